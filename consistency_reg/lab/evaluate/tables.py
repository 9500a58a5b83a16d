"""What was measured as tables for the terminal."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from torch import Tensor

from consistency_reg.lab.evaluate.measure import ADVISED_POLICY, FAVOURITES, Evaluation
from consistency_reg.lab.render.table import Table, in_bytes, number, percent
from consistency_reg.measures import COLLAPSED_BELOW
from consistency_reg.metrics.hit_rates import ModelHitRates

POLICY_NAMES = {"lru": "LRU", "lfu": "LFU", "belady": "Belady", "fixed": "fixed set"}
KINDS = {
    "domain": ("domains", "CV of the usage share"),
    "vocabulary": ("token ids", f"share of the {FAVOURITES} favourites"),
}
RULES = (
    "mean over documents and layers; the first load into a slot that is still free counts as a hit; K experts active"
)
SHARED_RULES = "as many slots in all as a cache for each layer has; K is the sum over the layers"


def tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """All tables; the ranking comes first where there are several models."""
    ranked = [ranking(evaluations)] if len(evaluations) > 1 else []
    parts = [consistency(evaluations), hit_rates(evaluations)]
    if any(cache.shared for one in evaluations for cache in one.policies.values()):
        parts.append(shared_hit_rates(evaluations))
    parts.append(balance(evaluations))
    if any(one.recording.text_loss for one in evaluations):
        parts.append(perplexity(evaluations))
    if any(len(one.domain_srp) > 1 for one in evaluations):
        parts.append(domains(evaluations))
    if any(one.kinds for one in evaluations):
        parts.append(specialization(evaluations))
    return [*ranked, *parts, advice(evaluations)]


def common_length(evaluations: Sequence[Evaluation]) -> int:
    """The m to compare models by: 16 where all have it, else the shortest that all have, else that of the first."""
    shared = set.intersection(*(set(one.srp) for one in evaluations))
    return 16 if 16 in shared else min(shared, default=evaluations[0].segment_length)


def ranking(evaluations: Sequence[Evaluation]) -> Table:
    """The models by SRP, beside what would make a high SRP worthless."""
    m = common_length(evaluations)
    header = ["model", f"SRP m={m}", "local gain", f"SCH m={m} at 2 x K", "LRU at 2 x K", "global CV", "smallest share"]
    measured = sorted((one for one in evaluations if m in one.srp), key=lambda one: -float(one.srp[m].srp))
    rows = [
        [
            f"{place}. {_name(one)}",
            percent(float(one.srp[m].srp)),
            percent(float(one.srp[m].local_gain)),
            percent(float(one.sch[m].at(2))),
            percent(float(one.policies["lru"].at(2))),
            number(3)(_mean_cv(one)),
            number(2)(one.min_share),
        ]
        for place, one in enumerate(measured, start=1)
    ]
    return Table("Ranking by SRP (in %)", header, rows, "without local gain a high SRP is imbalance")


def consistency(evaluations: Sequence[Evaluation]) -> Table:
    """SRP by segment length, beside what imbalance alone would reach."""
    header = ["model", "m", "SRP", "95% interval", "static SRP", "local gain", "rho_hat"]
    note = "rho_hat: experts that the best segment router loads for one that is used; local gain: SRP - static SRP"
    table = Table("Consistency (SRP and gain in %)", header, note=note)
    for one in evaluations:
        for place, (m, result) in enumerate(one.srp.items()):
            table.rows.append(
                [
                    "" if place else _name(one),
                    str(m),
                    percent(float(result.srp)),
                    _interval(result.interval),
                    percent(float(result.static_srp)),
                    percent(float(result.local_gain)),
                    number(2)(float(result.size_ratio)),
                ]
            )
    return table


def hit_rates(evaluations: Sequence[Evaluation]) -> Table:
    """Each simulated cache at each size, a cache for each layer."""

    def cell(rates: ModelHitRates, ratio: float) -> str:
        return _with_interval(rates.at(ratio), rates.intervals.get(ratio))

    return _hit_rates("Cache hit rates (in %)", evaluations, cell, RULES)


def shared_hit_rates(evaluations: Sequence[Evaluation]) -> Table:
    """Each simulated cache at each size, one cache for all layers; models of which it was simulated."""

    def cell(rates: ModelHitRates, ratio: float) -> str:
        shared = rates.shared
        return "" if shared is None else _with_interval(shared.at(ratio), shared.interval_at(ratio))

    shared = [one for one in evaluations if all(rates.shared for rates in one.policies.values())]
    return _hit_rates("Cache hit rates, one cache for all layers (in %)", shared, cell, SHARED_RULES)


def _hit_rates(
    title: str, evaluations: Sequence[Evaluation], cell: Callable[[ModelHitRates, float], str], note: str
) -> Table:
    ratios = sorted({ratio for one in evaluations for ratio in one.cache_ratios})
    table = Table(title, ["model", "cache", *(f"{ratio:g} x K slots" for ratio in ratios)], note=note)
    for one in evaluations:
        caches = {f"SCH m={m}": rates for m, rates in one.sch.items()}
        caches |= {POLICY_NAMES[name]: rates for name, rates in one.policies.items()}
        for place, (name, rates) in enumerate(caches.items()):
            table.rows.append(["" if place else _name(one), name, *(cell(rates, ratio) for ratio in ratios)])
    return table


def balance(evaluations: Sequence[Evaluation]) -> Table:
    """Global balance beside local, which consistency costs."""
    segments = sorted({m for one in evaluations for m in one.balance.local_cv if m})
    header = ["model", "SD [points]", "global CV", "max/mean", "smallest share"]
    rows = [
        [
            _name(one),
            number(2)(fmean(float(layer.sd) for layer in one.balance.layers)),
            number(3)(_mean_cv(one)),
            number(2)(max(float(layer.max_over_mean) for layer in one.balance.layers)),
            number(2)(one.min_share),
            *(number(3)(_mean(one.balance.local_cv.get(m))) for m in segments),
            number(3)(_mean(one.balance.local_cv[None])),
            percent(_mean(one.balance.overlap)),
        ]
        for one in evaluations
    ]
    header += [*(f"local CV m={m}" for m in segments), "in a document", "overlap (%)"]
    note = (
        "means over layers; max/mean and smallest share (of the fair share) are the worst layer's; "
        f"below {COLLAPSED_BELOW} a model counts as collapsed"
    )
    return Table("Balance", header, rows, note)


def domains(evaluations: Sequence[Evaluation]) -> Table:
    """SRP of each domain by itself."""
    names = list(dict.fromkeys(domain for one in evaluations for domain in one.domain_srp))
    m = common_length(evaluations)
    rows = []
    for one in evaluations:
        results = [one.domain_srp.get(name, {}).get(m) for name in names]
        rows.append([_name(one), *("" if result is None else percent(float(result.srp)) for result in results)])
    return Table(f"SRP by domain, m={m} (in %)", ["model", *names], rows)


def perplexity(evaluations: Sequence[Evaluation]) -> Table:
    """Return the perplexity of each model on all text and by domain."""
    domains = list(dict.fromkeys(domain for one in evaluations for domain in one.recording.domains))
    rows = [
        [_name(one), *(_perplexity(one.recording.perplexity(domain)) for domain in (None, *domains))]
        for one in evaluations
    ]
    return Table("Perplexity", ["model", "all", *domains], rows, "of the tokens after a row's first one")


def _perplexity(value: float | None) -> str:
    return "" if value is None else number(2)(value)


def specialization(evaluations: Sequence[Evaluation]) -> Table:
    """What experts are for, and whether that goes with their own SRP."""
    header = ["model", "in", "measure", "mean", "Pearson", "Spearman"]
    note = "means over the experts that are used; correlations with the experts' own SRP, over all experts of a model"
    lengths = sorted({one.segment_length for one in evaluations})
    table = Table(f"Specialization of experts, and SRP, m={' or '.join(map(str, lengths))}", header, note=note)
    for one in evaluations:
        for place, (kind, found) in enumerate(one.kinds.items()):
            mean = float(found.mean)
            shown = number(2)(mean) if kind == "domain" else f"{percent(mean)}%"
            correlations = [number(2)(float(value)) for value in (found.pearson, found.spearman)]
            table.rows.append(["" if place else _name(one), *KINDS[kind], shown, *correlations])
    return table


def advice(evaluations: Sequence[Evaluation]) -> Table:
    """Cache sizes to choose from."""
    header = ["model", "cache", "slots a layer", "hits (%)", "fast memory", "misses a token", "loads a token"]
    note = "the first load of an expert into a free slot is not counted: a document loads up to its slots once more"
    table = Table(f"Advice: an {POLICY_NAMES[ADVISED_POLICY]} cache for each layer", header, note=note)
    for one in evaluations:
        if "knee" not in one.advice:
            table.rows.append([_name(one), "no knee", *[""] * (len(header) - 2)])
        for place, (name, choice) in enumerate(one.advice.items()):
            label = f"{name} (rho {choice.ratio:.3g})" if name == "knee" else f"rho {choice.ratio:.3g}"
            slots = sorted(set(choice.slots))
            table.rows.append(
                [
                    "" if place and "knee" in one.advice else _name(one),
                    label,
                    "-".join(map(str, (slots[0], slots[-1]) if len(slots) > 1 else slots)),
                    percent(choice.hit_rate),
                    in_bytes(choice.memory_bytes),
                    number(2)(choice.misses),
                    in_bytes(choice.loaded_bytes),
                ]
            )
    return table


def _name(one: Evaluation) -> str:
    """The model's name, with a mark when an expert collapsed."""
    return f"{one.recording.model} (collapsed)" if one.min_share < COLLAPSED_BELOW else one.recording.model


def _interval(interval: Tensor | None) -> str:
    if interval is None or bool(interval.isnan().any()):
        return ""
    low, high = interval.tolist()
    return f"({percent(low)}-{percent(high)})"


def _with_interval(value: Tensor, interval: Tensor | None) -> str:
    return f"{percent(float(value))} {_interval(interval)}".rstrip()


def _mean(values: Tensor | None) -> float:
    return math.nan if values is None else float(values.mean())


def _mean_cv(one: Evaluation) -> float:
    return fmean(float(layer.cv) for layer in one.balance.layers)
