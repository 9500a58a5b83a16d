"""Sum up what one offloaded model took, as the numbers that tables, files and wandb show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from consistency_reg.lab.offload.decoding import Pass
from consistency_reg.offload.calibration import Calibration

QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Measured:
    """Holds what a model did under a budget.

    Attributes:
        name: of the model.
        about: place, slots, policy, bytes and so on: everything that is no measurement.
        passes: over each prompt.
        texts: what it wrote, or "" for text that it read.
        calibration: of the machine with this model; None where it was not asked for.
    """

    name: str
    about: dict[str, Any]
    passes: Sequence[Pass]
    texts: Sequence[str] = ()
    calibration: Calibration | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """The measurements by name: tokens/s, ms of a token, MB, shares; nan where nothing was measured."""
        seconds = [second for one in self.passes for second in one.seconds]
        steps = [step for one in self.passes for step in one.steps]
        prefill = sum(one.prefill_seconds for one in self.passes)
        needed = sum(step.hits + step.misses for step in steps)
        waiting = sum(step.seconds_waiting for step in steps)
        tokens = len(seconds)
        p50, p95, p99 = quantiles(seconds)
        numbers = {
            "decode_tokens_per_s": _ratio(tokens, sum(seconds)),
            "prefill_tokens_per_s": _ratio(sum(one.prompt_tokens for one in self.passes), prefill),
            "p50_ms": 1e3 * p50,
            "p95_ms": 1e3 * p95,
            "p99_ms": 1e3 * p99,
            "mb_per_token": _ratio(sum(step.bytes_read for step in steps), tokens) / 1e6,
            "misses_per_token": _ratio(sum(step.misses for step in steps), tokens),
            "hit_rate": _ratio(sum(step.hits for step in steps), needed),
            "waiting_share": _ratio(waiting, sum(seconds)),
            "tokens": float(tokens),
        }
        losses = [loss for one in self.passes for loss in one.losses]
        if losses:
            numbers["perplexity"] = math.exp(sum(losses) / len(losses))
        if self.calibration is not None:
            predicted = 1 / self.calibration.seconds_per_token(numbers["misses_per_token"])
            numbers["predicted_tokens_per_s"] = predicted
            numbers["measured_over_predicted"] = numbers["decode_tokens_per_s"] / predicted
            numbers["read_gb_per_s"] = self.calibration.bandwidth / 1e9
            numbers["native_gb_per_s"] = self.calibration.native_bandwidth / 1e9
            numbers["compute_ms"] = 1e3 * self.calibration.compute_seconds
        return numbers

    def token_rows(self) -> list[dict[str, float | int | str]]:
        """Return a row for each decoded token: what it took and what it read."""
        return [
            {
                "model": self.name,
                "prompt": number,
                "token": place,
                "ms": 1e3 * seconds,
                "hits": step.hits,
                "misses": step.misses,
                "bytes_read": step.bytes_read,
                "ms_waiting": 1e3 * step.seconds_waiting,
            }
            for number, one in enumerate(self.passes)
            for place, (seconds, step) in enumerate(zip(one.seconds, one.steps, strict=True))
        ]


def quantiles(values: Sequence[float], of: Sequence[float] = QUANTILES) -> list[float]:
    """Return quantiles, nan for no values.

    Example:
        >>> quantiles([1.0, 2.0, 3.0], of=[0.5])
        [2.0]
    """
    if not values:
        return [math.nan] * len(of)
    found: list[float] = torch.tensor(values).double().quantile(torch.tensor(of).double()).tolist()
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
