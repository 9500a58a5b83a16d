"""The one table of what is measured: its name in logs, label, unit, direction, panel, and what it is measured of.

Metrics, monitor, `evaluate`, `report`, model cards, the wandb workspace, goals and the table in docs/measures.md all
read it here. To add a measure of a metric: write its equation (:mod:`consistency_reg.functional`), let the results of a
metric hold it (:mod:`consistency_reg.metrics`), and add a row below.

A name in a log is ``STAGE/KEY``, such as ``val/srp/m16``; behind it stands ``/layer_03`` for a layer, or ``/NAME`` for
a domain. :func:`parse` reads such a name back.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from consistency_reg.measures.reading import (
    AGREEMENT_CALLBACK,
    AS_PAIR,
    CLOZE_COMMAND,
    DEPLOYED,
    DIFFERENCE,
    DISTILLATION,
    DOMAIN,
    DOWN,
    EVALUATE,
    EXPERT,
    ITSELF,
    LAYER,
    MODEL,
    MODULE,
    MULTIPLE,
    NATS,
    POINTS,
    RATIO,
    REGULARIZER,
    ROUTING_CALLBACK,
    SHARE,
    TRAINING,
    UP,
    USES,
    VALIDATION,
    Measure,
    Reading,
    Where,
)

COLLAPSED_BELOW = 0.1  # usage of an expert, as a share of its fair share, below which its router has collapsed
USUAL_LENGTH = 16  # the m of single numbers

_AT_16: tuple[Where, ...] = ({"m": 16},)
_AT_ALL: tuple[Where, ...] = ({"m": 4}, {"m": 16}, {"m": 64})
_ONCE: tuple[Where, ...] = ({},)
_QUARTER: Where = {"share": 0.25}
_ALL = (MODEL, LAYER, DOMAIN)
_BOTH = (VALIDATION, TRAINING)

PERPLEXITY = Measure(
    "ppl",
    "perplexity",
    "how well the model predicts text: exp of the cross-entropy",
    DOWN,
    "Trade-off",
    digits=1,
    shown={"overview": _ONCE, "runs": _ONCE, "pairs": _ONCE, "card": _ONCE},
    logged_by=MODULE,
)
CROSS_ENTROPY = Measure(
    "ce", "cross-entropy", "mean loss of a predicted token", DOWN, "Training", NATS, 3, stages=_BOTH, logged_by=MODULE
)
DENSE_PERPLEXITY = Measure(
    "dense/ppl",
    "dense model's perplexity",
    "perplexity on the same text of the dense model that a mixture was made from",
    AS_PAIR,
    "Training",
    digits=1,
    logged_by=DISTILLATION,
)
DENSE_DIVERGENCE = Measure(
    "dense/kl",
    "divergence from the dense model",
    "KL(dense model ‖ mixture) of the distribution of the next token",
    DOWN,
    "Training",
    NATS,
    3,
    logged_by=DISTILLATION,
)
CLOZE = Measure(
    "cloze/accuracy",
    "cloze accuracy",
    "share of held-out passages whose own continuation the model finds likelier than three others",
    UP,
    "Trade-off",
    SHARE,
    1,
    compared=DIFFERENCE,
    logged_by=CLOZE_COMMAND,
)
SRP = Measure(
    "srp/{segment}",
    "SRP {segment}",
    "segment routing best performance: how well one set of experts serves a segment of m tokens",
    UP,
    "Consistency",
    SHARE,
    of=(*_ALL, EXPERT),
    stages=_BOTH,
    metric="srp",
    name="srp",
    attribute="srp",
    compared=DIFFERENCE,
    shown={"overview": _AT_16, "runs": _AT_ALL, "pairs": _AT_16, "card": _AT_16},
)
SIZE_RATIO = Measure(
    "rho_hat/{segment}",
    "rho_hat {segment}",
    "experts that the best segment router loads for one that is used; near 1 is good",
    DOWN,
    "Consistency",
    RATIO,
    metric="srp",
    name="size_ratio",
    attribute="size_ratio",
    compared=MULTIPLE,
    shown={"runs": _AT_ALL},
)
THRESHOLD = Measure(
    "threshold/{segment}",
    "threshold {segment}",
    "from how many uses in a segment on the best segment router loads an expert",
    AS_PAIR,
    "Consistency",
    USES,
    metric="srp",
    name="threshold",
    attribute="threshold",
    compared=DIFFERENCE,
)
STATIC_SRP = Measure(
    "static_srp",
    "static SRP",
    "the SRP of one fixed set of experts for the whole data: what imbalance alone gives",
    AS_PAIR,
    "Consistency",
    SHARE,
    stages=_BOTH,
    metric="srp",
    attribute="static_srp",
    compared=DIFFERENCE,
    shown={"overview": _ONCE, "runs": _ONCE, "card": _ONCE},
)
LOCAL_GAIN = Measure(
    "local_gain/{segment}",
    "local gain {segment}",
    "SRP - static SRP: consistency that is not imbalance",
    UP,
    "Consistency",
    SHARE,
    stages=_BOTH,
    metric="srp",
    name="local_gain",
    attribute="local_gain",
    compared=DIFFERENCE,
    shown={"runs": _AT_16, "pairs": _AT_16, "card": _AT_16},
)
OVERLAP = Measure(
    "overlap",
    "overlap",
    "share of a token's experts that the token before used too",
    UP,
    "Consistency",
    SHARE,
    of=_ALL,
    metric="balance",
    attribute="overlap",
    over_layers="mean",
    compared=DIFFERENCE,
    shown={"runs": _ONCE},
)
AGREEMENT = Measure(
    "agreement",
    "agreement",
    "share of a token's experts that the model chose before fine-tuning too; as deployed, that its routers prefer",
    AS_PAIR,
    "Consistency",
    SHARE,
    of=(MODEL, LAYER),
    compared=DIFFERENCE,
    logged_by=AGREEMENT_CALLBACK,
)
HIT_RATE = Measure(
    "cache/{cache}_{size}",
    "{cache} hits at {size}",
    "hit rate of a cache of experts for each layer: lru_2k has 2K slots, lru_25pct a quarter of the experts",
    UP,
    "Caches",
    SHARE,
    of=_ALL,
    stages=_BOTH,
    metric="hit_rate",
    name="hit_rate_{cache}",
    over_layers="mean",
    complement="{cache} misses at {size}",
    shown={
        "overview": (_QUARTER,),
        "runs": ({"ratio": 1}, {"ratio": 2}, _QUARTER),
        "pairs": (_QUARTER,),
        "card": ({"ratio": 2}, _QUARTER),
    },
)
SHARED_HIT_RATE = Measure(
    "cache/{cache}_{size}_shared",
    "{cache} hits at {size}, one cache for all layers",
    "hit rate of one cache whose slots all layers share",
    UP,
    "Caches",
    SHARE,
    of=(MODEL,),
    metric="hit_rate",
    name="hit_rate_{cache}",
    logged_by=EVALUATE,
)
BALANCE_SD = Measure(
    "balance/sd",
    "balance SD",
    "SD of the experts' usage over all data, in percentage points; mean of the layers",
    AS_PAIR,
    "Balance",
    POINTS,
    metric="balance",
    name="balance_sd",
    attribute="sd",
    over_layers="mean",
    compared=DIFFERENCE,
)
GLOBAL_CV = Measure(
    "balance/cv",
    "global CV",
    "CV of the experts' usage over all data (0: all alike); mean of the layers",
    AS_PAIR,
    "Balance",
    of=_ALL,
    metric="balance",
    name="balance_cv",
    attribute="cv",
    over_layers="mean",
    compared=MULTIPLE,
    shown={"overview": _ONCE, "runs": _ONCE, "pairs": _ONCE, "card": _ONCE},
)
MAX_MEAN = Measure(
    "balance/max_mean",
    "max/mean",
    "usage of the busiest expert over the mean; of the worst layer",
    AS_PAIR,
    "Balance",
    RATIO,
    metric="balance",
    name="balance_max_over_mean",
    attribute="max_over_mean",
    over_layers="max",
    compared=MULTIPLE,
    shown={"runs": _ONCE, "pairs": _ONCE},
)
LOCAL_CV = Measure(
    "balance/local_cv/{segment}",
    "local CV {segment}",
    "CV of the experts' usage within a segment or document; rises with consistency, and should",
    UP,
    "Balance",
    metric="balance",
    name="local_cv",
    attribute="local_cv",
    over_layers="mean",
    compared=MULTIPLE,
    shown={"overview": _AT_16, "runs": _AT_16},
)
MIN_SHARE = Measure(
    "balance/min_share",
    "smallest share",
    f"usage of the least used expert over its fair share; of the worst layer; below {COLLAPSED_BELOW} it is dead",
    AS_PAIR,
    "Balance",
    of=_ALL,
    metric="balance",
    name="balance_min_share",
    attribute="min_share",
    over_layers="min",
    compared=ITSELF,
    shown={"overview": _ONCE, "runs": _ONCE, "pairs": _ONCE, "card": _ONCE},
)
SPECIALIZATION = Measure(
    "specialization/{kind}",
    "specialization ({kind})",
    "how much experts are for one domain (CV of the usage share) or for few token ids (share of their favourites)",
    AS_PAIR,
    "Specialization",
    of=(MODEL, EXPERT),
    metric="specialization",
    name="{kind}_specialization",
    attribute="mean",
    compared=DIFFERENCE,
    logged_by=EVALUATE,
)
SPECIALIZATION_SPEARMAN = Measure(
    "specialization/{kind}_srp_spearman",
    "its correlation with SRP ({kind})",
    "Spearman's correlation of an expert's specialization with its own SRP, over all experts",
    AS_PAIR,
    "Specialization",
    of=(MODEL,),
    metric="specialization",
    name="{kind}_srp_spearman",
    attribute="spearman",
    compared=DIFFERENCE,
    logged_by=EVALUATE,
)
TERM = Measure(
    "consistency/loss",
    "consistency term, raw",
    "the term before its weight; for SRP 1 - SRP of the batch",
    DOWN,
    "Training",
    digits=3,
    of=(MODEL, LAYER),
    stages=(TRAINING,),
    logged_by=REGULARIZER,
)
TERM_WEIGHT = Measure(
    "consistency/weight",
    "consistency term, weight",
    "the term's weight at this step",
    AS_PAIR,
    "Training",
    digits=3,
    of=(MODEL,),
    stages=(TRAINING,),
    logged_by=REGULARIZER,
)
TERM_WEIGHTED = Measure(
    "consistency/weighted",
    "consistency term, weighted",
    "what is added to the loss; small beside it",
    DOWN,
    "Training",
    digits=3,
    of=(MODEL,),
    stages=(TRAINING,),
    logged_by=REGULARIZER,
)
STRENGTH = Measure(
    "strength",
    "strength of cache-aware routing",
    "how strongly the deployed model prefers experts that are in the cache; 0 is the model as it is",
    AS_PAIR,
    "Cache-aware routing",
    of=(MODEL,),
    stages=(DEPLOYED,),
    logged_by=ROUTING_CALLBACK,
)
CACHE_RATIO = Measure(
    "cache_ratio",
    "cache of cache-aware routing",
    "slots of the cache that the deployed model knows, over the active experts K",
    AS_PAIR,
    "Cache-aware routing",
    RATIO,
    of=(MODEL,),
    stages=(DEPLOYED,),
    logged_by=ROUTING_CALLBACK,
)
TRAINED_STRENGTH = replace(
    STRENGTH,
    key="routing/strength",
    meaning="how strongly this training step prefers experts that are in the cache",
    stages=(TRAINING,),
)
TRAINED_CACHE_RATIO = replace(
    CACHE_RATIO,
    key="routing/cache_ratio",
    meaning="slots of the cache that this training step knows, over the active experts K",
    stages=(TRAINING,),
)
TRAINED_MISSES = Measure(
    "routing/misses",
    "misses of cache-aware routing",
    "share of the uses of experts in a training batch that were not in the cache, first uses included",
    DOWN,
    "Cache-aware routing",
    SHARE,
    of=(MODEL,),
    stages=(TRAINING,),
    logged_by=ROUTING_CALLBACK,
)

MEASURES = tuple(row for row in list(globals().values()) if isinstance(row, Measure))  # in the order above


def usual_length(segment_lengths: Iterable[int]) -> int:
    """Return the m to name where there is room for one: the nearest to 16, the shorter of two."""
    return min(segment_lengths, key=lambda m: (abs(m - USUAL_LENGTH), m))


def of_metric(metric: str) -> tuple[Measure, ...]:
    """Return the measures that the results of a metric hold."""
    return tuple(measure for measure in MEASURES if measure.metric == metric)


def of_panel(panel: str) -> tuple[Measure, ...]:
    """Return the measures that stand in a panel of trackers, such as "Balance"."""
    return tuple(measure for measure in MEASURES if measure.panel == panel)


def shown_in(place: str, panel: str | None = None) -> Iterator[Reading]:
    """Yield what is shown at a place ("overview", "runs", "pairs", "card") in the table's order.

    Args:
        place: one of these.
        panel: only what stands in this panel; all of them when None.

    Example:
        >>> [reading.label for reading in shown_in("card", "Caches")]
        ['LRU hits at 2 x K', 'LRU hits at 25% of the experts']
    """
    for measure in MEASURES:
        if panel in (None, measure.panel):
            yield from (measure.at(**where) for where in measure.shown.get(place, ()))  # type: ignore[arg-type]


def parse(name: str) -> Reading | None:
    """Read a name of a log back; None where it is not in the table.

    Example:
        >>> reading = parse("val/before/cache/lru_2k/layer_03")
        >>> reading.stage, reading.ratio, reading.layer, reading.label
        ('val/before', 2.0, 3, 'LRU hits at 2 x K')
        >>> parse("val/srp/m16/cpp").domain, parse("val/cache/curve")
        ('cpp', None)
    """
    stage = next((stage for stage in _STAGES if name.startswith(f"{stage}/")), "")
    key = name.removeprefix(f"{stage}/") if stage else name
    for measure in MEASURES:
        if found := measure.pattern.fullmatch(key):
            parts = found.groupdict()
            below = parts.pop("below") or ""
            layer = _LAYER.fullmatch(below)
            of = (int(layer[1]), "") if layer else (None, below)
            return Reading(measure, tuple(parts.items()), stage, *of)
    return None


_STAGES = (
    *(f"{VALIDATION}/before/deployed", f"{VALIDATION}/before", DEPLOYED, f"best/{VALIDATION}"),
    *(VALIDATION, TRAINING),
)
_LAYER = re.compile(r"layer_(\d+)")
