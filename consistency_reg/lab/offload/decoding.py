"""Time an offloaded model token by token over a text that it writes, or reads as it stands."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from consistency_reg.offload import OffloadedExperts
from consistency_reg.offload.statistics import Step

READ_AT_ONCE = 16  # tokens of a text that is read, before it goes token by token
Choose = Callable[[Tensor], int]  # logits [V] of the next token -> its id


@dataclass
class Pass:
    """Holds what the tokens of one text took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        prefill_seconds: of reading it.
        seconds: of each further token.
        steps: what each further token read and waited for.
        prefill: what the prompt read and waited for.
        ids: of the further tokens.
        losses: the cross-entropy in nats of each further token of a text that was read as it stands.
    """

    prompt_tokens: int
    prefill_seconds: float
    seconds: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    prefill: Step = field(default_factory=Step)
    ids: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@torch.no_grad()
def write_text(
    offloaded: OffloadedExperts,
    prompt: Tensor,
    tokens: int,
    choose: Choose,
    told: Callable[[int], None] = lambda _: None,
) -> Pass:
    """Let the model continue a prompt, from empty slots.

    Args:
        offloaded: attached.
        prompt: [T] ids.
        tokens: to write.
        choose: the next token.
        told: of each token as it is written.
    """
    output, done = _prefill(offloaded, prompt)
    for _ in range(tokens):
        chosen = choose(output.logits[0, -1])
        done.ids.append(chosen)
        told(chosen)
        output = _step(offloaded, chosen, output, done)
    return _with_steps(offloaded, done)


@torch.no_grad()
def read_text(offloaded: OffloadedExperts, ids: Tensor, prompt_tokens: int, *, empty: bool = True) -> Pass:
    """Have the model read a text token by token behind its first tokens: the same text for every model.

    Args:
        offloaded: attached.
        ids: [T] of the text.
        prompt_tokens: that are read at once.
        empty: whether slots are emptied first.
    """
    output, done = _prefill(offloaded, ids[:prompt_tokens], empty=empty)
    for following in ids[prompt_tokens:].tolist():
        done.losses.append(float(-output.logits[0, -1].float().log_softmax(-1)[following]))
        done.ids.append(following)
        output = _step(offloaded, following, output, done)
    return _with_steps(offloaded, done)


def sampler(temperature: float, seed: int) -> Choose:
    """Return a choice of tokens: the most probable at temperature 0, else drawn.

    Example:
        >>> sampler(0.0, seed=0)(torch.tensor([0.1, 2.0, 0.3]))
        1
    """
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator().manual_seed(seed)
    return lambda logits: int((logits.float().cpu() / temperature).softmax(-1).multinomial(1, generator=generator))


def _prefill(offloaded: OffloadedExperts, prompt: Tensor, *, empty: bool = True) -> tuple[Any, Pass]:
    if empty:
        offloaded.reset()
    else:
        offloaded.forget()
    model: Any = offloaded.model
    began = time.perf_counter()
    output = model(prompt[None].to(offloaded.device), use_cache=True)
    offloaded.finish()
    return output, Pass(len(prompt), time.perf_counter() - began)


def _step(offloaded: OffloadedExperts, token: int, output: Any, done: Pass) -> Any:
    model: Any = offloaded.model
    ids = torch.tensor([[token]], device=offloaded.device)
    began = time.perf_counter()
    output = model(ids, past_key_values=output.past_key_values, use_cache=True)
    offloaded.finish()
    done.seconds.append(time.perf_counter() - began)
    return output


def _with_steps(offloaded: OffloadedExperts, done: Pass) -> Pass:
    done.prefill, *done.steps = offloaded.statistics().steps
    return done
