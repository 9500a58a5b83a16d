"""Compare runs with ``consistency-reg report``: in tables, figures and one page."""

from consistency_reg.lab.report.command import main
from consistency_reg.lab.report.pairs import Pair, pair_runs
from consistency_reg.lab.report.runs import Run, read_folder, read_run

__all__ = ["Pair", "Run", "main", "pair_runs", "read_folder", "read_run"]
