"""Compare runs as they are deployed, with cache-aware routing, next to the seed's baseline as it is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from consistency_reg.lab.pricing.rows import Row
from consistency_reg.lab.render.verdict import CV_RATIO_AT_MOST
from consistency_reg.lab.report.hypervolume import BUDGETS, best_within, rank
from consistency_reg.lab.report.measured import GLOBAL_CV, MIN_SHARE, PERPLEXITY, deployed
from consistency_reg.lab.report.pairs import Pair, over_seeds
from consistency_reg.lab.report.runs import Run, loss_labels
from consistency_reg.measures import AGREEMENT, CACHE_RATIO, COLLAPSED_BELOW, HIT_RATE, STRENGTH
from consistency_reg.measures.reading import VALIDATION
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

CHANGES = ("misses_change", "perplexity_change", "lfu_change", "smallest_share", "cv_ratio", "agreement")
RUN_COLUMNS = ["deployed", "against", "cell", "seed", "loss", "weight", "has_baseline"]
COLUMNS = [*RUN_COLUMNS, "strength", "left_out", *CHANGES]
WITHIN = ["deployed", "against"]
DECIMALS = 6  # of what validation logs as float32: 0.1 is 0.10000000149 there


@dataclass(frozen=True)
class Setting:
    """Holds the settings by which a model is deployed, apart from the strength of the bias.

    Attributes:
        method: of cache-aware routing.
        guaranteed: the number of best experts that are always chosen.
        cache_ratio: slots of each layer's cache, in units of its K.
        domains: the text that was measured on; "" for each run's own validation text.
    """

    method: str = "prior"
    guaranteed: int = 1
    cache_ratio: float = 2.0
    domains: str = ""

    def __str__(self) -> str:
        said = [f"{self.cache_ratio:g} x K slots"]
        said += [self.method] if self.method != "prior" else []
        said += [f"{self.guaranteed} guaranteed"] if self.guaranteed != 1 else []
        return ", ".join([*said, *([f"on {self.domains}"] if self.domains else [])])


@dataclass(frozen=True)
class Point:
    """Holds what a model reaches as deployed at one strength (0: as it is); NaN where it was not measured."""

    strength: float
    perplexity: float
    misses: float
    misses_lfu: float = math.nan
    smallest_share: float = math.nan
    global_cv: float = math.nan
    agreement: float = math.nan


def deployed_frame(runs: Sequence[Run], pairs: Sequence[Pair]) -> pd.DataFrame:
    """Return a row for each run, setting and strength: its changes against the same seed's baseline as it is.

    A run is in a setting if it was measured there at a strength above 0, by ``consistency-reg price`` or by the
    validation of training (``val/deployed/``). A run without a baseline stands next to itself as it is.

    Args:
        runs: all runs of the report.
        pairs: of :func:`~consistency_reg.lab.report.pairs.pair_runs`.

    Returns:
        "deployed" (the setting in words), "against" and "cell" (equal for a run that stands next to itself), "seed",
        "loss", "weight", "has_baseline" (whether the run is a baseline, or has one among the runs), "strength",
        "left_out", and :data:`CHANGES`.
    """
    measured = {run.name: _measured(run) for run in runs}
    labels, baselines = loss_labels(runs), {pair.run.name: pair.baseline for pair in pairs}
    paired = {name for pair in pairs for name in (pair.run.name, pair.baseline.name)}
    rows = []
    for setting in _ordered({setting for points in measured.values() for setting in points}):
        for run in runs:
            points, baseline = measured[run.name].get(setting, []), baselines.get(run.name, run)
            base = as_it_is(baseline, setting)
            if not points or base is None:
                continue
            before = as_it_is(run, setting)
            has_baseline = run.loss == "none" or run.name in paired
            about = [str(setting), baseline.cell, run.cell, run.seed, labels[run.name], run.weight, has_baseline]
            rows += [[*about, *_compared(point, base)] for point in [*([before] if before else []), *points]]
    return pd.DataFrame(rows, columns=COLUMNS)


def strength_frame(points: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting, cell and strength: mean, lowest and highest over the seeds.

    Args:
        points: of :func:`deployed_frame`.

    Returns:
        "deployed", "against", "cell", "strength", "loss", "weight", "has_baseline", "seeds", "left_out" (how many of
        the seeds), and for every name of :data:`CHANGES` "name_mean", "name_min" and "name_max".
    """
    return over_seeds(points, [*WITHIN, "cell", "strength"], ["loss", "weight", "has_baseline"], CHANGES)


