"""Read finished runs as one flat record each, from run folders, ablations and committed CSV files."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from consistency_reg.lab.pricing.rows import Row, merge
from consistency_reg.lab.pricing.rows import read as read_prices
from consistency_reg.lab.recipe import (
    DATA_SETTINGS,
    IN_THE_LOOP,
    architecture,
    consistency_term,
    pair_of,
    term_options,
    validation_limits,
)
from consistency_reg.lab.report.curves import Curve, read_curve
from consistency_reg.lab.report.measured import HITS, MIN_SHARE, PERPLEXITY
from consistency_reg.lab.run_folder import RunFolder, runs_within
from consistency_reg.measures import COLLAPSED_BELOW, parse
from consistency_reg.measures.reading import Reading

HASH_DIGITS = 16  # of a corpus' SHA-256: enough to tell two apart
SAME_PERPLEXITY = 0.01  # relative; what the precision of a forward may change
ROUTING = "routing."  # how the options of cache-aware routing in training begin


@dataclass(frozen=True)
class Run:
    """Holds a finished run.

    Attributes:
        name: of the run's folder.
        architecture: experts/active of the router and the shared experts, such as "31/3 + 1 shared".
        loss: the consistency term, "none" where there is none or its weight is 0.
        weight: of that term.
        pair: equal in runs that differ in the consistency term alone.
        data: what must agree for two perplexities to be comparable: the corpus' hashes and how it is read.
        metrics: flat names, such as "val/srp/m16", of the final validation.
        options: of the consistency term, besides its weight.
        labels: axis -> label of the value that the run takes in its ablation; empty for a run of none.
        device: the GPU or processor that it was trained on; empty where it is not known.
        curve: "tokens", "val/ppl" and "val/cache/lru_25pct" of each validation.
        folder: None where it is not known.
        priced: rows of ``consistency-reg price``; none where the run was not priced.
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
    options: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    curve: Curve = field(default_factory=dict)
    device: str = ""
    folder: Path | None = None
    wandb_dir: str = ""
    priced: tuple[Row, ...] = ()

    @property
    def loop(self) -> float:
        """Return the strength of the cache-aware routing that the run was trained in; 0 without."""
        return float(self.options.get(f"{ROUTING}strength") or 0.0)

    @property
    def cell(self) -> str:
        """Return the name without its seed, which runs of different seeds have in common."""
        return self.name.removesuffix(f"-seed{self.seed}")

    @property
    def domains(self) -> list[str]:
        """Return the domains of the validation, each with a perplexity of its own."""
        found = (reading for reading, _ in self.readings() if reading.within(reading.stage) == PERPLEXITY)
        return [reading.domain for reading in found if reading.domain]

    @property
    def misses(self) -> float:
        """Return the share of accesses that an LRU cache of 25% of the experts misses; NaN where not measured."""
        return 1 - self.get(HITS)

    @property
    def collapsed(self) -> bool:
        """Return whether an expert is used less than a tenth of its fair share."""
        return self.metrics.get(MIN_SHARE.name, 1.0) < COLLAPSED_BELOW

    def get(self, reading: Reading) -> float:
        """Return a measure of the final validation; NaN where it was not measured."""
        return self.metrics.get(reading.name, math.nan)

    def measured(self, *readings: Reading) -> bool:
        """Return whether all of these were measured."""
        return all(reading.name in self.metrics for reading in readings)

    def readings(self) -> Iterator[tuple[Reading, float]]:
        """Yield each metric that is in the table of measures, with its value."""
        for name, value in self.metrics.items():
            if (reading := parse(name)) is not None:
                yield reading, value


def read_run(folder: Path) -> Run:
    """Return the run in a folder, with its prices.

    Raises:
        ValueError: the folder holds no run, or one that is not finished or not whole.
    """
    here = RunFolder(folder)
    if not here.is_finished:
        if here.is_run:
            raise ValueError(f"{folder} holds a run that is not finished: the command that began it goes on with it")
        raise ValueError(f"{folder} is no run: it has no result.json")
    try:
        result = here.read_result()
        labels = _labels(here.cell_settings)
        curve = read_curve(folder, int(result["steps"]), int(result["tokens"]))
        run = run_from_result(result, folder=folder, labels=labels, curve=curve)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{here.result} is no result of a run: {reason}") from error
    return attach([run], read_prices(here.prices))[0] if here.prices.exists() else run


def attach(runs: Sequence[Run], rows: Sequence[Row]) -> list[Run]:
    """Return the runs with the prices that are theirs, by name and seed.

    Warns:
        UserWarning: prices whose perplexity at strength 0 is not the run's: they are of another model or text, and are
            left out; prices of runs that are not there.
    """
    known = {(run.name, run.seed) for run in runs}
    if strange := sorted({str(row["run"]) for row in rows if (row["run"], row["seed"]) not in known}):
        warnings.warn(f"prices of runs that are not in the report are left out: {', '.join(strange)}", stacklevel=2)
    priced = []
    for run in runs:
        mine = [row for row in rows if (row["run"], row["seed"]) == (run.name, run.seed)]
        as_it_is = [row["perplexity"] for row in mine if not row["strength"] and not row.get("domains")]
        if any(abs(value / run.get(PERPLEXITY) - 1) > SAME_PERPLEXITY for value in as_it_is):
            said = f"perplexity {as_it_is[0]:.2f} as it is, where the run has {run.get(PERPLEXITY):.2f}"
            warnings.warn(f"prices of {run.name} are of another model or text ({said}) and are left out", stacklevel=2)
            mine = []
        priced.append(replace(run, priced=tuple(merge(run.priced, mine))) if mine else run)
    return priced


