"""An evaluation as JSON, in full, as CSV, a row for each number, and the usage of its experts for engines."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from consistency_reg.functional.balance import usage_counts
from consistency_reg.functional.srp import ModelSRP, SRPResult
from consistency_reg.lab.evaluate.measure import FAVOURITES, Evaluation
from consistency_reg.lab.evaluate.traces import Recording
from consistency_reg.lab.files import csv_text, without_nan
from consistency_reg.measures import HIT_RATE, PERPLEXITY, SRP, of_metric
from consistency_reg.metrics.simulated_caches import ModelHitRates
from consistency_reg.metrics.specialization import Specialization
from consistency_reg.tracking.experts import usage_profile

COLUMNS = ("model", "domain", "layer", "measure", "m", "cache_ratio", "value", "low", "high")
ALL = "all"
SHARED = "shared by all"  # in the place of a layer: one cache for all of them


def to_csv(evaluations: Sequence[Evaluation]) -> str:
    """Return a row for each number; ``low`` and ``high`` are its 95% interval where there is one."""
    rows = (
        {"model": evaluation.recording.model, "domain": ALL, "layer": ALL} | row
        for evaluation in evaluations
        for row in _rows(evaluation)
    )
    return csv_text(rows, COLUMNS)


def to_json(evaluations: Sequence[Evaluation], about: dict[str, Any]) -> str:
    """Return all that was measured, down to the hit rate of every layer's cache at every size."""
    return json.dumps(without_nan({**about, "models": [_model(one) for one in evaluations]}), indent=1) + "\n"


def usage_lines(recording: Recording) -> str:
    """Return how many tokens used each expert of each layer, for engines that pin experts in memory."""
    layers = zip(recording.expert_ids, recording.num_experts, strict=True)
    return usage_profile(usage_counts(ids.long(), E, recording.valid) for ids, E in layers)


