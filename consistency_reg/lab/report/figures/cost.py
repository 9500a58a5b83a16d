"""Draw what the term costs and saves by the tokens seen."""

from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.charts import lines, plane, points
from consistency_reg.lab.render.page import CELL
from consistency_reg.lab.render.png import legend_below, panels
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.optional import require

with require("plots"):
    from matplotlib.figure import Figure

TITLE = "Cost and saving by tokens seen"
CAPTION = (
    "Perplexity and LRU misses against the baseline of the same seed, by the tokens seen: thick the mean over the "
    "seeds, thin each seed."
)
TOKENS = "tokens seen (millions)"
SIDES = (
    ("perplexity_change", "perplexity, change against the baseline (%)\n← better"),
    ("misses_change", "LRU misses at cache = 25% of the experts,\nchange against the baseline (%)   ← better"),
)


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Draw two panels over the tokens, of the best cell of each loss; None where runs were validated once."""
    costs = findings.costs[findings.costs["cell"].isin(findings.shown)]
    if costs.empty:
        return None
    runs = findings.run_of_cell
    figure, both = panels(1, 2, 11, 4.8)
    handles = []
    for axes, (change, label) in zip(both, SIDES, strict=True):
        for cell, group in costs.groupby("cell", sort=False):
            colour, shape = looks.colour(runs[cell]), looks.shape(runs[cell])
            for _, seed in group.groupby("seed"):
                axes.plot(seed["tokens"] / 1e6, 100 * seed[change], color=colour, linewidth=0.8, alpha=0.5)
            mean = group.groupby("tokens")[change].mean()
            (line,) = axes.plot(mean.index / 1e6, 100 * mean, color=colour, marker=shape, linewidth=2.2, label=cell)
            handles += [line] if axes is both[0] else []
        axes.axhline(0, color="0.4", linewidth=0.9)
        axes.set_xlabel(TOKENS)
        axes.set_ylabel(label)
    legend_below(figure, handles, columns=3)
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return the same of all cells, to be pointed at and opened; None where runs were validated once."""
    if findings.costs.empty:
        return None
    runs = findings.run_of_cell
    charts = []
    for change, label in SIDES:
        measured = findings.costs[findings.costs[change].notna()]
        seeds, means = [], []
        for cell, group in measured.groupby("cell", sort=False):
            look = {"id": f"{CELL}{cell}", "crossed": False}
            for seed, of_seed in group.groupby("seed"):
                thin = look | {"line": f"{cell} {seed}", "alpha": 0.3}
                rows = of_seed[["tokens", change]].to_numpy()
                seeds += [looks.mark(runs[cell], x / 1e6, 100 * y, order=x, **thin) for x, y in rows]
            for tokens, mean in group.groupby("tokens")[change].mean().items():
                say = f"after {tokens / 1e6:.3g}M tokens: {100 * mean:+.1f}%"
                thick = look | {"line": cell, "order": tokens, "say": say}
                means.append(looks.mark(runs[cell], tokens / 1e6, 100 * mean, **thick))
        layers = [*lines(seeds, width=0.8), *lines(means, width=2), *points(means, size=45)]
        charts.append(plane(layers, TOKENS, label))
    return Explored("cost", TITLE, CAPTION, charts)
