"""What a run shows: measures under the names that trackers group, the table of experts, pictures, a wandb workspace.

Nothing here knows a trainer: :mod:`consistency_reg.callbacks` and :mod:`consistency_reg.lab` bring it to loggers.
"""
