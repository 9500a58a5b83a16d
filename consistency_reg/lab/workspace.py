"""``consistency-reg workspace``: the panels of a wandb project, laid out for reading trade-offs."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from consistency_reg.lab.usage import CommandParser
from consistency_reg.lab.wandb_login import login_found
from consistency_reg.optional import require

STEP, TOKENS = "trainer/global_step", "trainer/tokens"
ENTITY_AND_PROJECT = re.compile(r"[^/\s]+/[^/\s]+")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg workspace``: save the layout as a view of the project, and print its address.

    Raises:
        ValueError: an argument of another form; no login.
    """
    options = _parser().parse_args(argv)
    if not ENTITY_AND_PROJECT.fullmatch(options.project):
        raise ValueError(f"the project is given as ENTITY/PROJECT, got {options.project!r}")
    entity, project = options.project.split("/")
    view = workspace(entity, project, quality=options.quality, segment_length=options.segment_length)
    if not login_found():
        raise ValueError("a view lives on wandb's server, which needs a login: run `wandb login`, or set WANDB_API_KEY")
    print(view.save().url)
    return 0


def workspace(entity: str, project: str, *, quality: str = "val/ppl", segment_length: int = 16) -> Any:
    """The layout: trade-off first, then consistency, caches, balance, training, and the pictures; nothing is sent.

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
    m = f"m{segment_length}"

    def scatter(title: str, x: str) -> Any:
        return panels.ScatterPlot(title=title, x=panels.SummaryMetric(x), y=panels.SummaryMetric(quality))

    def lines(title: str, *metrics: str, x: str = STEP) -> Any:
        return panels.LinePlot(title=title, x=x, y=list(metrics))

    def pictures(title: str, *keys: str) -> Any:
        return panels.MediaBrowser(title=title, media_keys=list(keys), mode="gallery", gallery_axis="step")

    sections = {
        "Trade-off": [
            scatter("quality against LRU misses, cache of 25% of the experts", "tradeoff/misses_25pct"),
            scatter("quality against LRU hits, cache of 2K slots", "val/cache/lru_2k"),
            scatter(f"quality against SRP, {m}", f"val/srp/{m}"),
            scatter("quality against the smallest share: collapse is on the left", "val/balance/min_share"),
            lines("quality by tokens seen", quality, x=TOKENS),
            lines("LRU misses by tokens seen", "tradeoff/misses_25pct", x=TOKENS),
        ],
        "Consistency": [
            lines(f"SRP, {m}", f"val/srp/{m}"),
            lines("static SRP: what imbalance alone gives", "val/static_srp"),
            lines("local gain: SRP - static SRP", f"val/local_gain/{m}"),
            lines("experts shared with the token before", "val/overlap"),
        ],
        "Caches": [
            lines("LRU hits by cache size", "val/cache/lru_k", "val/cache/lru_2k", "val/cache/lru_25pct"),
            pictures("hit rate by cache ratio", "val/cache/curve"),
        ],
        "Balance": [
            lines("CV of usage over all data", "val/balance/cv"),
            lines(f"CV of usage within segments, {m}", f"val/balance/local_cv/{m}"),
            lines("busiest expert over the mean", "val/balance/max_mean"),
            lines("smallest share of fair", "val/balance/min_share"),
        ],
        "Training": [
            lines("cross-entropy", "train/ce"),
            lines("consistency term, weighted", "train/consistency/weighted"),
            lines("consistency term, raw", "train/consistency/loss"),
            lines(f"SRP of the batch, {m}", f"train/srp/{m}"),
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


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "consistency-reg workspace",
        description="Lay out the panels of a wandb project for reading trade-offs, as a saved view of it.",
        epilog="example:\n  consistency-reg workspace my-team/consistency-reg",
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are")
    parser.add_argument("--quality", default="val/ppl", metavar="METRIC", help="what misses are traded for (val/ppl)")
    parser.add_argument("--segment-length", type=int, default=16, metavar="M", help="of SRP in the panels (16)")
    return parser
