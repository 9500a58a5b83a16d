"""SRP of a model as a metric."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from consistency_reg.functional.bootstrap import percentile_interval
from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.functional.srp import ModelSRP, best_f1, model_srp
from consistency_reg.functional.srp_counts import srp_counts
from consistency_reg.measures import of_metric
from consistency_reg.metrics.base import Value, axes_of
from consistency_reg.metrics.resampled import ResampledMetric
from consistency_reg.routing import RoutingTrace


class SegmentRoutingPerformance(ResampledMetric):
    """Measures SRP, static SRP and local gain of every layer and of the model, for several segment lengths at once.

    ``compute()`` gives ``static_srp`` and, for each m, ``srp_m16``, ``size_ratio_m16``, ``threshold_m16``,
    ``local_gain_m16`` of the model and ``srp_m16_layer_00`` of each layer, and with a bootstrap ``srp_m16_low`` and
    ``srp_m16_high``. ``results()`` gives a :class:`~consistency_reg.functional.srp.ModelSRP` for each m, which holds
    the layers and, in them, the experts. See :mod:`consistency_reg.functional.srp` for what is measured.

    Args:
        num_experts: E of each layer, in the model's order.
        segment_lengths: the m.
        replicates: bootstrap replicates for the 95% intervals; 0 for none.
        options: see :class:`~consistency_reg.metrics.resampled.ResampledMetric`.

    Example:
        >>> from consistency_reg.routing import RoutingTrace
        >>> metric = SegmentRoutingPerformance([4, 4], segment_lengths=[2])
        >>> ids = torch.tensor([[[0], [0], [1], [1]]])
        >>> metric.update(RoutingTrace([ids, ids], num_experts=4))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items() if "layer" not in name}
        {'srp_m2': 0.857, 'size_ratio_m2': 1.333, 'threshold_m2': 1.0, 'static_srp': 0.667, 'local_gain_m2': 0.19}
    """

    higher_is_better = True
    usage: Tensor
    tokens: Tensor
    resampled: Tensor

    def __init__(
        self,
        num_experts: int | Sequence[int],
        segment_lengths: int | Sequence[int] = (4, 16, 64),
        *,
        replicates: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_experts, replicates=replicates, **options)
        self.segment_lengths = check_segment_lengths(segment_lengths)
        experts, layers = sum(self.num_experts), len(self.num_experts)
        self._add_sum("usage", experts)
        self._add_sum("tokens")
        for m in self.segment_lengths:
            self._add_sum(f"windows_{m}", experts, m + 1)
        if replicates:
            self._add_sum("resampled", replicates, layers, sum(m + 1 for m in self.segment_lengths))

    def update(self, trace: RoutingTrace, sequence_index: Tensor | None = None) -> None:
        """Count the windows of a batch. On a GPU the host does not wait."""
        for part, index in self._numbered(trace, sequence_index):
            options = self.segment_lengths, part.valid, part.document_ids
            counts = [
                srp_counts(layer.expert_ids, layer.num_experts, *options, per_sequence=self.replicates > 0)
                for layer in part
            ]
            self._add("usage", torch.cat([layer.usage for layer in counts]))
            self._add("tokens", part.valid_mask.sum())
            for m in self.segment_lengths:
                self._add(f"windows_{m}", torch.cat([layer.windows[m] for layer in counts]))
            if self.replicates:
                by_sequence = [
                    torch.cat([layer.sequence_windows[m] for m in self.segment_lengths], 1) for layer in counts
                ]
                self._add("resampled", self._resampled(torch.stack(by_sequence, dim=1), index))

    def plot(self, val: dict[int, ModelSRP] | None = None, ax: Any = None) -> Any:
        """Draw SRP by segment length, the model with its interval and the layers behind it; return (figure, axes)."""
        results = self.results() if val is None else val
        ax = axes_of(ax)
        lengths, models = list(results), list(results.values())
        ax.plot(lengths, [[float(layer.srp) for layer in model.layers] for model in models], color="0.8", linewidth=1)
        ax.plot(
            lengths,
            [float(model.srp) for model in models],
            color="C0",
            marker="o" if len(models) < 10 else None,
            label="model",
        )
        intervals = [model.interval.tolist() for model in models if model.interval is not None]
        if intervals:
            ax.fill_between(lengths, *zip(*intervals, strict=True), color="C0", alpha=0.2, label="95% interval")
        ax.set(xlabel="segment length m [tokens]", ylabel="SRP")
        ax.legend()
        return ax.figure, ax

    def _results(self) -> dict[int, ModelSRP]:
        usage = [self.usage[experts] for experts in self._layer_experts]
        results = {}
        for m in self.segment_lengths:
            windows = getattr(self, f"windows_{m}")
            results[m] = model_srp([windows[experts] for experts in self._layer_experts], usage, self.tokens)
        return self._add_intervals(results) if self._with_intervals else results

    def _add_intervals(self, results: dict[int, ModelSRP]) -> dict[int, ModelSRP]:
        bins = [m + 1 for m in results]
        found = {}
        for (m, result), windows_RLJ in zip(results.items(), self.resampled.split(bins, dim=-1), strict=True):
            intervals = _interval(windows_RLJ.movedim(0, 1), m)
            layers = [
                replace(layer, interval=low_high) for layer, low_high in zip(result.layers, intervals, strict=True)
            ]
            found[m] = replace(result, interval=_interval(windows_RLJ.sum(dim=1), m), layers=tuple(layers))
        return found

    def values(self, results: dict[int, ModelSRP]) -> Iterator[Value]:
        """Yield SRP and its companions: see :func:`srp_values`."""
        return srp_values(results)

    def _scalars(self, results: dict[int, ModelSRP]) -> dict[str, Tensor]:
        scalars = super()._scalars(results)
        for m, result in results.items():
            if result.interval is not None:
                scalars[f"srp_m{m}_low"], scalars[f"srp_m{m}_high"] = result.interval
        return scalars


def srp_values(results: dict[int, ModelSRP]) -> Iterator[Value]:
    """Yield SRP and its companions, of the model and of the layers, for each m that they depend on."""
    for measure in of_metric("srp"):
        for m, result in list(results.items())[: None if measure.by_segment else 1]:
            of_layers = [getattr(layer, measure.attribute) for layer in result.layers]
            yield Value(measure.at(m), getattr(result, measure.attribute), of_layers)


def _interval(windows: Tensor, m: int) -> Tensor:
    """Return the 95% interval of SRP from histograms [..., R, m+1]; replicates that drew no sequence are left out."""
    replicates = best_f1(windows, m)
    return percentile_interval(replicates.f1.where(replicates.active > 0, torch.nan))
