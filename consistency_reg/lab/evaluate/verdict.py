"""Write the verdict of an evaluation: which model misses least, and how large a cache it needs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from consistency_reg.lab.evaluate.measure import Evaluation
from consistency_reg.lab.pricing.show import bought
from consistency_reg.lab.render.table import in_bytes
from consistency_reg.lab.render.verdict import Verdict, of_models


def verdict(evaluations: Sequence[Evaluation], priced: Sequence[Mapping[str, Any]] = ()) -> Verdict:
    """Return the verdict on models that were measured on the same text; the others stand next to the first.

    Args:
        evaluations: at least one.
        priced: rows of cache-aware routing; what +0.5% perplexity buys is said of each model and cache.
    """
    one_domain = all(one.is_of_one_domain for one in evaluations)
    values = {one.recording.model: one.values for one in evaluations}
    said = of_models(values, _advice(evaluations[0]), one_domain=one_domain)
    return replace(said, found=" ".join([said.found, *bought(priced)]))


def _advice(one: Evaluation) -> str:
    """Return the cache to begin with: at the knee of the hit rates, or of 2K slots where there is none."""
    name, choice = next(iter(one.advice.items()))
    size = f"{choice.ratio:.3g} x K slots a layer" + (", the knee of the hit rates" if name == "knee" else "")
    memory = "" if choice.memory_bytes is None else f" and {in_bytes(choice.memory_bytes)}"
    gain = f"{100 * choice.hit_rate:.1f}% hits, {choice.misses:.2f} loads a token{memory}"
    return f"Next: an LRU cache of {size}: {gain}."
