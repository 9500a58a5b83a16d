"""Documents and the windows of tokens inside them: the ground that every measure and loss stands on.

A *document* is a maximal run of valid tokens of one row with the same document id. No window, adjacent pair or
simulated cache crosses a row, a pad or a document boundary.

B rows, T tokens a row, E routed experts of the layer, K active experts per token, m segment length.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor


def check_segment_lengths(
    segment_lengths: int | Iterable[int], *, lowest: int = 1, name: str = "segment_lengths"
) -> tuple[int, ...]:
    """One or several segment lengths as a tuple.

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


def row_chunks(rows: int, row_size: int, most: int) -> Iterator[slice]:
    """Rows to work on together so that memory does not grow with their number; one empty chunk where there are none.

    Args:
        rows: how many there are.
        row_size: of one row, in the unit of ``most``.
        most: of a chunk, unless a single row is larger.

    Example:
        >>> list(row_chunks(5, row_size=10, most=25))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, most // max(row_size, 1))
    for first in range(0, max(rows, 1), step):
        yield slice(first, min(first + step, rows))


def rows_of(
    rows: slice, expert_ids: Tensor, valid: Tensor | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Some rows of the ids and of the masks that there are."""
    return (
        expert_ids[rows],
        None if valid is None else valid[rows],
        None if document_ids is None else document_ids[rows],
    )


def side_by_side(expert_ids: Sequence[Tensor], num_experts: Sequence[int]) -> Tensor:
    """The experts of several layers as those of one layer, each layer's ids behind those of the layer before.

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


def document_positions(
    shape: tuple[int, int],
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Index of every token within its document, and -1 on padding.

    Args:
        shape: (B, T).
        valid: [B, T] bool, True for real tokens; all of them when None.
        document_ids: [B, T] integers; one document a row when None.
        device: where the result lives when neither mask is given.

    Returns:
        [B, T] int64.

    Example:
        >>> valid = torch.tensor([[True, True, True, False, True]])
        >>> document_ids = torch.tensor([[0, 0, 7, 7, 7]])
        >>> document_positions((1, 5), valid, document_ids)
        tensor([[ 0,  1,  0, -1,  0]])
    """
    B, T = shape
    if device is None:
        device = next((mask.device for mask in (valid, document_ids) if mask is not None), None)
    index_T = torch.arange(T, device=device)
    first_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
    first_BT[:, :1] = True
    if document_ids is not None:
        first_BT[:, 1:] |= document_ids[:, 1:] != document_ids[:, :-1]
    if valid is not None:
        first_BT[:, 1:] |= ~valid[:, :-1]
    start_BT = torch.where(first_BT, index_T, 0).cummax(dim=1).values
    position_BT = index_T - start_BT
    return position_BT if valid is None else position_BT.masked_fill(~valid, -1)


def active_experts(expert_ids: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """The 0/1 activations a[e, t]: [..., B, T, K] ids -> [..., B, T, E] int16, 0 on padding.

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
    """Where a whole window of ``segment_length`` tokens of one document ends: [B, T] positions -> [B, T] bool.

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
    """``scan(values, dim)`` over T of [..., T, E]. A GPU scans quickly along the innermost axis in memory alone."""
    if not values.is_cuda:
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
