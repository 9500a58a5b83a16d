"""``consistency-reg export``: write a model as GGUF, and see that llama.cpp writes the same text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consistency_reg.lab.arguments.export import parser
from consistency_reg.lab.checkpoint import model_folder, read_configuration, read_tokenizer
from consistency_reg.lab.gguf.engine import LlamaCpp, greedy_ids, same_tokens
from consistency_reg.lab.gguf.settings import check_exportable
from consistency_reg.lab.gguf.write import write_gguf
from consistency_reg.lab.render.outputs import check_writable
from consistency_reg.optional import require

with require("transformers"):
    from transformers import AutoModelForCausalLM

PROMPT = "The committee met on Tuesday, and 17 of its members didn't agree."
TOKENS = 32  # that are compared


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg export`` and return its exit code: 1 where llama.cpp writes another text."""
    options = parser().parse_args(argv)
    if options.out.is_dir():
        raise ValueError(f"--out must be a file such as {options.out / 'model.gguf'}, got the folder {options.out}")
    check_writable("--out", options.out.parent)
    place = str(model_folder(Path(options.model)) or options.model)
    config = read_configuration(
        place, trust_remote_code=False, option="a tool that runs it, which this command does not"
    )
    check_exportable(config)
    tokenizer = read_tokenizer(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()
    write_gguf(model, tokenizer, options.out, name=_name(Path(options.model)), dtype=options.dtype)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {config.model_type}")
    if deployed := getattr(config, "cache_aware_routing", None):
        print(f"llama.cpp has no bias towards cached experts: the one of {deployed['strength']:g} is not exported")
    return _check(model, tokenizer, options.out) if options.check else 0


def _check(model: Any, tokenizer: Any, path: Path) -> int:
    ids = tokenizer(PROMPT)["input_ids"]
    engine = LlamaCpp(path, context=len(ids) + TOKENS)
    if (got := engine.token_ids(PROMPT)) != ids:
        print(f"llama.cpp reads other tokens than transformers in {PROMPT!r}: {got} against {ids}")
        return 1
    ours, theirs = greedy_ids(model.float(), ids, TOKENS), engine.greedy(PROMPT, TOKENS)
    same = same_tokens(ours, theirs)
    print(
        f"llama.cpp and transformers write the same {same} of {len(ours)} greedy tokens: {tokenizer.decode(theirs)!r}"
    )
    return int(same < len(ours))


def _name(place: Path) -> str:
    folder = place.resolve()
    return folder.parent.name if folder.name == "model" else folder.name
