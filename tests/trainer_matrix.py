"""The gradient that the consistency term has in every trainer, head, batch form and accumulation.

    python tests/trainer_matrix.py            # prints the table
    python tests/trainer_matrix.py --write    # writes it to docs/trainers/matrix.md

Each cell trains one optimizer step twice, with the term and without, and compares the difference of the gradients with
``weight`` times the gradient of ``LocalConsistencyLoss``, a mean over the micro-batches, on traces whose masks are told
from the tokens by hand: 0 is a pad, 1 begins a document and stands nowhere else.
"""

import argparse
import copy
import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lightning.pytorch as pl
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from plain_sgd import PLAIN_SGD, InOrder
from tiny_models import COMMON, E, K
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.functional import cross_entropy

from consistency_reg import ConsistencyRegularizer, LocalConsistencyLoss, RouterCapture
from consistency_reg.integrations import ConsistencyCallback, attach

DOCUMENT = Path(__file__).parents[1] / "docs" / "trainers" / "matrix.md"
PAD, BEGIN, END = 0, 1, 2
B, T = 2, 12
WEIGHT = 50.0
LOSS = LocalConsistencyLoss((2, 4))
EXACT = 1e-6

Batch = dict[str, Any]


# --- models and batches -------------------------------------------------------------------------------------------


HEADS = {
    "causal LM": transformers.AutoModelForCausalLM,
    "sequence classification": transformers.AutoModelForSequenceClassification,
    "token classification": transformers.AutoModelForTokenClassification,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
}


@functools.cache
def _first_model(head: str) -> nn.Module:
    torch.manual_seed(0)
    if head == "encoder-decoder":
        config = transformers.SwitchTransformersConfig(
            vocab_size=64, d_model=32, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=E,
            num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, dropout_rate=0.0, router_jitter_noise=0.0,
            decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END,
        )  # fmt: skip
    else:
        config = transformers.Qwen3MoeConfig(
            **COMMON, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=8, head_dim=16
        )
        config.num_labels = 1 if head == "reward" else 3
    automatic = HEADS.get(head, transformers.AutoModelForSequenceClassification)
    model = automatic.from_config(config).double()
    if head != "encoder-decoder":
        model.set_experts_implementation("eager")  # the one that takes doubles
    return model.train()


def new_model(head: str) -> Any:
    return copy.deepcopy(_first_model(head))


def documents(generator: torch.Generator, lengths: list[int]) -> list[int]:
    """Return documents of these lengths, one behind the other."""
    ids = [torch.randint(3, 64, (length - 1,), generator=generator).tolist() for length in lengths]
    return [token for document in ids for token in (BEGIN, *document)]


FORMS = {  # lengths of the documents of the two rows of a batch
    "full": [[T], [T]],
    "padded right": [[9], [T]],
    "padded left": [[T], [7]],
    "packed": [[5, 7], [3, 4, 5]],
}


def batches(head: str, form: str, count: int) -> list[Batch]:
    """Return batches of two rows, with labels for a head; the rows have unequally many."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        batch: dict[str, list[torch.Tensor]] = {}
        for index, lengths in enumerate(FORMS[form]):
            row = torch.tensor(documents(generator, lengths))
            padded = T - len(row)
            sides = (padded, 0) if form == "padded left" else (0, padded)
            columns = {"input_ids": row}
            if form.startswith("padded"):
                columns["attention_mask"] = torch.ones_like(row)
            if form == "packed":
                columns["position_ids"] = torch.cat([torch.arange(length) for length in lengths])
            columns = {name: nn.functional.pad(value, sides) for name, value in columns.items()}
            columns["labels"] = _labels(head, columns["input_ids"], ignored=2 * number + index, generator=generator)
            for name, value in columns.items():
                batch.setdefault(name, []).append(value)
        made.append({name: torch.stack(values) for name, values in batch.items()})
    return made


def rows_of(cell: "Cell") -> list[Batch]:
    """Return the rows of a cell's micro-batches, one behind the other."""
    made = batches(cell.head, cell.form, cell.accumulation)
    return [{name: value[index] for name, value in batch.items()} for batch in made for index in range(B)]


def _labels(head: str, ids: torch.Tensor, ignored: int, generator: torch.Generator) -> torch.Tensor:
    if head in ("sequence classification", "reward"):
        return torch.randint(3, (), generator=generator)
    labels = torch.randint(3, ids.shape, generator=generator) if head == "token classification" else ids.clone()
    labels[ids == PAD] = -100
    labels[: min(ignored, 6)] = -100
    return labels


