"""``consistency-reg workspace``: the panels of a wandb project, laid out for reading trade-offs."""

import re
from collections.abc import Sequence
from typing import Any

from consistency_reg.lab.arguments.workspace import parser
from consistency_reg.lab.wandb_login import login_found
from consistency_reg.measures import HIT_RATE, MIN_SHARE, SRP, of_panel
from consistency_reg.measures.reading import TRAINING, VALIDATION, Measure, Reading, size_name
from consistency_reg.optional import require
from consistency_reg.tracking.board import STEP, TOKENS

ENTITY_AND_PROJECT = re.compile(r"[^/\s]+/[^/\s]+")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg workspace``: save the layout as a view of the project, and print its address.

    Raises:
        ValueError: an argument of another form; no login.
    """
    options = parser().parse_args(argv)
    if not ENTITY_AND_PROJECT.fullmatch(options.project):
        raise ValueError(f"the project is given as ENTITY/PROJECT, got {options.project!r}")
    entity, project = options.project.split("/")
    view = workspace(entity, project, quality=options.quality, segment_length=options.segment_length)
    if not login_found():
        raise ValueError("a view lives on wandb's server, which needs a login: run `wandb login`, or set WANDB_API_KEY")
    print(view.save().url)
    return 0


def workspace(entity: str, project: str, *, quality: str = "val/ppl", segment_length: int = 16) -> Any:
    """Return the layout: trade-off first, then consistency, caches, balance, training, pictures; nothing is sent.

    Args:
        entity: user or team.
        project: of wandb.
        quality: the validation metric of quality, lower is better.
        segment_length: the m of the panels.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``, to be changed or saved with its ``save()``.
    """
    with require("workspace"):
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as views

    def scatter(against: str, metric: str) -> Any:
        title = f"quality against {against}"
        return panels.ScatterPlot(title=title, x=panels.SummaryMetric(metric), y=panels.SummaryMetric(quality))

    def lines(title: str, *metrics: str, x: str = STEP) -> Any:
        return panels.LinePlot(title=title, x=x, y=list(metrics))

    def curves(panel: str, stage: str) -> list[Any]:
        """Return a panel for each measure that training logs, or of validation for each that runs show."""
        measures = [
            one for one in of_panel(panel) if (TRAINING in one.stages if stage == TRAINING else "runs" in one.shown)
        ]
        return [lines(*_title_and_names(one, segment_length, stage)) for one in measures]

    hits = HIT_RATE.at(share=0.25)
    misses = f"tradeoff/misses_{size_name(share=0.25)}"
    scattered = (HIT_RATE.at(ratio=2), SRP.at(segment_length), MIN_SHARE.at())
    picture = panels.MediaBrowser(
        title="hit rate by cache ratio", media_keys=["val/cache/curve"], mode="gallery", gallery_axis="step"
    )
    sections = {
        "Trade-off": [
            scatter(hits.complement, misses),
            *(scatter(reading.label, reading.within(VALIDATION).name) for reading in scattered),
            lines("quality by tokens seen", quality, x=TOKENS),
            lines(f"{hits.complement}, by tokens seen", misses, x=TOKENS),
        ],
        "Consistency": curves("Consistency", VALIDATION),
        "Caches": [*curves("Caches", VALIDATION), picture],
        "Balance": curves("Balance", VALIDATION),
        "Training": [
            *curves("Training", TRAINING),
            lines(f"{SRP.at(segment_length).label} of the batch", SRP.at(segment_length).within(TRAINING).name),
        ],
    }
    return views.Workspace(
        entity=entity,
        project=project,
        name="Routing consistency",
        sections=[views.Section(name=name, panels=shown, is_open=True) for name, shown in sections.items()],
        settings=views.WorkspaceSettings(x_axis=STEP, group_by_prefix="last"),
        auto_generate_panels=True,
    )


def _title_and_names(measure: Measure, segment_length: int, stage: str) -> tuple[str, ...]:
    """Return the title of a measure's panel and the names of its curves: one, or one for each usual cache size."""
    sizes = [measure.at(**where) for where in measure.shown.get("runs", ())] if measure is HIT_RATE else []  # type: ignore[arg-type]
    readings: list[Reading] = sizes or [measure.at(segment_length)]
    label = "LRU hits by cache size" if sizes else readings[0].label
    return f"{label}: {measure.meaning}", *(reading.within(stage).name for reading in readings)
