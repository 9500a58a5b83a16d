"""What a run shows: measures under the names that trackers group, the table of experts, pictures, a wandb workspace.

Nothing here knows a trainer: :mod:`consistency_reg.callbacks` and :mod:`consistency_reg.lm` bring it to loggers.
"""