# --- what is right ------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """Records one optimizer step: its gradient, and the forwards with a gradient of each micro-batch."""

    micro_batches: list[list[Batch]] = field(default_factory=lambda: [[]])
    gradient: torch.Tensor | None = None

    def listen(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            given = {"input_ids": args[0]} if args else {}
            given |= {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
            given = {name: value.detach().clone() for name, value in given.items()}
            # without a cache the model itself reads packed rows from the positions, and attends within documents
            given["use_cache"] = kwargs.get("use_cache", model.config.use_cache)
            self.micro_batches[-1].append(given)

    def end_micro_batch(self) -> None:
        self.micro_batches.append([])

    def end(self, model: nn.Module, scale: float = 1.0) -> None:
        if self.gradient is None:
            self.gradient = gradient_of(model) / scale


def gradient_of(model: nn.Module) -> torch.Tensor:
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([part.detach().flatten().clone() for part in parts])


def right_gradient(head: str, step: Step) -> torch.Tensor:
    """Return the mean over micro-batches of the term's gradient, with masks told from the tokens alone."""
    model = new_model(head)
    micro_batches = [forwards for forwards in step.micro_batches if forwards]
    for forwards in micro_batches:
        for given in forwards:
            ids = given["input_ids"]
            kept = {"input_ids", "attention_mask", "position_ids"}
            kept |= {"labels"} if head == "encoder-decoder" else {"use_cache"}
            with RouterCapture(model) as capture:
                model(**{name: value for name, value in given.items() if name in kept})
            trace = capture.trace(ids != PAD, (ids == BEGIN).cumsum(dim=1))
            (LOSS(trace) / len(forwards) / len(micro_batches)).backward()
    return gradient_of(model)


# --- trainers -----------------------------------------------------------------------------------------------------

Run = Callable[["Cell", Any, float, Step, Path], None]  # trains one step of a model with this weight of the term


def policy_loss(output: Any, batch: Batch, number: int) -> torch.Tensor:
    log_probs = output.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])
    return -[0.5, -6.0, 0.0][number % 3] * log_probs.mean()


LOSSES: dict[str, Callable[[Any, Batch, int], torch.Tensor]] = {
    "the model's": lambda output, batch, number: output.loss,
    "of one's own": lambda output, batch, number: cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    ),
    "policy": policy_loss,
    "the model's times a reward": lambda output, batch, number: [0.5, -6.0, 0.3][number % 3] * output.loss,
}


def plain_loop(cell: "Cell", model: Any, weight: float, step: Step, folder: Path) -> None:
    count, scaler = cell.accumulation, None
    if "gradient scaler" in cell.trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scale = None
    if "scale=" in cell.trainer:
        scale = 1 / count if scaler is None else lambda one: scaler.scale(one) / count
    extra = {"num_items_in_batch": torch.tensor(19.0)} if "num_items" in cell.loss else {}
    loss_of = LOSSES[cell.loss.split(",")[0]]
    if weight:
        attach(model, LOSS, weight, scale=scale)
    for number, batch in enumerate(batches(cell.head, cell.form, count)):
        loss = loss_of(model(**batch, **extra), batch, number) / (1 if extra else count)
        (loss if scaler is None else scaler.scale(loss)).backward()
        step.end_micro_batch()
    step.end(model, 1.0 if scaler is None else scaler.get_scale())


