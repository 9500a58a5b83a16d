"""Metrics with bootstrap intervals: every sequence has a number, from which its weight in every replicate follows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from consistency_reg.functional.bootstrap import resampled_sums
from consistency_reg.metrics.base import RoutingMetric
from consistency_reg.routing import RoutingTrace


class ResampledMetric(RoutingMetric):
    """Base of the metrics that have 95% intervals from a Poisson bootstrap over sequences, in the same pass.

    A replicate weighs each sequence (row) by a hash of the sequence's number in the data set. The metric counts that
    number: the i-th sequence that process r of W sees is number ``i W + r``, as a ``DistributedSampler`` without
    shuffling deals them out. So numbers never collide, batches of any size give the same intervals, and W processes
    give those of one. Metrics that are not of one process group and are merged by hand need ``sequence_index`` in
    ``update``, or sequences with the same number would be drawn together.

    Args:
        num_experts: E of each layer, in the model's order.
        replicates: bootstrap replicates; 0 for no intervals.
        seed: of the bootstrap.
        options: see :class:`~consistency_reg.metrics.base.RoutingMetric`.
    """

    chunk_sequences = 256  # worked on at a time: bounds the memory of one update
    sequences: Tensor

    def __init__(self, num_experts: int | Sequence[int], *, replicates: int = 0, seed: int = 0, **options: Any) -> None:
        super().__init__(num_experts, **options)
        if replicates < 0:
            raise ValueError(f"replicates must be 0 or more, got {replicates}")
        self.replicates = replicates
        self.seed = seed
        self._seen_before: Tensor | int = 0
        self._batch_alone = False
        self._add_sum("sequences")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and give its own value, without intervals."""
        # torchmetrics empties the states to value the batch alone: the numbers of the sequences must go on.
        self._seen_before, self._batch_alone = self.sequences, True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._seen_before, self._batch_alone = 0, False

    @property
    def _with_intervals(self) -> bool:
        return self.replicates > 0 and not self._batch_alone

    def _numbered(self, trace: RoutingTrace, sequence_index: Tensor | None) -> Iterator[tuple[RoutingTrace, Tensor]]:
        """Yield the sequences of a batch, some at a time, and their numbers; the batch is checked and counted."""
        self._check(trace)
        B = trace.shape[0]
        if sequence_index is None:
            rank, processes = self._rank_and_processes()
            seen = torch.arange(B, device=self.sequences.device) + (self._seen_before + self.sequences)
            sequence_index = seen * processes + rank
        elif sequence_index.shape != (B,) or sequence_index.dtype != torch.int64:
            found = f"{list(sequence_index.shape)} {sequence_index.dtype}"
            raise ValueError(f"sequence_index must be [B] = [{B}] int64, got {found}")
        self._add("sequences", B)
        for first in range(0, B, self.chunk_sequences):
            rows = slice(first, first + self.chunk_sequences)
            yield _rows(trace, rows), sequence_index[rows]

    def _resampled(self, statistic: Tensor, sequence_index: Tensor) -> Tensor:
        """Return the sums of a statistic [N, ...] over these sequences in every replicate: [R, ...]."""
        return resampled_sums(statistic, sequence_index, self.replicates, self.seed)

    def _rank_and_processes(self) -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(self.process_group), torch.distributed.get_world_size(self.process_group)
        return 0, 1


def _rows(trace: RoutingTrace, rows: slice) -> RoutingTrace:
    return replace(
        trace,
        expert_ids=[ids[rows] for ids in trace.expert_ids],
        scores=None,
        logits=None,
        inputs=None,
        valid=None if trace.valid is None else trace.valid[rows],
        document_ids=None if trace.document_ids is None else trace.document_ids[rows],
    )
