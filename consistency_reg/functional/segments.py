"""Windows of tokens inside documents, which :mod:`consistency_reg.routing.documents` defines.

B rows, T tokens a row, E routed experts of the layer, K active experts per token, m segment length.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from consistency_reg.devices import is_on_host


def check_segment_lengths(
    segment_lengths: int | Iterable[int], *, lowest: int = 1, name: str = "segment_lengths"
) -> tuple[int, ...]:
    """Return one or several segment lengths as a tuple.

    Args:
        segment_lengths: m in tokens, or several of them.
        lowest: the shortest that makes sense.
        name: of the argument, for the message.

    Raises:
        ValueError: unless there is at least one and all are distinct integers of at least ``lowest``.

    Example:
        >>> check_segment_lengths(16), check_segment_lengths([4, 16], lowest=2)
        ((16,), (4, 16))
    """
    several = isinstance(segment_lengths, Iterable)
    lengths = tuple(segment_lengths) if isinstance(segment_lengths, Iterable) else (segment_lengths,)
    if (
        not lengths
        or any(not isinstance(m, int) or isinstance(m, bool) or m < lowest for m in lengths)
        or len(set(lengths)) != len(lengths)
    ):
        expected = "a list of distinct integers" if several else "an integer"
        raise ValueError(f"{name} must be {expected} of at least {lowest}, got {segment_lengths!r}")
    return lengths


def side_by_side(expert_ids: Sequence[Tensor], num_experts: Sequence[int]) -> Tensor:
    """Return the experts of several layers as those of one, each layer's ids behind those of the layer before.

    Args:
        expert_ids: [B, T, K] for each layer.
        num_experts: E of each layer.

    Returns:
        [B, T, sum of K]; a single layer's ids as they are.

    Example:
        >>> side_by_side([torch.tensor([[[2, 0]]]), torch.tensor([[[1]]])], [3, 4])
        tensor([[[2, 0, 4]]])
    """
    first = [sum(num_experts[:layer]) for layer in range(len(num_experts))]
    shifted = [ids + at if at else ids for ids, at in zip(expert_ids, first, strict=True)]
    return torch.cat(shifted, dim=-1) if len(shifted) > 1 else shifted[0]


def active_experts(expert_ids: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """Return the 0/1 activations a[e, t]: [..., B, T, K] ids -> [..., B, T, E] int16, 0 on padding.

    Example:
        >>> active_experts(torch.tensor([[[2, 0]]]), num_experts=3)
        tensor([[[1, 0, 1]]], dtype=torch.int16)
    """
    active_BTE = torch.zeros(*expert_ids.shape[:-1], num_experts, dtype=torch.int16, device=expert_ids.device)
    if valid is None:
        return active_BTE.scatter_(-1, expert_ids, 1)
    expert_ids = expert_ids.where(valid[..., None], 0)  # what a router says of padding may be anything
    return active_BTE.scatter_(-1, expert_ids, 1).mul_(valid[..., None])


def window_ends(position: Tensor, segment_length: int) -> Tensor:
    """Return where a whole window of ``segment_length`` tokens of a document ends: [B, T] positions -> [B, T] bool.

    Example:
        >>> window_ends(torch.tensor([[0, 1, 2, 0, 1]]), 2)
        tensor([[False,  True,  True, False,  True]])
    """
    return position >= segment_length - 1


def running_sums(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over all tokens of a row up to each, in ``dtype`` or that of ``values``: [..., T, E] -> [..., T, E].

    It must be exact in that dtype, or wrap around as integers do: differences of two, such as :func:`window_sums`, are
    right all the same where they fit.
    """
    return along_tokens(lambda rows, dim: rows.cumsum(dim, dtype=dtype or rows.dtype), values)


def along_tokens(scan: Callable[[Tensor, int], Tensor], values: Tensor) -> Tensor:
    """Return ``scan(values, dim)`` over T of [..., T, E]; a GPU scans quickly along the innermost axis alone."""
    if is_on_host(values):
        return scan(values, values.dim() - 2)
    by_expert = values.transpose(-1, -2).contiguous()
    return scan(by_expert, values.dim() - 1).transpose(-1, -2)


def window_sums(running: Tensor, segment_length: int) -> Tensor:
    """Sum over the ``segment_length`` tokens that end at each token of a row.

    Args:
        running: [..., T, E], the :func:`running_sums` of the values.
        segment_length: m.

    Returns:
        [..., T, E]; ``out[t] = sum(values[max(t - m + 1, 0) : t + 1])``. Only the entries where
        :func:`window_ends` is True are windows of a document.

    Example:
        >>> window_sums(running_sums(torch.tensor([[[1], [0], [1], [1]]])), 2).flatten().tolist()
        [1, 1, 1, 2]
    """
    if segment_length >= running.shape[-2]:
        return running
    out = running.clone()
    out[..., segment_length:, :] -= running[..., :-segment_length, :]
    return out


def covering_sums(values: Tensor, segment_length: int) -> Tensor:
    """Sum over the windows that cover each token, the transpose of :func:`window_sums`: [..., T, E] -> [..., T, E].

    ``values[t]`` belongs to the window that ends at t (0 where none ends); ``out[t] = sum(values[t : t + m])``.

    Example:
        >>> covering_sums(torch.tensor([[[0], [1], [2], [4]]]), 2).flatten().tolist()
        [1, 3, 6, 4]
    """
    total = running_sums(values)
    T, ahead = total.shape[-2], segment_length - 1
    rest = total[..., -1:, :].expand(*total.shape[:-2], min(ahead, T), -1)
    out = torch.cat([total[..., ahead:, :], rest], dim=-2)
    out[..., 1:, :] -= total[..., :-1, :]
    return out
