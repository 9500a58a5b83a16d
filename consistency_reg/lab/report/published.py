"""Compare our design ablation with the published one: do the same choices raise and lower consistency?"""

from collections.abc import Sequence
from pathlib import Path

from consistency_reg.lab.report.effects import sign
from consistency_reg.lab.report.measured import BALANCE_SD, SRP
from consistency_reg.lab.report.runs import Run
from consistency_reg.lab.report.tables import term
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

PUBLISHED = Path(__file__).with_name("published.csv")
BASELINE = "Baseline"
LEAST_DESIGNS = 3  # besides the baseline: fewer have no rank correlation to speak of


def published() -> pd.DataFrame:
    """Return SRP at m = 16 (%) and balance SD (percentage points) by design.

    Example:
        >>> published().loc["Baseline"].to_dict()
        {'srp': 43.56, 'sd': 4.02}
    """
    return pd.read_csv(PUBLISHED, comment="#", index_col="design")


def beside_published(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row for each design and consistency term: ours, the published, and whether their signs agree.

    A run's design is the label, or the part of its name between hyphens, that is one of the published names.

    Returns:
        "term", "design", "seeds", "srp_mean", "sd_mean", "srp" and "sd" (published), "effect_mean", "effect_min",
        "effect_max" (SRP less that of the baseline of the same seed and term), "effect" (published), "agrees"
        (None for the baseline); percent and percentage points. Empty where no term has three designs and a baseline.
    """
    names = {name.casefold(): name for name in published().index}
    rows = [
        {
            "term": term(run),
            "design": design,
            "seed": run.seed,
            "ours": 100 * run.get(SRP),
            "sd_of": run.get(BALANCE_SD),
        }
        for run in runs
        if (design := _design(run, names))
    ]
    frame = pd.DataFrame(rows, columns=["term", "design", "seed", "ours", "sd_of"])
    kept = [
        group
        for _, group in frame.groupby("term", sort=False)
        if BASELINE in set(group["design"]) and group["design"].nunique() > LEAST_DESIGNS
    ]
    if not kept:
        return pd.DataFrame()
    frame = pd.concat(kept)
    base = frame[frame["design"] == BASELINE].set_index(["term", "seed"])["ours"]
    frame["effect_of"] = frame["ours"] - base.reindex(list(zip(frame["term"], frame["seed"], strict=True))).to_numpy()
    groups = frame.groupby(["term", "design"], sort=False)
    table = groups.agg(
        seeds=("seed", "size"),
        srp_mean=("ours", "mean"),
        sd_mean=("sd_of", "mean"),
        effect_mean=("effect_of", "mean"),
        effect_min=("effect_of", "min"),
        effect_max=("effect_of", "max"),
    ).reset_index()
    table = table.join(published(), on="design")
    table["effect"] = table["srp"] - published().loc[BASELINE, "srp"]
    table["agrees"] = [_agree(row) for _, row in table.iterrows()]
    order = {name: place for place, name in enumerate(published().index)}
    return table.sort_values("design", key=lambda names: names.map(order), kind="stable").sort_values(
        "term", key=lambda terms: terms != "none", kind="stable", ignore_index=True
    )


def agreement(beside: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each term: how far its effects agree with the published ones.

    Returns:
        "term", "signs" (how many effects have the published sign), "effects" (of how many), and Spearman's correlation
        with the published SRP and balance over the designs, "spearman_srp" and "spearman_sd".

    Args:
        beside: of :func:`beside_published`.
    """
    rows = []
    for name, group in beside.groupby("term", sort=False):
        judged = group["agrees"].dropna()
        ranks = group[["srp_mean", "srp", "sd_mean", "sd"]].rank()
        rows.append(
            {
                "term": name,
                "signs": int(judged.sum()),
                "effects": len(judged),
                "spearman_srp": ranks["srp_mean"].corr(ranks["srp"]),
                "spearman_sd": ranks["sd_mean"].corr(ranks["sd"]),
            }
        )
    return pd.DataFrame(rows)


def _design(run: Run, names: dict[str, str]) -> str | None:
    parts = [*run.labels.values(), *run.cell.replace("/", "-").split("-")]
    return next((names[part.casefold()] for part in parts if part.casefold() in names), None)


def _agree(row: pd.Series) -> bool | None:
    if row["design"] == BASELINE or pd.isna(row["effect_mean"]):
        return None
    return sign(row["effect_mean"], row["effect_mean"]) == sign(row["effect"], row["effect"])
