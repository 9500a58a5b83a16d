"""Whether the capture fits every mixture-of-experts architecture of the installed transformers.

    python tests/architectures.py            # prints the table
    python tests/architectures.py --write    # writes it to docs/architectures.md

:func:`examine` builds one architecture (tests/tiny_architectures.py), runs it, and compares what was captured with
what the experts themselves were given. The walk over all takes a minute or two.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from forced_choice import check_cache_aware
from tiny_architectures import KINDS, build, is_part_of_another, moe_model_types
from torch import Tensor, nn

from consistency_reg import LocalConsistencyLoss, RouterCapture, RoutingTrace
from consistency_reg.routing import LayerRouting

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
LOSS = LocalConsistencyLoss((4,))
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")

# Why an architecture is not supported, where its own error does not say.
REASONS = {
    "qwen3_omni_moe": "has no forward of its own; its parts are models: the thinker is `qwen3_omni_moe_thinker`",
    "vitpose": "is not routed: the caller names one expert for a whole picture (`dataset_index`)",
}

# What a reader of a row that passes should know.
REMARKS = {
    "longcat_flash": "experts without weights count in E",
    "nllb-moe": "captured is what the router chose; the installed experts module runs its first two experts alone",
    "zaya": "skipping the experts counts as one more expert",
}


@dataclass(frozen=True)
class Row:
    """Holds what came out for one model type.

    Attributes:
        architecture: the class that was built.
        model_type: of its configuration.
        kind: one of :data:`tiny_architectures.KINDS`.
        routed: how, in words.
        reason: why it does not pass; empty where it does.
        cache_aware: whether `CacheAwareRouting` can change what its routers choose, in words.
    """

    architecture: str
    model_type: str
    kind: str
    routed: str
    reason: str = ""
    cache_aware: str = ""

    @property
    def passes(self) -> bool:
        """Return whether every check held."""
        return not self.reason


def examine(model_type: str) -> Row:
    """Build a model type, capture its routing, and compare."""
    if model_type in REASONS:
        return Row("", model_type, "other", "", REASONS[model_type])
    try:
        model, inputs, kind = build(model_type)
    except Exception as error:  # whatever keeps a model from being built is its row's reason
        return Row("", model_type, "other", "", f"cannot be built tiny: {type(error).__name__}: {error}")
    try:
        routed = check(model, inputs)
        cache_aware = check_routing(model, inputs)
    except Exception as error:
        return Row(type(model).__name__, model_type, kind, "", f"{type(error).__name__}: {error}".split("\n")[0])
    remark = f"; {REMARKS[model_type]}" if model_type in REMARKS else ""
    return Row(type(model).__name__, model_type, kind, routed + remark, cache_aware=cache_aware)


def check(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Raise AssertionError unless everything holds; how the model routes, in words."""
    everything = RouterCapture(model)
    blocks = expert_blocks(model)
    assert len(everything.layer_names) == len(blocks), f"{len(everything.layer_names)} routers, {len(blocks)} blocks"
    draw_routers(everything)
    stacks = routers_by_tokens(everything, inputs)
    words: dict[str, None] = {}
    for names in stacks.values():
        capture = RouterCapture(model, layers=f"^({'|'.join(names)})$")
        words |= dict.fromkeys(check_stack(capture, inputs))
    left_out = len(everything.layer_names) - sum(map(len, stacks.values()))
    notes = [f"a capture for each of {len(stacks)} stacks"] * (len(stacks) > 1)
    notes += [f"text alone, without {left_out} routers of pictures"] * (left_out > 0)
    return "; ".join([*words, *notes])


