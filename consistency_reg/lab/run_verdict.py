"""The verdict at the end of ``consistency-reg fit``: what the run saved and cost, and what to try next."""

from typing import Any

from consistency_reg.lab.recipe import consistency_term, pair_of, without_term
from consistency_reg.lab.render.verdict import Verdict, of_run
from consistency_reg.lab.run_folder import RunFolder


def verdict(folder: RunFolder) -> Verdict:
    """Return the verdict on a finished run, next to its baseline where that is in a neighbouring folder.

    Args:
        folder: of the run.
    """
    result = folder.read_result()
    has_term = _has_term(result)
    baseline = _baseline(folder, result) if has_term else None
    there = None if baseline is None else (baseline["name"], baseline["metrics"])
    return of_run(
        result["name"],
        result["metrics"],
        has_term=has_term,
        before=result.get("before"),
        baseline=there,
        without_term=without_term(result["config"]),
    )


def _baseline(folder: RunFolder, result: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of the finished run in the same place that differs in the consistency term alone."""
    pair = pair_of(result)
    for place in sorted(folder.path.resolve().parent.iterdir()):
        other = RunFolder(place)
        if not other.is_finished:
            continue
        try:
            there = other.read_result()
            if pair_of(there) == pair and not _has_term(there):
                return there
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a neighbour that is no run of ours
            continue
    return None


def _has_term(result: dict[str, Any]) -> bool:
    return consistency_term(result["config"])[0] != "none"
