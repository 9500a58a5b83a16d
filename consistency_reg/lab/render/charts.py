"""Charts to explore on a page: layers of marks over two axes, as Vega-Lite draws them, described through Altair.

Colours are variables of the page's style sheet, so that a chart follows a dark page. Each chart has the parameters
``hidden``, ``wanted`` and ``picked``, by which the page's script filters and emphasizes the marks of all charts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from consistency_reg.lab.render.palette import PATHS
from consistency_reg.optional import require

with require("plots"):
    import altair as alt
    import vl_convert

HEIGHT, ROW, TALL_ROW, FIELD = 340, 25, 36, 24  # pixels: of a chart, a row of names, of names of two lines, of fields
INK, PAPER, GRID, GAIN = "var(--ink)", "var(--paper)", "var(--grid)", "var(--gain)"
SHOWN = "indexof(hidden, datum.group) < 0 && (wanted == '' || indexof(lower(datum.cell), wanted) >= 0)"
EMPHASIS = "(picked == '' || datum.cell == picked ? 1 : 0.15) * datum.alpha"
TOLD = "{id: datum.id, say: datum.say}"  # what the page makes a tooltip of
LOOK: dict[str, Any] = {"opacity": alt.ExprRef(EMPHASIS)}
POINTED: dict[str, Any] = {"tooltip": alt.ExprRef(TOLD), "cursor": "pointer"}
LINES = r"split(datum.label, '\n')"  # of the name of a row
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": GRID,
        "domainColor": GRID,
        "tickColor": GRID,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleLimit": 0,
    },
    "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "titleLimit": 0},
}


@dataclass(frozen=True)
class Mark:
    """Holds a point of a chart, or a line that begins there.

    Attributes:
        x: position; a mark is not drawn where it is None or NaN, that is not measured.
        y: position, or the name of the row in a chart of rows.
        id: of the item that a click opens; "" for none.
        cell: name that the page's search compares with.
        group: name of the group that the page's legend shows and hides.
        colour: a variable of the style sheet.
        shape: as matplotlib names it.
        hollow: whether only its outline is drawn.
        crossed: whether a cross lies under it.
        alpha: how opaque it is, 0..1.
        say: a line of its own in what is shown when the pointer is over it.
        x2: where a line from it ends.
        y2: where it ends on the other axis.
        line: name of the line that the mark is a part of.
        order: position along that line, or the value of a coloured field.
        text: that is written next to it.
    """

    x: float | str | None
    y: float | str | None
    id: str = ""
    cell: str = ""
    group: str = ""
    colour: str = INK
    shape: str = "o"
    hollow: bool = False
    crossed: bool = False
    alpha: float = 1.0
    say: str = ""
    x2: float | None = None
    y2: float | None = None
    line: str = ""
    order: float = 0.0
    text: str = ""

    def but(self, **changes: Any) -> "Mark":
        """Return the mark with some of its attributes changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Area:
    """Tints and names the part of a chart to the left of ``x`` and below ``y``."""

    x: float
    y: float
    name: str


@dataclass(frozen=True)
class Chart:
    """Holds a chart of a page: its specification in Vega-Lite, and a title where a figure has several charts."""

    title: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """Holds charts that stand side by side.

    Attributes:
        name: of the figure, such as "frontier".
        title: what a reader calls it.
        caption: what it shows, and how to read it.
        charts: at least one.
    """

    name: str
    title: str
    caption: str
    charts: Sequence[Chart]


Layers = list[alt.Chart]


def plane(
    layers: Layers,
    x: str,
    y: str,
    *,
    title: str = "",
    zeros: bool = False,
    area: Area | None = None,
) -> Chart:
    """Return a chart of layers over two axes of numbers.

    Args:
        layers: the last is on top.
        x: title of the axis, in one or several lines.
        y: title of the other axis.
        title: of the chart.
        zeros: whether lines mark 0 on both axes.
        area: to be tinted.
    """
    below = [] if area is None else _tinted(area)
    if zeros:
        below += [_rule().encode(x=alt.datum(0)), _rule().encode(y=alt.datum(0))]
    placed = [layer.encode(x=_number("x", x), y=_number("y", y)) for layer in layers]
    return _chart(title, [*below, *placed], HEIGHT)


