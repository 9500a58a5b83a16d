"""Draw a model's routing: which experts serve which token of a text, and what a cache of experts would hit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consistency_reg.metrics.simulated_caches import ModelHitRates
from consistency_reg.optional import require
from consistency_reg.tracking.palette import BLUE, ORANGE, VERMILION

with require("plots"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

STAYS, COMES, LINE = BLUE, ORANGE, VERMILION
DPI = 100
MOST_LAYERS = 3
LAST_SIMPLE_LETTER = "\u024f"  # fonts have the Latin letters up to here


@dataclass(frozen=True)
class Sample:
    """Hold the routing of a few tokens of text.

    Attributes:
        name: of the text.
        expert_ids: for each layer [T, K] int64.
        num_experts: E of each layer.
        layer_names: of the layers.
        document_ids: [T], or None for one document.
        tokens: the T tokens as text; None where they are not known.
    """

    name: str
    expert_ids: Sequence[Tensor]
    num_experts: Sequence[int]
    layer_names: Sequence[str]
    document_ids: Tensor | None = None
    tokens: Sequence[str] | None = None


def routing_heatmap(sample: Sample) -> Figure:
    """Return a picture of tokens x experts for the first, the middle and the last layer.

    An expert that the token before used too is blue, a new one orange. Long blue rows are hits of a small cache; orange
    is what it has to fetch.
    """
    shown = sorted({0, len(sample.expert_ids) // 2, len(sample.expert_ids) - 1})[:MOST_LAYERS]
    T = len(sample.expert_ids[0])
    heights = [min(max(0.055 * sample.num_experts[layer], 1.0), 3.0) for layer in shown]
    figure = Figure(figsize=(2.0 + 0.13 * T, 1.3 + sum(heights) + 0.3 * len(shown)), dpi=DPI)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    colours = ListedColormap(["white", COMES, STAYS])
    for axes, layer in zip(panels, shown, strict=True):
        states = routing_states(sample.expert_ids[layer], sample.num_experts[layer], sample.document_ids)
        axes.imshow(states.T, aspect="auto", cmap=colours, interpolation="nearest", vmin=0, vmax=2)
        axes.text(0, 1.02, sample.layer_names[layer], transform=axes.transAxes, fontsize=8)
        axes.set_ylabel("expert", fontsize=8)
        axes.set_xticks([])
        axes.tick_params(axis="y", labelsize=7)
        for start in _document_starts(sample.document_ids):
            axes.axvline(start - 0.5, color="0.4", linewidth=0.8)
    below = {"transform": panels[-1].get_xaxis_transform(), "va": "top", "ha": "center"}
    for place, text in enumerate(sample.tokens or []):  # not as ticks, which take twice the time of all the rest
        panels[-1].text(place, -0.03, shown_token(text), rotation=90, fontsize=7, parse_math=False, **below)
    words = "tokens of a text that stays the same" + (
        "; a line begins a document" if sample.document_ids is not None else ""
    )
    figure.text(0.5, 0.005, words, fontsize=8, ha="center", va="bottom")
    legend = [Patch(color=STAYS, label="used by the token before too"), Patch(color=COMES, label="new")]
    figure.legend(handles=legend, loc="upper right", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(sample.name, x=0.01, ha="left", fontsize=10)
    inches = figure.get_size_inches()
    bottom = 0.85 if sample.tokens is not None else 0.45
    figure.subplots_adjust(0.55 / inches[0], bottom / inches[1], 1 - 0.1 / inches[0], 1 - 0.5 / inches[1], hspace=0.25)
    return figure


def routing_states(expert_ids: Tensor, num_experts: int, document_ids: Tensor | None = None) -> Tensor:
    """Return 0 where a token does not use an expert, 1 where it does and the token before did not, 2 where both do.

    Args:
        expert_ids: [T, K] int64.
        num_experts: E.
        document_ids: [T]; the first token of a document has no token before it.

    Returns:
        [T, E] int64.

    Example:
        >>> routing_states(torch.tensor([[0], [0], [1]]), 2)
        tensor([[1, 0],
                [2, 0],
                [0, 1]])
    """
    active = torch.zeros(len(expert_ids), num_experts, dtype=torch.int64).scatter_(1, expert_ids.cpu(), 1)
    before = torch.zeros_like(active)
    before[1:] = active[:-1]
    for start in _document_starts(document_ids):
        before[start] = 0
    return active + active * before


def cache_curve(rates: ModelHitRates, shares: Sequence[float] = ()) -> Figure:
    """Return a picture of the LRU hit rate by cache ratio: the layers in grey, their mean in blue.

    Args:
        rates: of LRU caches.
        shares: sizes to mark next to 2 x K slots, as shares of a layer's experts.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for layer in rates.layers:
        x = np.arange(1, len(layer.hit_rate) + 1) / layer.top_k
        axes.plot(x, 100 * layer.hit_rate.cpu(), color="0.8", linewidth=1)
    ratios, mean = mean_curve(rates)
    axes.plot(ratios, [100 * rate for rate in mean], color=STAYS, linewidth=2, label="mean of the layers")
    marked = {"2K": (2.0, float(rates.at(2.0)))}
    for share in shares:
        at = [max(round(share * len(layer.hit_rate)), 1) / layer.top_k for layer in rates.layers]
        of_share = torch.stack([layer.at_share(share) for layer in rates.layers]).mean()
        name, place = f"{100 * share:g}% of the experts", (sum(at) / len(at), float(of_share))
        twins = [other for other, there in marked.items() if there == place]
        for twin in twins:
            del marked[twin]
        marked[", ".join([*twins, name])] = place
    for name, (ratio, hits) in marked.items():
        axes.plot(ratio, 100 * hits, "o", color=LINE)
        axes.annotate(f"{name}: {100 * hits:.1f}%", (ratio, 100 * hits), (8, -12), textcoords="offset points")
    axes.plot([], [], color="0.8", label="each layer")
    axes.set(xlabel="cache ratio: slots of a layer / active experts K", ylabel="LRU hit rate [%]", ylim=(0, 102))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    return figure


def mean_curve(rates: ModelHitRates) -> tuple[list[float], list[float]]:
    """Return cache ratios up to all experts, and the layers' mean hit rates."""
    return rates.ratios, [float(rates.at(ratio)) for ratio in rates.ratios]


def pixels(figure: Figure) -> np.ndarray:
    """Return a figure as a [height, width, 3] uint8 array."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def shown_token(text: str) -> str:
    """Return a token as the label of a tick, with signs for spaces, line ends and letters that fonts lack."""
    text = text.replace("\n", "\\n").replace("\t", "\\t").strip() or "\u2423"
    return "".join(letter if " " <= letter <= LAST_SIMPLE_LETTER or letter == "\u2423" else "\u25a1" for letter in text)


def _document_starts(document_ids: Tensor | None) -> list[int]:
    """Return the tokens at which documents other than the first begin."""
    if document_ids is None:
        return []
    return (1 + (document_ids[1:] != document_ids[:-1]).nonzero().flatten()).tolist()
