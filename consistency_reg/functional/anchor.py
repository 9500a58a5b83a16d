"""The divergence of a router from a reference.

B rows, T tokens, E routed experts of the layer.
"""

from torch import Tensor

from consistency_reg.functional.pairs import masked_mean


def mean_kl(log_probability: Tensor, log_reference: Tensor, valid: Tensor) -> Tensor:
    """Return ``mean KL(p_t ‖ reference_t)`` over the valid tokens: two [B, T, E] log-distributions -> scalar.

    Example:
        >>> import torch
        >>> log_p = torch.tensor([[[0.5, 0.5]]]).log()
        >>> round(mean_kl(log_p, torch.tensor([[[0.8, 0.2]]]).log(), torch.tensor([[True]])).item(), 4)
        0.2231
    """
    divergence = (log_probability.exp() * (log_probability - log_reference)).sum(dim=-1)
    return masked_mean(divergence, valid)