def rank_frame(points: pd.DataFrame, strengths: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting and cell with its "loss" and "has_baseline", the largest hypervolume first.

    Args:
        points: of :func:`deployed_frame`.
        strengths: of :func:`strength_frame`.
    """
    cells = strengths[[*WITHIN, "cell", "loss", "has_baseline"]].drop_duplicates([*WITHIN, "cell"])
    ranks = rank(points, strengths, by="cell", along="strength", within=WITHIN)
    return ranks.merge(cells, how="left", on=[*WITHIN, "cell"])


def parts_frame(strengths: pd.DataFrame) -> pd.DataFrame:
    """Return what training does, what the bias does, and what both do, for each setting and trained cell.

    Each cell is at the strength with the fewest misses within the first budget of perplexity, at the cheapest strength
    where none is within it. Cells without a baseline that has the bias alone are left out.

    Args:
        strengths: of :func:`strength_frame`.

    Returns:
        "deployed", "against", "cell", "strength"; for "training", "bias" and "both" the mean changes "name_misses" and
        "name_perplexity"; "added", what the bias adds to the trained model's perplexity; "alone", what the bias alone
        costs for as few misses, NaN where no strength reaches them; "alone_at_most", the dearest that was measured.
    """
    rows = []
    for (deployed_as, against, cell), group in strengths.groupby(["deployed", "against", "cell"], sort=False):
        same = strengths[(strengths["deployed"] == deployed_as) & (strengths["against"] == against)]
        bias = same[same["cell"] == against].set_index("strength").sort_index()
        training, biased = group[group["strength"] == 0], group[group["strength"] > 0]
        both = best_within(biased[biased["left_out"] == 0], BUDGETS[0])
        if cell == against or bias.empty or training.empty:
            continue
        if both is None:
            both = biased.loc[biased["perplexity_change_mean"].idxmin()]
        row = {"deployed": deployed_as, "against": against, "cell": cell, "strength": both["strength"]}
        alike = bias.loc[both["strength"]] if both["strength"] in bias.index else None
        for name, one in (("training", training.iloc[0]), ("bias", alike), ("both", both)):
            for change in ("misses", "perplexity"):
                row[f"{name}_{change}"] = math.nan if one is None else one[f"{change}_change_mean"]
        row["added"] = (1 + row["both_perplexity"]) / (1 + row["training_perplexity"]) - 1
        row["alone"], row["alone_at_most"] = cost_of(row["both_misses"], bias), bias["perplexity_change_mean"].iloc[-1]
        rows.append(row)
    return pd.DataFrame(rows)


def cost_of(misses: float, bias: pd.DataFrame) -> float:
    """Return the change of perplexity at which a model has so few misses, between the strengths that were measured.

    Args:
        misses: change of the misses.
        bias: "misses_change_mean" and "perplexity_change_mean" of the model by strength, the weakest first.

    Returns:
        The change of perplexity on the straight line between two neighbours; NaN where no strength saves as much.

    Example:
        >>> bias = pd.DataFrame({"misses_change_mean": [0.0, -0.4], "perplexity_change_mean": [0.0, 0.01]})
        >>> cost_of(-0.2, bias), cost_of(-0.5, bias)
        (0.005, nan)
    """
    places = list(zip(bias["misses_change_mean"], bias["perplexity_change_mean"], strict=True))
    for (more, cheap), (fewer, dear) in pairwise(places):
        if fewer <= misses <= more:
            return float(cheap + (dear - cheap) * ((more - misses) / (more - fewer) if more > fewer else 0.0))
    return math.nan


def as_it_is(run: Run, setting: Setting) -> Point | None:
    """Return the run without any bias, with the cache and on the text of a setting; None where it was not measured."""
    for row in run.priced:
        if not row["strength"] and (row["cache_ratio"], row.get("domains") or "") == (
            setting.cache_ratio,
            setting.domains,
        ):
            return _of_row(row)
    hits = HIT_RATE.at(ratio=setting.cache_ratio).within(VALIDATION)
    if setting.domains or not run.measured(hits):
        return None
    lfu = HIT_RATE.at(cache="lfu", ratio=setting.cache_ratio).within(VALIDATION)
    share, cv = run.get(MIN_SHARE), run.get(GLOBAL_CV)
    return Point(0.0, run.get(PERPLEXITY), 1 - run.get(hits), 1 - run.get(lfu), share, cv, 1.0)


def _measured(run: Run) -> dict[Setting, list[Point]]:
    """Return the points of a run at strengths above 0 by setting, the weakest first."""
    found: dict[Setting, dict[float, Point]] = {}
    if (validated := _validated(run)) is not None:
        found[validated[0]] = {validated[1].strength: validated[1]}
    for row in run.priced:
        if row["strength"]:
            found.setdefault(_setting(row), {})[row["strength"]] = _of_row(row)
    return {setting: [points[strength] for strength in sorted(points)] for setting, points in found.items()}


def _validated(run: Run) -> tuple[Setting, Point] | None:
    """Return how the run's last validation deployed it, and what was measured then."""
    strength, ratio = (run.get(deployed(one.at())) for one in (STRENGTH, CACHE_RATIO))
    if not strength > 0 or math.isnan(ratio):
        return None
    strength, ratio = round(strength, DECIMALS), round(ratio, DECIMALS)
    options = {name: run.options.get(f"routing.{name}") for name in ("method", "guaranteed")}
    setting = replace(Setting(cache_ratio=ratio), **{name: value for name, value in options.items() if value})
    hits = run.get(deployed(HIT_RATE.at(ratio=ratio)))
    if math.isnan(hits):
        return None
    share, cv, agreement = (run.get(deployed(one)) for one in (MIN_SHARE, GLOBAL_CV, AGREEMENT.at()))
    return setting, Point(strength, run.get(deployed(PERPLEXITY)), 1 - hits, math.nan, share, cv, agreement)


def _setting(row: Row) -> Setting:
    return Setting(row["method"], row.get("guaranteed") or 1, row["cache_ratio"], row.get("domains") or "")


def _of_row(row: Row) -> Point:
    names = ("misses_lfu", "balance/min_share", "balance/cv", "agreement")
    return Point(row["strength"], row["perplexity"], row["misses"], *(row.get(name, math.nan) for name in names))


def _ordered(settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings, the usual one first."""
    usual = Setting()

    def unusual(one: Setting) -> tuple[bool | float | str | int, ...]:
        unlike = one.method != usual.method, one.method, one.guaranteed != 1, one.guaranteed
        return one.domains, *unlike, abs(one.cache_ratio - 2), one.cache_ratio

    return sorted(settings, key=unusual)


def _compared(point: Point, base: Point) -> list[float | bool]:
    """Return "strength", "left_out" and :data:`CHANGES` of a point next to the baseline as it is."""
    cv_ratio = _ratio(point.global_cv, base.global_cv)
    left_out = point.smallest_share < COLLAPSED_BELOW or cv_ratio > CV_RATIO_AT_MOST
    pairs = ((point.misses, base.misses), (point.perplexity, base.perplexity), (point.misses_lfu, base.misses_lfu))
    changes = [_ratio(*pair) - 1 for pair in pairs]
    return [point.strength, left_out, *changes, point.smallest_share, cv_ratio, point.agreement]


def _ratio(value: float, base: float) -> float:
    return value / base if base else math.nan
