"""Adapters that PEFT saved: the base that each was trained on, and the two as one model."""

import json
import warnings
from pathlib import Path
from typing import Any

from consistency_reg.lab.checkpoint import ADAPTER_CONFIG
from consistency_reg.optional import require

with require("transformers"):
    from transformers import PreTrainedModel

BASE = "base_model_name_or_path"  # in the configuration


def adapter_base(folder: Path) -> str:
    """Return the place of the model that an adapter was trained on; a relative one may be relative to the adapter.

    Raises:
        ValueError: the adapter names none.
        FileNotFoundError: it names a folder that is not there.
    """
    base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(BASE)
    if not base:
        raise ValueError(f"{folder} is a PEFT adapter that names no base: write it into {ADAPTER_CONFIG}, {BASE}")
    near = folder / base
    if not Path(base).exists() and near.is_dir():
        return str(near)
    if not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise FileNotFoundError(
            f"{folder} is a PEFT adapter of {base}, which is not there: correct {BASE} in {ADAPTER_CONFIG}"
        )
    return str(base)


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return a model with an adapter's updates in its weights.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the adapter is of a kind that cannot be merged, does not fit the model, or lacks weights.
    """
    with require("peft"):
        from peft import PeftConfig, PeftModel
    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        kind = config.peft_type.value
        raise ValueError(f"{folder} is a PEFT adapter of kind {kind}, which adds tokens: it cannot become one model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            wrapped: Any = PeftModel.from_pretrained(model, str(folder))
            return wrapped.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, UserWarning, AttributeError) as error:
            said = str(error).strip().splitlines()[0]
            raise ValueError(f"{folder} is a PEFT adapter that does not fit its base: {said}") from error
