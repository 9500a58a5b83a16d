"""The tokens that the routers of a step saw: their shape, which are real, and where documents begin."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from consistency_reg.capture.calls import told_of
from consistency_reg.capture.readings import Forward, shape_of
from consistency_reg.capture.stacks import Stack
from consistency_reg.devices import is_on_host
from consistency_reg.masks import Masks, Shape, given_by, has_tokens, labelled_tokens, read_masks, token_shape
from consistency_reg.masks.batches import DESCRIBES_TOKENS
from consistency_reg.masks.hints import inner_batches, looks_padded, unread_hints
from consistency_reg.session.listener import Listener

LOOKS = 8  # batches that are looked at for pads without a mask


class TokenReader:
    """Reads which tokens count in the forwards of a module, and warns once of each thing that is hinted at only.

    Args:
        module: the one that is trained; the configurations of the models within may name the id of pads.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._warned: set[str] = set()
        self._looks_left = LOOKS

    def agreed(
        self,
        listener: Listener,
        stacks: Sequence[Stack],
        forwards: Sequence[Forward],
        batch: Any,
        given: Mapping[str, Any],
    ) -> tuple[Shape, Masks]:
        """Return the shape and the masks of the tokens that all stacks saw in a forward.

        Args:
            listener: says which tokens count, and may give the masks.
            stacks: those that are asked for.
            forwards: of each stack, in their order.
            batch: what the step was given.
            given: what the batch holds by name.

        Raises:
            ValueError: the stacks saw different tokens, or masks that do not describe them.
        """
        if listener.options.masks is not None:
            masks = listener.options.masks(batch)
            shape = None if masks[0] is None else token_shape({"seq_idx": masks[0]})
            return _one_shape(stacks, forwards, shape), masks
        shape = _one_shape(stacks, forwards, token_shape(given) if has_tokens(given) else None)
        told = [_told(forward, given) for forward in forwards]
        described = {tuple(id(one[name]) for name in DESCRIBES_TOKENS if name in one) for one in told}
        if len(described) > 1:
            raise different_tokens(
                stacks, [f"{[name for name in DESCRIBES_TOKENS if name in one] or 'no masks'}" for one in told]
            )
        self._warn_of_unknown_masks(stacks[0], told[0], batch, forwards[0])
        valid, document_ids = read_masks(told[0], shape, self._pad_id(forwards[0]))
        if listener.options.tokens == "labels":
            labelled = labelled_tokens(told[0], shape)
            valid = labelled if valid is None else valid & labelled
        return shape, (valid, document_ids)

    def warn_of_several_models(self, stacks: Sequence[Stack]) -> None:
        """Warn once that several models are taken for one."""
        apart = {stack.caller or stack.path.partition(".")[0] for stack in stacks}
        if len(apart) > 1:
            self._warn_once(
                f"the routing of {len(stacks)} stacks is taken together: {', '.join(map(str, stacks))}. Choose with "
                "layers=, a regular expression on the routers' names, if that is not meant"
            )

    def _warn_of_unknown_masks(self, stack: Stack, told: Mapping[str, Any], batch: Any, forward: Forward) -> None:
        """Warn once where something hints at pads or boundaries that are not known."""
        boundaries, pads = unread_hints(
            told, given_by(batch), inner_batches(batch), encoder_decoder=_of_encoder_decoder(forward)
        )
        if pads:
            self._warn_once(
                f"{sorted({*boundaries, *pads})} of the batch may tell which tokens of {stack} are pads or where "
                "documents begin, but this is not read: all tokens count, each row as one document. Give the model an "
                "attention_mask, document_ids or position_ids, or give masks="
            )
        elif boundaries:
            self._warn_once(
                f"{boundaries} of the batch may tell where documents begin in the rows of {stack}, but this is not "
                "read: each row counts as one document. Give the model document_ids or position_ids of its tokens, or "
                "give masks="
            )
        elif not any(told.get(name) is not None for name in DESCRIBES_TOKENS):
            self._warn_of_pads(told, is_on_host(forward[stack.names[0]].logits), self._pad_id(forward))

    def _warn_of_pads(self, told: Mapping[str, Any], on_host: bool, pad_id: int | None) -> None:
        """Warn once where ids look padded although no mask says so; on a GPU, whose host waits, look a few times."""
        if not self._looks_left and not on_host:
            return
        self._looks_left = max(0, self._looks_left - 1)
        if looks_padded(told, pad_id):
            self._warn_once(
                f"rows of input_ids begin or end with the pad token {pad_id} but there is no attention_mask: these "
                "tokens count as real. Give the model an attention_mask, or give masks="
            )

    def _pad_id(self, forward: Forward) -> int | None:
        """Return the id of pads, as the configuration of the model around the routers tells it."""
        call = next(iter(forward.values())).call
        while call is not None:
            config = getattr(self.module.get_submodule(call.caller), "config", None)
            pad_id = getattr(config, "pad_token_id", None)
            if isinstance(pad_id, int):
                return pad_id
            call = call.outer
        return None

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def different_tokens(stacks: Sequence[Stack], found: Sequence[str]) -> ValueError:
    """Return the error that says that stacks saw different tokens, with what was found of each."""
    each = "; ".join(f"{stack}: {what}" for stack, what in zip(stacks, found, strict=True))
    return ValueError(
        f"the routers that are trained saw different tokens ({each}): choose one stack with layers=, a regular "
        f"expression on the routers' names such as layers={'^' + re.escape(stacks[0].path)!r}, and take one more "
        "for each other stack"
    )


def _one_shape(stacks: Sequence[Stack], forwards: Sequence[Forward], otherwise: Shape | None) -> Shape:
    """Return the one (B, T) that all stacks saw; ``otherwise`` where the routers do not tell."""
    shapes = [shape_of(forward, otherwise) for forward in forwards]
    if len(set(shapes)) > 1:
        raise different_tokens(stacks, [f"{list(shape)} tokens" for shape in shapes])
    return shapes[0]


def _told(forward: Forward, batch: Mapping[str, Any]) -> dict[str, Any]:
    name, reading = next(((name, one) for name, one in forward.items() if one.call is not None), (None, None))
    if name is None or reading is None:
        return dict(batch)
    return told_of(name, reading.call, batch)


def _of_encoder_decoder(forward: Forward) -> bool:
    call = next(iter(forward.values())).call
    while call is not None and not call.encoder_decoder:
        call = call.outer
    return call is not None
