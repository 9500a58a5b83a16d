"""How figures look: palette, panels, legends, and how they become PNGs."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from consistency_reg.lab.report.pairs import Pair
from consistency_reg.lab.report.runs import COLLAPSED_BELOW, Run, loss_labels
from consistency_reg.optional import require

with require("plots"):
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey by their lightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "h")
NO_TERM = "0.35"  # the colour of runs without a term
DPI = 150


@dataclass(frozen=True)
class Looks:
    """Colour by consistency term, shape by what runs have in common besides it; the same in all figures of a report.

    Where all have the rest in common, shape too tells the terms apart.
    """

    colours: dict[str, str]
    shapes: dict[str, str]
    loss_of: dict[str, str]
    setting_of: dict[str, str]

    @classmethod
    def of(cls, runs: Sequence[Run], pairs: Sequence[Pair]) -> "Looks":
        """Looks of the runs' losses and settings, in the runs' order."""
        loss_of = loss_labels(runs)
        losses = list(dict.fromkeys(loss_of[run.name] for run in runs if run.loss != "none"))
        colours = {loss: COLOURS[i % len(COLOURS)] for i, loss in enumerate(losses)}
        setting_of = _settings(runs, pairs)
        settings = list(dict.fromkeys(setting_of[run.cell] for run in runs))
        by_loss = len(settings) == 1
        shapes = {name: SHAPES[i % len(SHAPES)] for i, name in enumerate(losses if by_loss else settings)}
        return cls({"none": NO_TERM, **colours}, {"none": "o", **shapes} if by_loss else shapes, loss_of, setting_of)

    def colour(self, run: Run) -> str:
        """Of the run's term."""
        return self.colours[self.loss_of[run.name]]

    def shape(self, run: Run) -> str:
        """Of what it shares with other terms; of the term where all share it."""
        return self.shapes.get(self.setting_of[run.cell]) or self.shapes[self.loss_of[run.name]]

    def point(self, axes: Axes, run: Run, x: float, y: float) -> None:
        """The run; hollow without a term, crossed out when collapsed."""
        face = "white" if run.loss == "none" else self.colour(run)
        style: dict[str, Any] = {
            "color": self.colour(run),
            "markerfacecolor": face,
            "markersize": 8,
            "markeredgewidth": 1.6,
        }
        axes.plot(x, y, self.shape(run), zorder=3, **style)
        if run.collapsed:
            axes.plot(x, y, "x", color="black", markersize=14, markeredgewidth=1.5, zorder=4)

    def legend(self, runs: Sequence[Run], *, collapsed: bool = True) -> list[Line2D]:
        """What colours and shapes mean."""
        handles = []
        shaped_by_loss = set(self.shapes) == set(self.colours)
        for loss, colour in self.colours.items():
            shape = self.shapes[loss] if shaped_by_loss else "_"
            if loss != "none":
                handles.append(entry(loss, shape, color=colour, markeredgewidth=1.6 if shaped_by_loss else 4))
        if any(run.loss == "none" for run in runs):
            handles.append(entry("no term", "o", color=NO_TERM, markerfacecolor="white", markeredgewidth=1.6))
        if not shaped_by_loss:
            handles += [entry(name, shape, color="0.35") for name, shape in self.shapes.items()]
        if collapsed and any(run.collapsed for run in runs):
            handles.append(entry(f"an expert below {COLLAPSED_BELOW} of its fair share", "x", color="black"))
        return handles


def entry(label: str, marker: str, **style: object) -> Line2D:
    """An entry of a legend: a marker without a line."""
    return Line2D([], [], linestyle="", marker=marker, label=label, **{"markersize": 8, **style})  # type: ignore[arg-type]


def panels(rows: int, columns: int, width: float, height: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row; sizes in inches of the whole."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    every: list[Axes] = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flatten().tolist()
    for axes in every:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def whiskers(mean: Any, low: Any, high: Any) -> np.ndarray:
    """From means down to the lowest and up to the highest, [2, n]; the mean of equal floats may lie beside them.

    Example:
        >>> whiskers(2.0, 1.5, 4.0).tolist()
        [[0.5], [2.0]]
    """
    return np.maximum(np.stack([np.atleast_1d(mean - low), np.atleast_1d(high - mean)]), 0.0)


def legend_below(figure: Figure, handles: Iterable[Line2D], columns: int = 4) -> None:
    """One legend for all panels."""
    legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def png(figure: Figure, source: str = "") -> bytes:
    """A figure as PNG, with what it was made from in its metadata; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None, "Source": source})
    return file.getvalue()


def _settings(runs: Sequence[Run], pairs: Sequence[Pair]) -> dict[str, str]:
    """By cell what runs share besides the term: the architecture where that says it, else the baseline's cell."""
    against = {pair.run.cell: pair.baseline.cell for pair in pairs}
    architectures = {run.cell: run.architecture for run in runs}
    settings = {cell: against.get(cell, cell if cell in against.values() else "") for cell in architectures}
    named = {setting: architectures[setting] for setting in settings.values() if setting}
    told_apart = len(set(named.values())) == len(named)
    return {
        cell: f"{architectures[cell]} experts/active" if told_apart or not setting else setting
        for cell, setting in settings.items()
    }
