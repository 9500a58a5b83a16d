"""Price routing that knows the cache: a run's perplexity and misses at several strengths, on its own validation text.

    python -m consistency_reg.lab.evaluate.deployed runs/gate/off-seed3 --csv deployed.csv

Every row of text is read in one forward (teacher-forced), which chooses as generation token by token does.
"""

import csv
import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.capture import RouterCapture
from consistency_reg.functional.agreement import agreement_mean
from consistency_reg.lab.checkpoint import model_folder
from consistency_reg.lab.corpus.data import TextDataModule, model_inputs
from consistency_reg.lab.evaluate.models import expert_bytes, load
from consistency_reg.lab.module import next_token_losses
from consistency_reg.lab.provenance import device_name, git_commit, package_versions
from consistency_reg.lab.recipe import consistency_term
from consistency_reg.lab.usage import CommandParser
from consistency_reg.masks import batch_masks
from consistency_reg.metrics import CacheHitRate
from consistency_reg.rerouting import CacheAwareRouting
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import RoutingMeasures

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.3)
MEASURES = (
    *("balance/cv", "balance/max_mean", "balance/min_share", "balance/local_cv/m16"),
    *("srp/m16", "static_srp", "cache/lru_25pct"),
)
Batches = Mapping[str, Iterable[Mapping[str, Tensor]]]


