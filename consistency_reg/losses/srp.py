"""Train for local routing consistency: the loss is 1 - SRP."""

from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor, iinfo, int32

from consistency_reg.distributed import all_sum
from consistency_reg.functional.consistency import Marginals, count_histogram, srp_marginals
from consistency_reg.functional.segments import (
    active_experts,
    check_segment_lengths,
    running_sums,
    window_ends,
    window_sums,
)
from consistency_reg.losses.envelope import EnvelopeLoss
from consistency_reg.routing import LayerStack


class LocalConsistencyLoss(EnvelopeLoss):
    r"""Trains for 1 - SRP of the batch, averaged over segment lengths and layers, by the envelope theorem.

    With the activations ``a[e, t]``, the window counts ``f[e, w]``, the best threshold and its resident sets
    ``R[e, w] = [f[e, w] >= threshold]``: ``dSRP/df[e, w] = (2*R[e, w] - SRP) / D``, ``D = m*sum(R) + sum(f)``.
    Summed over the windows that cover t this is ``g[e, t]``, what activating e on t is worth, and the surrogate is
    ``-sum(g * s)`` with soft memberships s. The value is exactly ``1 - SRP``.

    Args:
        segment_lengths: m, in tokens; those longer than every document of a batch are left out of its mean.
        temperature: see :class:`EnvelopeLoss`, as are the options below.

    Example:
        >>> import torch
        >>> from consistency_reg import RoutingTrace
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0]] * 8], requires_grad=True)
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=3, logits=[logits])
        >>> LocalConsistencyLoss(segment_lengths=(4,))(trace).item()  # the same expert all along: SRP is 1
        0.0
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = (4, 16, 64),
        temperature: float = 1.0,
        balance_neutral: bool | Literal["slope"] | None = None,
        *,
        membership: Literal["margin", "probability"] = "margin",
        scope: Literal["global", "batch", "sequence"] = "global",
    ) -> None:
        super().__init__(membership=membership, temperature=temperature, balance_neutral=balance_neutral, scope=scope)
        self.segment_lengths = check_segment_lengths(segment_lengths, lowest=2)

    def marginals(self, layers: LayerStack, position: Tensor) -> Iterator[Marginals]:
        """Yield SRP of each segment length."""
        active = active_experts(layers.expert_ids, layers.num_experts, position >= 0)
        holds_longest = max(self.segment_lengths) <= iinfo(active.dtype).max
        running = running_sums(active, active.dtype if holds_longest else int32)
        for m in self.segment_lengths:
            counts = window_sums(running, m)
            histogram = count_histogram(counts, window_ends(position, m), m, by_row=self.scope == "sequence")
            if self.scope == "global":
                (histogram,) = all_sum(histogram)
            yield srp_marginals(counts, position, histogram, m)
