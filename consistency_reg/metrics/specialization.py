"""Specialization of a model's experts as a metric, and whether it goes with their consistency."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistency_reg.functional.segments import check_segment_lengths, side_by_side
from consistency_reg.functional.specialization import (
    check_group_ids,
    domain_specialization,
    grouped_usage,
    pearson,
    spearman,
    vocabulary_specialization,
)
from consistency_reg.functional.srp import best_f1
from consistency_reg.functional.srp_counts import srp_counts
from consistency_reg.measures import of_metric
from consistency_reg.metrics.base import RoutingMetric, Value, axes_of
from consistency_reg.routing import RoutingTrace


@dataclass(frozen=True)
class Specialization:
    """Holds one kind of specialization.

    Attributes:
        layers: for each layer [E] float64; NaN for an expert that is never used.
        mean: over the experts of the model that are used.
        pearson, spearman: correlation with the experts' own SRP over all experts of the model; NaN if one is constant.
    """

    layers: tuple[Tensor, ...]
    mean: Tensor
    pearson: Tensor
    spearman: Tensor


@dataclass(frozen=True)
class ModelSpecialization:
    """Holds the specialization of a model's experts.

    Attributes:
        srp: for each layer [E] float64, the SRP of each expert.
        domain: CV over domains of the usage share; None where no domains were asked for.
        vocabulary: share of activations that the favourite token ids hold; None where no vocabulary was asked for.
    """

    srp: tuple[Tensor, ...]
    domain: Specialization | None
    vocabulary: Specialization | None

    @property
    def kinds(self) -> dict[str, Specialization]:
        """Return the kinds of specialization that were measured, by name."""
        both = {"domain": self.domain, "vocabulary": self.vocabulary}
        return {name: kind for name, kind in both.items() if kind is not None}

    def values(self) -> Iterator[Value]:
        """Yield the specialization of the model, and its correlation with the experts' own SRP, of each kind."""
        for name, kind in self.kinds.items():
            for measure in of_metric("specialization"):
                yield Value(measure.at(kind=name), getattr(kind, measure.attribute))