def price(
    model: nn.Module,
    batches: Batches,
    strengths: Sequence[float] = STRENGTHS,
    cache_ratios: Sequence[float] = (2.0,),
    method: str = "prior",
    guaranteed: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each cache ratio and strength: perplexity and misses of the model as it is deployed then.

    Args:
        model: a causal language model of transformers in evaluation mode.
        batches: by domain, as :class:`~consistency_reg.lab.corpus.data.TextDataModule` makes them.
        strengths: of :class:`~consistency_reg.CacheAwareRouting`; 0 is the model as it is.
        cache_ratios: slots of each layer's cache, in units of its K.
        method: "prior", "max_rank" or "cumulative".
        guaranteed: experts that are chosen always.

    Raises:
        ValueError: settings that :class:`~consistency_reg.CacheAwareRouting` refuses, before the first forward.
    """
    settings = [(ratio, strength) for ratio in cache_ratios for strength in strengths]
    routings = [CacheAwareRouting(model, ratio, strength, guaranteed, method) for ratio, strength in settings]
    for routing in routings:
        yield {
            "method": method,
            "strength": routing.strength,
            "cache_ratio": routing.cache_ratio,
            "guaranteed": guaranteed,
            **_measure(model, batches, routing),
        }


@torch.inference_mode()
def _measure(model: nn.Module, batches: Batches, routing: CacheAwareRouting) -> dict[str, Any]:
    device = next(model.parameters()).device
    measures = RoutingMeasures((16,), (routing.cache_ratio,), (0.25,))
    capture = RouterCapture(model)
    lfu: CacheHitRate | None = None
    nats, predicted, same, uses = 0.0, 0, 0, 0
    with routing, capture:
        for domain, of_domain in enumerate(batches.values()):
            for on_host in of_domain:
                batch = {name: value.to(device) for name, value in on_host.items()}
                routing.given_masks = masks = batch_masks(batch)
                losses = next_token_losses(model(**model_inputs(batch)).logits, batch["labels"])
                nats, predicted = nats + float(losses.double().sum()), predicted + len(losses)
                trace = capture.trace(*masks)
                measures.add(trace, domain)
                lfu = lfu or CacheHitRate(_experts(trace), "lfu").to(device)
                lfu.update(trace)
                for layer in trace:
                    assert layer.scores is not None
                    agreed = agreement_mean(layer.expert_ids, layer.scores.topk(layer.top_k).indices, trace.valid)
                    same, uses = same + int(agreed.total), uses + int(agreed.count)
    measured = measures.results(list(batches), device)
    if measured is None or lfu is None:
        raise ValueError(f"batches must hold text to measure on, got none in {list(batches)}")
    values = {name: float(value) for name, value in measured.model.items()}
    cross_entropy = nats / predicted
    return {
        "slots": round(routing.cache_ratio * trace.layers[0].top_k),
        "perplexity": math.exp(cross_entropy),
        "cross_entropy": cross_entropy,
        "misses": 1 - float(measured.hit_rates.at(routing.cache_ratio)),
        "misses_with_first_uses": routing.misses / (routing.hits + routing.misses),
        "misses_lfu": 1 - float(lfu.results().at(routing.cache_ratio)),
        "bytes_per_token": _bytes_per_token(model, routing, trace),
        "agreement": same / uses,
        **{name: values[name] for name in MEASURES},
    }


def _experts(trace: RoutingTrace) -> list[int]:
    return [layer.num_experts for layer in trace]


def _bytes_per_token(model: nn.Module, routing: CacheAwareRouting, trace: RoutingTrace) -> float:
    """Return the bytes of experts that a token loads, first uses included; NaN where an expert's size is not known."""
    sizes = expert_bytes(model, routing.layer_names, _experts(trace))
    if sizes is None:
        return math.nan
    misses, hits = routing.layer_misses, routing.layer_hits
    loaded = sum(misses[name] * size for name, size in zip(misses, sizes, strict=True))
    first, top_k = routing.layer_names[0], trace.layers[0].top_k
    return loaded * top_k / (misses[first] + hits[first])


def price_run(
    folder: Path, *, device: str = "cpu", data: Mapping[str, Any] | None = None, **settings: Any
) -> Iterator[dict[str, Any]]:
    """Yield the rows of :func:`price` of a finished run on its own validation text, with what the run was.

    Args:
        folder: of the run.
        device: where the model is run.
        data: arguments of :class:`~consistency_reg.lab.corpus.data.TextDataModule` that differ from the run's own.
        settings: of :func:`price`.

    Raises:
        ValueError: a folder without a finished run; settings that are refused.
    """
    path = folder / "result.json"
    if not path.exists():
        raise ValueError(f"{folder} must hold a finished run, with a result.json")
    result = json.loads(path.read_text())
    candidate = load(str(folder), device=torch.device(device))
    other = {**data, "tokenizer": str(model_folder(folder))} if data else {}  # else one would be trained on that text
    text = TextDataModule(**{**result["config"]["data"], **other})
    text.prepare_data()
    text.setup()
    loss, weight = consistency_term(result["config"])
    about = {"run": result["name"], "seed": result["seed"], "loss": loss, "weight": weight}
    about |= {"trained_strength": (result["config"].get("routing") or {}).get("strength", 0.0)}
    batches = dict(zip(text.domains, text.val_dataloader(), strict=True))
    for row in price(candidate.model, batches, **settings):
        yield about | row


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]], command: str) -> list[dict[str, Any]]:
    """Add rows to a CSV file one by one, each with the command, commit, versions and device that made it.

    Raises:
        ValueError: the file holds rows of other columns.
    """
    origin = {
        "command": command,
        "git_commit": git_commit(),
        "versions": json.dumps(package_versions()),
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
    }
    written = []
    for row in rows:
        whole = {**row, **origin}
        new = not path.exists()
        if not new and (there := next(csv.reader(path.open(encoding="utf-8")))) != list(whole):
            raise ValueError(f"{path} holds rows of other columns, {there} instead of {list(whole)}: give another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(whole))
            if new:
                writer.writeheader()
            writer.writerow(whole)
        written.append(whole)
    return written


def main(argv: Sequence[str]) -> int:
    """Price the runs that ``argv`` names; 0 when their rows are written."""
    parser = CommandParser("python -m consistency_reg.lab.evaluate.deployed", description="Price cache-aware routing.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--cache-aware", nargs="+", type=float, default=list(STRENGTHS), metavar="S", help="strengths")
    parser.add_argument("--cache-ratios", nargs="+", type=float, default=[2.0], metavar="RHO", help="slots / K")
    parser.add_argument("--method", default="prior", metavar="NAME", help="prior, max_rank or cumulative")
    parser.add_argument("--guaranteed", type=int, default=1, metavar="N", help="best experts that are always chosen")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda; default: cpu")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="of the default corpus, instead of the run's own")
    parser.add_argument("--csv", type=Path, default=Path("deployed.csv"), metavar="FILE", help="is added to")
    options = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "consistency_reg.lab.evaluate.deployed", *argv])
    for folder in options.runs:
        rows = price_run(
            folder,
            device=options.device,
            data={"domains": options.domains} if options.domains else None,
            strengths=options.cache_aware,
            cache_ratios=options.cache_ratios,
            method=options.method,
            guaranteed=options.guaranteed,
        )
        for row in append_rows(options.csv, rows, command):
            said = {name: row[name] for name in ("run", "strength", "slots", "perplexity", "misses", "agreement")}
            print(", ".join(f"{name} {value:.4g}" if name != "run" else value for name, value in said.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
