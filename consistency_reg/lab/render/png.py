"""Draw panels and legends with matplotlib, and turn figures into PNGs."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from consistency_reg.optional import require

with require("plots"):
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

DPI = 150


def panels(
    rows: int, columns: int, width: float, height: float, *, sharey: bool = False, widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of ``width`` x ``height`` inches and its panels, row by row; ``widths`` are relative."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    every: list[Axes] = (
        figure.subplots(rows, columns, squeeze=False, sharey=sharey, width_ratios=widths).flatten().tolist()
    )
    for axes in every:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def entry(label: str, marker: str, **style: object) -> Line2D:
    """Return an entry of a legend: a marker without a line."""
    return Line2D([], [], linestyle="", marker=marker, label=label, **{"markersize": 8, **style})  # type: ignore[arg-type]


def whiskers(mean: Any, low: Any, high: Any) -> np.ndarray:
    """Return the distances from means down to the lowest and up to the highest value, [2, n].

    Rounding may put the mean of equal floats beside them: no distance is negative.

    Example:
        >>> whiskers(2.0, 1.5, 4.0).tolist()
        [[0.5], [2.0]]
    """
    return np.maximum(np.stack([np.atleast_1d(mean - low), np.atleast_1d(high - mean)]), 0.0)


def legend_below(figure: Figure, handles: Iterable[Line2D], columns: int = 4) -> None:
    """Draw one legend for all panels below them."""
    legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def png(figure: Figure, source: str = "") -> bytes:
    """Return a figure as PNG; the same figure gives the same bytes.

    Args:
        figure: to draw.
        source: what the figure was made from, kept in the metadata unless it is empty.
    """
    file = io.BytesIO()
    metadata = {"Software": None, **({"Source": source} if source else {})}
    figure.savefig(file, format="png", dpi=DPI, metadata=metadata)
    return file.getvalue()
