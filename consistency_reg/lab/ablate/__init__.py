"""``consistency-reg ablate``: a resumable grid of runs over any keys of a recipe, each in its own process."""

from consistency_reg.lab.ablate.command import main
from consistency_reg.lab.ablate.grid import Cell, Grid
from consistency_reg.lab.ablate.launchers import LocalLauncher
from consistency_reg.lab.ablate.scheduler import Outcome, run_cells
from consistency_reg.lab.ablate.schema import load_grid

__all__ = ["Cell", "Grid", "LocalLauncher", "Outcome", "load_grid", "main", "run_cells"]
