"""Draw the pictures of an evaluation."""

from collections.abc import Sequence

import torch

from consistency_reg.lab.evaluate.advice import ratios
from consistency_reg.lab.evaluate.measure import ADVISED_POLICY, Evaluation
from consistency_reg.lab.evaluate.tables import KINDS, common_length
from consistency_reg.lab.render.palette import COLOURS
from consistency_reg.lab.render.png import panels as empty_panels
from consistency_reg.lab.render.png import png
from consistency_reg.measures.reading import cache_label, segment_name
from consistency_reg.optional import require
from consistency_reg.tracking.figures import shown_token

with require("plots"):
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

COLUMNS = 3
NAMES = ("srp", "hit_rates", "layers", "specialization", "cache_aware", "memory", r"routing(_\d+)?")


def figures(evaluations: Sequence[Evaluation]) -> dict[str, bytes]:
    """Return PNGs by name; a routing heatmap for each model."""
    drawn = {
        "srp": srp_by_length(evaluations),
        "hit_rates": hit_rates(evaluations),
        "layers": srp_by_layer(evaluations),
    }
    if any(one.kinds for one in evaluations):
        drawn["specialization"] = specialization(evaluations)
    for i, one in enumerate(evaluations):
        drawn["routing" if len(evaluations) == 1 else f"routing_{i + 1}"] = routing(one)
    return {name: png(figure) for name, figure in drawn.items()}


def srp_by_length(evaluations: Sequence[Evaluation]) -> Figure:
    """Draw SRP by segment length with its 95% interval; dashed what one fixed set of experts reaches."""
    figure, (axes,) = _panels(1, width=6.5)
    for one, colour in zip(evaluations, _colours(evaluations), strict=True):
        lengths, results = list(one.srp), list(one.srp.values())
        axes.plot(lengths, [_percent(r.srp) for r in results], "o-", color=colour, label=one.recording.model)
        intervals = [r.interval for r in results]
        bounded = [(m, i.tolist()) for m, i in zip(lengths, intervals, strict=True) if i is not None]
        if bounded:
            low, high = zip(*(interval for _, interval in bounded), strict=True)
            axes.fill_between(
                [m for m, _ in bounded], [100 * x for x in low], [100 * x for x in high], color=colour, alpha=0.2, lw=0
            )
        axes.axhline(_percent(results[0].static_srp), color=colour, linestyle="--", linewidth=1)
    marks = sorted({m for one in evaluations for m in one.srp})
    axes.set_xscale("log", base=2)
    axes.set_xticks(marks, [str(m) for m in marks])
    axes.minorticks_off()
    axes.plot([], [], "--", color="0.3", linewidth=1, label="static SRP: one set for the whole data")
    axes.set(xlabel="segment length m [tokens]", ylabel="SRP, with its 95% interval [%]")
    _legend(figure)
    return figure


def hit_rates(evaluations: Sequence[Evaluation]) -> Figure:
    """Draw hit rates by cache ratio: SCH and policies, the advised sizes on LRU's curve; a panel for each model."""
    m = common_length(evaluations)
    figure, panels = _panels(len(evaluations))
    for axes, one in zip(panels, evaluations, strict=True):
        curves = {cache_label(f"sch_{segment_name(m)}"): one.sch[m]} if m in one.sch else {}
        curves |= {cache_label(name): rates for name, rates in one.policies.items()}
        for (label, rates), colour in zip(curves.items(), COLOURS, strict=False):
            xs = ratios(rates)
            advised = label == cache_label(ADVISED_POLICY)
            ys = [_percent(rates.at(x)) for x in xs]
            axes.plot(xs, ys, color=colour, label=label, linewidth=2.2 if advised else 1.2)
        shared = one.policies[ADVISED_POLICY].shared
        if shared is not None:
            slots = range(shared.top_k, len(shared.hit_rate) + 1)
            axes.plot(
                [count / shared.top_k for count in slots],
                [_percent(shared.hit_rate[count - 1]) for count in slots],
                ":",
                color="black",
                linewidth=1.5,
                label=f"{cache_label(ADVISED_POLICY)}, one cache for all layers",
            )
        _mark_advice(axes, one)
        axes.set(xlabel="cache ratio rho: slots of a layer / K", title=one.recording.model)
    panels[0].set_ylabel("hit rate [%]")
    _legend(figure, panels[0])
    return figure


