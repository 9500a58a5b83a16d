"""Work out once all that a report says of its runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from consistency_reg.lab.render.table import Table
from consistency_reg.lab.report import comparison
from consistency_reg.lab.report.cells import cell_frame, chosen
from consistency_reg.lab.report.cost import cost_frame
from consistency_reg.lab.report.deployed import deployed_frame, parts_frame, rank_frame, strength_frame
from consistency_reg.lab.report.deployed_tables import deployed_tables, strength_table
from consistency_reg.lab.report.effects import effect_frame
from consistency_reg.lab.report.finetuning import fine_tuning_tables
from consistency_reg.lab.report.hypervolume import loss_frame
from consistency_reg.lab.report.pairs import Pair, pair_frame
from consistency_reg.lab.report.published import agreement, beside_published
from consistency_reg.lab.report.runs import Run
from consistency_reg.lab.report.tables import overview_table, pair_table, run_tables
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd


@dataclass(frozen=True)
class Findings:
    """Compares runs with their baselines, and keeps what follows from it.

    Attributes:
        runs: validated on the same data.
        pairs: of :func:`~consistency_reg.lab.report.pairs.pair_runs`.
        baseline: the name that the pairs' baseline was asked by.
    """

    runs: Sequence[Run]
    pairs: Sequence[Pair]
    baseline: str | None = None

    @cached_property
    def run_of_cell(self) -> dict[str, Run]:
        """Return a run of each cell, which tells the cell's look in figures."""
        return {run.cell: run for run in self.runs}

    @cached_property
    def pair_frame(self) -> pd.DataFrame:
        """Return a row for each pair."""
        return pair_frame(self.pairs)

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Return a row for each cell that has a baseline."""
        return cell_frame(self.pair_frame)

    @cached_property
    def shown(self) -> list[str]:
        """Return the cells to draw where not all have room: those without a baseline, and the best of each loss."""
        compared = {pair.run.cell for pair in self.pairs}
        best = set(chosen(self.cells)["cell"]) if self.pairs else set()
        cells = dict.fromkeys(run.cell for run in self.runs)
        return [cell for cell in cells if cell not in compared or cell in best]

    @cached_property
    def effects(self) -> pd.DataFrame:
        """Return a row for each design choice."""
        return effect_frame(self.runs, self.baseline)

    @cached_property
    def published(self) -> pd.DataFrame:
        """Return a row for each published design; empty where the runs have none of them."""
        return beside_published(self.runs)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Return a row for each validation of each pair; empty where runs were validated once."""
        return cost_frame(self.pairs)

    @cached_property
    def deployed(self) -> pd.DataFrame:
        """Return a row for each run and strength of cache-aware routing; empty where no run was measured with it."""
        return deployed_frame(self.runs, self.pairs)

    @cached_property
    def strengths(self) -> pd.DataFrame:
        """Return a row for each cell and strength of cache-aware routing."""
        return strength_frame(self.deployed)

    @cached_property
    def deployed_ranks(self) -> pd.DataFrame:
        """Return a row for each cell that was measured with cache-aware routing, the best first."""
        return rank_frame(self.deployed, self.strengths)

    def tables(self) -> list[Table]:
        """Return all tables, what a reader asks first in front."""
        tables = [overview_table(self.runs)]
        if not self.deployed.empty:
            tables += deployed_tables(self.deployed_ranks, parts_frame(self.strengths))
        if self.pairs:
            losses = loss_frame(self.pair_frame, self.cells)
            tables += [comparison.gate_table(self.cells), comparison.loss_table(losses)]
            tables += [comparison.cell_table(self.cells)]
        if not self.deployed.empty:
            tables.append(strength_table(self.strengths))
        if not self.costs.empty:
            tables.append(comparison.cost_table(self.costs))
        if not self.effects.empty:
            tables.append(comparison.effect_table(self.effects))
        if not self.published.empty:
            tables += comparison.published_tables(self.published, agreement(self.published))
        tables += fine_tuning_tables(self.runs)
        return [*tables, *([pair_table(self.pairs)] if self.pairs else []), *run_tables(self.runs)]
