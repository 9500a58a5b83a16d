"""Recipes of today belong to the committed rows: a cell of a grid has the digest that its row was given."""

import csv

import pytest
import yaml
from places import ROOT

from consistency_reg.lab.ablate import load_grid
from consistency_reg.lab.ablate.folder import fit_arguments, write_config
from consistency_reg.lab.recipe import pair_digest
from consistency_reg.lab.recipe_cli import CheckOnly, parse


@pytest.mark.parametrize("name", ["demo", "frontier", "longer", "medium", "paper"])
def test_a_cell_has_the_digest_of_its_committed_row(name, tmp_path):
    with (ROOT / "recipes" / "results" / f"{name}.csv").open(newline="") as file:
        rows = {row["name"]: row["pair"] for row in csv.DictReader(file)}
    grid = load_grid(ROOT / "recipes" / "ablations" / f"{name}.yaml")
    cells = [cell for cell in grid.cells if cell.name in rows]
    for cell in (cells[0], cells[-1]):
        write_config(cell, tmp_path / "cell.yaml")
        cli = parse(CheckOnly, fit_arguments(grid, cell, tmp_path / "cell.yaml"))
        assert pair_digest(yaml.safe_load(cli.recipe)) == rows[cell.name], cell.name
