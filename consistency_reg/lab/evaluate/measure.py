"""Measure all that a recording says of a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from consistency_reg.cache_policies import POLICIES
from consistency_reg.functional.srp import ModelSRP
from consistency_reg.lab.evaluate.advice import CacheChoice, choose, knee_ratio
from consistency_reg.lab.evaluate.traces import Recording
from consistency_reg.measures import HIT_RATE, MIN_SHARE, PERPLEXITY, SHARED_HIT_RATE, usual_length
from consistency_reg.measures.reading import Reading, segment_name
from consistency_reg.metrics import (
    CacheHitRate,
    ExpertSpecialization,
    RoutingBalance,
    SegmentCacheHitRate,
    SegmentRoutingPerformance,
)
from consistency_reg.metrics.balance import ModelBalance
from consistency_reg.metrics.simulated_caches import ModelHitRates
from consistency_reg.metrics.specialization import ModelSpecialization, Specialization
from consistency_reg.metrics.srp import srp_values
from consistency_reg.optional import require

with require("transformers"):
    from tqdm import tqdm

ADVISED_POLICY = "lru"  # what a device can have without knowing the future
FAVOURITES = 10  # token ids of an expert


@dataclass(frozen=True)
class Evaluation:
    """Holds all measures of one model.

    Attributes:
        recording: what it is measured on.
        srp: by segment length.
        domain_srp: SRP of each domain by segment length; without those that no document of it is as long as.
        sch: hit rates of SCH by segment length.
        policies: hit rates of real caches by policy.
        balance: global and local.
        specialization: in domains, where there are several, and in token ids, where they are known; None for neither.
        cache_ratios: sizes to show.
    """

    recording: Recording
    srp: dict[int, ModelSRP]
    domain_srp: dict[str, dict[int, ModelSRP]]
    sch: dict[int, ModelHitRates]
    policies: dict[str, ModelHitRates]
    balance: ModelBalance
    specialization: ModelSpecialization | None
    cache_ratios: tuple[float, ...]

    @property
    def segment_length(self) -> int:
        """Return the m to name where there is room for one."""
        return usual_length(self.srp)

    @property
    def min_share(self) -> float:
        """Return the usage of the least used expert of all layers, as a share of the fair share."""
        return self.get(MIN_SHARE.at())

    @property
    def is_of_one_domain(self) -> bool:
        """Tell whether the text is of one domain, where experts for other text are idle without having collapsed."""
        return len(self.recording.domains) == 1

    @cached_property
    def caches(self) -> dict[str, ModelHitRates]:
        """Return the hit rates of every simulated cache, by its name in a log: "sch_m16", "lru" and so on."""
        return {f"sch_{segment_name(m)}": rates for m, rates in self.sch.items()} | self.policies

    @cached_property
    def values(self) -> dict[str, float]:
        """Return every measure of the model under the name that a training run logs below "val/"."""
        of_specialization = () if self.specialization is None else self.specialization.values()
        hit_rates = [
            rates.value(HIT_RATE.at(cache=cache, ratio=ratio))
            for cache, rates in self.caches.items()
            for ratio in self.cache_ratios
        ]
        shared = {
            SHARED_HIT_RATE.at(cache=cache, ratio=ratio).name: float(rates.shared.at(ratio))
            for cache, rates in self.caches.items()
            for ratio in self.cache_ratios
            if rates.shared is not None
        }
        every = [*srp_values(self.srp), *hit_rates, *self.balance.values(), *of_specialization]
        perplexity = self.recording.perplexity()
        quality = {} if perplexity is None else {PERPLEXITY.at().name: perplexity}
        return {value.reading.name: float(value.model) for value in every} | shared | quality

    def get(self, reading: Reading) -> float:
        """Return a measure of the model; NaN where it was not measured."""
        if reading.measure is HIT_RATE:
            return float(self.caches[reading.cache].value(reading).model) if reading.cache in self.caches else math.nan
        return self.values.get(reading.name, math.nan)

    @property
    def kinds(self) -> dict[str, Specialization]:
        """Return the specialization by kind: "domain", "vocabulary", both or neither."""
        return {} if self.specialization is None else self.specialization.kinds

    @cached_property
    def advice(self) -> dict[str, CacheChoice]:
        """Return the cache at the "knee" of LRU's hit rates, if there is one, and at "2K" slots."""
        rates, sizes = self.policies[ADVISED_POLICY], self.recording.expert_bytes
        bend = knee_ratio(rates)
        at = {"knee": bend, "2K": 2.0}
        return {name: choose(rates, ratio, sizes) for name, ratio in at.items() if ratio is not None}