def _rows(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    names = evaluation.recording.layer_names
    for m, result in evaluation.srp.items():
        yield from _srp_rows(result, m)
        for name, layer in zip(names, result.layers, strict=True):
            yield from ({"layer": name} | row for row in _srp_rows(layer, m))
    for domain in (ALL, *evaluation.recording.domains):
        perplexity = evaluation.recording.perplexity(None if domain == ALL else domain)
        if perplexity is not None:
            yield {"domain": domain, "measure": PERPLEXITY.label, "value": perplexity}
    for domain, by_length in evaluation.domain_srp.items():
        for m, result in by_length.items():
            yield from ({"domain": domain} | row for row in _srp_rows(result, m))
    simulations = [("sch", m, rates) for m, rates in evaluation.sch.items()]
    for policy, length, rates in [*simulations, *((name, None, rates) for name, rates in evaluation.policies.items())]:
        for ratio in evaluation.cache_ratios:
            where = {"measure": HIT_RATE.record.format(cache=policy), "m": length, "cache_ratio": ratio}
            yield from (where | row for row in _hit_rate_rows(rates, ratio, names))
    for kind, found in evaluation.kinds.items():
        for measure, number in _summary(found).items():
            yield {"measure": f"{kind}_specialization_{measure}", "m": evaluation.segment_length, "value": number}
    for value in evaluation.balance.values():
        where = {"measure": value.reading.measure.record, "m": value.reading.m}
        yield from (where | {"layer": name, "value": float(v)} for name, v in zip(names, value.layers, strict=True))


def _hit_rate_rows(rates: ModelHitRates, ratio: float, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the hit rate of the model, of each layer's cache, and of one cache for all layers."""
    yield {"value": float(rates.at(ratio))} | _interval(rates.intervals.get(ratio))
    shared = [] if rates.shared is None else [(SHARED, rates.shared)]
    for name, cache in [*zip(names, rates.layers, strict=True), *shared]:
        yield {"layer": name, "value": float(cache.at(ratio))} | _interval(cache.interval_at(ratio))


def _srp_rows(result: ModelSRP | SRPResult, m: int) -> Iterator[dict[str, Any]]:
    for measure in of_metric("srp"):
        interval = _interval(result.interval) if measure is SRP else {}
        yield {"measure": measure.record, "m": m, "value": getattr(result, measure.attribute).item()} | interval


def _model(evaluation: Evaluation) -> dict[str, Any]:
    recording, balance = evaluation.recording, evaluation.balance
    return {
        "model": recording.model,
        "about": recording.about,
        "tokens": recording.tokens,
        "rows": len(recording.valid),
        "layer_names": list(recording.layer_names),
        "num_experts": list(recording.num_experts),
        "top_k": [ids.shape[-1] for ids in recording.expert_ids],
        "expert_bytes": None if recording.expert_bytes is None else list(recording.expert_bytes),
        "srp": {m: _srp(result) | {"layers": list(map(_srp, result.layers))} for m, result in evaluation.srp.items()},
        "srp_by_domain": {
            domain: {m: _srp(result) for m, result in by_length.items()}
            for domain, by_length in evaluation.domain_srp.items()
        },
        "sch": {m: _hit_rates(rates, evaluation.cache_ratios) for m, rates in evaluation.sch.items()},
        "caches": {name: _hit_rates(rates, evaluation.cache_ratios) for name, rates in evaluation.policies.items()},
        "balance": {
            "layers": _balance_of_layers(evaluation),
            "usage": [usage.tolist() for usage in balance.usage],
            "local_cv": {m or "document": cv.tolist() for m, cv in balance.local_cv.items()},
            "overlap": balance.overlap.tolist(),
        },
        "specialization": _specialization(evaluation),
        "perplexity": {
            domain: recording.perplexity(None if domain == ALL else domain) for domain in (ALL, *recording.text_loss)
        },
        "advice": {name: asdict(choice) for name, choice in evaluation.advice.items()},
    }


def _srp(result: ModelSRP | SRPResult) -> dict[str, Any]:
    values = {measure.attribute: getattr(result, measure.attribute).item() for measure in of_metric("srp")}
    return values | _interval(result.interval)


def _balance_of_layers(evaluation: Evaluation) -> list[dict[str, float]]:
    """Return the measures of balance of each layer that are not of a segment length."""
    values = [value for value in evaluation.balance.values() if not value.reading.measure.by_segment]
    return [
        {value.reading.measure.attribute: float(value.layers[i]) for value in values}
        for i in range(len(evaluation.recording.layer_names))
    ]


def _hit_rates(rates: ModelHitRates, cache_ratios: Sequence[float]) -> dict[str, Any]:
    at = {ratio: {"hit_rate": float(rates.at(ratio))} | _interval(rates.intervals.get(ratio)) for ratio in cache_ratios}
    found = {"at_ratio": at, "layers_by_slots": [layer.hit_rate.tolist() for layer in rates.layers]}
    if rates.shared is None:
        return found
    shared = {
        ratio: {"hit_rate": float(rates.shared.at(ratio))} | _interval(rates.shared.interval_at(ratio))
        for ratio in cache_ratios
    }
    return found | {"shared": {"at_ratio": shared, "by_slots": rates.shared.hit_rate.tolist()}}


def _specialization(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return by kind the mean, the correlations with the experts' own SRP, and the value of every expert."""
    found = evaluation.specialization
    if found is None:
        return None
    of_experts = {
        kind: _summary(one) | {"layers": [layer.tolist() for layer in one.layers]}
        for kind, one in evaluation.kinds.items()
    }
    about = {"m": evaluation.segment_length, "favourites": FAVOURITES}
    return {**about, "srp": [layer.tolist() for layer in found.srp], **of_experts}


def _summary(kind: Specialization) -> dict[str, float]:
    return {name: float(getattr(kind, name)) for name in ("mean", "pearson", "spearman")}


def _interval(interval: Tensor | None) -> dict[str, float]:
    return {} if interval is None else dict(zip(("low", "high"), interval.tolist(), strict=True))
