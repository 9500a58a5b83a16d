"""Bring the consistency term to trainers other than Lightning's: attach, transformers' Trainer, TRL."""

from importlib import import_module
from typing import Any

from consistency_reg.integrations.attach import Attachment, attach

__all__ = ["Attachment", "ConsistencyCallback", "RoutingMonitorCallback", "attach"]

_OF_TRANSFORMERS = {"ConsistencyCallback": "transformers_trainer", "RoutingMonitorCallback": "monitor"}


def __getattr__(name: str) -> Any:
    if name in _OF_TRANSFORMERS:  # need transformers and accelerate
        return getattr(import_module(f"{__name__}.{_OF_TRANSFORMERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
