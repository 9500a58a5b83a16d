"""Choose the colour and shape that stand for a run in all figures of a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from consistency_reg.lab.render.charts import Mark
from consistency_reg.lab.render.page import RUN, Entry
from consistency_reg.lab.render.palette import COLOURS, NO_TERM, SHAPES, css_name
from consistency_reg.lab.render.png import entry, whiskers
from consistency_reg.lab.report.pairs import Pair, mean_and_range
from consistency_reg.lab.report.runs import Run, loss_labels
from consistency_reg.measures import COLLAPSED_BELOW
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


@dataclass(frozen=True)
class Looks:
    """Holds the colour and the shape of each run, the same in all figures of a report.

    The colour tells the consistency term, the shape the rest of the recipe; where all runs have the rest in common, the
    shape tells the term too.
    """

    colours: dict[str, str]
    shapes: dict[str, str]
    loss_of: dict[str, str]
    setting_of: dict[str, str]

    @classmethod
    def of(cls, runs: Sequence[Run], pairs: Sequence[Pair]) -> "Looks":
        """Return the looks of the runs' losses and settings, in the runs' order."""
        loss_of = loss_labels(runs)
        losses = list(dict.fromkeys(loss_of[run.name] for run in runs if run.loss != "none"))
        colours = {loss: COLOURS[i % len(COLOURS)] for i, loss in enumerate(losses)}
        setting_of = _settings(runs, pairs)
        settings = list(dict.fromkeys(setting_of[run.cell] for run in runs))
        by_loss = len(settings) == 1
        shapes = {name: SHAPES[i % len(SHAPES)] for i, name in enumerate(losses if by_loss else settings)}
        return cls({"none": NO_TERM, **colours}, {"none": "o", **shapes} if by_loss else shapes, loss_of, setting_of)

    @property
    def _shaped_by_loss(self) -> bool:
        return set(self.shapes) == set(self.colours)

    def colour(self, run: Run) -> str:
        """Return the colour of the run's term."""
        return self.colours[self.loss_of[run.name]]

    def shape(self, run: Run) -> str:
        """Return the shape of the run's recipe without its term, or of the term where all recipes share the rest."""
        return self.shapes.get(self.setting_of[run.cell]) or self.shapes[self.loss_of[run.name]]

    def point(self, axes: Axes, run: Run, x: float, y: float) -> None:
        """Draw the run: hollow without a term, over a cross when it collapsed."""
        face = "white" if run.loss == "none" else self.colour(run)
        style: dict[str, Any] = {
            "color": self.colour(run),
            "markerfacecolor": face,
            "markersize": 8,
            "markeredgewidth": 1.6,
        }
        if run.collapsed:
            cross(axes, x, y)
        axes.plot(x, y, self.shape(run), zorder=3, **style)

    def mark(self, run: Run, x: float, y: float, **more: Any) -> Mark:
        """Return the run as a mark of a chart, which a click opens."""
        look = {"id": f"{RUN}{run.name}", "cell": run.cell, "crossed": run.collapsed, **more}
        return Mark(
            x,
            y,
            group=self.loss_of[run.name],
            colour=css_name(self.colour(run)),
            shape=self.shape(run),
            hollow=run.loss == "none",
            **look,
        )

    def entries(self, runs: Sequence[Run]) -> list[Entry]:
        """Return the legend of a page: each term can be switched off."""
        entries = [
            Entry(loss, css_name(colour), self.shapes[loss] if self._shaped_by_loss else "_", group=loss)
            for loss, colour in self.colours.items()
            if loss != "none"
        ]
        if any(run.loss == "none" for run in runs):
            entries.append(Entry("no term", css_name(NO_TERM), "o", group="none", hollow=True))
        if not self._shaped_by_loss:
            entries += [Entry(name, css_name(NO_TERM), shape) for name, shape in self.shapes.items()]
        if any(run.collapsed for run in runs):
            entries.append(Entry(f"crossed: an expert below {COLLAPSED_BELOW} of its fair share", "var(--ink)", "x"))
        return entries

    def legend(self, runs: Sequence[Run], *, collapsed: bool = True) -> list[Line2D]:
        """Return the legend of a picture: what colours and shapes mean."""
        handles = []
        width = 1.6 if self._shaped_by_loss else 4
        for loss, colour in self.colours.items():
            if loss != "none":
                shape = self.shapes[loss] if self._shaped_by_loss else "_"
                handles.append(entry(loss, shape, color=colour, markeredgewidth=width))
        if any(run.loss == "none" for run in runs):
            handles.append(entry("no term", "o", color=NO_TERM, markerfacecolor="white", markeredgewidth=1.6))
        if not self._shaped_by_loss:
            handles += [entry(name, shape, color="0.35") for name, shape in self.shapes.items()]
        if collapsed and any(run.collapsed for run in runs):
            handles.append(entry(f"an expert below {COLLAPSED_BELOW} of its fair share", "x", color="black"))
        return handles


def cross(axes: Axes, x: float, y: float) -> None:
    """Draw a cross whose arms stick out from under the shape that is drawn over it."""
    axes.plot(x, y, "x", color="black", markersize=17, markeredgewidth=1.4, zorder=2.5)


def errors(row: pd.Series, gain: str) -> dict[str, Any]:
    """Return the error bars in percent from the lowest to the highest seed: of a gain across, of perplexity upwards."""
    xerr, yerr = (100 * whiskers(*mean_and_range(row, name)) for name in (gain, "perplexity_change"))
    return {"xerr": xerr, "yerr": yerr}


def whisker_marks(frame: pd.DataFrame, gain: str, marks: Sequence[Mark]) -> list[Mark]:
    """Return the same bars as lines of a chart, for the rows that are of several seeds; a mark for each row."""
    lines = []
    for (_, row), mark in zip(frame.iterrows(), marks, strict=True):
        if row["seeds"] > 1:
            (_, low, high), (_, least, most) = (mean_and_range(row, name) for name in (gain, "perplexity_change"))
            lines += [mark.but(x=100 * low, x2=100 * high), mark.but(y=100 * least, y2=100 * most)]
    return lines


def _settings(runs: Sequence[Run], pairs: Sequence[Pair]) -> dict[str, str]:
    """Return by cell what runs share besides the term: the architecture if that says it, else the baseline's cell."""
    against = {pair.run.cell: pair.baseline.cell for pair in pairs}
    architectures = {run.cell: run.architecture for run in runs}
    settings = {cell: against.get(cell, cell if cell in against.values() else "") for cell in architectures}
    named = {setting: architectures[setting] for setting in settings.values() if setting}
    told_apart = len(set(named.values())) == len(named)
    return {
        cell: f"{architectures[cell]} experts/active" if told_apart or not setting else setting
        for cell, setting in settings.items()
    }
