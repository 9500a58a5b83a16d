"""Figures of a report."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from consistency_reg.optional import require
from consistency_reg.report.pairs import Pair
from consistency_reg.report.runs import COLLAPSED_BELOW, MISSES_FROM, PERPLEXITY, SRP, Run
from consistency_reg.report.tables import change

with require("plots"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey by their lightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("s", "^", "D", "v", "P", "X", "p", "*")
MOST_LABELS = 6


def tradeoff(runs: Sequence[Run], pairs: Sequence[Pair]) -> Figure:
    """Perplexity against LRU misses at cache = 25% of the experts, and against SRP at m = 16.

    Colour tells the architecture, shape the consistency term (a hollow circle is a run without); an arrow leads from
    each baseline to the run beside it. Runs that lack a panel's metric are not in it.
    """
    colours = dict(zip(_distinct(run.architecture for run in runs), COLOURS * len(runs), strict=False))
    losses = _distinct(run.loss for run in runs if run.loss != "none")
    shapes = {"none": "o", **dict(zip(losses, SHAPES * len(runs), strict=False))}
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    panels: tuple[tuple[Axes, str, Callable[[Run], float]], ...] = (
        (left, MISSES_FROM, lambda run: 100 * run.misses),
        (right, SRP, lambda run: 100 * run.metrics[SRP]),
    )
    for axes, needed, read in panels:
        shown = [run for run in runs if needed in run.metrics]
        both = [
            pair for pair in pairs if {needed, PERPLEXITY} <= pair.run.metrics.keys() & pair.baseline.metrics.keys()
        ]
        for pair in both:
            _arrow(axes, pair, read, colours[pair.run.architecture])
        for run in shown:
            _point(axes, run, read(run), colours[run.architecture], shapes[run.loss])
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(0.16, 0.14)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xlabel("LRU misses at cache = 25% of the experts (% of expert accesses)\n← better")
    right.set_xlabel("SRP, segments of 16 tokens (%)\nbetter →")
    left.set_ylabel("validation perplexity, all domains\n← better")
    _label_pairs(left, [pair for pair in pairs if MISSES_FROM in pair.run.metrics], colours)
    figure.legend(handles=_legend(runs, pairs, colours, shapes), loc="outside lower center", ncols=4, frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the same figure gives the same bytes."""
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _point(axes: Axes, run: Run, x: float, colour: str, shape: str) -> None:
    y = run.metrics[PERPLEXITY]
    face = "white" if run.loss == "none" else colour
    axes.plot(x, y, shape, color=colour, markerfacecolor=face, markersize=9, markeredgewidth=1.8, zorder=3)
    if run.collapsed:
        axes.plot(x, y, "x", color="black", markersize=15, markeredgewidth=1.5, zorder=4)


def _arrow(axes: Axes, pair: Pair, read: Callable[[Run], float], colour: str) -> None:
    axes.annotate(
        "",
        xy=(read(pair.run), pair.run.metrics[PERPLEXITY]),
        xytext=(read(pair.baseline), pair.baseline.metrics[PERPLEXITY]),
        arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "shrinkA": 7, "shrinkB": 7, "alpha": 0.7},
    )


def _label_pairs(axes: Axes, pairs: Sequence[Pair], colours: dict[str, str]) -> None:
    """What each arrow gains and costs, beside its head; only where there are few."""
    if len(pairs) > MOST_LABELS:
        return
    for pair in pairs:
        axes.annotate(
            f"misses {change(pair.misses_change)}\nperplexity {change(pair.perplexity_change)}",
            xy=(100 * pair.run.misses, pair.run.metrics[PERPLEXITY]),
            xytext=(0, 11),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colours[pair.run.architecture],
        )


def _legend(
    runs: Sequence[Run], pairs: Sequence[Pair], colours: dict[str, str], shapes: dict[str, str]
) -> list[Line2D]:
    def entry(label: str, marker: str, **style: object) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, label=label, **{"markersize": 9, **style})  # type: ignore[arg-type]

    handles = [
        entry(f"{name} (experts/active)", "_", color=colour, markeredgewidth=4) for name, colour in colours.items()
    ]
    if any(run.loss == "none" for run in runs):
        handles.append(entry("no consistency term", "o", color="0.3", markerfacecolor="white", markeredgewidth=1.8))
    handles += [entry(name, shape, color="0.3") for name, shape in shapes.items() if name != "none"]
    if pairs:
        handles.append(Line2D([], [], color="0.3", marker=">", markevery=[1], label="baseline to its pair"))
        handles[-1].set_data([0, 1], [0, 0])
    if any(run.collapsed for run in runs):
        handles.append(entry(f"an expert below {COLLAPSED_BELOW} of its fair share", "x", color="black"))
    return handles


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