def rows(layers: Layers, names: Sequence[str], x: str, *, title: str = "") -> Chart:
    """Return a chart with a row for each name and an axis of numbers with a line at 0."""
    look: dict[str, Any] = {"labelLimit": 190, "ticks": False, "domain": False, "grid": True}
    y = alt.Y("y:N", sort=list(names), axis=alt.Axis(title=None, labelExpr=LINES, **look))
    placed = [layer.encode(x=_number("x", x), y=y) for layer in layers]
    height = len(names) * (TALL_ROW if any("\n" in name for name in names) else ROW)
    return _chart(title, [_rule().encode(x=alt.datum(0)), *placed], height, zoom=("x",))


def fields(marks: Sequence[Mark], names: Sequence[str], x: str, value: str) -> Chart:
    """Return a chart of coloured fields: ``y`` of each mark is one of the names, ``order`` its value."""
    legend = alt.Legend(title=value, orient="top", gradientLength=160)
    drawn = {
        "x": alt.X("x:O", title=x, axis=alt.Axis(labelAngle=0)),
        "y": alt.Y("y:N", sort=list(names), axis=alt.Axis(title=None, labelLimit=190)),
        "color": alt.Color("order:Q", scale=alt.Scale(scheme="cividis", zero=False), legend=legend),
    }
    layers = [layer.mark_rect(**POINTED, **LOOK).encode(**drawn) for layer in _data(marks)]
    return _chart("", layers, FIELD * len(names), zoom=())


def points(marks: Sequence[Mark], size: float = 80) -> Layers:
    """Return the marks' shapes; under those that are crossed out lies a cross whose arms stick out."""
    crossed = [mark.but(hollow=True) for mark in marks if mark.crossed]
    under = [mark.but(shape="x", colour=INK) for mark in crossed]
    between = [mark.but(colour=PAPER) for mark in crossed]
    return [*_shapes(under, 4 * size), *_shapes(between, 1.6 * size), *_shapes(marks, size)]


def lines(marks: Sequence[Mark], width: float = 1.5) -> Layers:
    """Return a line through the marks that have ``line`` in common, in their ``order``."""
    drawn = {"detail": alt.Detail("line:N"), "order": alt.Order("order:Q"), "stroke": _as_it_is("stroke", "colour")}
    return [layer.mark_line(strokeWidth=width, **LOOK).encode(**drawn) for layer in _data(marks)]


def spans(marks: Sequence[Mark], width: float = 1.0) -> Layers:
    """Return a straight line for each mark, to ``x2``, to ``y2`` or to both."""
    layers: Layers = []
    for across, upwards in ((True, False), (False, True), (True, True)):
        some = [mark for mark in marks if (mark.x2 is not None, mark.y2 is not None) == (across, upwards)]
        drawn = {"stroke": _as_it_is("stroke", "colour")}
        drawn |= {"x2": alt.X2("x2:Q")} if across else {}
        drawn |= {"y2": alt.Y2("y2:Q")} if upwards else {}
        layers += [layer.mark_rule(strokeWidth=width, **LOOK).encode(**drawn) for layer in _data(some)]
    return layers


def texts(marks: Sequence[Mark]) -> Layers:
    """Return the texts of the marks that have one, above and to the right of their places."""
    look: dict[str, Any] = {"dx": 8, "dy": -8, "align": "left", "fontSize": 10, "fill": INK}
    named = [mark for mark in marks if mark.text]
    return [layer.mark_text(**look, **LOOK).encode(text="text:N") for layer in _data(named)]


def javascript() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that needs no network."""
    return vl_convert.javascript_bundle(snippet="window.vegaEmbed = vegaEmbed;")


def _data(marks: Sequence[Mark]) -> Layers:
    """Return a layer of the marks that were measured, without a look yet; none where no mark was."""
    measured = [_row(mark) for mark in marks if _is_measured(mark)]
    return [alt.Chart(alt.Data(values=measured)).transform_filter(SHOWN)] if measured else []


def _shapes(marks: Sequence[Mark], size: float) -> Layers:
    drawn = {
        name: _as_it_is(name, field) for name, field in (("shape", "shape"), ("stroke", "colour"), ("fill", "fill"))
    }
    look = {"size": size, "strokeWidth": 1.6, **POINTED, **LOOK}
    return [layer.mark_point(**look).encode(**drawn) for layer in _data(marks)]


def _as_it_is(channel: str, field: str) -> Any:
    """Return the encoding of a field that holds colours or shapes themselves."""
    kind = {"shape": alt.Shape, "stroke": alt.Stroke, "fill": alt.Fill}[channel]
    return kind(f"{field}:N", scale=None)


def _is_measured(mark: Mark) -> bool:
    known = None not in (mark.x, mark.y)
    return known and not any(place != place for place in (mark.x, mark.y, mark.x2, mark.y2, mark.order))


def _row(mark: Mark) -> dict[str, Any]:
    """Return what Vega reads of a mark, without what it has in common with most."""
    row = {
        **{name: getattr(mark, name) for name in ("x", "y", "cell", "group", "colour", "alpha", "order")},
        "shape": PATHS[mark.shape],
        "fill": PAPER if mark.hollow else mark.colour,
    }
    more = {name: getattr(mark, name) for name in ("id", "line", "say", "x2", "y2", "text")}
    return row | {name: value for name, value in more.items() if value not in (None, "")}


def _rule() -> alt.Chart:
    return alt.Chart(alt.Data(values=[{}])).mark_rule(stroke=INK, strokeWidth=0.8, opacity=0.5)


def _number(field: str, title: str) -> Any:
    channel = alt.X if field == "x" else alt.Y
    side = f"ceil({'width' if field == 'x' else 'height'} / {80 if field == 'x' else 45})"
    axis = alt.Axis(title=title.splitlines(), grid=True, tickCount=alt.ExprRef(side))
    room = 32 if field == "x" else 14  # pixels; texts stand to the right of their places
    return channel(f"{field}:Q", axis=axis, scale=alt.Scale(zero=False, nice=False, padding=room))


def _tinted(area: Area) -> Layers:
    one = alt.Chart(alt.Data(values=[{"name": area.name}]))
    corner = {"x": alt.datum(area.x), "y": alt.datum(area.y)}
    tint = one.mark_rect(fill=GAIN, opacity=0.14, clip=True)
    name = one.mark_text(align="right", baseline="top", dx=-4, dy=4, fontSize=11, fill=GAIN)
    return [tint.encode(**corner, x2=alt.value(0), y2=alt.value("height")), name.encode(**corner, text="name:N")]


def _chart(title: str, layers: Layers, height: int, *, zoom: tuple[Literal["x", "y"], ...] = ("x", "y")) -> Chart:
    parameters = [alt.param("hidden", value=[]), alt.param("wanted", value=""), alt.param("picked", value="")]
    if zoom:  # with the shift key, so that a page still scrolls
        drag = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"
        how: dict[str, Any] = {"zoom": "wheel![event.shiftKey]", "translate": drag, "clear": "dblclick"}
        scales = alt.selection_interval(name="zoomed", encodings=list(zoom), bind="scales", **how)
        layers = [*layers[:-1], layers[-1].add_params(scales)]
    whole = alt.layer(*layers).properties(width="container", height=height).add_params(*parameters)
    return Chart(title, whole.configure(**CONFIG).to_dict(validate=True))
