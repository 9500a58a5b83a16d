"""Begin ``consistency-reg fit`` with a checkpoint, which decides tokenizer and context and is measured first."""

import hashlib
from typing import Any

from consistency_reg.lab.model import expert_counts
from consistency_reg.lab.pretrained import checkpoint_config, checkpoint_place, has_tokenizer, pretrained_moe

CLASS_PATH = f"{pretrained_moe.__module__}.{pretrained_moe.__name__}"


def is_fine_tuning(config: Any) -> bool:
    """Return whether a recipe begins with a checkpoint."""
    return config.model.model.class_path == CLASS_PATH


def follow_checkpoint(config: Any) -> None:
    """Let the data of a recipe follow its checkpoint: the tokenizer, how many ids there are, the longest row.

    In the path ``{seed}`` becomes the seed, so that each seed of an ablation can begin with a checkpoint of its own.

    Raises:
        ValueError: no path; no tokenizer in the checkpoint nor in the recipe; rows longer than the model can read.
        OSError: no such checkpoint.
    """
    arguments, data = config.model.model.init_args, config.data
    arguments.path = path = str(arguments.path).replace("{seed}", str(config.seed_everything))
    model = checkpoint_config(path, arguments.get("trust_remote_code", False)).get_text_config()
    check_choice(path, model, config)
    context = getattr(model, "max_position_embeddings", None)
    if context is not None and data.sequence_length > context:
        raise ValueError(
            f"data.sequence_length must be at most {context}, what model {path!r} can read, got {data.sequence_length}"
        )
    data.vocab_size = model.vocab_size
    if data.tokenizer is None:
        if not has_tokenizer(path):
            raise ValueError(
                f"model {path!r} comes without a tokenizer: name the one it was trained with, data.tokenizer"
            )
        data.tokenizer = checkpoint_place(path)


def check_choice(path: str, model: Any, config: Any) -> None:
    """Refuse a term, or cache-aware routing, for a checkpoint whose tokens use every expert.

    Args:
        path: of the checkpoint.
        model: its configuration.
        config: the recipe.

    Raises:
        ValueError: names the key that must be 0.
    """
    experts, top_k = expert_counts(model) or (0, 1)
    strengths = {"consistency.weight": config.consistency.weight, "routing.strength": config.routing.strength}
    for key, value in strengths.items():
        if value and experts == top_k:
            raise ValueError(
                f"{key} must be 0 for model {path!r}, whose tokens use all of its experts ({top_k} of {experts}), "
                f"got {value}"
            )


def vocabulary_digest(tokenizer: Any) -> str:
    """Return digits that are equal for tokenizers with the same vocabulary, wherever they lie."""
    pairs = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]


def measure_before(trainer: Any, module: Any, data: Any) -> dict[str, Any]:
    """Return what ``result.json`` says of the checkpoint.

    That is ``before``, its measures on the text that the fine-tuned model is measured on, and ``trainable_parameters``,
    how many of its parameters are to learn.
    """
    trainer.validate(module, datamodule=data, verbose=False)
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return {"before": validated(trainer), "trainable_parameters": trainable}


def validated(trainer: Any) -> dict[str, float]:
    """Return the measures of a trainer's last validation by name."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
