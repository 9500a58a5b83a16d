"""Measure what cache-aware routing costs a model and what it saves, on batches of text.

Every row of text is read in one forward (teacher-forced), which chooses as generation token by token does.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consistency_reg.capture import RouterCapture
from consistency_reg.lab.arguments.price import STRENGTHS
from consistency_reg.lab.corpus.data import model_inputs
from consistency_reg.lab.evaluate.models import expert_bytes
from consistency_reg.lab.module import next_token_losses
from consistency_reg.masks import batch_masks
from consistency_reg.measures import HIT_RATE
from consistency_reg.metrics import CacheHitRate
from consistency_reg.rerouting import CacheAwareRouting
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import RoutingMeasures
from consistency_reg.tracking.deployed import DeployedMeasures

MEASURES = (
    "agreement",
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
    skip: Collection[tuple[float, float]] = (),
) -> Iterator[dict[str, Any]]:
    """Yield a row for each cache ratio and strength: perplexity, misses and balance of the model deployed like that.

    Args:
        model: a causal language model of transformers in evaluation mode.
        batches: batches of each domain, as :class:`~consistency_reg.lab.corpus.data.TextDataModule` makes them.
        strengths: strengths of :class:`~consistency_reg.CacheAwareRouting`; 0 is the model as it is.
        cache_ratios: slots of each layer's cache, in units of its K.
        method: "prior", "max_rank" or "cumulative".
        guaranteed: the number of best experts that are always chosen.
        skip: pairs of a cache ratio and a strength that are not measured.

    Raises:
        ValueError: settings that :class:`~consistency_reg.CacheAwareRouting` refuses, before the first forward.
    """
    every = [(ratio, strength) for ratio in cache_ratios for strength in strengths]
    settings = [setting for setting in every if setting not in skip]
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
    measures = DeployedMeasures(RoutingMeasures((16,), (routing.cache_ratio,), (0.25,)))
    capture = RouterCapture(model)
    lfu: CacheHitRate | None = None
    nats, predicted = 0.0, 0
    with routing, capture:
        for domain, of_domain in enumerate(batches.values()):
            for on_host in of_domain:
                batch = {name: value.to(device) for name, value in on_host.items()}
                routing.given_masks = masks = batch_masks(batch)
                losses = next_token_losses(model(**model_inputs(batch)).logits, batch["labels"])
                nats, predicted = nats + float(losses.double().sum()), predicted + len(losses)
                trace = capture.trace(*masks)
                measures.add(trace, domain)
                lfu = lfu or CacheHitRate.from_trace(trace, "lfu")
                lfu.update(trace)
    values = measures.results(list(batches), device, routing.strength, routing.cache_ratio)
    if lfu is None:
        raise ValueError(f"batches must hold text to measure on, got none in {list(batches)}")
    cross_entropy = nats / predicted
    return {
        "slots": round(routing.cache_ratio * trace.layers[0].top_k),
        "perplexity": math.exp(cross_entropy),
        "cross_entropy": cross_entropy,
        "misses": 1 - float(values[HIT_RATE.at(ratio=routing.cache_ratio).name]),
        "misses_with_first_uses": routing.misses / (routing.hits + routing.misses),
        "misses_lfu": 1 - float(lfu.results().at(routing.cache_ratio)),
        "bytes_per_token": _bytes_per_token(model, routing, trace),
        **{name: float(values.get(name, math.nan)) for name in MEASURES},  # documents may be shorter than 16 tokens
    }


def _bytes_per_token(model: nn.Module, routing: CacheAwareRouting, trace: RoutingTrace) -> float:
    """Return the bytes of experts that a token loads, first uses included; NaN where an expert's size is not known."""
    sizes = expert_bytes(model, routing.layer_names, [layer.num_experts for layer in trace])
    if sizes is None:
        return math.nan
    misses, hits = routing.layer_misses, routing.layer_hits
    loaded = sum(misses[name] * size for name, size in zip(misses, sizes, strict=True))
    first, top_k = routing.layer_names[0], trace.layers[0].top_k
    return loaded * top_k / (misses[first] + hits[first])
