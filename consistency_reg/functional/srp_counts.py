"""The counts of windows that SRP is made of, for several segment lengths in one pass.

``f[e, p]`` is the number of tokens of the window p (m consecutive tokens of one document) on which expert e is active.
N sequences, T tokens, E routed experts of a layer, K active per token, m segment length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from consistency_reg import devices
from consistency_reg.functional.segments import active_experts, running_sums, window_ends
from consistency_reg.routing import check_id_shape, check_masks
from consistency_reg.routing.documents import chunks_with_positions

CHUNK_TOKENS = 2**13  # with 64 experts a chunk is a megabyte: it stays in a CPU's cache
KERNEL_CHUNK_TOKENS = 2**22  # enough to fill a GPU


@dataclass(frozen=True)
class SRPCounts:
    """Counts that determine the SRP of one layer: integers, so that they add up over batches and processes exactly.

    Attributes:
        windows: for each segment length m, [E, m+1] int64; ``[e, j]`` is the number of windows with ``f[e] = j``.
        sequence_windows: for each m, [N, m+1] int64, those of each sequence over all experts; empty unless asked for.
        usage: [E] int64, valid tokens on which each expert is active.
    """

    windows: dict[int, Tensor]
    sequence_windows: dict[int, Tensor]
    usage: Tensor


def srp_counts(
    expert_ids: Tensor,
    num_experts: int,
    segment_lengths: Sequence[int],
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    per_sequence: bool = False,
    chunk_tokens: int | None = None,
) -> SRPCounts:
    """Count the windows of one layer by expert and f, for several segment lengths in one pass.

    Memory beyond the result is bounded by ``chunk_tokens`` x E (or one row, if that is longer), whatever N is.
    On CUDA the host does not wait, so ids are not checked: see :func:`consistency_reg.routing.check_expert_ids`.

    Args:
        expert_ids: [N, T, K] int64.
        num_experts: E.
        segment_lengths: the m.
        valid, document_ids: [N, T], see :func:`consistency_reg.functional.srp`.
        per_sequence: count the windows of each sequence too, for a bootstrap.
        chunk_tokens: tokens that are worked on at a time; what suits the device when None.

    Example:
        >>> counts = srp_counts(torch.tensor([[[0], [0], [1], [1]]]), num_experts=2, segment_lengths=[2])
        >>> counts.windows[2].tolist(), counts.usage.tolist()
        ([[1, 1, 1], [1, 1, 1]], [2, 2])
    """
    check_id_shape(expert_ids, num_experts)
    N, T, _ = expert_ids.shape
    check_masks((N, T), valid, document_ids)
    device, E = expert_ids.device, num_experts
    windows = {m: torch.zeros(E, m + 1, dtype=torch.int64, device=device) for m in segment_lengths}
    sequences = {m: torch.zeros(N, m + 1, dtype=torch.int64, device=device) for m in segment_lengths if per_sequence}
    usage_E = torch.zeros(E, dtype=torch.int64, device=device)
    by_kernel = devices.has_kernels(expert_ids)
    count, most = (_count_by_kernel, KERNEL_CHUNK_TOKENS) if by_kernel else (_count, CHUNK_TOKENS)
    chunks = chunks_with_positions(expert_ids, valid, document_ids, chunk_tokens or most)
    for rows, ids_BTK, valid_BT, position_BT in chunks:
        part = count(ids_BTK, E, segment_lengths, valid_BT, position_BT, per_sequence)
        usage_E += part.usage
        for m in segment_lengths:
            windows[m] += part.windows[m]
            if per_sequence:
                sequences[m][rows] = part.sequence_windows[m]
    return SRPCounts(windows, sequences, usage_E)


def _count(
    ids_BTK: Tensor, E: int, lengths: Sequence[int], valid_BT: Tensor | None, position_BT: Tensor, per_sequence: bool
) -> SRPCounts:
    B, T, _ = ids_BTK.shape
    active_BTE = active_experts(ids_BTK, E, valid_BT)
    sum_dtype = torch.int16 if T < 2**15 else torch.int32
    before_BTE = pad(running_sums(active_BTE, sum_dtype), (0, 0, 1, 0))  # [B, T+1, E]
    expert_E = torch.arange(E, device=ids_BTK.device)
    sequence_B11 = torch.arange(B, device=ids_BTK.device)[:, None, None]
    windows, sequences = {}, {}
    for m in lengths:
        f_BWE = before_BTE[:, m:] - before_BTE[:, : max(T + 1 - m, 0)]  # W = 0 where a row is shorter than m
        whole_BW = window_ends(position_BT, m)[:, m - 1 :]
        windows[m] = _count_rows(f_BWE, expert_E, whole_BW, (E, m + 1))
        if per_sequence:
            sequences[m] = _count_rows(f_BWE, sequence_B11, whole_BW, (B, m + 1))
    return SRPCounts(windows, sequences, before_BTE[:, -1].sum(dim=0))


def _count_by_kernel(
    ids_BTK: Tensor, E: int, lengths: Sequence[int], valid_BT: Tensor | None, position_BT: Tensor, per_sequence: bool
) -> SRPCounts:
    from consistency_reg.kernels.srp import window_counts

    found = {m: window_counts(ids_BTK, E, position_BT, m, per_sequence=per_sequence) for m in lengths}
    windows = {m: by_expert for m, (by_expert, _) in found.items()}
    sequences = {m: by_row for m, (_, by_row) in found.items() if by_row is not None}
    usage_E = window_counts(ids_BTK, E, position_BT, 1)[0][:, 1]  # a window of one token counts uses
    return SRPCounts(windows, sequences, usage_E)


def _count_rows(f_BWE: Tensor, row: Tensor, whole_BW: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the histogram of f over whole windows for each ``row``, which broadcasts against f: [rows, m+1]."""
    count = _bincount if devices.is_on_host(f_BWE) else _scatter_count
    return count(f_BWE + (row * shape[1]).to(torch.int32), whole_BW, shape[0] * shape[1]).view(shape)


def _bincount(bin_BWE: Tensor, keep_BW: Tensor, bins: int) -> Tensor:
    kept = bin_BWE if bool(keep_BW.all()) else bin_BWE[keep_BW]
    return torch.bincount(kept.flatten(), minlength=bins)


def _scatter_count(bin_BWE: Tensor, keep_BW: Tensor, bins: int) -> Tensor:
    """Count as :func:`_bincount` does, without a wait of the host for the device."""
    counts = torch.zeros(bins, dtype=torch.int64, device=bin_BWE.device)
    return counts.scatter_add_(0, bin_BWE.flatten().long(), keep_BW[..., None].expand_as(bin_BWE).flatten().long())
