"""Write the verdict of a report: the cell that saves most within its budget, and what to try next."""

import math
from dataclasses import replace

from consistency_reg.lab.render.table import change
from consistency_reg.lab.render.verdict import WITHOUT_TERM, Outcome, Verdict, advise, describe, in_words
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.hypervolume import BUDGETS, best_within
from consistency_reg.lab.report.measured import HITS
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

NO_BASELINE = "Next: the same command with {} and the same seed, and a report on both."
NO_TERM = "Next: the same command with --consistency.weight 0.35 and the same seed, and a report on both."


def verdict(findings: Findings) -> Verdict:
    """Return what the best cell saves and costs; where nothing is compared, what the run that misses least does.

    Where runs were measured with cache-aware routing, a sentence says what the best of them reaches as it is deployed.
    """
    said = _as_they_are(findings)
    deployed = _as_deployed(findings)
    return replace(said, found=f"{said.found} {deployed}") if deployed else said


def _as_they_are(findings: Findings) -> Verdict:
    if not findings.pairs:
        best = min(findings.runs, key=lambda run: math.inf if math.isnan(run.misses) else run.misses)
        if all(run.loss == "none" for run in findings.runs):
            return Verdict(describe(best.name, best.metrics), NO_TERM)
        off = f"{WITHOUT_TERM} --routing.strength 0" if best.loop else WITHOUT_TERM
        return Verdict(describe(best.name, best.metrics), NO_BASELINE.format(off))
    best = best_cell(findings.cells)
    of_loss = findings.cells[(findings.cells["loss"] == best["loss"]) & (findings.cells["against"] == best["against"])]
    outcome = Outcome(
        name=best["cell"],
        against=best["against"],
        misses=best["misses_change_mean"],
        cache=HITS.complement,
        perplexity=best["perplexity_change_mean"],
        smallest_share=best["smallest_share_min"],
        cv_ratio=best["cv_ratio_max"],
        seeds=int(best["seeds"]),
    )
    return Verdict(str(outcome), advise(outcome, heavier=best["weight"] == of_loss["weight"].max()))


def _as_deployed(findings: Findings) -> str:
    """Return the fewest misses within the first budget at any strength, next to the bias alone; "" for none."""
    if findings.deployed.empty:
        return ""
    strengths = findings.strengths
    usual = strengths[strengths["deployed"] == strengths["deployed"].iloc[0]]
    kept = usual[usual["left_out"] == 0]
    best = best_within(kept, BUDGETS[0])
    if best is None or (best["cell"] == best["against"] and not best["strength"]):
        within = f"within {change(BUDGETS[0].mean)} perplexity and with balance held"
        return f"As deployed with {usual['deployed'].iloc[0]}, nothing has fewer misses than its baseline {within}."
    said = f"As deployed with {best['deployed']}, {best['cell']} has {_reached(best)}"
    if best["loss"] == "none":
        return f"{said}, by the bias alone."
    if not best["has_baseline"]:
        return f"{said}, next to itself without any bias: its baseline is not among the runs."
    alone = (kept["cell"] == best["against"]) & (kept["loss"] == "none") & (kept["strength"] > 0)
    bias = best_within(kept[alone], BUDGETS[0])
    return f"{said}{'' if bias is None else f'; the bias alone has {_reached(bias)}'}."


def _reached(row: pd.Series) -> str:
    how = f"at strength {row['strength']:g}" if row["strength"] else "without any bias"
    return f"{in_words(row['misses_change_mean'], 'misses')} for {change(row['perplexity_change_mean'])} {how}"


def best_cell(cells: pd.DataFrame) -> pd.Series:
    """Return the cell with the fewest misses within the first budget of perplexity.

    Where no cell is within it, this is the cheapest cell that stays in comparisons, and where none stays, the one with
    the fewest misses.
    """
    kept = cells[cells["left_out"] == 0]
    if (cheap := best_within(kept, BUDGETS[0])) is not None:
        return cheap
    for group, by in ((kept, "perplexity_change_mean"), (cells, "misses_change_mean")):
        if group[by].notna().any():
            return group.loc[group[by].idxmin()]
    return cells.iloc[0]
