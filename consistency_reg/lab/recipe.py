"""Facts about a run that its recipe states: the architecture, the consistency term, and what must agree in a pair."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from consistency_reg.losses import LOCALITY_LOSSES
from consistency_reg.moved import former_path

DATA_SETTINGS = ("validation_tokens", "sequence_length", "vocab_size", "tokenizer")
PAIRED_SETTINGS = {
    "model": None,
    "data": ("domains", "data", "sequence_length", "batch_size", "vocab_size", "tokenizer", "corpus_bytes"),
    "trainer": ("max_steps", "max_epochs", "accumulate_grad_batches", "precision", "gradient_clip_val", "devices"),
    "seed_everything": None,
}
# Of the trainer: what is done with a run, and what changes no more of it than rounding does.
NO_PART_OF_TRAINING = frozenset(
    {
        *("accelerator", "barebones", "benchmark", "check_val_every_n_epoch", "default_root_dir", "detect_anomaly"),
        *("deterministic", "enable_autolog_hparams", "enable_checkpointing", "enable_model_summary"),
        *("enable_progress_bar", "inference_mode", "limit_predict_batches", "limit_test_batches", "log_every_n_steps"),
        *("logger", "model_registry", "num_sanity_val_steps", "profiler", "val_check_interval"),
    }
)
TRAINER_DEFAULTS = {  # Lightning's, of the other keys; None besides
    "fast_dev_run": False,
    "gradient_clip_algorithm": "norm",
    "num_nodes": 1,
    "overfit_batches": 0.0,
    "reload_dataloaders_every_n_epochs": 0,
    "strategy": "auto",
    "sync_batchnorm": False,
    "use_distributed_sampler": True,
}
OF_VALIDATION = ("limit_val_batches", "overfit_batches", "fast_dev_run")
ONLY_WATCH = ("Bar", "Monitor", "Summary", "Checkpoint")  # how callbacks that change nothing are named
IN_THE_LOOP = "CacheAware"  # the name of cache-aware routing in training, where it is alone
ROUTING = ("strength", "start_step", "ramp_steps", "cache_ratio", "guaranteed", "method")
ADDED_LATER = {"trust_remote_code": False}  # options of a model
STRENGTHS = ("weight", "target", "budget")  # how strong a term is, not what it is
OF_A_GOAL = ("target", "budget", "reference", "max_weight", "response_steps")  # what a term of weight 0 may not have


def consistency_term(config: Mapping[str, Any]) -> tuple[str, float]:
    """Return name and weight of a recipe's consistency term; "none" where nothing of it reaches the loss.

    Cache-aware routing in training counts as one, of its strength, where it is alone.

    Example:
        >>> consistency_term({"consistency": {"loss": {"class_path": "a.ReMoELoss"}, "weight": 0.1}})
        ('ReMoE', 0.1)
    """
    section = config.get("consistency") or {}
    weight = float(section.get("weight") or 0.0)
    if not any(section.get(strength) for strength in STRENGTHS):
        strength = _routing(config).get("strength", 0.0)
        return (IN_THE_LOOP, float(strength)) if strength else ("none", 0.0)
    loss = section.get("loss") or {}
    name = loss.get("class_path", "LocalConsistencyLoss").rpartition(".")[2]
    if name == "make_loss":
        name = LOCALITY_LOSSES[loss["init_args"]["name"]].__name__
    return name.removesuffix("Loss"), weight


def term_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a term is besides its class and its strength: options of the loss, and when it begins.

    Example:
        >>> loss = {"class_path": "a.StickyLoss", "init_args": {"window": 8}}
        >>> term_options({"consistency": {"loss": loss, "weight": 0.1, "start_step": 100}})
        {'start_step': 100, 'window': 8}
    """
    section = dict(config.get("consistency") or {})
    loss = section.pop("loss", None) or {}
    options = {**section, **(loss.get("init_args") or {})}
    options |= {f"routing.{key}": value for key, value in _routing(config).items()}
    return {key: value for key, value in sorted(options.items()) if key not in STRENGTHS and value not in (None, [])}


def without_term(config: Mapping[str, Any]) -> str:
    """Return the options with which ``fit`` trains a recipe without its term, its goal and its routing in training.

    Example:
        >>> without_term({"consistency": {"weight": 0.1, "target": {"srp/m16": 0.5}}, "routing": {"strength": 0.1}})
        '--consistency.weight 0 --consistency.target null --routing.strength 0'
    """
    section = config.get("consistency") or {}
    goal = [f"--consistency.{key} null" for key in OF_A_GOAL if section.get(key) is not None]
    return " ".join(["--consistency.weight 0", *goal, *(["--routing.strength 0"] if _routing(config) else [])])


