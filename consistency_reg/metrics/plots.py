"""Draw the pictures of routing metrics."""

from collections.abc import Sequence
from typing import Any

from consistency_reg.optional import require


def axes_of(ax: Any = None) -> Any:
    """Return the given matplotlib axes, or new ones."""
    with require("plots"):
        from matplotlib import pyplot
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax


def interval_plot(
    x: Sequence[float],
    model: Sequence[float],
    layers: Sequence[Sequence[float]],
    intervals: Sequence[Sequence[float] | None],
    labels: tuple[str, str],
    ax: Any = None,
) -> Any:
    """Draw the model's value over x with its 95% interval, and each layer's behind it.

    Args:
        x: [X].
        model: [X].
        layers: [X, L].
        intervals: [X], low and high or None.
        labels: of the axes.
        ax: matplotlib axes to draw on; new ones when None.

    Returns:
        (figure, axes).
    """
    ax = axes_of(ax)
    ax.plot(x, layers, color="0.8", linewidth=1)
    ax.plot(x, model, color="C0", marker="o" if len(x) < 10 else None, label="model")
    if all(interval is not None for interval in intervals):
        low, high = zip(*intervals, strict=True)
        ax.fill_between(x, low, high, color="C0", alpha=0.2, label="95% interval")
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.legend()
    return ax.figure, ax
