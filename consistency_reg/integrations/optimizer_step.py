"""Scale a term so that an optimizer step has the mean over its micro-batches, whatever their losses are."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from consistency_reg.integrations.attach import Attachment
from consistency_reg.integrations.trainer_state import check_boundaries
from consistency_reg.routing import RoutingTrace
from consistency_reg.term import Term


class StepTerm(Attachment):
    """Attach a term for a trainer that says where optimizer steps and micro-batches begin and end.

    The term of each forward is scaled by ``loss scale / (micro-batches of the step * forwards of the micro-batch)``. At
    the end of a micro-batch it is checked that this was so: that each forward with a gradient was trained once, and
    that none came after the first was.

    Attributes:
        name: of the term, in the log and in checkpoints.
        base_name: the name without the number that tells it from others.
        watch: is given the weighted term and its trace in each forward, if any.
        told_boundaries: columns of the dataset that tell where documents begin.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, scale=self._scale_of_backward, **options)
        self.name = self.base_name = ""
        self.watch: Callable[[Tensor, RoutingTrace], None] | None = None
        self.told_boundaries: tuple[str, ...] = ()
        self._micro_batches, self._seen = 1, 0
        self._scaler: Any = None
        self._forget()

    def warn_of_others(self) -> None:
        """Do nothing: a trainer may have any number of terms, whose names its callbacks tell apart."""

    def begin(self, micro_batches: int, scaler: Any = None) -> None:
        """Begin an optimizer step.

        Args:
            micro_batches: how many the step has.
            scaler: the ``GradScaler`` that scales its losses, or None.

        Raises:
            RuntimeError: the step before ended without moving the parameters, with fewer micro-batches than was said.
        """
        if 0 < self._seen < self._micro_batches:
            self.end()
        self._micro_batches, self._scaler, self._seen = micro_batches, scaler, 0
        self._forget()

    def end_micro_batch(self) -> list[Term]:
        """End a micro-batch; return the terms of its forwards, without their graphs.

        Raises:
            RuntimeError: there was no forward with a gradient, or one was not trained, or more than once, or came after
                a backward pass of the same micro-batch: the term of the micro-batch is not their mean.
        """
        terms, backwards = self._terms, self._backwards
        self._seen += 1
        self._forget()
        if not terms:
            raise RuntimeError(
                f"the {type(self._model).__name__} ran in no forward in training mode with a gradient in this "
                "micro-batch, so the consistency term is not trained: add weight * "
                "LocalConsistencyLoss()(RouterCapture(model).trace()) to the loss in compute_loss"
            )
        if backwards != [len(terms)] * len(terms):
            raise RuntimeError(
                f"in one micro-batch the model ran {len(terms)} times with a gradient, and {len(backwards)} backward "
                f"passes went through what it returned, when it had run {backwards} times: the consistency term is the "
                "mean over these forwards where each is trained once, after the last of them. Run what is not trained "
                "under torch.no_grad(), or add weight * LocalConsistencyLoss()(RouterCapture(model).trace()) to the "
                "loss in compute_loss"
            )
        return terms

    def end(self) -> None:
        """End an optimizer step.

        Raises:
            RuntimeError: it had another number of micro-batches than was said.
        """
        if self._seen != self._micro_batches:
            raise RuntimeError(
                f"the optimizer step had {self._seen} micro-batches where {self._micro_batches} were expected from "
                "gradient_accumulation_steps and the length of the dataloader, so the consistency term was divided by "
                "the wrong number: add the callback by ConsistencyCallback(...).add_to(trainer), which asks the "
                "trainer, set gradient_accumulation_steps=1, or give a dataloader whose len() is right"
            )
        self._seen = 0

    def _join(self, output: Any, term: Term, trace: RoutingTrace, given: Mapping[str, Any]) -> Any:
        if self.told_boundaries:
            check_boundaries(self.told_boundaries, given)
        self._terms.append(term.detach())
        if self.watch is not None and term.weight:
            self.watch(term.weighted, trace)
        return super()._join(output, term, trace, given)

    def _scale_of_backward(self, one: Tensor) -> Tensor:
        self._backwards.append(len(self._terms))
        scaled: Tensor = one if self._scaler is None else self._scaler.scale(one)
        return scaled / (self._micro_batches * len(self._terms))

    def _forget(self) -> None:
        self._terms: list[Term] = []
        self._backwards: list[int] = []  # forwards so far, at each backward pass through one
