"""Models to judge: from a folder, a finished run or the hub, with the model's own tokenizer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from consistency_reg.lab.checkpoint import is_adapter, model_folder, read_configuration, read_tokenizer
from consistency_reg.lab.evaluate.adapters import adapter_base, merged
from consistency_reg.lab.evaluate.text import Document, Rows
from consistency_reg.optional import require

with require("transformers"):
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


@dataclass(frozen=True)
class Candidate:
    """Holds a model to judge.

    Attributes:
        name: what tables call it.
        model: in evaluation mode, on its device.
        tokenizer: the model's own.
        has_head: whether the checkpoint holds the head that predicts tokens.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    has_head: bool = True

    @property
    def is_encoder_decoder(self) -> bool:
        """Tell whether the model has an encoder and a decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def body(self) -> nn.Module:
        """Return the part of the model that routes, without its head."""
        return self.model if self.is_encoder_decoder else self.model.base_model

    @property
    def predicts(self) -> bool:
        """Return whether the model predicts text: a causal model with its head."""
        return self.has_head and not self.is_encoder_decoder

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens that the head chooses among."""
        return int(self.model.config.get_text_config().vocab_size)

    def text_of(self, token: int) -> str:
        """Return one token as text."""
        return str(self.tokenizer.decode([token]))

    @property
    def context(self) -> int | None:
        """Return the most tokens that the model reads at once; None where there is no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, documents: list[Document]) -> Rows:
        """Return token ids of documents, strings or chats.

        A causal model's text begins with its start token, else its end token, if it has one; a chat is what the
        tokenizer's template makes of it.

        Raises:
            ValueError: ids that the model has no embedding for; chats, and a tokenizer without a template.
        """
        is_text = [isinstance(document, str) for document in documents]
        if not all(is_text) and not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.name} has no chat template, which chats need: give text")
        texts = [
            document if isinstance(document, str) else str(self.tokenizer.apply_chat_template(document, tokenize=False))
            for document in documents
        ]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        leading = [] if start is None or self.is_encoder_decoder else [start]
        known = len(self.model.get_input_embeddings().get_parameter("weight"))
        highest = max((max(ids) for ids in encoded if ids), default=0)
        if highest >= known:
            raise ValueError(f"{self.name}: the tokenizer gives id {highest}, but the model has {known} embeddings")
        return [leading + ids if is_plain else ids for ids, is_plain in zip(encoded, is_text, strict=True)]


def load(
    place: str,
    *,
    device: torch.device,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    tokenizer_place: str | None = None,
) -> Candidate:
    """Load a model and its tokenizer.

    Args:
        place: a folder of ``save_pretrained``, the folder of a finished run of ``consistency-reg fit``, a hub id, or
            the folder of a PEFT adapter, which is merged into the base that it names.
        device: where the model goes.
        dtype: one of :data:`DTYPES`; "auto" is that of the saved weights.
        trust_remote_code: run code that comes with the model.
        tokenizer_place: where the tokenizer is; with the model when None.

    Raises:
        ValueError: a run folder without a model, code that is not trusted, a model that is neither causal nor an
            encoder-decoder, weights or a tokenizer that are missing, an adapter that does not fit.
        OSError: no such model or tokenizer.
    """
    if is_adapter(Path(place)):
        return _with_adapter(Path(place), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    path = str(model_folder(Path(place)) or place)
    config = read_configuration(path, trust_remote_code=trust_remote_code, option="--trust-remote-code")
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    tokenizer = read_tokenizer(tokenizer_place or path, trust_remote_code=trust_remote_code)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    loaded: Any = kind.from_pretrained(path, **options)
    model, read = loaded
    has_head = _check_complete(place, model, read["missing_keys"])
    nn.Module.to(model, device)
    folder = Path(path).resolve()  # "." and "model" are good names where one stands in the run
    name = place if not folder.is_dir() else folder.parent.name if folder.name == "model" else folder.name
    return Candidate(name, model.eval(), tokenizer, has_head)


def _with_adapter(folder: Path, *, device: torch.device, **options: Any) -> Candidate:
    """Return the base of an adapter with the adapter merged into it, with the adapter's own tokenizer if it has one."""
    with require("peft"):
        import peft  # noqa: F401  missed before a large base is read
    base_place = adapter_base(folder)
    own = str(folder) if (folder / "tokenizer_config.json").exists() else None
    try:
        base = load(base_place, device=torch.device("cpu"), tokenizer_place=own, **options)
    except OSError as error:
        said = f"{folder} is a PEFT adapter of {base_place!r}, which cannot be read: {error}"
        raise OSError(said.splitlines()[0]) from error
    model = merged(base.model, folder)
    nn.Module.to(model, device)
    return replace(base, name=folder.resolve().name, model=model.eval())


def _check_complete(place: str, model: PreTrainedModel, missing: Collection[str]) -> bool:
    """Return whether the head is there, and raise where weights that route would be random."""
    head = model.get_output_embeddings()
    heads = tuple(f"{name}." for name, module in model.named_modules() if module is head)
    if lacking := sorted(name for name in missing if not name.startswith(heads)):
        raise ValueError(
            f"{place} lacks {len(lacking)} of the model's weights, such as {lacking[0]}: they would be random"
        )
    return not missing


def expert_bytes(model: nn.Module, routers: Sequence[str], num_experts: Sequence[int]) -> list[int] | None:
    """Return the parameter bytes of one routed expert of each layer: those of all its experts, divided by E.

    The experts are the module ``experts`` of the block that the router stands in. None where a block has none.
    """
    sizes = []
    for name, E in zip(routers, num_experts, strict=True):
        block = model.get_submodule(name.rpartition(".")[0])
        experts = getattr(block, "experts", None)
        total = 0 if experts is None else sum(p.numel() * p.element_size() for p in experts.parameters())
        if total == 0 or total % E:
            return None
        sizes.append(total // E)
    return sizes
