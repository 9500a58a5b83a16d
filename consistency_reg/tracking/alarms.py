"""Say that a training goes wrong while it runs: an expert dies, balance is lost, a term does not reach the routers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consistency_reg.measures import COLLAPSED_BELOW, GLOBAL_CV, MIN_SHARE, parse
from consistency_reg.measures.reading import Measure
from consistency_reg.routing import RoutingTrace

TOO_STRONG = "Lower the weight of the term, or hold balance over more steps: LoadBalanceLoss(running=0.95)"


@dataclass(frozen=True)
class Alarm:
    """Holds what is wrong in one line, and in a text how to mend it."""

    title: str
    text: str


class Alarms:
    """Raise each alarm once.

    Args:
        min_share: usage of an expert, as a share of its fair share, that none shall fall below; None for no alarm.
        max_cv: global CV of the experts' usage, mean of the layers, that shall not be exceeded; None for no alarm. What
            is usual depends on the model: twice the baseline's is a good bound where that is known.

    Raises:
        ValueError: a bound that is not positive.

    Example:
        >>> alarms = Alarms()
        >>> collapsed = {"balance/min_share": torch.tensor(0.02), "balance/min_share/layer_03": torch.tensor(0.02)}
        >>> [alarm.title for alarm in alarms.of_model(collapsed)], alarms.of_model(collapsed)
        (['an expert is used less than 0.1 of its fair share'], [])
    """

    def __init__(self, min_share: float | None = COLLAPSED_BELOW, max_cv: float | None = 1.0) -> None:
        for name, bound in (("min_share", min_share), ("max_cv", max_cv)):
            if bound is not None and not bound > 0:
                raise ValueError(f"alarms must have a positive {name}, or None for no alarm, got {bound}")
        self.min_share = min_share
        self.max_cv = max_cv
        self._raised: set[str] = set()

    def begin_anew(self) -> None:
        """Forget which alarms were raised."""
        self._raised = set()

    def of_model(self, measures: Mapping[str, Tensor]) -> list[Alarm]:
        """Return the alarms that the measures of a model and its layers raise now, and have not raised before."""
        alarms = []
        share, cv = (float(measures.get(one.key, torch.nan)) for one in (MIN_SHARE, GLOBAL_CV))
        if self.min_share is not None and share < self.min_share:
            title = f"an expert is used less than {self.min_share:g} of its fair share"
            text = (
                f"It has {share:.3f} of it{_worst_layer(measures, MIN_SHARE, min)}: the router collapses. {TOO_STRONG}."
            )
            alarms.append(Alarm(title, text))
        if self.max_cv is not None and cv > self.max_cv:
            title = f"the global CV of expert usage is above {self.max_cv:g}"
            where = _worst_layer(measures, GLOBAL_CV, max).replace(" in", ", most in")
            text = f"It is {cv:.2f}{where}: a few experts do most of the work. {TOO_STRONG}."
            alarms.append(Alarm(title, text))
        return self._new(alarms)

    def of_term(self, gradient: Tensor | float) -> list[Alarm]:
        """Return an alarm if the gradient of a weighted term, see :func:`gradient_norm`, is 0 or not finite."""
        norm = float(gradient)
        if norm > 0 and norm != float("inf"):
            return []
        title = "the consistency term has no gradient" if norm == 0 else "the consistency term's gradient is not finite"
        text = (
            f"Its norm at the routers' scores is {norm:g}: the term does not train the routers. Are they frozen, are "
            "all documents shorter than the segments, or is its temperature too small?"
        )
        return self._new([Alarm(title, text)])

    def _new(self, alarms: list[Alarm]) -> list[Alarm]:
        new = [alarm for alarm in alarms if alarm.title not in self._raised]
        self._raised |= {alarm.title for alarm in new}
        return new


def gradient_norm(term: Tensor, trace: RoutingTrace) -> Tensor:
    """Return the norm of a term's gradient at the routers' scores of its trace, and keep the graph.

    Only the graph between the scores and the term is walked, not the model's. The host does not wait.

    Args:
        term: scalar, with the graph.
        trace: what it was computed on.

    Example:
        >>> scores = torch.randn(1, 3, 4, requires_grad=True)
        >>> trace = RoutingTrace([scores.topk(1).indices], num_experts=4, scores=[scores])
        >>> float(gradient_norm((trace.scores[0] * 0).sum(), trace))
        0.0
    """
    found = [tensor for tensor in (*(trace.scores or ()), *(trace.logits or ())) if tensor.requires_grad]
    if not found or not term.requires_grad:
        return term.new_zeros(())
    gradients = torch.autograd.grad(term, found, retain_graph=True, allow_unused=True)
    norms = [gradient.detach().float().norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else term.new_zeros(())


def _worst_layer(measures: Mapping[str, Tensor], measure: Measure, worst: Callable[..., int]) -> str:
    """Return " in layer 3", the layer of the worst value; "" where layers are not known."""
    readings = {name: parse(name) for name in measures}
    layers = {
        reading.layer: float(measures[name])
        for name, reading in readings.items()
        if reading is not None and reading.measure is measure and reading.layer is not None
    }
    return f" in layer {worst(layers, key=layers.__getitem__)}" if layers else ""