def measure(
    recording: Recording,
    *,
    segment_lengths: Sequence[int] = (4, 16, 64),
    cache_ratios: Sequence[float] = (1, 2, 3, 4),
    replicates: int = 200,
    shared_cache: bool = True,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Measure a recording.

    Args:
        recording: routing of one model.
        segment_lengths: m of SRP, SCH and local balance; those longer than every document are left out.
        cache_ratios: cache sizes to have intervals for, in units of K.
        replicates: of the bootstrap; 0 for no intervals.
        shared_cache: simulate one cache for the experts of all layers too, if there are several layers. It costs about
            as many times what the layers' caches cost as there are layers.
        device: where to count.

    Raises:
        ValueError: no document is as long as a segment.
    """
    longest = recording.longest_document
    lengths = [m for m in segment_lengths if m <= longest]
    if not lengths:
        raise ValueError(
            f"{recording.model}: segment_lengths must not all exceed the longest document, {longest} tokens, "
            f"got {list(segment_lengths)}"
        )
    experts, D = tuple(recording.num_experts), len(recording.domains)
    resampled = {"replicates": replicates, "check_values": False}  # a recording is checked when it is made or read
    srp = SegmentRoutingPerformance(experts, lengths, **resampled).to(device)
    caches: dict[str, Any] = {"cache_ratios": cache_ratios, "shared": shared_cache and len(experts) > 1, **resampled}
    sch = SegmentCacheHitRate(experts, lengths, **caches).to(device)
    policies = {name: CacheHitRate(experts, name, **caches).to(device) for name in POLICIES}
    balance = RoutingBalance(experts, lengths, check_values=False).to(device)
    by_domain = [SegmentRoutingPerformance(experts, lengths, check_values=False).to(device) for _ in range(D)]
    words, token_ids = _words(recording)
    specialization = None
    if D > 1 or words:
        specialization = ExpertSpecialization(
            experts,
            D if D > 1 else None,
            words,
            segment_length=usual_length(lengths),
            favourites=FAVOURITES,
            check_values=False,
        ).to(device)
    progress = tqdm(
        total=recording.tokens, desc=f"measuring {recording.model}", unit="token", disable=None, leave=False
    )
    for domain, of_domain in enumerate(by_domain):
        for trace, index in recording.chunks((recording.domain_ids == domain).nonzero()[:, 0], device):
            for metric in (srp, sch, *policies.values()):
                metric.update(trace, index)
            balance.update(trace)
            of_domain.update(trace)
            if specialization is not None:
                specialization.update(
                    trace,
                    domain_ids=torch.full_like(index, domain) if D > 1 else None,
                    token_ids=None if token_ids is None else token_ids[index.cpu()].to(device),
                )
            progress.update(int(trace.valid_mask.sum()))
    progress.close()
    return Evaluation(
        recording=recording,
        srp=srp.results(),
        domain_srp=dict(zip(recording.domains, map(_of_windows, by_domain), strict=True)),
        sch=sch.results(),
        policies={name: metric.results() for name, metric in policies.items()},
        balance=balance.results(),
        specialization=None if specialization is None else specialization.results(),
        cache_ratios=tuple(cache_ratios),
    )


def _of_windows(metric: SegmentRoutingPerformance) -> dict[int, ModelSRP]:
    """Return the results that are of any segment at all: without one SRP is unknown, not 0."""
    return {m: result for m, result in metric.results().items() if result.histogram.any()}


def _words(recording: Recording) -> tuple[int | None, torch.Tensor | None]:
    """Return how many different token ids the text has, and the text as their numbers: [N, T].

    An expert's favourites do not depend on how token ids are numbered, and a vocabulary is far larger than a text's.
    """
    if recording.token_ids is None:
        return None, None
    words, number_NT = recording.token_ids.unique(return_inverse=True)
    return len(words), number_NT
