"""Segment routing best performance (SRP): how well one fixed set of experts a segment could serve a router's choices.

Source: arXiv 2505.16056. N sequences, T tokens, E routed experts of the layer, K active per token, m segment length,
``f[e, p]`` the number of tokens of the window p on which expert e is active.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BestF1:
    """The best segment router of each group of (expert, window) pairs; every tensor has the groups' shape.

    Attributes:
        f1: float64, ``max_a 2 TP(a) / (P(a) + A)``, which is the SRP of the group; 0 where it is never active.
        threshold: int64, a*, the first threshold that reaches the maximum.
        loaded: int64, ``P(a*)``, tokens x experts that the segment router keeps ready.
        hits: int64, ``TP(a*)``, those of them that the router uses.
        active: int64, ``A``, tokens x experts that the router uses.
    """

    f1: Tensor
    threshold: Tensor
    loaded: Tensor
    hits: Tensor
    active: Tensor

    @property
    def size_ratio(self) -> Tensor:
        """rho_hat = P(a*) / A in float64: experts that the segment router loads for one that the router uses."""
        return torch.where(self.active > 0, self.loaded / self.active.clamp_min(1).double(), 0.0)


def best_f1(histogram: Tensor, segment_length: int) -> BestF1:
    """The threshold on f that predicts activations best, one for each group, from how often each f occurs.

    ``TP(a) = sum_{j>=a} j H[j]``, ``P(a) = m sum_{j>=a} H[j]``, ``A = sum_j j H[j]``, ``F1(a) = 2 TP(a) / (P(a) + A)``
    for a = 0..m. Reads no value on the host and carries no gradient.

    Args:
        histogram: [..., m+1] integers; ``H[j]`` of a group is the number of its (expert, window) pairs with f = j.
        segment_length: m.

    Raises:
        TypeError: a histogram that is not of integers.
        ValueError: a last dimension other than m + 1.

    Example:
        >>> best = best_f1(torch.tensor([[2, 0, 1], [3, 0, 0]]), segment_length=2)
        >>> best.f1, best.threshold
        (tensor([1., 0.], dtype=torch.float64), tensor([1, 0]))
    """
    if histogram.is_floating_point() or histogram.dtype == torch.bool:
        raise TypeError(f"histogram must be an integer tensor, got {histogram.dtype}")
    if histogram.dim() == 0 or histogram.shape[-1] != segment_length + 1:
        raise ValueError(f"histogram must have shape [..., m+1] with m+1={segment_length + 1}, got {list(histogram.shape)}")
    count = torch.arange(segment_length + 1, device=histogram.device)
    loaded = segment_length * _sum_from(histogram)
    hits = _sum_from(histogram * count)
    active = hits[..., 0]
    f1 = 2 * hits / (loaded + active[..., None]).clamp_min(1).double()
    best, threshold = f1.max(dim=-1)
    at_best = threshold[..., None]
    return BestF1(
        f1=best,
        threshold=threshold,
        loaded=loaded.gather(-1, at_best)[..., 0],
        hits=hits.gather(-1, at_best)[..., 0],
        active=active,
    )


def _sum_from(values: Tensor) -> Tensor:
    """``out[..., a] = sum_{j>=a} values[..., j]`` in int64."""
    return values.flip(-1).cumsum(-1, dtype=torch.int64).flip(-1)
