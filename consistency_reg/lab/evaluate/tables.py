"""Show what was measured as tables for the terminal."""

from collections.abc import Callable, Sequence

from torch import Tensor

from consistency_reg.lab.evaluate.measure import ADVISED_POLICY, FAVOURITES, Evaluation
from consistency_reg.lab.render.table import Table, in_bytes, number, percent
from consistency_reg.measures import COLLAPSED_BELOW, GLOBAL_CV, HIT_RATE, LOCAL_GAIN, MIN_SHARE, SRP, of_metric
from consistency_reg.measures.reading import Measure, cache_label, segment_name
from consistency_reg.metrics.simulated_caches import ModelHitRates

KINDS = {
    "domain": ("domains", "CV of the usage share"),
    "vocabulary": ("token ids", f"share of the {FAVOURITES} favourites"),
}
RULES = (
    "mean over documents and layers; the first load into a slot that is still free counts as a hit; K experts active"
)
SHARED_RULES = "as many slots in all as a cache for each layer has; K is the sum over the layers"


def tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return all tables; the ranking comes first where there are several models."""
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
    """Return the m to compare models by: 16 where all have it, else the shortest in common, else the first's."""
    shared = set.intersection(*(set(one.srp) for one in evaluations))
    return 16 if 16 in shared else min(shared, default=evaluations[0].segment_length)


def ranking(evaluations: Sequence[Evaluation]) -> Table:
    """Return the models by SRP, next to what would make a high SRP worthless."""
    m = common_length(evaluations)
    hits = [HIT_RATE.at(cache=f"sch_{segment_name(m)}", ratio=2), HIT_RATE.at(ratio=2)]
    shown = [SRP.at(m), LOCAL_GAIN.at(m), *hits, GLOBAL_CV.at(), MIN_SHARE.at()]
    measured = sorted((one for one in evaluations if m in one.srp), key=lambda one: -one.get(SRP.at(m)))
    rows = [
        [f"{place}. {_name(one)}", *(reading.show(one.get(reading), finer=1) for reading in shown)]
        for place, one in enumerate(measured, start=1)
    ]
    header = ["model", *(reading.header for reading in shown)]
    return Table("Ranking by SRP", header, rows, "without local gain a high SRP is imbalance")


def consistency(evaluations: Sequence[Evaluation]) -> Table:
    """Return SRP by segment length, next to what imbalance alone would reach."""
    measures = of_metric("srp")
    header = ["model", "m", *(measure.bare_label + measure.unit_label for measure in measures)]
    header.insert(3, "95% interval")
    table = Table("Consistency", header, note=meanings(measures))
    for one in evaluations:
        for place, (m, result) in enumerate(one.srp.items()):
            values = [measure.show(one.get(measure.at(m))) for measure in measures]
            values.insert(1, _interval(result.interval))
            table.rows.append(["" if place else _name(one), str(m), *values])
    return table


def hit_rates(evaluations: Sequence[Evaluation]) -> Table:
    """Return each simulated cache at each size, a cache for each layer."""

    def cell(rates: ModelHitRates, ratio: float) -> str:
        return _with_interval(rates.at(ratio), rates.intervals.get(ratio))

    return _hit_rates("Cache hit rates (in %)", evaluations, cell, RULES)


def shared_hit_rates(evaluations: Sequence[Evaluation]) -> Table:
    """Return each simulated cache at each size, one for all layers, of the models of which it was simulated."""

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
        for place, (cache, rates) in enumerate(one.caches.items()):
            cells = [cell(rates, ratio) for ratio in ratios]
            table.rows.append(["" if place else _name(one), cache_label(cache), *cells])
    return table


def balance(evaluations: Sequence[Evaluation]) -> Table:
    """Return global balance next to local, which consistency costs."""
    readings = dict.fromkeys(value.reading for one in evaluations for value in one.balance.values())
    rows = [[_name(one), *(reading.show(one.get(reading), finer=1) for reading in readings)] for one in evaluations]
    note = (
        "means over layers; max/mean and smallest share (of the fair share) are the worst layer's; "
        f"below {COLLAPSED_BELOW} a model counts as collapsed"
    )
    if any(one.is_of_one_domain for one in evaluations):
        note += "; on text of one domain it may be for lack of other text that experts are idle: measure on several"
    return Table("Balance", ["model", *(reading.header for reading in readings)], rows, note)


def domains(evaluations: Sequence[Evaluation]) -> Table:
    """Return SRP of each domain by itself."""
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
    """Return what experts are for, and whether that goes with their own SRP."""
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
    """Return cache sizes to choose from."""
    header = ["model", "cache", "slots a layer", "hits (%)", "fast memory", "misses a token", "loads a token"]
    note = "the first load of an expert into a free slot is not counted: a document loads up to its slots once more"
    table = Table(f"Advice: an {cache_label(ADVISED_POLICY)} cache for each layer", header, note=note)
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


def meanings(measures: Sequence[Measure]) -> str:
    """Return a note that says what each of some measures is."""
    return "; ".join(f"{measure.bare_label}: {measure.meaning}" for measure in measures)


def _name(one: Evaluation) -> str:
    """Return the model's name, with a mark when an expert is hardly used: collapsed, or idle on a single domain."""
    if not one.min_share < COLLAPSED_BELOW:
        return one.recording.model
    return f"{one.recording.model} ({'idle experts' if one.is_of_one_domain else 'collapsed'})"


def _interval(interval: Tensor | None) -> str:
    if interval is None or bool(interval.isnan().any()):
        return ""
    low, high = interval.tolist()
    return f"({percent(low)}-{percent(high)})"


def _with_interval(value: Tensor, interval: Tensor | None) -> str:
    return f"{percent(float(value))} {_interval(interval)}".rstrip()
