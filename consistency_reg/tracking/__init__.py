"""Watch a run: add up its routing, raise alarms, and show measures, tables and pictures in trackers.

Nothing here knows a trainer: :mod:`consistency_reg.callbacks` and :mod:`consistency_reg.lab` bring it to loggers.
"""
