"""Documents and the windows of tokens inside them: the ground that every measure and loss stands on.

A *document* is a maximal run of valid tokens of one row with the same document id. No window, adjacent pair or
simulated cache crosses a row, a pad or a document boundary.

B rows, T tokens a row, E routed experts of the layer, K active experts per token, m segment length.
"""

import torch
from torch import Tensor


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
    """The 0/1 activations a[e, t] of one layer: [B, T, K] ids -> [B, T, E] int16, 0 on padding.

    Example:
        >>> active_experts(torch.tensor([[[2, 0]]]), num_experts=3)
        tensor([[[1, 0, 1]]], dtype=torch.int16)
    """
    active_BTE = torch.zeros(*expert_ids.shape[:2], num_experts, dtype=torch.int16, device=expert_ids.device)
    if valid is None:
        return active_BTE.scatter_(2, expert_ids, 1)
    expert_ids = expert_ids.where(valid[..., None], 0)  # what a router says of padding may be anything
    return active_BTE.scatter_(2, expert_ids, 1).mul_(valid[..., None])


def window_ends(position: Tensor, segment_length: int) -> Tensor:
    """Where a whole window of ``segment_length`` tokens of one document ends: [B, T] positions -> [B, T] bool.

    Example:
        >>> window_ends(torch.tensor([[0, 1, 2, 0, 1]]), 2)
        tensor([[False,  True,  True, False,  True]])
    """
    return position >= segment_length - 1


def window_sums(values: Tensor, segment_length: int) -> Tensor:
    """Sum over the ``segment_length`` tokens that end at each token of a row, in the dtype of ``values``.

    Args:
        values: [B, T, E]. The cumulative sum along T must be exact in its dtype (int16 holds rows of 32767 tokens).

    Returns:
        [B, T, E]; ``out[:, t] = sum(values[:, max(t - m + 1, 0) : t + 1])``. Only the entries where
        :func:`window_ends` is True are windows of a document.

    Example:
        >>> window_sums(torch.tensor([[[1], [0], [1], [1]]]), 2).flatten().tolist()
        [1, 1, 1, 2]
    """
    total = values.cumsum(dim=1, dtype=values.dtype)
    if segment_length >= values.shape[1]:
        return total
    out = total.clone()
    out[:, segment_length:] -= total[:, :-segment_length]
    return out


def covering_sums(values: Tensor, segment_length: int) -> Tensor:
    """Sum over the windows that cover each token, the transpose of :func:`window_sums`.

    ``values[:, t]`` belongs to the window that ends at t (0 where none ends);
    ``out[:, t] = sum(values[:, t : t + m])``.

    Example:
        >>> covering_sums(torch.tensor([[[0], [1], [2], [4]]]), 2).flatten().tolist()
        [1, 3, 6, 4]
    """
    total = values.cumsum(dim=1, dtype=values.dtype)
    ahead = segment_length - 1
    out = torch.cat([total[:, ahead:], total[:, -1:].expand(-1, min(ahead, values.shape[1]), -1)], dim=1)
    out[:, 1:] -= total[:, :-1]
    return out
