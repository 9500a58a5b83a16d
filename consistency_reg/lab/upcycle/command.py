"""``consistency-reg upcycle``: turn a dense language model into a mixture of experts that plain transformers loads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from consistency_reg.lab.arguments.upcycle import parser
from consistency_reg.lab.checkpoint import read_tokenizer
from consistency_reg.lab.corpus.text import load_domain
from consistency_reg.lab.render.outputs import check_writable
from consistency_reg.lab.upcycle.convert import Plan, mlp_inputs, turned_layers, upcycle
from consistency_reg.lab.upcycle.refit import refit
from consistency_reg.lab.upcycle.smollm import place_of
from consistency_reg.optional import require

with require("transformers"):
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

CORPUS_BYTES = 4_500_000  # of each domain, as in the recipes, so that the same text is held out
ROW = 256  # tokens, as in the recipes


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg upcycle``: write the mixture and its tokenizer into a folder."""
    options = parser().parse_args(argv)
    plan = Plan(
        splits=options.splits,
        copies=options.copies,
        top_k=options.top_k,
        shared=options.shared,
        layers=None if options.layers is None else layer_numbers(options.layers),
        router_scale=options.router_scale,
        seed=options.seed,
    )
    if (options.out / "config.json").exists():
        raise ValueError(f"--out must not hold a model yet, got {options.out}")
    check_writable("--out", options.out)
    if options.calibration_tokens < len(options.domains):
        raise ValueError(f"--calibration-tokens must be one a domain or more, got {options.calibration_tokens}")
    place = place_of(options.dense)
    layers = turned_layers(AutoConfig.from_pretrained(place), plan)
    tokenizer = read_tokenizer(place)
    dense = AutoModelForCausalLM.from_pretrained(place, dtype="auto").float().eval()
    rows = calibration_rows(tokenizer, options.calibration_tokens, options.domains)
    autocast = torch.bfloat16 if options.bf16 else None
    with torch.autocast(dense.device.type, torch.bfloat16, enabled=options.bf16):
        inputs = mlp_inputs(dense, rows, layers)
    mixture = upcycle(dense, plan, inputs)
    if options.refit:
        for index, left in refit(dense, mixture, rows, autocast=autocast).items():
            print(f"layer {index}: {left:.0%} of the squared error is left after the refit")
    mixture.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    total = sum(parameter.numel() for parameter in mixture.parameters())
    print(
        f"{options.out}: {len(layers)} of {dense.config.num_hidden_layers} layers have {plan.num_experts} "
        f"experts of {mixture.config.moe_intermediate_size} neurons, {plan.top_k} active; "
        f"{total / 1e6:.0f}M parameters"
    )
    return 0


def calibration_rows(tokenizer: PreTrainedTokenizerBase, tokens: int, domains: Sequence[str]) -> list[Tensor]:
    """Return rows of token ids from the training text of the default corpus, each domain's share equal.

    Raises:
        ValueError: none of the domains can be read.
    """
    texts = [text for name in domains if (text := load_domain(name, CORPUS_BYTES)) is not None]
    if not texts:
        raise ValueError(f"none of the domains {list(domains)} can be read: see the warnings above")
    rows = []
    for text in texts:
        ids: list[int] = []
        for document in text.train:
            ids += tokenizer(document["text"], verbose=False)["input_ids"]
            if len(ids) >= tokens // len(texts):
                break
        rows += torch.tensor(ids[: tokens // len(texts)]).split(ROW)
    return rows


def layer_numbers(text: str) -> tuple[int, ...]:
    """Return the layers that a text such as "0,2,10-12" names.

    Raises:
        ValueError: another form.

    Example:
        >>> layer_numbers("0,2,10-12")
        (0, 2, 10, 11, 12)
    """
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"--layers must be numbers and ranges such as 0,2,10-12, got {text!r}") from None
    return tuple(found)
