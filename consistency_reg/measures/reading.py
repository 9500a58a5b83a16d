"""A measure and a reading of it: how names in logs are made of a row of the table, and read back.

The rows are in :mod:`consistency_reg.measures`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from consistency_reg.cache_policies import POLICY_LABELS

UP, DOWN, AS_PAIR = "up", "down", "as in the baseline"  # what is good
SHARE, POINTS, RATIO, NATS, USES, NUMBER = "%", "percentage points", "x", "nats", "uses", ""  # units
MODEL, LAYER, DOMAIN, EXPERT = "model", "layer", "domain", "expert"  # what is measured
VALIDATION, TRAINING, DEPLOYED = "val", "train", "val/deployed"  # where it is logged
MONITOR, REGULARIZER, AGREEMENT_CALLBACK = "RoutingMonitor", "ConsistencyRegularizer", "ExpertAgreement"  # who logs
MODULE, EVALUATE, DISTILLATION, CLOZE_COMMAND = "the module", "evaluate", "Distillation", "cloze"
ROUTING_CALLBACK = "CacheAwareTraining"
# How a run stands next to its baseline: by a relative change, a difference, as a multiple of it, or by itself.
RELATIVE, DIFFERENCE, MULTIPLE, ITSELF = "relative", "difference", "multiple", "itself"

_PATTERNS = {  # how the parts of a key look in a name
    "segment": r"m\d+|document",
    "cache": r"[a-z]+(?:_m\d+)?",
    "size": r"[\d.]*k|[\d.]+pct",
    "kind": r"domain|vocabulary",
}

Where = Mapping[str, int | float | str]  # arguments of Measure.at


@dataclass(frozen=True)
class Measure:
    """Holds one row of the table of measures.

    Attributes:
        key: its name in logs; ``{segment}``, ``{cache}``, ``{size}`` and ``{kind}`` stand for what :meth:`at` fills in.
        label: what tables and axes call it.
        meaning: one sentence for readers.
        better: UP, DOWN or AS_PAIR.
        panel: where it stands in a tracker.
        unit: SHARE is kept as 0..1 and shown in percent.
        digits: behind the point, when it is shown.
        of: what it is logged of: the MODEL over all data, each LAYER, each DOMAIN, each EXPERT.
        stages: where it is logged.
        logged_by: who logs it: a callback, the module that is trained, or a command.
        metric: the metric whose results hold it: "srp", "balance", "hit_rate" or "specialization"; "" for none.
        name: what the metric's ``compute()`` and the rows of `evaluate` call it, if not by its key.
        attribute: what the metric's results call it.
        over_layers: "mean", "max" or "min" of the layers give the model; "" where layers are pooled.
        compared: how a run stands beside its baseline: a RELATIVE change, a DIFFERENCE, a MULTIPLE, or ITSELF alone.
        complement: label of 1 - value, where that is what people speak of.
        shown: by place ("overview", "runs", "pairs", "card"), at which parts of the key it is shown there.
    """

    key: str
    label: str
    meaning: str
    better: str
    panel: str
    unit: str = NUMBER
    digits: int = 2
    of: tuple[str, ...] = (MODEL, DOMAIN)
    stages: tuple[str, ...] = (VALIDATION,)
    logged_by: str = MONITOR
    metric: str = ""
    name: str = ""
    attribute: str = ""
    over_layers: str = ""
    compared: str = RELATIVE
    complement: str = ""
    shown: Mapping[str, tuple[Where, ...]] = field(default_factory=dict, hash=False)

    @property
    def record(self) -> str:
        """Return the measure's name in ``compute()`` and in the rows of `evaluate`, without the parts of its key."""
        return self.name or self.key

    @property
    def bare_label(self) -> str:
        """Return the label without the parts of the key, for a table with a column of these parts."""
        return re.sub(r" ?\{\w+\}", "", self.label).strip()

    @property
    def unit_label(self) -> str:
        """Return the unit as it stands behind a label: " (%)"."""
        return f" ({self.unit})" if self.unit in (SHARE, POINTS) else ""

    @property
    def by_segment(self) -> bool:
        """Return whether the measure has a value for each segment length."""
        return "{segment}" in self.key

    def at(
        self,
        m: int | None = None,
        *,
        cache: str = "lru",
        ratio: float | None = None,
        share: float | None = None,
        kind: str = "domain",
    ) -> "Reading":
        """Return the measure at what its key leaves open.

        Args:
            m: segment length; None for whole documents.
            cache: policy, such as "lru", or "sch_m16".
            ratio: slots over active experts K.
            share: slots over a layer's experts, instead of ``ratio``.
            kind: of specialization, "domain" or "vocabulary".

        Example:
            >>> from consistency_reg.measures import HIT_RATE, SRP
            >>> SRP.at(16).name, HIT_RATE.at(ratio=2).name, HIT_RATE.at(share=0.25).label
            ('srp/m16', 'cache/lru_2k', 'LRU hits at 25% of the experts')
        """
        size = "" if ratio is None and share is None else size_name(ratio, share)
        parts = {"segment": segment_name(m), "cache": cache, "size": size, "kind": kind}
        open_parts = {part: text for part, text in parts.items() if f"{{{part}}}" in self.key}
        if "" in open_parts.values():
            raise ValueError(f"{self.key} needs a ratio or a share")
        return Reading(self, tuple(open_parts.items()))

    def metric_key(self, m: int | None = None) -> str:
        """Return what the metric's ``compute()`` calls it.

        Example:
            >>> from consistency_reg.measures import GLOBAL_CV, LOCAL_CV, SIZE_RATIO
            >>> SIZE_RATIO.metric_key(16), GLOBAL_CV.metric_key(), LOCAL_CV.metric_key(None)
            ('size_ratio_m16', 'balance_cv', 'local_cv_document')
        """
        return f"{self.record}_{segment_name(m)}" if self.by_segment else self.record

    def show(self, value: float, finer: int = 0) -> str:
        """Return the value as text, without its unit; "" for NaN.

        Args:
            value: as it is logged.
            finer: more digits than usual.

        Example:
            >>> from consistency_reg.measures import GLOBAL_CV, SRP
            >>> SRP.show(0.4567), GLOBAL_CV.show(0.2345), GLOBAL_CV.show(0.2345, finer=1)
            ('45.7', '0.23', '0.234')
        """
        if math.isnan(value):
            return ""
        return f"{100 * value:.1f}" if self.unit == SHARE else f"{value:.{self.digits + finer}f}"

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names that begin with its key."""
        key = re.escape(self.key)
        for part, pattern in _PATTERNS.items():
            key = key.replace(re.escape(f"{{{part}}}"), f"(?P<{part}>{pattern})")
        return re.compile(rf"{key}(?:/(?P<below>.+))?")


@dataclass(frozen=True)
class Reading:
    """Holds a measure as it stands in a log: with its parts, stage, and the layer or domain that it is of.

    Attributes:
        measure: its row of the table.
        parts: of the key, as they stand in the name.
        stage: "val", "train", "val/before", or "" for none.
        layer: its number, from 0; None for the model.
        domain: its name; "" for all data.
    """

    measure: Measure
    parts: tuple[tuple[str, str], ...] = ()
    stage: str = ""
    layer: int | None = None
    domain: str = ""

    @property
    def name(self) -> str:
        """Return the name of the reading in a log."""
        key = self.measure.key.format(**dict(self.parts))
        layer = "" if self.layer is None else layer_name(self.layer)
        return "/".join(filter(None, (self.stage, key, layer, self.domain)))

    @property
    def label(self) -> str:
        """Return the label in tables and on axes, without layer and domain."""
        return self._filled(self.measure.label)

    @property
    def header(self) -> str:
        """Return the label with its unit, as the header of a column."""
        return self.label + self.measure.unit_label

    @property
    def complement(self) -> str:
        """Return the label of 1 - value."""
        return self._filled(self.measure.complement)

    @property
    def m(self) -> int | None:
        """Return the segment length; None for none and for whole documents."""
        segment = dict(self.parts).get("segment", "document")
        return None if segment == "document" else int(segment[1:])

    @property
    def ratio(self) -> float | None:
        """Return the slots of the cache over active experts; None where the size is a share, or there is no cache."""
        size = dict(self.parts).get("size", "")
        return float(size[:-1] or 1) if size.endswith("k") else None

    @property
    def share(self) -> float | None:
        """Return the slots of the cache over a layer's experts; None where the size is a ratio or there is no cache."""
        size = dict(self.parts).get("size", "")
        return float(size.removesuffix("pct")) / 100 if size.endswith("pct") else None

    @property
    def cache(self) -> str:
        """Return the simulated cache, such as "lru" or "sch_m16"; "" for none."""
        return dict(self.parts).get("cache", "")

    def within(self, stage: str = "", layer: int | None = None, domain: str = "") -> "Reading":
        """Return the same reading in a stage, of a layer or of a domain.

        Example:
            >>> from consistency_reg.measures import HIT_RATE, SRP
            >>> SRP.at(16).within("val", layer=3).name
            'val/srp/m16/layer_03'
        """
        return replace(self, stage=stage, layer=layer, domain=domain)

    def show(self, value: float, finer: int = 0) -> str:
        """Return the value as text: see :meth:`Measure.show`."""
        return self.measure.show(value, finer)

    def compare(self, value: float, baseline: float) -> float:
        """Return how a run stands next to its baseline, as the table says; where there is a complement, by 1 - value.

        Args:
            value: of the run; NaN where it was not measured.
            baseline: of its baseline.

        Returns:
            A relative change, a difference, a multiple, or the value itself; NaN for a ratio to 0.

        Example:
            >>> from consistency_reg.measures import HIT_RATE, SRP
            >>> round(HIT_RATE.at(share=0.25).compare(0.8, 0.6), 3), round(SRP.at(16).compare(0.6, 0.5), 3)
            (-0.5, 0.1)
        """
        if self.complement:
            value, baseline = 1 - value, 1 - baseline
        how = self.measure.compared
        if how == DIFFERENCE:
            return value - baseline
        if how == ITSELF:
            return value
        ratio = value / baseline if baseline else math.nan
        return ratio - 1 if how == RELATIVE else ratio

    def show_compared(self, compared: float) -> str:
        """Return what :meth:`compare` gave as text; "" for NaN.

        Example:
            >>> from consistency_reg.measures import GLOBAL_CV, PERPLEXITY, SRP
            >>> PERPLEXITY.at().show_compared(0.004), SRP.at(16).show_compared(0.1), GLOBAL_CV.at().show_compared(1.25)
            ('+0.4%', '+10.0', '1.25x')
        """
        if math.isnan(compared):
            return ""
        measure = self.measure
        if measure.compared == RELATIVE:
            return f"{100 * compared:+.1f}%"
        if measure.compared == MULTIPLE:
            return f"{compared:.2f}x"
        if measure.compared == ITSELF:
            return measure.show(compared)
        return f"{100 * compared:+.1f}" if measure.unit == SHARE else f"{compared:+.{measure.digits}f}"

    def _filled(self, label: str) -> str:
        return label.format(**{part: PART_LABELS[part](text) for part, text in self.parts})


