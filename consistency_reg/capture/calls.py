"""Find which modules of a model are given tokens, and what each of their calls is told about them."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from consistency_reg.capture.finding import Router
from consistency_reg.masks import Shape, has_tokens, token_shape
from consistency_reg.masks.batches import DESCRIBES_TOKENS, KEYS, TOKENS
from consistency_reg.masks.hints import is_hint

DECODER = "decoder_"
OTHER_THAN_TEXT = re.compile(r"vision|visual|image|audio|video|speech|pixel|patch", re.IGNORECASE)


@dataclass(eq=False)
class Call:
    """Holds a call of a module that contains routers.

    Attributes:
        caller: where the module stands in the model.
        given: what of its arguments describes tokens, by name.
        grad: whether it was called with autograd.
        outer: the call that it is a part of.
        encoder_decoder: whether the module takes the tokens of an encoder and of a decoder.
        begun: how many readings each router had when it began.
        has_inner: whether a module within was given tokens too: then those of the others are not known to be these.
    """

    caller: str
    given: dict[str, Any]
    grad: bool
    outer: "Call | None"
    encoder_decoder: bool
    begun: dict[str, int]
    has_inner: bool = field(default=False)

    @property
    def shape(self) -> Shape | None:
        """Return (B, T) of the tokens that the module was given; None where it was given none."""
        return token_shape(self.given) if has_tokens(self.given) else None


@dataclass(frozen=True)
class Caller:
    """Holds a module whose calls are noted, and the names of its forward's arguments."""

    name: str
    module: nn.Module
    arguments: tuple[str, ...]

    @property
    def takes_tokens(self) -> bool:
        """Return whether tokens are among the arguments of the module."""
        return any(name in self.arguments for name in TOKENS)

    @property
    def encoder_decoder(self) -> bool:
        """Return whether the module takes the tokens of an encoder and of a decoder."""
        return f"{DECODER}input_ids" in self.arguments

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that describe tokens, or may do so, by name; those that are None are left out."""
        given = dict(zip(self.arguments, args, strict=False)) | dict(kwargs)
        return {
            name: value
            for name, value in given.items()
            if value is not None and (name.removeprefix(DECODER) in KEYS or is_hint(name, value))
        }


def find_callers(model: nn.Module, routers: Iterable[Router]) -> Iterator[Caller]:
    """Yield the modules around the routers whose calls are to be noted, the outermost first.

    Those are the modules that are given tokens by name, and the model and its children, as far as they are more than a
    router or its block.
    """
    routers = list(routers)
    around = {outer for router in routers for outer in _outer_names(router.name)}
    blocks = {router.block_name for router in routers}
    for name, module in model.named_modules():
        if name not in around:
            continue
        caller = Caller(name, module, tuple(inspect.signature(module.forward).parameters))
        if name == "" or caller.takes_tokens or ("." not in name and name not in blocks):
            yield caller


def _outer_names(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def told_of(router: str, call: Call | None, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what describes the tokens that a router saw: what its model was called with, then the batch.

    What an outer call is given holds for an inner one unless that has its own, as far as both have the same tokens: the
    mask of an encoder's tokens is not its decoder's, and that of a text not that of its pictures.
    """
    chain: list[Call] = []
    while call is not None:
        chain.insert(0, call)
        call = call.outer
    if chain and chain[-1].has_inner and OTHER_THAN_TEXT.search(router.removeprefix(chain[-1].caller)):
        return {}
    encoder_decoder = any(one.encoder_decoder for one in chain)
    told = dict(batch)
    for one in chain:
        told = _inherit(told, one.given, encoder_decoder=encoder_decoder) | one.given
    return {name: value for name, value in told.items() if name in KEYS or not name.startswith(DECODER)}


def _inherit(outer: dict[str, Any], inner: Mapping[str, Any], *, encoder_decoder: bool) -> dict[str, Any]:
    """Return what of an outer call or a batch holds for the tokens of an inner call."""
    if not has_tokens(inner) or not has_tokens(outer):
        return outer
    ids, own_ids = outer.get("input_ids"), inner.get("input_ids")
    if ids is own_ids and ids is not None:
        return outer
    if encoder_decoder:
        if own_ids is None and inner.get("attention_mask") is outer.get("attention_mask", inner):
            return outer
        decoders = {name.removeprefix(DECODER): value for name, value in outer.items() if name.startswith(DECODER)}
        return decoders | {"labels": outer["labels"]} if "labels" in outer else decoders
    if token_shape(outer) != token_shape(inner) and any(name in inner for name in DESCRIBES_TOKENS):
        return {name: value for name, value in outer.items() if not isinstance(value, Tensor)}
    return outer
