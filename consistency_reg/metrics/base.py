"""What the routing metrics share: the layers they expect, sequences and their numbers, results in two shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from consistency_reg.functional.bootstrap import resampled_sums
from consistency_reg.routing import RoutingTrace

CHUNK_SEQUENCES = 256  # worked on at a time: bounds the memory of one update


@dataclass(frozen=True)
class Sequences:
    """Some sequences of a batch: the routing of every layer, and the numbers of the sequences in the data set."""

    trace: RoutingTrace
    index: Tensor
    rows: slice


class RoutingMetric(Metric):
    """Base of the metrics over a :class:`~consistency_reg.routing.RoutingTrace`.

    States are sums of a fixed size, so that a metric merges with others and is right under DDP with uneven batches.
    ``compute()`` gives a flat dict of scalars to log, ``results()`` the same in full, down to the expert.

    Bootstrap: a replicate weighs each sequence by a hash of its number in the data set. That number is counted: the
    i-th sequence that process r of W sees has number ``i W + r``, as a ``DistributedSampler`` without shuffling deals
    them out, so numbers never collide and W processes equal one. Where processes are not torch's (metrics that are
    merged by hand), give ``sequence_index`` to ``update``.

    Args:
        num_experts: E of each layer, in the model's order; a single number for a model of one layer.
        replicates: bootstrap replicates for the 95% intervals; 0 for no intervals.
        seed: of the bootstrap.
        layer_names: names of the layers in ``compute()``; ``layer_00`` and so on when None.
        check_values: on the CPU, raise on expert ids out of range or repeated and on NaN scores. On a GPU values are
            never checked, as that would make the host wait: see :meth:`RoutingTrace.check_values`.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    sequences: Tensor

    def __init__(
        self,
        num_experts: int | Sequence[int],
        *,
        replicates: int = 0,
        seed: int = 0,
        layer_names: Sequence[str] | None = None,
        check_values: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_experts = (num_experts,) if isinstance(num_experts, int) else tuple(num_experts)
        if not self.num_experts or min(self.num_experts) < 1:
            raise ValueError(f"num_experts must be a positive number for each layer, got {num_experts}")
        if replicates < 0:
            raise ValueError(f"replicates must be 0 or more, got {replicates}")
        names = [f"layer_{i:02d}" for i in range(len(self.num_experts))] if layer_names is None else layer_names
        if len(set(names)) != len(self.num_experts):
            raise ValueError(
                f"layer_names must be distinct names for {len(self.num_experts)} layers, got {list(names)}"
            )
        self.layer_names = tuple(names)
        self.replicates = replicates
        self.seed = seed
        self.check_values = check_values
        self._seen_before: Tensor | int = 0
        self._batch_alone = False
        self.add_sum("sequences")

    @classmethod
    def from_trace(cls, trace: RoutingTrace, *args: Any, **kwargs: Any) -> "RoutingMetric":
        """The metric for the model that this trace is of, with the layers' names; it does not count the trace yet."""
        names = [layer.name for layer in trace]
        return cls([layer.num_experts for layer in trace], *args, **{"layer_names": names} | kwargs).to(
            trace.expert_ids[0].device
        )

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        """Add a state of zeros that sums over batches and processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _add(self, name: str, value: Tensor) -> None:
        # Out of place: a state that was made in inference mode may not be written to outside of it.
        setattr(self, name, getattr(self, name) + value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and give its own value, without intervals."""
        # torchmetrics empties the states to value the batch alone: the numbers of the sequences must go on.
        self._seen_before, self._batch_alone = self.sequences, True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._seen_before, self._batch_alone = 0, False

    def results(self) -> Any:
        """The value in full; what it holds is told by the metric. Synchronized over processes as ``compute()`` is."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self._results()

    def compute(self) -> dict[str, Tensor]:
        """The value as a flat dict of scalars."""
        return self._scalars(self._results())

    def _results(self) -> Any:
        raise NotImplementedError

    def _scalars(self, results: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    @property
    def experts(self) -> list[slice]:
        """Where each layer's experts stand when those of all layers lie side by side."""
        ends = [sum(self.num_experts[: i + 1]) for i in range(len(self.num_experts))]
        return [slice(end - E, end) for end, E in zip(ends, self.num_experts, strict=True)]

    def _sequences(self, trace: RoutingTrace, sequence_index: Tensor | None) -> Iterator[Sequences]:
        """The sequences of a batch, some at a time, with their numbers; the batch is checked and counted."""
        self._check(trace)
        B = trace.shape[0]
        if sequence_index is None:
            rank, world = self._rank_and_world_size()
            seen = torch.arange(B, device=self.sequences.device) + (self._seen_before + self.sequences)
            sequence_index = seen * world + rank
        elif sequence_index.shape != (B,) or sequence_index.dtype != torch.int64:
            found = f"{list(sequence_index.shape)} {sequence_index.dtype}"
            raise ValueError(f"sequence_index must be [B] = [{B}] int64, got {found}")
        self.sequences = self.sequences + B
        for first in range(0, B, CHUNK_SEQUENCES):
            rows = slice(first, first + CHUNK_SEQUENCES)
            yield Sequences(_rows(trace, rows), sequence_index[rows], rows)

    def _resampled(self, statistic: Tensor, index: Tensor) -> Tensor:
        """Sums of a statistic [N, ...] over these sequences in every replicate: [R, ...]."""
        return resampled_sums(statistic, index, self.replicates, self.seed)

    @property
    def _with_intervals(self) -> bool:
        return self.replicates > 0 and not self._batch_alone

    def _rank_and_world_size(self) -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(self.process_group), torch.distributed.get_world_size(self.process_group)
        return 0, 1

    def _check(self, trace: RoutingTrace) -> None:
        if not isinstance(trace, RoutingTrace):
            raise TypeError(f"update takes a RoutingTrace, got {type(trace).__name__}")
        found = tuple(layer.num_experts for layer in trace)
        if found != self.num_experts:
            raise ValueError(f"the metric is for layers of {self.num_experts} experts, got a trace of {found}")
        if self.check_values and trace.expert_ids[0].device.type == "cpu":
            trace.check_values()


def _rows(trace: RoutingTrace, rows: slice) -> RoutingTrace:
    return replace(
        trace,
        expert_ids=[ids[rows] for ids in trace.expert_ids],
        scores=None,
        logits=None,
        valid=None if trace.valid is None else trace.valid[rows],
        document_ids=None if trace.document_ids is None else trace.document_ids[rows],
    )