def segment_name(m: int | None) -> str:
    """Return how a segment length stands in a name; None is a whole document."""
    return "document" if m is None else f"m{m}"


def layer_name(layer: int) -> str:
    """Return how a layer, from 0, stands in a name."""
    return f"layer_{layer:02d}"


def size_name(ratio: float | None = None, share: float | None = None) -> str:
    """Return how a cache's size stands in a name: ``ratio`` times K slots, or a ``share`` of a layer's experts.

    Example:
        >>> size_name(1.0), size_name(1.5), size_name(share=0.25)
        ('k', '1.5k', '25pct')
    """
    if (ratio is None) == (share is None):
        raise ValueError(f"a cache's size is a ratio or a share, got ratio={ratio}, share={share}")
    return f"{'' if ratio == 1 else f'{ratio:g}'}k" if share is None else f"{100 * share:g}pct"


def _segment_label(segment: str) -> str:
    return "in a document" if segment == "document" else f"m={segment[1:]}"


def _size_label(size: str) -> str:
    """Return a size in words; "2 x K" and not "2K", which reads as two thousand."""
    if size.endswith("pct"):
        return f"{size[:-3]}% of the experts"
    return "K" if size == "k" else f"{size[:-1]} x K"


def cache_label(cache: str) -> str:
    """Return what tables call a simulated cache.

    Example:
        >>> cache_label("lru"), cache_label("sch_m16")
        ('LRU', 'SCH m=16')
    """
    policy, _, segment = cache.partition("_")
    return (
        f"{POLICY_LABELS.get(policy, policy.upper())} {_segment_label(segment)}" if segment else POLICY_LABELS[policy]
    )


PART_LABELS: dict[str, Callable[[str], str]] = {
    "segment": _segment_label,
    "size": _size_label,
    "cache": cache_label,
    "kind": str,
}
