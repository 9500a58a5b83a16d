"""The paper's ten design choices as recipes: every cell is a recipe that fit takes, of the size that it should have."""

import json

import pytest
import torch
import yaml
from places import ROOT

from consistency_reg.lab import train as fit
from consistency_reg.lab.ablate import load_grid
from consistency_reg.lab.ablate.command import check_cells
from consistency_reg.lab.model import count_parameters, small_moe

RECIPES = ROOT / "recipes"
GRIDS = sorted(path.stem for path in (RECIPES / "ablations").glob("*.yaml"))
OF_CHECKPOINTS = ("finetune", "finetune_deployed", "finetune_mature", "upcycle_deployed")  # in test_finetune.py
GRIDS = [name for name in GRIDS if name not in OF_CHECKPOINTS]
PAPER = ["Baseline", "FewerExp", "ActMore", "ActFewer", "1ShrExp", "2ShrExp", "DenseFst", "DenseHlf", "NoLB", "OverLB"]
SMALL = {  # what makes a cell a run of two steps
    "data": {
        "domains": ["math", "cpp"],
        "corpus_bytes": 60_000,
        "vocab_size": 300,
        "sequence_length": 64,
        "batch_size": 2,
        "validation_tokens": 128,
    },
    "model": {"warmup_steps": 1, "model": {"init_args": {"hidden_size": 32, "num_heads": 2, "expert_size": 8}}},
    "trainer": {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
    "consistency": {"start_step": 0, "warmup_steps": 0},
    "wandb_project": "",
}


def merged(*recipes):
    whole = {}
    for recipe in recipes:
        for key, value in recipe.items():
            both = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = merged(whole[key], value) if both else value
    return whole


def models(grid):
    """Design -> its model, without weights; and design -> the weight of its load-balance loss."""
    built, balance = {}, {}
    for cell in grid.select(["term=off"]):
        if cell.seed != grid.seeds[0]:
            continue
        recipe = merged(*(yaml.safe_load(p.read_text()) for p in (fit.DEFAULTS, *grid.recipes)), cell.config)
        arguments = recipe["model"]["model"]["init_args"]
        with torch.device("meta"):
            built[cell.labels["design"]] = small_moe(
                vocab_size=recipe["data"]["vocab_size"], context_length=recipe["data"]["sequence_length"], **arguments
            )
        balance[cell.labels["design"]] = recipe["model"]["balance_weight"]
    return built, balance


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_of_every_grid_is_a_recipe_that_fit_takes(name):
    grid = load_grid(RECIPES / "ablations" / f"{name}.yaml")
    check_cells(grid, grid.cells)


@pytest.mark.parametrize(("name", "experts", "active"), [("paper", 32, 4), ("paper_full_size", 64, 8)])
def test_the_papers_ten_are_one_model_with_one_choice_changed(name, experts, active):
    grid = load_grid(RECIPES / "ablations" / f"{name}.yaml")
    assert list(grid.axes["design"]) == PAPER
    built, balance = models(grid)

    def routing(design):
        config = built[design].config
        return config.num_local_experts, config.num_experts_per_tok

    assert routing("Baseline") == (experts, active)
    assert routing("FewerExp") == (experts // 2, active // 2)
    assert routing("ActMore") == (experts, 2 * active)
    assert routing("ActFewer") == (experts, 2)
    assert routing("1ShrExp") == (experts - 1, active - 1)
    assert routing("2ShrExp") == (experts - 2, active - 2)
    assert balance["NoLB"] == 0
    assert balance["OverLB"] == pytest.approx(10 * balance["Baseline"])

    routers = {
        design: sum(name.endswith("router.weight") for name, _ in model.named_parameters())
        for design, model in built.items()
    }
    layers = built["Baseline"].config.num_hidden_layers
    assert routers.pop("DenseFst") == layers - 1
    assert routers.pop("DenseHlf") == layers // 2
    assert set(routers.values()) == {layers}

    (total, used), sizes = count_parameters(built["Baseline"]), {d: count_parameters(built[d]) for d in PAPER}
    for design, (other_total, other_used) in sizes.items():
        assert other_total == pytest.approx(total, rel=0.01), design
        if design in ("FewerExp", "1ShrExp", "2ShrExp", "NoLB", "OverLB"):
            assert other_used == pytest.approx(used, rel=0.01), design
    assert sizes["ActFewer"][1] < used < sizes["ActMore"][1] < sizes["DenseHlf"][1]
    assert used < sizes["DenseFst"][1] < sizes["DenseHlf"][1]


def test_the_full_size_is_the_papers():
    built, _ = models(load_grid(RECIPES / "ablations" / "paper_full_size.yaml"))
    for design, model in built.items():
        assert count_parameters(model)[0] == pytest.approx(1.43e9, rel=0.01), design
    config = built["Baseline"].config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (8, 1280, 640)
    dense = built["DenseFst"].model.layers[0].block_sparse_moe
    assert dense.output_linear.in_features == 40_960


@pytest.mark.parametrize("design", ["DenseHlf", "2ShrExp"])
def test_a_cell_of_the_papers_grid_trains_with_every_measure_of_its_routed_layers(design, tmp_path):
    grid = load_grid(RECIPES / "ablations" / "paper.yaml")
    (cell,) = grid.select([f"design={design}", "term=on", "seed=0"])
    configs = [*grid.recipes, tmp_path / "small.yaml", tmp_path / "cell.yaml"]
    configs[-2].write_text(yaml.safe_dump(SMALL))
    configs[-1].write_text(yaml.safe_dump(cell.config))
    run_dir = tmp_path / "run"
    assert fit.main([f"--config={config}" for config in configs] + [f"--run_dir={run_dir}"]) == 0
    result = json.loads((run_dir / "result.json").read_text())
    layers = {name for name in result["metrics"] if name.startswith("val/srp/m16/layer_")}
    assert len(layers) == (2 if design == "DenseHlf" else 4)
    assert "train/consistency/layer_01" in (run_dir / "metrics.csv").read_text().splitlines()[0]