def srp_by_layer(evaluations: Sequence[Evaluation]) -> Figure:
    """Draw SRP of each layer; dashed what one fixed set of the layer's experts reaches."""
    m = common_length(evaluations)
    figure, (axes,) = _panels(1, width=8)
    for one, colour in zip(evaluations, _colours(evaluations), strict=True):
        if m not in one.srp:
            continue
        layers = one.srp[m].layers
        axes.plot([_percent(layer.srp) for layer in layers], "o-", color=colour, label=one.recording.model)
        axes.plot([_percent(layer.static_srp) for layer in layers], "_--", color=colour, linewidth=1)
    axes.plot([], [], "--", color="0.3", linewidth=1, label="static SRP: one set for the whole data")
    axes.set_xlim(-0.5, max(len(one.recording.layer_names) for one in evaluations) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="MoE layer, from the first", ylabel=f"SRP, m = {m} [%]")
    _legend(figure)
    return figure


def specialization(evaluations: Sequence[Evaluation]) -> Figure:
    """Draw the specialization of each expert against its own SRP, a panel for each kind."""
    measured = [kind for kind in KINDS if any(kind in one.kinds for one in evaluations)]
    figure, panels = _panels(len(measured), width=5.2, sharey=False)
    for axes, kind in zip(panels, measured, strict=True):
        for one, colour in zip(evaluations, _colours(evaluations), strict=True):
            if kind not in one.kinds or one.specialization is None:
                continue
            found = one.kinds[kind]
            where = torch.cat(one.specialization.srp).cpu(), torch.cat(found.layers).cpu()
            label = f"{one.recording.model}: Spearman {float(found.spearman):.2f}"
            axes.scatter(100 * where[0], where[1], s=9, alpha=0.6, color=colour, linewidths=0, label=label)
        in_what, measure = KINDS[kind]
        m = evaluations[0].segment_length
        axes.set(xlabel=f"SRP of the expert, m = {m} [%]", ylabel=f"{in_what}: {measure}")
        axes.legend(frameon=False, fontsize=8)
    return figure


def routing(evaluation: Evaluation) -> Figure:
    """Draw which experts the layer of median SRP uses on each token of a sample text."""
    recording, m = evaluation.recording, evaluation.segment_length
    of_layers = [float(layer.srp) for layer in evaluation.srp[m].layers]
    layer = sorted(range(len(of_layers)), key=of_layers.__getitem__)[len(of_layers) // 2]
    row = recording.sample_row
    T = len(recording.sample) or min(96, int(recording.valid[row].sum()))
    E = recording.num_experts[layer]
    active_TE = torch.zeros(T, E).scatter_(1, recording.expert_ids[layer][row, :T].long(), 1)
    figure, (axes,) = _panels(1, width=2.2 + 0.15 * T, height=min(max(2.2 + 0.07 * E, 3.2), 12))
    axes.imshow(
        active_TE.T, aspect="auto", cmap=ListedColormap(["white", COLOURS[0]]), interpolation="nearest", vmin=0, vmax=1
    )
    if recording.sample:
        axes.set_xticks(
            range(T), [shown_token(text) for text in recording.sample], rotation=90, fontsize=7, parse_math=False
        )
    axes.grid(visible=False)
    axes.set(xlabel="token", ylabel="expert")
    axes.set_title(
        f"{recording.model}: {recording.layer_names[layer]}, the layer of median SRP "
        f"({100 * of_layers[layer]:.1f}% at m = {m})",
        loc="left",
        fontsize=10,
    )
    return figure


def _mark_advice(axes: Axes, one: Evaluation) -> None:
    for (name, choice), marker in zip(reversed(one.advice.items()), ("D", "o"), strict=False):
        label = f"{name if name == '2K' else f'knee, {choice.ratio:.3g}K'}: {100 * choice.hit_rate:.0f}% hits"
        axes.plot(choice.ratio, 100 * choice.hit_rate, marker, color="black", markersize=7, zorder=5)
        axes.annotate(
            label,
            (choice.ratio, 100 * choice.hit_rate),
            (9, -14),
            textcoords="offset points",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _panels(count: int, width: float = 4.6, height: float = 4.2, *, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure, panels = empty_panels(rows, columns, columns * width, rows * height, sharey=sharey)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def _legend(figure: Figure, axes: Axes | None = None) -> None:
    source = figure.axes[0] if axes is None else axes
    columns = max(1, min(3, int(figure.get_figwidth() / 2.2)))  # inches of an entry
    figure.legend(*source.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def _colours(evaluations: Sequence[Evaluation]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(evaluations))]


def _percent(value: torch.Tensor) -> float:
    return 100 * float(value)