class ExpertSpecialization(RoutingMetric):
    """Measures how experts specialize in domains and in token ids, and the correlation with their own SRP.

    ``compute()`` gives ``domain_specialization``, ``domain_srp_pearson``, ``domain_srp_spearman`` and the same for
    ``vocabulary``; ``results()`` gives a :class:`ModelSpecialization` down to the expert.
    See :mod:`consistency_reg.functional.specialization` for what is measured.

    The vocabulary is counted exactly: 4 bytes for every token id and expert of the model, 200 MB for 50,000 x 1,024.

    Args:
        num_experts: E of each layer, in the model's order.
        num_domains: D; no domains when None.
        vocab_size: V; no vocabulary when None.
        segment_length: m of the SRP to correlate with.
        favourites: how many token ids count as an expert's favourites.
        options: see :class:`~consistency_reg.metrics.base.RoutingMetric`.

    Example:
        >>> metric = ExpertSpecialization([2], num_domains=2, segment_length=2)
        >>> trace = RoutingTrace([torch.tensor([[[0], [0]], [[1], [1]]])], num_experts=2)
        >>> metric.update(trace, domain_ids=torch.tensor([0, 1]))
        >>> float(metric.compute()["domain_specialization"])
        1.0
    """

    higher_is_better = None
    windows: Tensor
    domain_tokens: Tensor
    domain_usage: Tensor
    token_usage: Tensor

    def __init__(
        self,
        num_experts: int | Sequence[int],
        num_domains: int | None = None,
        vocab_size: int | None = None,
        segment_length: int = 16,
        favourites: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(num_experts, **options)
        if num_domains is None and vocab_size is None:
            raise ValueError("num_domains or vocab_size must be given: there is nothing to specialize in")
        for name, value in (("num_domains", num_domains), ("vocab_size", vocab_size), ("favourites", favourites)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        (self.segment_length,) = check_segment_lengths(segment_length)
        self.num_domains, self.vocab_size, self.favourites = num_domains, vocab_size, favourites
        experts = sum(self.num_experts)
        self._add_sum("windows", experts, segment_length + 1)
        if num_domains is not None:
            self._add_sum("domain_usage", num_domains, experts)
            self._add_sum("domain_tokens", num_domains)
        if vocab_size is not None:
            self._add_sum("token_usage", vocab_size, experts, dtype=torch.int32)

    def update(self, trace: RoutingTrace, domain_ids: Tensor | None = None, token_ids: Tensor | None = None) -> None:
        """Count a batch. On a GPU the host does not wait.

        Args:
            trace: the routing.
            domain_ids: [B] or [B, T] integers in 0..D-1, if the metric has domains.
            token_ids: [B, T] integers in 0..V-1, if the metric has a vocabulary; those of padding do not matter.
        """
        self._check(trace)
        for name, given, wanted in (
            ("domain_ids", domain_ids, self.num_domains),
            ("token_ids", token_ids, self.vocab_size),
        ):
            if (given is None) != (wanted is None):
                raise ValueError(f"{name} must {'not ' if wanted is None else ''}be given to a metric made as this one")
        masks = trace.valid, trace.document_ids
        m = self.segment_length
        counts = [srp_counts(layer.expert_ids, layer.num_experts, [m], *masks) for layer in trace]
        self._add("windows", torch.cat([layer.windows[m] for layer in counts]))
        ids, experts = side_by_side(trace.expert_ids, self.num_experts), sum(self.num_experts)
        if domain_ids is not None:
            assert self.num_domains is not None
            self._add("domain_usage", grouped_usage(ids, experts, domain_ids, self.num_domains, trace.valid))
            self._add("domain_tokens", _tokens_by_domain(trace, domain_ids, self.num_domains))
        if token_ids is not None:
            assert self.vocab_size is not None
            if self.token_usage.is_inference() and not torch.is_inference_mode_enabled():
                self.token_usage = self.token_usage.clone()
            grouped_usage(ids, experts, token_ids, self.vocab_size, trace.valid, out=self.token_usage)

    def plot(self, val: ModelSpecialization | None = None, ax: Any = None) -> Any:
        """Draw each expert's specialization against its SRP; return (figure, axes)."""
        results = self.results() if val is None else val
        ax = axes_of(ax)
        for name, kind in results.kinds.items():
            ax.scatter(torch.cat(results.srp), torch.cat(kind.layers), s=8, alpha=0.6, label=name)
        ax.set(xlabel=f"SRP of the expert, m = {self.segment_length}", ylabel="specialization")
        ax.legend()
        return ax.figure, ax

    def _results(self) -> ModelSpecialization:
        srp = best_f1(self.windows, self.segment_length).f1
        domain = None if self.num_domains is None else domain_specialization(self.domain_usage, self.domain_tokens)
        vocabulary = None if self.vocab_size is None else vocabulary_specialization(self.token_usage, self.favourites)
        return ModelSpecialization(
            srp=self._layers(srp), domain=self._kind(domain, srp), vocabulary=self._kind(vocabulary, srp)
        )

    def _kind(self, value: Tensor | None, srp: Tensor) -> Specialization | None:
        if value is None:
            return None
        return Specialization(self._layers(value), value.nanmean(), pearson(value, srp), spearman(value, srp))

    def _layers(self, values: Tensor) -> tuple[Tensor, ...]:
        return tuple(values[experts] for experts in self._layer_experts)

    def _scalars(self, results: ModelSpecialization) -> dict[str, Tensor]:
        scalars = {}
        for name, kind in results.kinds.items():
            scalars[f"{name}_specialization"] = kind.mean
            scalars[f"{name}_srp_pearson"] = kind.pearson
            scalars[f"{name}_srp_spearman"] = kind.spearman
        return scalars


def _tokens_by_domain(trace: RoutingTrace, domain_ids: Tensor, num_domains: int) -> Tensor:
    domain_BT = check_group_ids(domain_ids, num_domains, trace.shape, trace.valid).where(trace.valid_mask, 0)
    counts = torch.zeros(num_domains, dtype=torch.int64, device=domain_BT.device)
    return counts.scatter_add_(0, domain_BT.flatten(), trace.valid_mask.flatten().long())
