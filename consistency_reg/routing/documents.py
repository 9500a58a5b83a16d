"""Documents: the runs of tokens that belong together, which every measure and loss stands on.

A *document* is a maximal run of valid tokens of one row with the same document id. No window, adjacent pair or
simulated cache crosses a row, a pad or a document boundary.

B rows, T tokens a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad


def row_chunks(rows: int, row_size: int, most: int) -> Iterator[slice]:
    """Yield rows to work on together, so that memory does not grow with their number; one empty chunk for none.

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


def document_positions(
    shape: tuple[int, int],
    valid: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Return the index of every token within its document, and -1 on padding.

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


def document_lengths(position: Tensor) -> Tensor:
    """Return how many tokens the document of each token has, 0 on padding: [B, T] positions -> [B, T] int64.

    Example:
        >>> document_lengths(torch.tensor([[0, 1, 0, -1]]))
        tensor([[2, 2, 1, 0]])
    """
    B, T = position.shape
    index_T = torch.arange(T, device=position.device)
    no_continuation_BT = torch.where(position <= 0, index_T, T).flip(1).cummin(dim=1).values.flip(1)
    ends_BT = torch.cat([no_continuation_BT[:, 1:], no_continuation_BT.new_full((B, 1), T)], dim=1)
    return (ends_BT - index_T + position).masked_fill(position < 0, 0)


def document_ends(position: Tensor) -> Tensor:
    """Return where the last token of a document stands: [B, T] positions -> [B, T] bool.

    Example:
        >>> document_ends(torch.tensor([[0, 1, 0, -1, 0, 1]]))
        tensor([[False,  True,  True, False, False,  True]])
    """
    return (position >= 0) & (pad(position[:, 1:], (0, 1)) <= 0)


def chunks_with_positions(
    expert_ids: Tensor, valid: Tensor | None, document_ids: Tensor | None, most: int
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
    """Yield some rows at a time, about ``most`` tokens: which, their ids, ``valid`` and :func:`document_positions`."""
    B, T, _ = expert_ids.shape
    for rows in row_chunks(B, T, most):
        ids_BTK = expert_ids[rows]
        valid_BT, document_BT = (None if mask is None else mask[rows] for mask in (valid, document_ids))
        position_BT = document_positions((len(ids_BTK), T), valid_BT, document_BT, device=expert_ids.device)
        yield rows, ids_BTK, valid_BT, position_BT
