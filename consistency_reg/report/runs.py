"""Finished runs as one flat record each, read from run folders, ablations and committed CSV files."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HASH_DIGITS = 16  # of a corpus' SHA-256: enough to tell two apart
COLLAPSED_BELOW = 0.1  # smallest usage of an expert, as a share of its fair share

PERPLEXITY, MISSES_FROM, SRP = "val/ppl", "val/cache/lru_25pct", "val/srp/m16"
MIN_SHARE, MAX_MEAN = "val/balance/min_share", "val/balance/max_mean"

DATA_SETTINGS = ("validation_tokens", "sequence_length", "vocab_size", "tokenizer")
PAIRED_SETTINGS = {
    "model": None,
    "data": ("domains", "data", "sequence_length", "batch_size", "vocab_size", "tokenizer", "corpus_bytes"),
    "trainer": ("max_steps", "max_epochs", "accumulate_grad_batches", "precision", "gradient_clip_val", "devices"),
    "seed_everything": None,
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: of the run's folder.
        architecture: experts/active of the router and the shared experts, such as "31/3 + 1 shared".
        loss: the consistency term, "none" where there is none or its weight is 0.
        weight: of that term.
        pair: equal in runs that differ in the consistency term alone.
        data: what must agree for two perplexities to be comparable: the corpus' hashes and how it is read.
        metrics: flat names, such as "val/srp/m16", of the final validation.
        folder: None where it is not known.
    """

    name: str
    seed: int
    architecture: str
    loss: str
    weight: float
    pair: str
    data: dict[str, Any]
    total_parameters: int
    active_parameters: int
    tokens: int
    steps: int
    tokens_per_s: float
    wall_time_s: float
    command: str
    git_commit: str
    versions: dict[str, str]
    metrics: dict[str, float]
    folder: Path | None = None
    wandb_dir: str = ""

    @property
    def cell(self) -> str:
        """The name without its seed: what runs of different seeds have in common."""
        return self.name.removesuffix(f"-seed{self.seed}")

    @property
    def domains(self) -> list[str]:
        """The domains of the validation, each with a perplexity of its own."""
        names = (name.removeprefix(f"{PERPLEXITY}/") for name in self.metrics if name.startswith(f"{PERPLEXITY}/"))
        return [name for name in names if "/" not in name]

    @property
    def misses(self) -> float:
        """LRU misses at cache = 25% of the experts, as a share of all accesses."""
        return 1 - self.metrics[MISSES_FROM]

    @property
    def collapsed(self) -> bool:
        """Whether an expert is used less than a tenth of its fair share."""
        return self.metrics.get(MIN_SHARE, 1.0) < COLLAPSED_BELOW


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: the folder holds no run, or one that is not finished or not whole.
    """
    path = folder / "result.json"
    if not path.exists():
        if (folder / "config.yaml").exists() or (folder / "cell.json").exists():
            raise ValueError(f"{folder} holds a run that is not finished: the command that began it goes on with it")
        raise ValueError(f"{folder} is no run: it has no result.json")
    try:
        result = json.loads(path.read_text())
        return _run(result, folder)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no result of a run: {reason}") from error


def read_folder(folder: Path) -> tuple[list[Run], list[Path]]:
    """The finished runs of a run folder or of a folder of run folders, and the run folders that are not finished.

    Raises:
        ValueError: there is no finished run.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist")
    if (folder / "result.json").exists() or not any(_is_run_folder(inner) for inner in folder.iterdir()):
        return [read_run(folder)], []
    inner = [inner for inner in sorted(folder.iterdir()) if _is_run_folder(inner)]
    finished = [run for run in inner if (run / "result.json").exists()]
    unfinished = [run for run in inner if run not in finished]
    if not finished:
        raise ValueError(f"{folder} has no finished run; not finished: {', '.join(run.name for run in unfinished)}")
    return [read_run(run) for run in finished], unfinished


