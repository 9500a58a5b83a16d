"""Write how often each expert was used, in the form that engines read which pin experts in memory."""

from collections.abc import Iterable

from torch import Tensor


def usage_profile(counts: Iterable[Tensor]) -> str:
    """Return a line ``layer expert count`` for each expert, layers and experts numbered from 0.

    Args:
        counts: for each layer [E] int64, the tokens that used the expert; experts that none used get a line too.

    Example:
        >>> import torch
        >>> usage_profile([torch.tensor([5, 0]), torch.tensor([2, 3])]).splitlines()
        ['0 0 5', '0 1 0', '1 0 2', '1 1 3']
    """
    return "".join(
        f"{layer} {expert} {count}\n"
        for layer, counts_E in enumerate(counts)
        for expert, count in enumerate(counts_E.tolist())
    )
