"""The consistency term in trainers other than Lightning's: anything that trains a model's own loss."""

from importlib import import_module
from typing import Any

from consistency_reg.integrations.attach import Attachment, attach

__all__ = ["Attachment", "ConsistencyCallback", "attach"]


def __getattr__(name: str) -> Any:
    if name == "ConsistencyCallback":  # needs transformers and accelerate
        return import_module("consistency_reg.integrations.transformers_trainer").ConsistencyCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