def check_routing(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Raise AssertionError unless the routers of text can be made to know the cache, as far as they say so."""
    everything = RouterCapture(model)
    draw_routers(everything)
    stacks = routers_by_tokens(everything, inputs)
    return "; ".join(dict.fromkeys(check_cache_aware(model, inputs, names) for names in stacks.values()))


def check_stack(capture: RouterCapture, inputs: dict[str, Tensor]) -> list[str]:
    """Check the routers of one capture; return how each layer routes, in words."""
    with capture, received_by_experts(capture) as received:
        capture.model(**inputs)
    trace = capture.trace()
    trace.check_values()
    for layer in trace:
        check_ids(layer.expert_ids, layer.num_experts, received[layer.name])
        check_scores(layer.scores, layer.expert_ids)
    check_gradient(capture, trace, last=list(received)[-1])
    return [how(capture, layer) for layer in trace]


def expert_blocks(model: nn.Module) -> set[str]:
    """Return the blocks that hold routed experts, found by the experts' class names alone."""
    blocks: set[str] = set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("CDMoE"):
            blocks.add(name)
        elif kind.endswith("Experts") and "shared" not in name.rpartition(".")[2]:
            blocks.add(name.rpartition(".")[0])
    return blocks


@torch.no_grad()
def draw_routers(capture: RouterCapture) -> None:
    """Draw routers as after training, with weights that tell tokens apart, biases that matter and distinct experts."""
    generator = torch.Generator().manual_seed(0)
    for name, router in capture.routers.items():
        block = capture.model.get_submodule(name.rpartition(".")[0])
        for parameter_name, parameter in router.named_parameters():
            if parameter.dim() == 2 and not parameter_name.endswith(BIASES):
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        for owner in (*router.modules(), block):
            for bias in BIASES:
                if isinstance(getattr(owner, bias, None), Tensor):
                    getattr(owner, bias).normal_(0, 0.03, generator=generator)
        if hasattr(router, "tid2eid"):
            order = torch.rand(len(router.tid2eid), router.num_experts, generator=generator).argsort(dim=1)
            router.tid2eid.copy_(order[:, : router.top_k])


def routers_by_tokens(capture: RouterCapture, inputs: dict[str, Tensor]) -> dict[int, list[str]]:
    """Return the routers that text reaches, by how many tokens reach them."""
    stacks: dict[int, list[str]] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, router in capture.routers.items():

            def hear(_, args, *, name=name):
                stacks.setdefault(args[0].shape[:-1].numel(), []).append(name)

            hooks.callback(router.register_forward_pre_hook(hear).remove)
        capture.model(**inputs)
    return stacks


# --- what the experts are given -----------------------------------------------------------------------------------


@contextmanager
def received_by_experts(capture: RouterCapture) -> Iterator[dict[str, Tensor]]:
    """Give what the experts of each router receive: [N, E] 1 where a token goes to an expert, -1 where unknown.

    Or [E] the number of tokens, where the experts are given no more than that (JetMoE).
    """
    received: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, router in capture.routers.items():
            read = READERS.get(type(router).__name__, _from_ids)

            def hear(experts, args, kwargs, *, name=name, read=read):
                received[name] = read(experts, (*args, *kwargs.values()))

            experts = experts_of(capture, name)
            hooks.callback(experts.register_forward_pre_hook(hear, with_kwargs=True).remove)
        yield received


def experts_of(capture: RouterCapture, name: str) -> nn.Module:
    """Return the module that is given the tokens of a router."""
    router = capture.routers[name]
    block = router if hasattr(router, "down_embed") else capture.model.get_submodule(name.rpartition(".")[0])
    parts = ("experts", "down_embed", "input_linear")
    return next(getattr(block, part) for part in parts if hasattr(block, part))


def _from_ids(experts: nn.Module, args: tuple) -> Tensor:
    (ids,) = (arg for arg in args if isinstance(arg, Tensor) and not arg.is_floating_point())
    return torch.zeros(len(ids), experts.num_experts).scatter(1, ids, 1)


def _from_ids_with_zero_experts(experts: nn.Module, args: tuple) -> Tensor:
    return torch.zeros(len(args[1]), experts.total_experts).scatter(1, args[1], 1)


def _from_ids_or_skip(experts: nn.Module, args: tuple) -> Tensor:
    """Read Zaya's: what has no weight skips the experts."""
    _, ids, weights = args
    classes = experts.num_experts + 1
    return torch.zeros(len(ids), classes).scatter(1, ids.masked_fill(weights == 0, classes - 1), 1)


def _from_mask(experts: nn.Module, args: tuple) -> Tensor:
    """Read Switch's: a mask without the tokens beyond an expert's capacity."""
    mask = args[1].flatten(0, -2).float()
    return mask.masked_fill(mask.sum(dim=1, keepdim=True) == 0, -1)


def _from_weights(experts: nn.Module, args: tuple) -> Tensor:
    """Read NLLB's: weights without the tokens beyond an expert's capacity."""
    given = (args[2] > 0).float()
    return given.masked_fill(given.sum(dim=1, keepdim=True) < 2, -1)


def _from_dense_inputs(experts: nn.Module, args: tuple) -> Tensor:
    """Read Llama 4's: every expert is given every token, those that were not chosen for it as zeros."""
    return args[0].view(experts.num_experts, -1, args[0].shape[-1]).abs().sum(dim=-1).T.ne(0).float()


def _from_cells(embedding: nn.Module, args: tuple) -> Tensor:
    """Read Doge's ids of cells."""
    return torch.zeros(len(args[0]), embedding.num_embeddings).scatter(1, args[0], 1)


def _from_counts(experts: nn.Module, args: tuple) -> Tensor:
    """Read JetMoE's: the number of tokens of each expert."""
    return torch.tensor(args[1])


READERS = {
    "DogeCDMoE": _from_cells,
    "JetMoeTopKGating": _from_counts,
    "Llama4Router": _from_dense_inputs,
    "LongcatFlashTopkRouter": _from_ids_with_zero_experts,
    "NllbMoeTop2Router": _from_weights,
    "SwitchTransformersTop1Router": _from_mask,
    "ZayaRouter": _from_ids_or_skip,
}


# --- what must hold -----------------------------------------------------------------------------------------------


def check_ids(ids_BTK: Tensor, num_experts: int, received: Tensor) -> None:
    """Check that the captured ids are those that the experts were given."""
    ids = ids_BTK.flatten(0, 1)
    captured = torch.zeros(len(ids), num_experts).scatter(1, ids, 1)
    if received.dim() == 1:
        assert torch.equal(captured.sum(dim=0).long(), received), "experts were given other numbers of tokens"
        return
    assert captured.shape == received.shape, f"captured {list(captured.shape)}, experts {list(received.shape)}"
    known = received >= 0
    assert known.any(), "the experts were given nothing"
    assert torch.equal(captured[known], received[known]), "experts were given other ids"


def check_scores(scores: Tensor, expert_ids: Tensor) -> None:
    """Check that no expert that was left out scores higher than one that was chosen."""
    lowest = scores.gather(-1, expert_ids).amin(dim=-1)
    highest_left = scores.scatter(-1, expert_ids, -float("inf")).amax(dim=-1)
    assert bool((lowest >= highest_left).all()), "the scores do not reproduce the ids"


def check_gradient(capture: RouterCapture, trace: RoutingTrace, last: str) -> None:
    """Check that the loss moves routers that select by scores, but no correction bias and no experts behind."""
    model = capture.model
    model.zero_grad()
    LOSS(trace).backward()
    for name, router in capture.routers.items():
        moved = [p for p in router.parameters() if p.grad is not None and p.grad.isfinite().all() and p.grad.any()]
        assert hasattr(router, "tid2eid") or any(p.dim() == 2 for p in moved), f"no gradient for router {name}"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.grad is None or not name.endswith(BIASES), f"gradient for {name}"
    touched = [name for name, p in experts_of(capture, last).named_parameters() if p.grad is not None and p.grad.any()]
    assert not touched, f"gradient for the experts behind the last router: {touched}"


# --- the table ----------------------------------------------------------------------------------------------------


def how(capture: RouterCapture, layer: LayerRouting) -> str:
    """Return how a layer routes, in words."""
    router = capture.routers[layer.name]
    kind = type(router).__name__
    if hasattr(router, "tid2eid"):
        return "a table of token ids"
    words = layer.score_function
    groups, kept = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    if groups > kept and getattr(router, "topk_method", "") != "greedy":
        words += " in the best groups"
    owners = (router, getattr(router, "moe_statics", None), capture.model.get_submodule(layer.name.rpartition(".")[0]))
    if any(isinstance(getattr(owner, bias, None), Tensor) for owner in owners for bias in BIASES):
        words += " + correction bias"
    more = {"DbrxRouter": ", ids from the experts", "JetMoeTopKGating": ", attention too", "DogeCDMoE": " of a grid"}
    return f"top {layer.top_k} by {words}{more.get(kind, '')}"


def walk(model_types: list[str] | None = None) -> list[Row]:
    """Return a row for every model type that is no mere part of another one."""
    types = moe_model_types() if model_types is None else model_types
    return [examine(model_type) for model_type in types if not is_part_of_another(model_type)]


def document(rows: list[Row]) -> str:
    """Return the page docs/architectures.md."""
    passed = Counter(row.kind for row in rows if row.passes)
    every = Counter(row.kind for row in rows)
    counts = [f"| {kind} | {passed[kind]} of {every[kind]} |" for kind in KINDS if every[kind]]
    lines = [
        "# Mixture-of-experts architectures of transformers",
        "",
        f"Made by `python tests/architectures.py --write` with transformers {transformers.__version__}.",
        "",
        "Every model type whose configuration has a field about experts is built tiny, with random weights, and run on",
        "text. It passes if there are as many captures as blocks of routed experts; if the captured ids are what the",
        "experts themselves were given; if no expert that was left out scores higher than one that was chosen; and if",
        "the gradient of `LocalConsistencyLoss` reaches every router that selects by scores, but no correction bias",
        "and no expert behind the last router.",
        "",
        "Cache-aware says whether `CacheAwareRouting` can change what the routers choose. It is yes if the model's",
        "logits stay as they are while all experts are in the cache, and if what goes on from a router for another",
        "choice of experts is what the router's own code makes of that choice: the same weights, in the same places.",
        "",
        "| kind | pass |",
        "|---|---|",
        *counts,
        f"| all | {sum(passed.values())} of {len(rows)} |",
        f"| cache-aware | {sum(row.cache_aware.startswith('yes') for row in rows)} of {len(rows)} |",
        "",
        "| architecture | model type | kind | routed | result | cache-aware |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        result = "pass" if row.passes else row.reason.replace("|", "\\|")
        cells = (row.architecture, f"`{row.model_type}`", row.kind, row.routed, result, row.cache_aware)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name} instead of printing it")
    parser.add_argument("model_types", nargs="*", help="these alone (printed, never written)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text = document(walk(arguments.model_types or None))
    if arguments.write and not arguments.model_types:
        DOCUMENT.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
