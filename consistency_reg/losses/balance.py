"""The load-balance loss of each layer, never pooled over layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from consistency_reg.distributed import all_sum, world_size
from consistency_reg.functional.segments import active_experts
from consistency_reg.losses.base import RoutingLoss, without_padding
from consistency_reg.losses.options import check_scope
from consistency_reg.routing import LayerRouting, RoutingTrace


class LoadBalanceLoss(RoutingLoss):
    """Computes Switch's ``E/K * sum_e share_e * prob_e`` for each layer, 1 when usage is uniform.

    ``share_e`` is the share of tokens that expert e is active on (sums to K, no gradient), ``prob_e`` the mean router
    probability of e over the valid tokens of this batch (gradient). With "global" that is the batch of all processes,
    each of which has its value; the gradients are right where they are averaged over the processes, as DDP and FSDP do.

    Args:
        scope: where usage is counted. "sequence": in each row by itself; "batch": in the batch of this process;
            "global": summed over the data-parallel processes and over the micro-batches of an accumulation so far.
        running: decay r in [0, 1) of a running average of the usage over steps, ``(1 - r) * sum_i r^i * share[n - i]``
            divided by its weight so far. Balance is then held over about ``1 / (1 - r)`` steps of data instead of
            one, which leaves room for local consistency. 0 uses the present step only. Training calls move the
            average, evaluation uses the present batch; the average is in the state dict.
        accumulation_steps: training-mode calls (micro-batches) that make one optimizer step; the average moves after
            the last of them, or where :meth:`end_step` ends the step before it.

    Source: arXiv 2101.03961 (the form), 2501.11873 (global scope).

    Example:
        >>> logits = torch.eye(4)[None] * 9
        >>> trace = RoutingTrace([logits.topk(1).indices], num_experts=4, logits=[logits])
        >>> round(LoadBalanceLoss(scope="batch")(trace).item(), 4)
        1.0
    """

    def __init__(
        self,
        scope: Literal["global", "batch", "sequence"] = "global",
        running: float = 0.0,
        *,
        accumulation_steps: int = 1,
    ) -> None:
        super().__init__()
        self.scope = check_scope(scope)
        if not 0 <= running < 1:
            raise ValueError(f"running must lie in [0, 1), got {running}")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        self.running = float(running)
        self.accumulation_steps = accumulation_steps
        self._average: dict[str, Tensor] = {}  # layer -> [E + 1] running average of the share, and its weight so far
        self._pending: dict[str, Tensor] = {}  # layer -> [E + 1] uses of each expert and tokens since the last step
        self._calls = 0

    def per_layer(self, trace: RoutingTrace) -> Tensor:
        """Return the loss of every layer [L]; a training-mode call counts as one micro-batch."""
        counts = [_Counts.of(layer, trace) for layer in trace]
        alike = groupby(counts, key=lambda one: (one.num_experts, one.top_k, one.probabilities.dtype, one.uses.device))
        tokens_B = trace.valid_mask.sum(dim=1)
        losses_L = torch.cat([self._losses(list(layers), tokens_B) for _, layers in alike])
        if self.training:
            self._calls += 1
            if self._calls == self.accumulation_steps:
                self.end_step()
        return losses_L

    def _losses(self, layers: Sequence["_Counts"], tokens_B: Tensor) -> Tensor:
        """Return the losses of layers of one shape [S]; in training mode their usage joins the present step."""
        uses_SBE = torch.stack([layer.uses for layer in layers])
        share_SGE = self._share([layer.name for layer in layers], uses_SBE, tokens_B)
        rows_G = tokens_B if self.scope == "sequence" else tokens_B.sum(dim=0, keepdim=True)
        probability_SGE = torch.stack([layer.probabilities for layer in layers])
        if self.scope != "sequence":
            probability_SGE = probability_SGE.sum(dim=1, keepdim=True)
        if self.scope == "global":
            mean_probability_SGE = _mean_over_processes(probability_SGE, rows_G)
        else:
            mean_probability_SGE = probability_SGE / rows_G.clamp_min(1)[:, None]
        fair = layers[0].top_k / layers[0].num_experts
        loss_SG = (share_SGE.to(mean_probability_SGE.dtype) * mean_probability_SGE).sum(dim=-1) / fair
        return loss_SG.sum(dim=-1) / (rows_G > 0).sum().clamp_min(1)

    @torch.no_grad()
    def _share(self, names: Sequence[str], uses: Tensor, tokens: Tensor) -> Tensor:
        """Return the usage that the loss multiplies with [S, G, E]: G = B rows for "sequence", else 1."""
        counts_SGE1 = torch.cat([uses, tokens[:, None].expand(*uses.shape[:2], 1)], dim=-1)
        total_SE1 = counts_SGE1.sum(dim=1)
        if self.scope == "global":
            (total_SE1,) = all_sum(total_SE1)
        if self.training:
            pending_SE1 = total_SE1 + _kept(self._pending, names, total_SE1)
            self._pending.update(zip(names, pending_SE1, strict=True))
            if self.scope == "global":
                total_SE1 = pending_SE1
        if self.scope != "sequence":
            counts_SGE1 = total_SE1[:, None]
        share_SGE1 = self._step(counts_SGE1)
        if self.training and self.running:
            share_SGE1 = self._moved(names, share_SGE1)
        return share_SGE1[..., :-1] / share_SGE1[..., -1:].clamp_min(torch.finfo(share_SGE1.dtype).tiny)

    def _step(self, counts: Tensor) -> Tensor:
        """Return the usage of one step and its weight [S, G, E + 1]: 1, or 0 for a step without tokens."""
        return counts / counts[..., -1:].clamp_min(1)

    def _moved(self, names: Sequence[str], step: Tensor) -> Tensor:
        """Return the running average and its weight after a step [S, G, E + 1]; no tokens leave it as it is."""
        past = _kept(self._average, names, step)[:, None]
        return torch.where(step[..., -1:] > 0, self.running * past + (1 - self.running) * step, past)

    @torch.no_grad()
    def end_step(self) -> None:
        """End the optimizer step before its last micro-batch, as a trainer does at the end of an epoch.

        Between two steps it does nothing, so it may be called at the end of every step.
        """
        pending = self._pending if self.running else {}
        for _, alike in groupby(pending, key=lambda name: (len(pending[name]), pending[name].device)):
            names = list(alike)
            step_S1E1 = self._step(torch.stack([pending[name] for name in names])[:, None])
            self._average.update(zip(names, self._moved(names, step_S1E1)[:, 0], strict=True))
        self._pending = {}
        self._calls = 0

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the state dict keeps: the running average and the counts of an unfinished accumulation."""
        return {"average": dict(self._average), "pending": dict(self._pending), "calls": self._calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`get_extra_state` returned."""
        self._average, self._pending = dict(state["average"]), dict(state["pending"])
        self._calls = state["calls"]


@dataclass(frozen=True)
class _Counts:
    """Holds the counts that the loss needs of a layer's batch: E numbers for each row, not for each token."""

    name: str
    num_experts: int
    top_k: int
    uses: Tensor  # [B, E] int64, the valid tokens on which each expert is active
    probabilities: Tensor  # [B, E] sum of the router's probabilities over the valid tokens, with the graph

    @classmethod
    def of(cls, layer: LayerRouting, trace: RoutingTrace) -> "_Counts":
        valid_BT = trace.valid_mask
        uses_BE = active_experts(layer.expert_ids, layer.num_experts, valid_BT).sum(dim=1)
        probabilities_BTE = without_padding(layer, trace).probabilities
        probability_BE = (probabilities_BTE * valid_BT[:, :, None]).sum(dim=1)
        return cls(layer.name, layer.num_experts, layer.top_k, uses_BE, probability_BE)


def _kept(state: Mapping[str, Tensor], names: Sequence[str], like: Tensor) -> Tensor:
    """Return what is kept of each layer [S, E + 1], 0 where nothing is."""
    nothing = like.new_zeros(like.shape[-1])
    return torch.stack([state[name].to(like) if name in state else nothing for name in names])


def _mean_over_processes(sums: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over all processes of sums [S, 1, E] by counts [1], each process with its part of the gradient.

    The part is multiplied by the number of processes, over which data-parallel training averages gradients: so
    processes with more valid tokens count for more.
    """
    all_sums, all_counts = all_sum(sums.detach(), counts.to(sums.dtype))
    own_part = world_size() * (sums - sums.detach())  # 0, with the gradient
    return (all_sums + own_part) / all_counts.clamp_min(1)[:, None]