def accelerate_loop(cell: "Cell", model: Any, weight: float, step: Step, folder: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=cell.accumulation)
    if weight:
        attach(model, LOSS, weight, scale=1 / cell.accumulation if "scale=" in cell.trainer else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = torch.utils.data.DataLoader(rows_of(cell), batch_size=B)  # type: ignore[arg-type]
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for number, batch in enumerate(loader):
        with accelerator.accumulate(prepared):
            accelerator.backward(LOSSES[cell.loss](prepared(**batch), batch, number))
            step.end_micro_batch()
    step.end(model)


class LitModel(pl.LightningModule):
    def __init__(self, model: Any, cell: "Cell", step: Step) -> None:
        super().__init__()
        self.model, self.cell, self.step = model, cell, step

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = LOSSES[self.cell.loss](self.model(**batch), batch, batch_idx)
        self.step.end_micro_batch()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.step.end(self.model)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def lightning(cell: "Cell", model: Any, weight: float, step: Step, folder: Path) -> None:
    trainer = pl.Trainer(
        max_steps=1, accumulate_grad_batches=cell.accumulation, accelerator="cpu", logger=False, barebones=False,
        callbacks=[ConsistencyRegularizer(LOSS, weight)] if weight else [], enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches(cell.head, cell.form, cell.accumulation), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(LitModel(model, cell, step), loader)


class Ends(transformers.TrainerCallback):
    """Tells a :class:`Step` where micro-batches end, and stops after the first step."""

    def __init__(self, step: Step, scale: float) -> None:
        self.step, self.scale = step, scale

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.step.end_micro_batch()

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.step.end(model, self.scale)


def start(cell: "Cell", trainer: transformers.Trainer, weight: float, step: Step) -> None:
    """Train one step, with the term of the way that the cell names."""
    scale = 1.0
    if "gradient scaler" in cell.trainer:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scale = 1024.0
    if weight and "attach" in cell.trainer:
        attach(trainer.model, LOSS, weight)
    elif weight:
        ConsistencyCallback(LOSS, weight).add_to(trainer)
    trainer.add_callback(Ends(step, scale))
    trainer.train()


def arguments(cell: "Cell", folder: Path) -> dict[str, Any]:
    return PLAIN_SGD | {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": B, "bf16": False,
        "gradient_accumulation_steps": cell.accumulation, "logging_strategy": "no",
    }  # fmt: skip


class OrderedTrainer(InOrder, transformers.Trainer):
    """A Trainer that does not shuffle."""


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    losses = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return losses / num_items_in_batch


def hf_trainer(cell: "Cell", model: Any, weight: float, step: Step, folder: Path) -> None:
    options = arguments(cell, folder)
    if cell.loss == "label smoothing":
        options["label_smoothing_factor"] = 0.1
    if "checkpointing" in cell.trainer:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if "torch.compile" in cell.trainer:
        torch.compiler.reset()  # a model that was compiled without hooks stays without
        options |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    if cell.loss == "averaged":
        model.accepts_loss_kwargs = False
    compute = own_loss if cell.loss == "compute_loss_func" else None
    given = {"train_dataset": rows_of(cell), "compute_loss_func": compute}
    trainer = OrderedTrainer(model, transformers.TrainingArguments(**options), **given)
    start(cell, trainer, weight, step)


@functools.cache
def tokenizer() -> Any:
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def texts(generator: torch.Generator, lengths: list[int], *, begin: bool) -> list[str]:
    """Return texts of so many words; those that begin a document begin with its token."""
    drawn = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(["<s>" if begin else "", *(f"w{word}" for word in words)]) for words in drawn]  # joined by a space


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(completion)) / 10 for completion in completions]


