"""Describe a byte-level BPE tokenizer as GGUF holds one."""

import json
from dataclasses import dataclass, field
from typing import Any

from consistency_reg.optional import require

with require("gguf"):
    from gguf import TokenType

# How text is cut before merges, and llama.cpp's name for that.
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}


@dataclass
class Vocabulary:
    """Holds the vocabulary of a GGUF file.

    Attributes:
        pre: llama.cpp's name of the rule that cuts text before merges.
        tokens: the text of each id, bytes written as byte-level BPE writes them.
        types: of each id, as :class:`gguf.TokenType` numbers them.
        merges: pairs of tokens, the first to be merged first.
        special: the id of each special token: "bos", "eos", "padding" and "unknown", as far as there are any.
        add_bos: whether text begins with the first of them.
        chat_template: in Jinja, or None.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    chat_template: str | None = None


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer of transformers.

    Args:
        tokenizer: a byte-level BPE.
        size: ids of the model; those that the tokenizer does not know are marked as unused.

    Raises:
        ValueError: llama.cpp would cut text otherwise, as far as this code knows; no end token; too few ids.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre(pipeline)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer must have an end token (eos_token): llama.cpp would take its token 11 for one")
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise ValueError(f"the model's vocab_size must hold the tokenizer's id {max(ids.values())}, got {size}")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, number in ids.items():
        tokens[number], types[number] = token, int(TokenType.NORMAL)
    for added in pipeline["added_tokens"]:
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pipeline["model"]["merges"]]
    names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    special = {name: getattr(tokenizer, f"{ours}_token_id") for name, ours in names.items()}
    special = {name: number for name, number in special.items() if number is not None}
    begins = tokenizer("a")["input_ids"][0] == special.get("bos")
    return Vocabulary(pre, tokens, types, merges, special, begins, getattr(tokenizer, "chat_template", None))


def _pre(pipeline: dict[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer; ValueError for one that it might cut otherwise."""
    step = pipeline["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    name = SPLITS.get(tuple(one.get("type") for one in steps))
    whole_text = {"add_prefix_space": False, "use_regex": True, "individual_digits": True}
    same = all(one[key] == value for one in steps for key, value in whole_text.items() if key in one)
    if name is None or not same or pipeline["normalizer"] or pipeline["model"]["type"] != "BPE":
        got = {part: pipeline[part] for part in ("normalizer", "pre_tokenizer")}
        raise ValueError(
            "only tokenizers that cut text as those of GPT-2 or SmolLM (byte-level BPE) can be exported, got "
            f"{pipeline['model']['type']} with {got}"
        )
    return name