def distinct_names(runs: Iterable[Run]) -> list[Run]:
    """The runs, those that share a name told apart by their parent folder's.

    Raises:
        ValueError: the same run is given twice.
    """
    runs = list(runs)
    names = [run.name for run in runs]
    told_apart = [
        replace(run, name=f"{run.folder.resolve().parent.name}/{run.name}")
        if names.count(run.name) > 1 and run.folder is not None
        else run
        for run in runs
    ]
    names = [run.name for run in told_apart]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"runs must have different names, got more than one {', '.join(twice)}")
    return told_apart


def refuse_different_data(runs: Sequence[Run]) -> None:
    """Raise ValueError if two runs were not validated on the same data, saying what differs."""
    first = runs[0]
    for run in runs[1:]:
        here, there = _flat(first.data), _flat(run.data)
        differing = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
        if differing:
            what = "; ".join(f"{key} {_short(here.get(key))} and {_short(there.get(key))}" for key in differing)
            raise ValueError(f"{first.name} and {run.name} are of different data and do not compare: {what}")


def _is_run_folder(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("result.json", "cell.json", "config.yaml"))


def _run(result: Mapping[str, Any], folder: Path) -> Run:
    config = result["config"]
    metrics = {name: float(value) for name, value in result["metrics"].items() if value is not None}
    if PERPLEXITY not in metrics:
        raise KeyError(PERPLEXITY)
    loss, weight = consistency_term(config)
    data_config = config.get("data") or {}
    return Run(
        name=str(result["name"]),
        seed=int(result["seed"]),
        architecture=architecture(config),
        loss=loss,
        weight=weight,
        pair=_digest(_paired(config)),
        data={
            "corpus": {domain: str(sha256)[:HASH_DIGITS] for domain, sha256 in result["corpus"].items()},
            **{key: data_config[key] for key in DATA_SETTINGS if data_config.get(key) is not None},
        },
        total_parameters=int(result["parameters"]["total"]),
        active_parameters=int(result["parameters"]["active"]),
        tokens=int(result["tokens"]),
        steps=int(result["steps"]),
        tokens_per_s=float(result["tokens_per_s"]),
        wall_time_s=float(result["wall_time_s"]),
        command=str(result["command"]),
        git_commit=str(result.get("git_commit") or ""),
        versions=dict(result["versions"]),
        metrics=metrics,
        folder=folder,
        wandb_dir=str(result.get("wandb_dir") or ""),
    )


def consistency_term(config: Mapping[str, Any]) -> tuple[str, float]:
    """Name and weight of a recipe's consistency term.

    Example:
        >>> consistency_term({"consistency": {"loss": {"class_path": "a.RemoeLoss"}, "weight": 0.1}})
        ('Remoe', 0.1)
    """
    section = config.get("consistency") or {}
    weight = float(section.get("weight") or 0.0)
    if not weight:
        return "none", 0.0
    loss = (section.get("loss") or {}).get("class_path", "LocalConsistencyLoss")
    return loss.rpartition(".")[2].removesuffix("Loss"), weight


def architecture(config: Mapping[str, Any]) -> str:
    """Routed experts/active of them, and the shared ones, which num_experts and top_k include.

    Example:
        >>> sizes = {"num_experts": 32, "top_k": 4, "shared_experts": 1}
        >>> architecture({"model": {"model": {"class_path": "a.small_moe", "init_args": sizes}}})
        '31/3 + 1 shared'
    """
    model = (config.get("model") or {}).get("model") or {}
    sizes = model.get("init_args") or {}
    if "num_experts" not in sizes or "top_k" not in sizes:
        return str(model.get("class_path", "model")).rpartition(".")[2]
    shared = sizes.get("shared_experts") or 0
    routed = f"{sizes['num_experts'] - shared}/{sizes['top_k'] - shared}"
    return f"{routed} + {shared} shared" if shared else routed


def _paired(config: Mapping[str, Any]) -> dict[str, Any]:
    paired: dict[str, Any] = {}
    for section, keys in PAIRED_SETTINGS.items():
        value = config.get(section)
        paired[section] = {key: value.get(key) for key in keys} if keys and isinstance(value, dict) else value
    return paired


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    corpus = {f"corpus of {domain}": sha256 for domain, sha256 in data.get("corpus", {}).items()}
    return {**corpus, **{key: value for key, value in data.items() if key != "corpus"}}


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