def read_folder(folder: Path) -> tuple[list[Run], list[str]]:
    """Return the finished runs of a run folder or of a folder of run folders, and the names of those not finished.

    Raises:
        ValueError: there is no finished run.
    """
    finished, unfinished = runs_within(folder)
    if unfinished == [folder]:
        return [read_run(folder)], []  # it says what is there instead
    names = [run.name for run in unfinished]
    if not finished:
        raise ValueError(f"{folder} has no finished run; not finished: {', '.join(names)}")
    return [read_run(run) for run in finished], names


def distinct_names(runs: Iterable[Run]) -> list[Run]:
    """Return the runs, those that share a name told apart by their parent folder's.

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


def loss_labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return what to call the term of each run, by the run's name: its loss and the options that differ.

    Cache-aware routing in the forward pass of training is named by its strength: "LocalConsistency (loop 0.1)".

    Example:
        >>> loss_labels([])
        {}
    """
    labels = {}
    for run in runs:
        alike = [other for other in runs if other.loss == run.loss]
        in_loop = [other for other in alike if bool(other.loop) == bool(run.loop)]
        said = [f"loop {run.loop:g}"] if run.loop and run.loss != IN_THE_LOOP else []
        said += _differing(run, alike, lambda key: not key.startswith(ROUTING))
        said += _differing(run, in_loop, lambda key: key.startswith(ROUTING) and key != f"{ROUTING}strength")
        labels[run.name] = f"{run.loss} ({', '.join(said)})" if said else run.loss
    return labels


def _differing(run: Run, alike: Sequence[Run], asked: Callable[[str], bool]) -> list[str]:
    """Return the options of a run that others have otherwise, and those that it lacks, of the keys asked for."""
    options = [{key: value for key, value in other.options.items() if asked(key)} for other in alike]
    mine = {key: value for key, value in run.options.items() if asked(key)}
    differing = [key for key in mine if any(other.get(key) != mine[key] for other in options)]
    missing = sorted({key for other in options for key in other if key not in mine})
    return [f"{key}={mine[key]}" for key in differing] + [f"no {key}" for key in missing]


def refuse_different_data(runs: Sequence[Run]) -> None:
    """Raise ValueError if two runs were not validated on the same data, saying what differs."""
    first = runs[0]
    for run in runs[1:]:
        here, there = _flat(first.data), _flat(run.data)
        known = {*here, *there} - ({"vocabulary"} - (here.keys() & there.keys()))  # earlier runs did not record it
        differing = [key for key in sorted(known) if here.get(key) != there.get(key)]
        if differing:
            what = "; ".join(f"{key} {_short(here.get(key))} and {_short(there.get(key))}" for key in differing)
            raise ValueError(f"{first.name} and {run.name} are of different data and do not compare: {what}")


def run_from_result(result: Mapping[str, Any], **more: Any) -> Run:
    """Return the run that result.json describes; ``more``: fields that it does not hold.

    Raises:
        KeyError, TypeError, ValueError: something is missing or is not what it should be.
    """
    config = result["config"]
    metrics = {name: float(value) for name, value in result["metrics"].items() if value is not None}
    metrics = {name: value if math.isfinite(value) else math.nan for name, value in metrics.items()}  # diverged
    if PERPLEXITY.name not in metrics:
        raise KeyError(PERPLEXITY.name)
    metrics |= {f"val/before/{name.removeprefix('val/')}": value for name, value in result.get("before", {}).items()}
    loss, weight = consistency_term(config)
    data_config = config.get("data") or {}
    return Run(
        name=str(result["name"]),
        seed=int(result["seed"]),
        architecture=architecture(config),
        loss=loss,
        weight=weight,
        pair=pair_of(result),
        data={
            "corpus": {domain: str(sha256)[:HASH_DIGITS] for domain, sha256 in result["corpus"].items()},
            **{key: data_config[key] for key in DATA_SETTINGS if data_config.get(key) is not None},
            **validation_limits(config),
            **({"vocabulary": str(result["vocabulary"])[:HASH_DIGITS]} if result.get("vocabulary") else {}),
            **({"tokenizer": result["vocabulary"]} if data_config.get("tokenizer") and "vocabulary" in result else {}),
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
        options=term_options(config) if loss != "none" else {},
        device=str(result.get("device") or ""),
        wandb_dir=str(result.get("wandb_dir") or ""),
        **more,
    )


def _labels(path: Path) -> dict[str, str]:
    """Return axis -> label of an ablation's cell; empty where the file is not there."""
    labels = json.loads(path.read_text()).get("labels", {}) if path.exists() else {}
    return {str(axis): str(label) for axis, label in labels.items()}


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    corpus = {f"corpus of {domain}": sha256 for domain, sha256 in data.get("corpus", {}).items()}
    return {**corpus, **{key: value for key, value in data.items() if key != "corpus"}}


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