def _routing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache-aware routing in training, empty where there is none; how it is deployed is no part of it."""
    section = config.get("routing") or {}
    return {key: section[key] for key in ROUTING if key in section} if section.get("strength") else {}


def architecture(config: Mapping[str, Any]) -> str:
    """Return the routed experts/active of them, and the shared ones, which num_experts and top_k include.

    Example:
        >>> sizes = {"num_experts": 32, "top_k": 4, "shared_experts": 1}
        >>> architecture({"model": {"model": {"class_path": "a.small_moe", "init_args": sizes}}})
        '31/3 + 1 shared'
    """
    model = (config.get("model") or {}).get("model") or {}
    sizes = model.get("init_args") or {}
    if "num_experts" not in sizes or "top_k" not in sizes:
        return str(model.get("class_path", "model")).rpartition(".")[2]
    shared, dense = sizes.get("shared_experts") or 0, len(sizes.get("dense_layers") or ())
    routed = f"{sizes['num_experts'] - shared}/{sizes['top_k'] - shared}"
    return routed + (f" + {shared} shared" if shared else "") + (f", {dense} dense layers" if dense else "")


def routed_experts(architecture: str) -> tuple[int, int] | None:
    """Return E and K of what :func:`architecture` gives; None where it does not know them.

    Example:
        >>> routed_experts("31/3 + 1 shared"), routed_experts("Mixtral")
        ((31, 3), None)
    """
    experts, slash, active = architecture.partition(" ")[0].rstrip(",").partition("/")
    return (int(experts), int(active)) if slash and experts.isdigit() and active.isdigit() else None


def validation_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of the trainer that leave out validation data; empty where there are none.

    Example:
        >>> validation_limits({"trainer": {"limit_val_batches": 10, "overfit_batches": 0.0, "max_steps": 400}})
        {'limit_val_batches': 10}
    """
    return {key: value for key, value in _more_of_trainer(config).items() if key in OF_VALIDATION}


def pair_digest(config: Mapping[str, Any]) -> str:
    """Return a digest that is equal for two recipes that differ in the consistency term alone.

    Example:
        >>> pair_digest({"consistency": {"weight": 0.1}, "anchor": {"weight": 0.0}}) == pair_digest({})
        True
        >>> pair_digest({"anchor": {"weight": 1.0}}) == pair_digest({})
        False
    """
    paired: dict[str, Any] = {}
    for section, keys in PAIRED_SETTINGS.items():
        value = config.get(section)
        paired[section] = {key: value.get(key) for key in keys} if keys and isinstance(value, dict) else value
    paired["model"] = _without_later_options(paired["model"])
    if more := _more_of_trainer(config):  # recipes that set none of it keep the digest of committed rows
        paired["trainer"] |= more
    if (anchor := config.get("anchor") or {}).get("weight"):
        paired["anchor"] = anchor
    return hashlib.sha256(json.dumps(_with_first_paths(paired), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _without_later_options(model: Any) -> Any:
    """Leave out options that were added after rows had been committed, where they say what was always done."""
    built: Any = model.get("model") if isinstance(model, Mapping) else None
    given = built.get("init_args") if isinstance(built, Mapping) else None
    if not isinstance(given, Mapping):
        return model
    kept = {key: value for key, value in given.items() if key not in ADDED_LATER or value != ADDED_LATER[key]}
    return {**model, "model": {**built, "init_args": kept}}


def pair_of(result: Mapping[str, Any]) -> str:
    """Return what is equal for the results of two runs that differ in the consistency term alone.

    A run that was made longer has had another learning rate than one that was as long from the start.
    """
    return pair_digest(result["config"]) + "".join(f"+{steps}" for steps in result.get("went_on_from", ()))


def _with_first_paths(value: Any) -> Any:
    """Return a recipe with the first path of every class, so that its digest stays when a class moves."""
    if isinstance(value, Mapping):
        return {key: _with_first_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_first_paths(entry) for entry in value]
    return former_path(value) if isinstance(value, str) else value


def _more_of_trainer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe sets of the trainer that changes the run, besides what is always part of a pair."""
    trainer = config.get("trainer") or {}
    known = {*NO_PART_OF_TRAINING, *(PAIRED_SETTINGS["trainer"] or ())}
    given = {key: value for key, value in trainer.items() if key not in known} | {"callbacks": _acting(trainer)}
    return {key: value for key, value in given.items() if value not in (None, [], TRAINER_DEFAULTS.get(key))}


def _acting(trainer: Mapping[str, Any]) -> list[Any]:
    """Return the recipe's own callbacks, without those that only watch."""
    given = trainer.get("callbacks") or []
    every = [given] if isinstance(given, Mapping) else given
    return [one for one in every if not str(one.get("class_path")).endswith(ONLY_WATCH)]
