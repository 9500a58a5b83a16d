"""Find the checkpoint of a model, its configuration and its tokenizer: for all commands that read a model."""

from pathlib import Path

from consistency_reg.lab.run_folder import RunFolder
from consistency_reg.optional import require

with require("transformers"):
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

    import consistency_reg.lab.model  # noqa: F401  makes its models known to the Auto classes

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of PEFT alone, without the model that it belongs to."""
    return (folder / ADAPTER_CONFIG).exists() and not (folder / CONFIG).exists()


def model_folder(path: Path) -> Path | None:
    """Return where the weights of a local model are; None for a path that is no folder.

    Args:
        path: a folder of ``save_pretrained``, or the folder of a finished run of ``consistency-reg fit``.

    Raises:
        ValueError: the folder has no model.
    """
    if not path.is_dir():
        return None
    run = RunFolder(path)
    for folder in (path, run.model):
        if (folder / CONFIG).exists():
            return folder
    if is_adapter(path):
        raise ValueError(f"{path} holds a PEFT adapter alone: merge it into its base, and save that (merge_and_unload)")
    if run.config.exists():
        raise ValueError(f"{path} is a run without a saved model: it is not finished, run the same command again")
    raise ValueError(f"{path} must hold a model (config.json) or a finished run (model/config.json), and has neither")


def read_configuration(place: str, *, trust_remote_code: bool, option: str) -> PreTrainedConfig:
    """Return the configuration of a checkpoint.

    Args:
        place: a folder with a model, or a hub id.
        trust_remote_code: whether code that comes with the model may run.
        option: how the user allows that, for the message.

    Raises:
        ValueError: code that is not trusted; an unknown architecture.
        OSError: no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{place} runs code of its own: read it, then allow it with {option}") from error
    except OSError as error:
        raise OSError(f"no model can be read from {place!r}: {error}") from error


def read_tokenizer(place: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer that comes with a checkpoint.

    Args:
        place: a folder with a model, or a hub id.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        ValueError: the tokenizer knows special tokens alone: transformers makes such a one where there are no files.
        OSError: no such tokenizer.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"{place} must hold the model's tokenizer next to its weights, got none: save it there with "
            "tokenizer.save_pretrained"
        )
    return tokenizer
