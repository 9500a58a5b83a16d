"""The base of all routing metrics: the layers that they expect, and results in full and as scalars to log."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric

from consistency_reg.devices import is_on_host
from consistency_reg.measures.reading import LAYER, Reading
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace


@dataclass(frozen=True)
class Value:
    """Holds one measure of a model and of its layers."""

    reading: Reading
    model: Tensor
    layers: Sequence[Tensor] = ()

    @property
    def metric_key(self) -> str:
        """Return the name in ``compute()``."""
        return self.reading.measure.metric_key(self.reading.m)

    @property
    def logged_layers(self) -> Sequence[Tensor]:
        """Return the layers, if the measure is logged of layers."""
        return self.layers if LAYER in self.reading.measure.of else ()


class RoutingMetric(Metric):
    """Base of the metrics over a :class:`~consistency_reg.routing.RoutingTrace`.

    States are sums of a fixed size, so that a metric merges with others and is right under DDP with uneven batches.
    ``compute()`` gives a flat dict of scalars to log, ``results()`` the same in full, down to the expert.

    Args:
        num_experts: E of each layer, in the model's order; a single number for a model of one layer.
        layer_names: names of the layers in ``compute()``; ``layer_00`` and so on when None.
        check_values: on the CPU, raise on expert ids out of range or repeated and on NaN scores. On a GPU values are
            never checked, as that would make the host wait: see :meth:`RoutingTrace.check_values`.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        num_experts: int | Sequence[int],
        *,
        layer_names: Sequence[str] | None = None,
        check_values: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_experts = (num_experts,) if isinstance(num_experts, int) else tuple(num_experts)
        if not self.num_experts or min(self.num_experts) < 1:
            raise ValueError(f"num_experts must be a positive number for each layer, got {num_experts}")
        layers = len(self.num_experts)
        self.layer_names = tuple(f"layer_{i:02d}" for i in range(layers)) if layer_names is None else tuple(layer_names)
        if len(set(self.layer_names)) != layers or len(self.layer_names) != layers:
            raise ValueError(f"layer_names must be distinct names for {layers} layers, got {list(self.layer_names)}")
        self.check_values = check_values

    @classmethod
    def from_trace(cls, trace: RoutingTrace, *args: Any, **kwargs: Any) -> Self:
        """Make the metric for the model that this trace is of, on its device; the trace itself is not counted yet."""
        return cls([layer.num_experts for layer in trace], *args, **kwargs).to(trace.expert_ids[0].device)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add another metric's sums; a value computed before is forgotten, which torchmetrics does not do by itself."""
        super().merge_state(incoming_state)
        self._computed = None

    def results(self) -> Any:
        """Return the value in full, synchronized over processes as ``compute()`` is."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self._results()

    def compute(self) -> dict[str, Tensor]:
        """Return the value as a flat dict of scalars."""
        return self._scalars(self._results())

    def _results(self) -> Any:
        raise NotImplementedError

    def values(self, results: Any) -> Iterator[Value]:
        """Yield the value of each measure of :mod:`consistency_reg.measures` that :meth:`results` holds."""
        return results.values()

    def _scalars(self, results: Any) -> dict[str, Tensor]:
        """Return the values under the names of ``compute()``: the model's first, then those of the layers."""
        values = list(self.values(results))
        scalars = {value.metric_key: value.model for value in values}
        for value in values:
            if value.logged_layers:
                scalars |= self._by_layer(value.metric_key, value.logged_layers)
        return scalars

    def _by_layer(self, name: str, values: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
        """Return one scalar for each layer, under its name."""
        return {f"{name}_{layer}": value for layer, value in zip(self.layer_names, values, strict=True)}

    @property
    def _layer_experts(self) -> list[slice]:
        """Return the place of each layer's experts when those of all layers lie side by side."""
        ends = list(accumulate(self.num_experts))
        return [slice(end - E, end) for end, E in zip(ends, self.num_experts, strict=True)]

    def _add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        """Declare a state of zeros that sums over batches and processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _add(self, name: str, value: Tensor | int) -> None:
        # Out of place: a state that was made in inference mode may not be written to outside of it.
        setattr(self, name, getattr(self, name) + value)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # Follow the module around to its device, but never to its precision: sums must stay exact.
        super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), *args, **kwargs)
        return self

    def _check(self, trace: RoutingTrace) -> None:
        if not isinstance(trace, RoutingTrace):
            raise TypeError(f"update takes a RoutingTrace, got {type(trace).__name__}")
        found = tuple(layer.num_experts for layer in trace)
        if found != self.num_experts:
            raise ValueError(f"the metric is for layers of {self.num_experts} experts, got a trace of {found}")
        if self.check_values and is_on_host(trace.expert_ids[0]):
            trace.check_values()


def axes_of(ax: Any = None) -> Any:
    """Return the given matplotlib axes, or new ones."""
    with require("plots"):
        from matplotlib import pyplot
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax
