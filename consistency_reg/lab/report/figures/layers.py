"""Draw the SRP of every layer."""

from consistency_reg.lab.render.charts import Figure as Explored
from consistency_reg.lab.render.charts import fields
from consistency_reg.lab.render.page import CELL
from consistency_reg.lab.render.png import panels
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.measured import SRP
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

TITLE = "Layers"
CAPTION = "SRP (segments of 16 tokens) of each MoE layer, means over the seeds, in percent."
LAYER, VALUE = "MoE layer, from the first", "SRP, segments of 16 tokens (%)"
MOST_NUMBERS = 16  # layers for which the numbers have room


def draw(findings: Findings, looks: Looks) -> Figure | None:
    """Draw a row for each cell, a column for each layer; None where layers were not measured."""
    table = _by_layer(findings)
    if table.empty:
        return None
    cells = table.index.tolist()
    height = 1.6 + 0.3 * len(cells)
    figure, (axes,) = panels(1, 1, min(11, 4.5 + 0.7 * len(table.columns)), height)
    image = axes.imshow(table, aspect="auto", cmap="cividis")
    axes.set_xticks(range(len(table.columns)), [str(layer) for layer in table.columns])
    axes.set_yticks(range(len(cells)), cells, parse_math=False)
    axes.set_xlabel(LAYER)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(table.columns) <= MOST_NUMBERS:
        _numbers(axes, table)
    figure.colorbar(image, label=VALUE)
    return figure


def explore(findings: Findings, looks: Looks) -> Explored | None:
    """Return the chart of the layers' SRP, whose fields open their cells."""
    table = _by_layer(findings)
    if table.empty:
        return None
    runs = findings.run_of_cell
    marks = [
        looks.mark(
            runs[cell],
            layer,
            cell,
            id=f"{CELL}{cell}",
            order=value,
            say=f"layer {layer}: {value:.1f}%",
        )
        for cell, row in table.iterrows()
        for layer, value in row.items()
        if value == value
    ]
    return Explored("layers", TITLE, CAPTION, [fields(marks, table.index.tolist(), LAYER, VALUE)])


def _by_layer(findings: Findings) -> pd.DataFrame:
    """Return SRP in percent with a row for each cell and a column for each layer, means over the seeds."""
    rows = [
        {"cell": run.cell, "layer": reading.layer, "srp": 100 * value}
        for run in findings.runs
        for reading, value in run.readings()
        if reading.layer is not None and reading.within(reading.stage) == SRP
    ]
    if not rows:
        return pd.DataFrame()
    cells = list(dict.fromkeys(str(row["cell"]) for row in rows))
    return pd.DataFrame(rows).pivot_table(index="cell", columns="layer", values="srp").loc[cells]


def _numbers(axes: Axes, table: pd.DataFrame) -> None:
    scaled = Normalize(table.min(axis=None), table.max(axis=None))(table.to_numpy())
    for row, values in enumerate(table.to_numpy()):
        for column, value in enumerate(values):
            if value == value:
                colour = "black" if scaled[row, column] > 0.5 else "white"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=colour)
