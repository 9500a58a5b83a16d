"""What the term costs and saves as tokens are seen."""

from consistency_reg.lab.render.png import legend_below, panels
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.optional import require

with require("plots"):
    from matplotlib.figure import Figure

CAPTION = (
    "Perplexity and LRU misses against the baseline of the same seed, by the tokens seen: thick the mean over the "
    "seeds, thin each seed; the best cell of each loss."
)


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Two panels over the tokens; None where runs were validated once."""
    costs = findings.costs[findings.costs["cell"].isin(findings.shown)]
    if costs.empty:
        return None
    runs = {run.cell: run for run in findings.runs}
    figure, both = panels(1, 2, 11, 4.8)
    handles = []
    for axes, change in zip(both, ("perplexity_change", "misses_change"), strict=True):
        for cell, group in costs.groupby("cell", sort=False):
            colour, shape = looks.colour(runs[cell]), looks.shape(runs[cell])
            for _, seed in group.groupby("seed"):
                axes.plot(seed["tokens"] / 1e6, 100 * seed[change], color=colour, linewidth=0.8, alpha=0.5)
            mean = group.groupby("tokens")[change].mean()
            (line,) = axes.plot(mean.index / 1e6, 100 * mean, color=colour, marker=shape, linewidth=2.2, label=cell)
            handles += [line] if axes is both[0] else []
        axes.axhline(0, color="0.4", linewidth=0.9)
        axes.set_xlabel("tokens seen (millions)")
    both[0].set_ylabel("perplexity, change against the baseline (%)\n← better")
    both[1].set_ylabel("LRU misses at cache = 25% of the experts,\nchange against the baseline (%)   ← better")
    legend_below(figure, handles, columns=3)
    return figure
