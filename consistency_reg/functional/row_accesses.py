"""The accesses of rows of tokens, on any device: one sort finds the uses of each expert before and after each access.

N rows, T tokens, K experts per token, A = T*K accesses of a row.
"""

import torch
from torch import Tensor


class RowAccesses:
    """The accesses of rows, numbered along each row; see :class:`~consistency_reg.cache_policies.Accesses`.

    The values of padding are arbitrary.

    Args:
        expert_ids: [N, T, K] int64.
        num_experts: E.
        position: [N, T] index of each token in its document, -1 on padding.

    Example:
        >>> accesses = RowAccesses(torch.tensor([[[0], [1], [0]]]), 2, torch.tensor([[0, 1, 2]]))
        >>> accesses.next_access().flatten().tolist(), accesses.uses_before().flatten().tolist()
        ([2, 3, 3], [0, 0, 1])
    """

    def __init__(self, expert_ids: Tensor, num_experts: int, position: Tensor) -> None:
        self.shape = expert_ids.shape
        N, self.tokens, K = expert_ids.shape
        self.size = self.tokens * K
        document_NT = torch.arange(self.tokens, device=position.device) - position  # the token that it starts at
        group_NTK = (document_NT * num_experts)[:, :, None] + expert_ids
        group_NA = group_NTK.masked_fill(position[:, :, None] < 0, -1).view(N, self.size)
        self._group_NA, self._access_NA = group_NA.sort(dim=1, stable=True)

    def uses_before(self) -> Tensor:
        """Return how often the document used the expert of each access before it: [N, T, K] int64."""
        index_A = torch.arange(self.size, device=self._group_NA.device)
        begins_NA = torch.ones_like(self._group_NA, dtype=torch.bool)
        begins_NA[:, 1:] = self._group_NA[:, 1:] != self._group_NA[:, :-1]
        first_NA = torch.where(begins_NA, index_A, 0).cummax(dim=1).values
        return self._by_access(index_A - first_NA)

    def next_access(self) -> Tensor:
        """Return the next access of the document to the same expert, A where there is none: [N, T, K] int64."""
        next_NA = torch.full_like(self._access_NA, self.size)
        same_NA = self._group_NA[:, 1:] == self._group_NA[:, :-1]
        next_NA[:, :-1] = torch.where(same_NA, self._access_NA[:, 1:], self.size)
        return self._by_access(next_NA)

    def _by_access(self, sorted_values: Tensor) -> Tensor:
        return torch.empty_like(sorted_values).scatter_(1, self._access_NA, sorted_values).view(self.shape)
