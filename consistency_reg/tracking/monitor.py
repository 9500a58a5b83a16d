"""The monitor of a training's routing, for any trainer: what to log, and what to show next to it.

:class:`~consistency_reg.callbacks.RoutingMonitor` brings it to Lightning.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from consistency_reg.functional.segments import check_segment_lengths
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import Measured, RoutingMeasures
from consistency_reg.tracking.alarms import Alarms, gradient_norm
from consistency_reg.tracking.board import Board
from consistency_reg.tracking.experts import usage_profile
from consistency_reg.tracking.tradeoff import TradeOff


class MonitorCore:
    """Measure the routing of training steps and of validations; knows no trainer.

    An adapter gives it the traces of a model, logs what it returns, and has it show the rest on a
    :class:`~consistency_reg.tracking.board.Board`. Names come without their stage: log them as ``train/NAME`` and
    ``val/NAME``.

    Args:
        segment_lengths: m of SRP and of local balance.
        cache_ratios: rho of the LRU caches, slots = rho * K.
        cache_shares: more LRU caches, as a share of a layer's experts.
        quality: the logged validation metric, lower is better, that the trade-off is about; a usual one when None.
        samples: how many texts to draw, the first row of as many domains.
        alarms: bounds to warn at; ``Alarms()`` when None.

    Raises:
        ValueError: segment lengths below 2; ratios that are not positive; shares outside of (0, 1]; negative samples.

    Example:
        >>> core = MonitorCore(segment_lengths=(2,), cache_ratios=(1.0,), cache_shares=())
        >>> trace = RoutingTrace([torch.tensor([[[0], [0], [1], [1]]])], num_experts=2)
        >>> sorted(core.training_step(trace))
        ['cache/lru_k', 'local_gain/m2', 'srp/m2', 'static_srp']
        >>> core.validation_batch(trace)
        >>> round(float(core.end_validation(["all"])["srp/m2"]), 3)
        0.857
        >>> core.show(Board(), {"val/loss": 3.2}, step=10, tokens=40)
        >>> core.tradeoff.best["best/val/loss"]
        3.2
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = (4, 16, 64),
        cache_ratios: Sequence[float] = (1.0, 2.0),
        cache_shares: Sequence[float] = (0.25,),
        *,
        quality: str | None = None,
        samples: int = 2,
        alarms: Alarms | None = None,
    ) -> None:
        if samples < 0:
            raise ValueError(f"samples must be at least 0 texts, got {samples}")
        self.segment_lengths = check_segment_lengths(segment_lengths, lowest=2)
        self.cache_ratios = _checked("cache_ratios", cache_ratios, "positive numbers", lambda rho: 0 < rho < math.inf)
        self.cache_shares = _checked("cache_shares", cache_shares, "numbers in (0, 1]", lambda share: 0 < share <= 1)
        self.samples = samples
        self.alarms = Alarms() if alarms is None else alarms
        self.tradeoff = TradeOff(quality)
        self.current: dict[str, float] = {}  # SRP and misses as measured last
        self._measures = self.new_measures()
        self._measured: Measured | None = None
        self._usage: tuple[Tensor, ...] = ()  # of the last validation
        self._pictures: Any = None
        self._gradient: Tensor | None = None  # norm of the term's, the largest since the last validation

    @property
    def headline_names(self) -> tuple[str, ...]:
        """Return the names of the measures that progress bars show."""
        return self._measures.headline_names

    def new_measures(self) -> RoutingMeasures:
        """Return measures like those of a validation, which have counted nothing yet."""
        return RoutingMeasures(self.segment_lengths, self.cache_ratios, self.cache_shares)

    def draw(self, board: Board, decode: Callable[[list[int]], str] | None = None) -> None:
        """Draw pictures from now on; needs the extra ``plots``, and warns where it is not installed.

        Args:
            board: is warned.
            decode: gives the text of a list of token ids.
        """
        try:
            from consistency_reg.tracking.pictures import RoutingPictures  # needs matplotlib
        except ImportError as error:
            board.warn(f"RoutingMonitor draws no pictures: {error}")
            return
        if self._pictures is None:
            self._pictures = RoutingPictures(self.samples, decode)

    def training_step(self, trace: RoutingTrace) -> dict[str, Tensor]:
        """Return the measures of one training batch of this process by name."""
        values = self._measures.of_batch(trace)
        self.current = self._measures.headline(values)
        return values

    def watch_term(self, weighted: Tensor, trace: RoutingTrace) -> None:
        """Measure the gradient of a term of the loss at the routers' scores.

        If it was 0 at every step since the last validation, or not finite at one, :meth:`show` raises an alarm.

        Args:
            weighted: the term as it is added to the loss, with its graph, at a weight that is not 0.
            trace: what it was computed on.
        """
        norm = gradient_norm(weighted, trace)
        self._gradient = norm if self._gradient is None else torch.maximum(self._gradient, norm)

    def validation_batch(
        self,
        trace: RoutingTrace,
        domain: int = 0,
        *,
        name: str = "",
        token_ids: Tensor | None = None,
        draw: bool = False,
        board: Board | None = None,
    ) -> None:
        """Count a batch of a validation.

        Args:
            trace: its routing.
            domain: number of its domain.
            name: of its domain, for the picture.
            token_ids: [B, T], for the picture.
            draw: whether its first row is a text to draw: the same row at every validation.
            board: is warned if it is not.
        """
        self._measures.add(trace, domain)
        if draw and self._pictures is not None:
            self._pictures.keep(trace, token_ids, domain, name or str(domain), board or Board())

    def end_validation(self, names: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return all measures of a validation by name, over all processes; empty where no batch was counted.

        Args:
            names: of the domains, by number.
            device: of this process.
        """
        self._measured = self._measures.results(names, device)
        if self._measured is None:
            return {}
        self.current = self._measures.headline(self._measured.model)
        self._usage = self._measured.usage
        return self._measured.parts | self._measured.model

    def usage_profile(self) -> str:
        """Return a line ``layer expert count`` for each expert: how many tokens of the last validation used it.

        Raises:
            RuntimeError: no validation was measured.
        """
        if not self._usage:
            raise RuntimeError("the usage of experts is that of a validation, and none was measured yet")
        return usage_profile(self._usage)

    def show(self, board: Board, logged: Mapping[str, float], *, step: int, tokens: int, first: bool = True) -> None:
        """Show what goes next to the numbers of a validation: alarms, trade-off, pictures and tables.

        Call it when the trainer has logged its own metrics of the validation.

        Args:
            board: where to.
            logged: the trainer's metrics of this validation by name.
            step: of the trainer.
            tokens: seen in training so far.
            first: whether this is the process that shows.
        """
        if self._measured is None:
            return
        measured, self._measured = self._measured, None
        if first:
            self._raise_alarms(board, measured)
        self.tradeoff.show(board, logged, measured, self._measures, step=step, tokens=tokens)
        if first and self._pictures is not None:
            self._pictures.show(measured, self._measures, board)

    def reset(self) -> None:
        """Forget what was counted since the last validation."""
        self._measures = self.new_measures()

    def begin_anew(self) -> None:
        """Forget another training: its best validation, and that its alarms and warnings were raised."""
        self.reset()
        self.tradeoff = TradeOff(self.tradeoff.quality)
        self.alarms.begin_anew()
        self._gradient = None

    def state_dict(self) -> dict[str, Any]:
        """Return the best validation so far."""
        return {"best": dict(self.tradeoff.best)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self.tradeoff.best = dict(state_dict["best"])

    def _raise_alarms(self, board: Board, measured: Measured) -> None:
        alarms = self.alarms.of_model(measured.model | measured.layers)
        if self._gradient is not None:
            alarms += self.alarms.of_term(self._gradient)
            self._gradient = None
        for alarm in alarms:
            board.warn(f"{alarm.title}. {alarm.text}")
            board.alert(alarm.title, alarm.text)


def _checked(name: str, values: Sequence[float], which: str, is_right: Callable[[float], bool]) -> tuple[float, ...]:
    numbers = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
    if not numbers or not all(map(is_right, values)):
        raise ValueError(f"{name} must be a list of {which}, got {values!r}")
    return tuple(values)