def trl_trainer(cell: "Cell", model: Any, weight: float, step: Step, folder: Path) -> None:
    import trl

    generator = torch.Generator().manual_seed(1)
    options = arguments(cell, folder) | {"gradient_checkpointing": False, "router_aux_loss_coef": 0.0}
    name, *kind = cell.loss.split(", ")
    rows = 4 * B * cell.accumulation
    prompts = texts(generator, [4 + index % 3 for index in range(rows)], begin=True)
    answers = [texts(generator, [3 + index * more % 5 for index in range(rows)], begin=False) for more in (1, 2)]
    if name == "SFT":
        options |= {"loss_type": kind[0], "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        ids = [documents(generator, [6 + index * 5 % 7]) for index in range(rows)]
        columns: dict[str, list[Any]] = {"input_ids": ids}
        if cell.form == "padding-free":
            options["padding_free"] = True
        if cell.form == "packed":
            options |= {"packing": True, "max_length": 16, "dataset_kwargs": None}
        if cell.form == "completion only":
            columns["labels"] = [[-100] * 3 + row[3:] for row in ids]
    elif name == "DPO":
        options |= {"loss_type": kind[0]}
        columns = {"prompt": prompts, "chosen": answers[0], "rejected": answers[1]}
    elif name == "KTO":
        options |= {"loss_type": kind[0]}
        columns = {"prompt": prompts, "completion": answers[0], "label": [index % 3 > 0 for index in range(rows)]}
    elif name == "reward model":
        columns = {
            which: [prompt + answer for prompt, answer in zip(prompts, some, strict=True)]
            for which, some in zip(("chosen", "rejected"), answers, strict=True)
        }
    else:
        options |= {"num_generations": 2, "max_completion_length": 6, "seed": 3, "beta": 0.0}
        options["generation_kwargs"] = {"suppress_tokens": [PAD, BEGIN]}
        if name == "GRPO":
            options |= {"loss_type": kind[0]}
        columns = {"prompt": prompts}
    trainer_class = {
        "SFT": trl.SFTTrainer, "DPO": trl.DPOTrainer, "KTO": trl.KTOTrainer, "reward model": trl.RewardTrainer,
        "GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer,
    }[name]  # fmt: skip
    config_class = getattr(trl, trainer_class.__name__.replace("Trainer", "Config"))
    if name == "reward model":
        del options["router_aux_loss_coef"]
    given: dict[str, Any] = {"reward_funcs": reward} if name in ("GRPO", "RLOO") else {}
    if name in ("DPO", "KTO"):
        given["ref_model"] = copy.deepcopy(model)
    trainer = trainer_class(
        model, args=config_class(**options), train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer(), **given,
    )  # fmt: skip
    start(cell, trainer, weight, step)


# --- cells --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    trainer: str
    head: str
    loss: str
    form: str
    accumulation: int
    run: Run = field(compare=False, repr=False)

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.trainer, self.head, self.loss, self.form, self.accumulation

    def __str__(self) -> str:
        return "; ".join(map(str, self.key))


def cells() -> Iterator[Cell]:
    """Yield every cell of the table, in its order."""
    lm, rest = "causal LM", ("sequence classification", "token classification")
    padded, forms = ("padded right",), tuple(FORMS)

    def each(
        run: Run, trainer: str, heads: Any, losses: Any, forms: Any = padded, accumulations: Any = (1, 3)
    ) -> Iterator[Cell]:
        for head in heads:
            for loss in losses:
                for form in forms:
                    if form == "packed" and head == "sequence classification":
                        continue  # one label a row
                    for accumulation in accumulations:
                        yield Cell(trainer, head, loss, form, accumulation, run)

    plain = "plain loop, attach"
    yield from each(plain_loop, plain, [lm], ["the model's"], forms)
    yield from each(plain_loop, plain, rest, ["the model's"])
    yield from each(plain_loop, plain, ["encoder-decoder"], ["the model's"], ("full",))
    yield from each(plain_loop, f"{plain}, gradient scaler", [lm], ["the model's"])
    yield from each(
        plain_loop, plain, [lm], ["of one's own", "policy", "the model's times a reward", "the model's, num_items"],
        accumulations=(3,),
    )  # fmt: skip
    scaled = f"{plain}(scale=...)"
    yield from each(plain_loop, scaled, [lm], list(LOSSES))
    yield from each(plain_loop, scaled, [lm], ["the model's, num_items"], accumulations=(3,))
    yield from each(plain_loop, scaled, rest, ["the model's"])
    yield from each(plain_loop, f"{scaled}, gradient scaler", [lm], ["policy"])
    yield from each(accelerate_loop, "accelerate, attach", [lm], ["the model's"], forms)
    yield from each(accelerate_loop, "accelerate, attach", rest, ["the model's"])
    yield from each(accelerate_loop, "accelerate, attach", [lm], ["policy"])
    yield from each(accelerate_loop, "accelerate, attach(scale=...)", [lm], ["policy"])
    yield from each(lightning, "Lightning", [lm], ["the model's"], forms)
    yield from each(lightning, "Lightning", rest, ["the model's"])
    yield from each(lightning, "Lightning", ["encoder-decoder"], ["the model's"], ("full",))
    yield from each(lightning, "Lightning", [lm], ["of one's own", "policy"])
    hf = "Trainer"
    yield from each(hf_trainer, hf, [lm], ["num_items_in_batch"], forms)
    yield from each(hf_trainer, hf, [lm], ["averaged", "label smoothing", "compute_loss_func"])
    yield from each(hf_trainer, hf, rest, ["the model's"])
    yield from each(hf_trainer, hf, ["encoder-decoder"], ["the model's"], ("full",))
    yield from each(hf_trainer, f"{hf}, gradient scaler", [lm], ["num_items_in_batch"])
    yield from each(hf_trainer, f"{hf}, gradient checkpointing", [lm], ["num_items_in_batch"])
    yield from each(hf_trainer, f"{hf}, torch.compile", [lm], ["num_items_in_batch"])
    yield from each(hf_trainer, f"{hf}, attach alone", [lm], ["averaged", "num_items_in_batch"])
    yield from each(trl_trainer, "TRL", [lm], ["SFT, nll"], (*padded, "completion only", "padding-free", "packed"))
    yield from each(trl_trainer, "TRL", [lm], ["SFT, dft"])
    yield from each(trl_trainer, "TRL, gradient scaler", [lm], ["SFT, nll"])
    yield from each(trl_trainer, "TRL, attach alone", [lm], ["SFT, nll"], accumulations=(1,))
    yield from each(trl_trainer, "TRL", [lm], ["DPO, sigmoid", "DPO, ipo", "KTO, kto"])
    yield from each(trl_trainer, "TRL", ["reward"], ["reward model"])
    yield from each(trl_trainer, "TRL", [lm], ["GRPO, dapo", "GRPO, grpo", "RLOO"], ("padded left",))


def examine(cell: Cell) -> tuple[str, float]:
    """Return "exact" and the relative error, or the message of the refusal and NaN; a wrong term fails an assertion."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    AcceleratorState._reset_state()  # else torch.compile of an earlier cell holds on
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), mock.patch.dict(os.environ):
        warnings.simplefilter("ignore")
        without, _ = _train(cell, 0.0, Path(folder))
        try:
            with_term, step = _train(cell, WEIGHT, Path(folder))
        except (RuntimeError, ValueError) as error:
            return str(error), float("nan")
    expected = WEIGHT * right_gradient(cell.head, step)
    error = float((with_term - without - expected).norm() / expected.norm())
    assert error < EXACT, f"{cell}: the term's gradient is off by {error:.2e} of its norm"
    return "exact", error


def _train(cell: Cell, weight: float, folder: Path) -> tuple[torch.Tensor, Step]:
    model, step = new_model(cell.head), Step()
    torch.manual_seed(2)
    step.listen(model)
    cell.run(cell, model, weight, step, folder)
    assert step.gradient is not None
    return step.gradient, step


# --- the page -----------------------------------------------------------------------------------------------------

HEADER = """# Exact, or refused

Generated by `python tests/trainer_matrix.py --write`; the tests fail where this page is out of step.

*exact*: over one optimizer step, the term's part of the gradient is `weight` times the mean over the micro-batches of
the gradient of `LocalConsistencyLoss` on a trace whose masks were written by hand, within 1e-6 of its norm, all
parameters together (tiny models in double precision, two rows a micro-batch with unequally many labels; transformers
{transformers}, TRL {trl}, accelerate {accelerate}, Lightning {lightning}, torch {torch}). *refused*: training stops
with the message below the table. Nothing else happens.

"""


def verdicts() -> dict[tuple[str, str, str, str, int], str]:
    """Return "exact" or the message of the refusal, of each cell."""
    return {cell.key: examine(cell)[0] for cell in cells()}


def document(found: dict[tuple[str, str, str, str, int], str]) -> str:
    """Return the page of these verdicts."""
    import accelerate
    import lightning as lightning_package
    import trl

    packages = (transformers, trl, accelerate, lightning_package, torch)
    versions = {package.__name__: package.__version__.split("+")[0] for package in packages}
    accumulations = sorted({key[-1] for key in found})
    messages: list[str] = []
    rows = []
    for row in dict.fromkeys(key[:-1] for key in found):
        shown = []
        for accumulation in accumulations:
            verdict = found.get((*row, accumulation))
            if verdict not in (None, "exact"):
                if verdict not in messages:
                    messages.append(verdict)
                verdict = f"refused ({messages.index(verdict) + 1})"
            shown.append(verdict or "")
        rows.append([*row, *shown])
    head = [
        "trainer",
        "head",
        "loss",
        "batch",
        *(f"{number} micro-batch{'es' * (number > 1)}" for number in accumulations),
    ]
    table = [head, ["---"] * len(head), *rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    notes = [f"{number}. {message}" for number, message in enumerate(messages, start=1)]
    return HEADER.format(**versions) + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def read(page: str) -> dict[tuple[str, str, str, str, int], str]:
    """Return the verdicts of a page."""
    found = {}
    lines = page.splitlines()
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    for row in table[2:]:
        for name, verdict in zip(table[0][4:], row[4:], strict=True):
            if verdict:
                message = notes[verdict.removeprefix("refused (").rstrip(")")] if verdict != "exact" else verdict
                found[*row[:4], int(name.split()[0])] = message
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    written = document(verdicts())
    DOCUMENT.write_text(written, encoding="utf-8") if parser.parse_args().write else print(written)
