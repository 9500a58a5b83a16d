"""The window counts of :mod:`consistency_reg.functional.srp_counts` on a GPU, from the ids as they are.

A program walks along a row with f, the tokens of the window on which each expert is active, in registers, one expert a
lane. From one window to the next only the experts that enter or leave it change: a run of windows with equal f is added
to the histogram at once when it ends, at most 2K additions a token.

N rows, T tokens, K experts per token, E experts, m segment length, X = E rounded up to a power of two.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT_TOKENS = 512  # a program counts the windows that end in so many tokens of a row, or 4m if that is more
REPLICAS = 16  # copies of the histogram, so that programs seldom wait for each other


def window_counts(
    expert_ids: Tensor, num_experts: int, position: Tensor, segment_length: int, *, per_sequence: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Count how often each f occurs: by expert [E, m+1], and over all experts by row [N, m+1] if asked. Never waits.

    Args:
        expert_ids: [N, T, K] int64.
        num_experts: E.
        position: [N, T] index of each token in its document, -1 on padding.
        segment_length: m. For m = 1 the counts of f = 1 are the usage of the experts.
        per_sequence: count by row too.
    """
    N, T, K = expert_ids.shape
    windows_REJ = torch.zeros(REPLICAS, num_experts, segment_length + 1, dtype=torch.int64, device=expert_ids.device)
    sequences_NJ = windows_REJ.new_zeros(N, segment_length + 1) if per_sequence else None
    if N and segment_length <= T:
        segment = max(SEGMENT_TOKENS, 4 * segment_length)
        with torch.cuda.device_of(expert_ids):  # Triton launches on the current one
            _count_windows[N, triton.cdiv(T, segment)](
                expert_ids.contiguous(),
                position,
                windows_REJ,
                sequences_NJ,
                T,
                K,
                num_experts,
                segment_length,
                segment,
                REPLICAS=REPLICAS,
                X=max(triton.next_power_of_2(num_experts), 2),
                num_warps=max(1, min(8, num_experts // 128)),
            )
    return windows_REJ.sum(dim=0), sequences_NJ


@triton.jit
def _add_runs(windows, sequence, f, run, ended):
    """Count the windows of a run for the experts whose run has ended."""
    ended = ended & (run > 0)
    tl.atomic_add(windows + f, run.to(tl.int64), mask=ended, sem="relaxed")
    if sequence is not None:
        tl.atomic_add(sequence + f, run.to(tl.int64), mask=ended, sem="relaxed")


@triton.jit
def _count_windows(ids, position, windows, sequences, T, K, E, m, segment, REPLICAS: tl.constexpr, X: tl.constexpr):
    """Count the windows that end in a segment of a row."""
    n = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * segment
    stop = tl.minimum(start + segment, T)
    before = tl.maximum(start - m + 1, 0)  # the first window begins here
    lanes = tl.arange(0, X)
    is_expert = lanes < E
    replica = (n + tl.program_id(1)) % REPLICAS
    of_expert = windows + (replica * E + lanes) * (m + 1)
    of_sequence = None
    if sequences is not None:
        of_sequence = sequences + n * (m + 1)
    f = tl.zeros((X,), tl.int32)
    counted = 0  # windows so far
    counted_before_run = tl.zeros((X,), tl.int32)
    for t in range(before, stop):
        at = tl.load(position + n * T + t)
        if at <= 0:
            _add_runs(of_expert, of_sequence, f, counted - counted_before_run, is_expert)
            f = tl.zeros((X,), tl.int32)
            counted_before_run = tl.zeros((X,), tl.int32) + counted
        if at >= 0:
            change = tl.zeros((X,), tl.int32)
            token = (n * T + t) * K
            for k in range(0, K):
                change += tl.where(lanes == tl.load(ids + token + k), 1, 0)
            if (at >= m) & (t - m >= before):
                left = (n * T + t - m) * K
                for k in range(0, K):
                    change -= tl.where(lanes == tl.load(ids + left + k), 1, 0)
            _add_runs(of_expert, of_sequence, f, counted - counted_before_run, change != 0)
            counted_before_run = tl.where(change != 0, counted, counted_before_run)
            f += change
            if (at >= m - 1) & (t >= start):
                counted += 1
    _add_runs(of_expert, of_sequence, f, counted - counted_before_run, is_expert)
