"""What a report finds: frontier, hypervolume, gate, effects of design choices, agreement with the published ones."""

import math
import random
from pathlib import Path

import pandas as pd
import pytest
from run_folders import LOSSES, write_demo, write_designs, write_losses, write_run

from consistency_reg.lab.report import pair_runs, read_folder
from consistency_reg.lab.report.cells import BASELINE, cell_frame
from consistency_reg.lab.report.comparison import gate_table
from consistency_reg.lab.report.effects import effect_frame
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.gate import GATE, passes
from consistency_reg.lab.report.hypervolume import REFERENCE, hypervolume, loss_frame
from consistency_reg.lab.report.pairs import pair_frame
from consistency_reg.lab.report.published import agreement, beside_published, published

PAPER = {name: row["srp"] / 100 for name, row in published().iterrows()}


def findings(folder, baseline=None):
    runs, _ = read_folder(folder)
    return Findings(runs, pair_runs(runs, baseline), baseline)


def table(found, title):
    (wanted,) = [one for one in found.tables() if one.title == title]
    return wanted


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    return findings(write_losses(tmp_path_factory.mktemp("losses")))


def test_hypervolume_is_the_area_that_random_points_of_the_box_find_dominated():
    rng = random.Random(0)
    points = [(rng.uniform(-0.02, 0.07), rng.uniform(-1, 0.1)) for _ in range(12)]
    low, high = (-0.02, -1.0), REFERENCE
    drawn = [(rng.uniform(low[0], high[0]), rng.uniform(low[1], high[1])) for _ in range(20_000)]
    inside = sum(any(x <= a and y <= b for x, y in points) for a, b in drawn) / len(drawn)
    assert hypervolume(points, REFERENCE) == pytest.approx(inside * (high[0] - low[0]) * (high[1] - low[1]), rel=0.03)
    assert hypervolume([], REFERENCE) == hypervolume([(0.06, -0.9), (0.0, 0.0)], REFERENCE) == 0


def test_cells_whose_misses_were_not_measured_stand_last_at_the_gate(losses):
    cells = losses.cells.copy()
    cells.loc[cells.index[::2], "misses_change_mean"] = math.nan
    measured = {cell["cell"]: cell["misses_change_mean"] for _, cell in cells.iterrows()}
    rows = gate_table(cells).rows
    misses = [measured[name] for name, *_, gate, _ in rows if name in measured and gate != "pass"]
    known = sorted(one for one in misses if not math.isnan(one))
    assert 0 < len(known) < len(misses)
    assert misses[: len(known)] == known


def test_losses_are_ordered_by_what_they_reach_over_all_weights_and_collapsed_runs_are_counted_out(losses):
    frame = loss_frame(losses.pair_frame, losses.cells)
    assert list(frame["loss"]) == ["LocalConsistency", "ReMoE", "Sticky"]
    assert list(frame["left_out"]) == [0, 3, 0]
    assert list(frame["weights"]) == [list(weights) for _, weights in LOSSES.values()]
    changes = [(0.0, (0.001 * (seed - 1), 0.02 * (seed - 1))) for seed in (0, 1, 2)]
    kept = {weight: change for weight, change in LOSSES["remoe"][1].items() if weight != 0.16}
    by_seed = [
        hypervolume([(cost + shift, saved - more) for cost, saved in kept.values()], REFERENCE) / 0.05
        for _, (shift, more) in changes
    ]
    remoe = frame.set_index("loss").loc["ReMoE"]
    assert remoe["volume_mean"] == pytest.approx(sum(by_seed) / 3)
    assert (remoe["volume_min"], remoe["volume_max"]) == pytest.approx((min(by_seed), max(by_seed)))
    assert frame["behind_mean"][0] == 0
    assert frame["behind_min"][1] > 0


def test_the_best_within_a_budget_is_of_the_cells_whose_seeds_all_keep_to_it(losses):
    rows = {row[0]: row[-3:] for row in table(losses, "Losses over all their weights").rows}
    assert rows["LocalConsistency"] == ["-52.0% (srp-0.2)"] * 3
    assert rows["ReMoE"] == ["-25.0% (remoe-0.02)"] * 3
    assert rows["Sticky"] == ["none", "none", "-10.0% (sticky-0.5)"]


def test_a_cell_is_dominated_by_cells_that_stay_and_by_the_baseline(losses):
    by = losses.cells.set_index("cell")["dominated_by"]
    assert by["srp-0.1"] == by["srp-0.8"] == ""
    assert by["remoe-0.04"] == "srp-0.2"
    assert by["sticky-4.0"] == "remoe-0.08, srp-0.2, srp-0.4, srp-0.8"
    worse = losses.pair_frame.assign(misses_change=0.1, perplexity_change=0.1).head(3)
    assert list(cell_frame(worse)["dominated_by"]) == [BASELINE]


def test_the_gate_says_what_passes_and_by_how_much(losses):
    rows = table(losses, "Gate").rows
    assert rows[0] == [
        *("srp-0.2", "3", "-52.0% (2.0)", "+0.3% (0.2)", "+0.4% (0.6)", "1.00 (0.10)", "0.30 (0.20)", "pass", "pass")
    ]
    by_cell = {row[0]: row for row in rows}
    assert by_cell["srp-0.4"][3:5] == ["+2.0% (1.5 !)", "+2.1% (1.1 !)"]
    assert by_cell["srp-0.1"][-2:] == ["fail", "pass"]
    assert by_cell["remoe-0.16 (left out)"][-3:] == ["0.02 (0.08 !)", "fail", "fail"]


def test_what_was_not_measured_does_not_pass_the_gate(tmp_path):
    write_run(tmp_path, "off-seed0")
    write_run(tmp_path, "on-seed0", weight=0.1, hits=0.9, metrics={"val/balance/max_mean": None})
    found = findings(tmp_path)
    assert not passes(found.cells.iloc[0], GATE)
    assert "not measured (!)" in table(found, "Gate").rows[0]


def test_a_gate_passed_by_one_seed_is_too_small(tmp_path):
    write_run(tmp_path, "off-seed0")
    write_run(tmp_path, "on-seed0", weight=0.1, hits=0.9)
    assert table(findings(tmp_path), "Gate").rows[0][-2:] == ["too small", "pass"]


def test_balance_given_up_leaves_a_run_out(tmp_path):
    write_run(tmp_path, "off-seed0")
    write_run(tmp_path, "on-seed0", weight=0.1, hits=0.9, metrics={"val/balance/cv": 0.46})
    write_run(tmp_path, "less-seed0", weight=0.05, hits=0.6, metrics={"val/balance/cv": 0.44})
    found = findings(tmp_path)
    assert dict(zip(found.cells["cell"], found.cells["left_out"], strict=True)) == {"less": 0, "on": 1}
    (row,) = table(found, "Losses over all their weights").rows
    assert row[4] == "1 of 2"


def test_each_loss_has_one_cell_where_figures_cannot_hold_all(losses):
    assert losses.shown == ["off", "remoe-0.02", "srp-0.2", "sticky-0.5"]


def test_costs_are_compared_after_as_many_tokens(losses):
    costs = losses.costs
    assert sorted(costs["tokens"].unique()) == [307_200, 614_400, 1_228_800]
    srp = costs[(costs["cell"] == "srp-0.2") & (costs["seed"] == 1)]
    assert srp["perplexity_change"].tolist() == pytest.approx([0.003] * 3)
    assert srp["misses_change"].iloc[-1] == pytest.approx(-0.52)
    by_tokens = table(losses, "Perplexity and LRU misses by tokens seen")
    assert by_tokens.header[2:] == ["0.307M", "0.614M", "1.23M"]
    assert [row[0] for row in by_tokens.rows] == list(dict.fromkeys(pair.run.cell for pair in losses.pairs))


def test_a_design_choice_is_compared_with_all_else_equal(tmp_path):
    for shared, term in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for seed in (0, 1):
            labels = {"shared": str(shared), "term": ("off", "on")[term]}
            better = (0.02 if seed else -0.01) * term
            options = {"seed": seed, "shared": shared, "weight": 0.3 * term, "labels": labels}
            write_run(
                tmp_path,
                f"{shared}-{labels['term']}-seed{seed}",
                perplexity=(70 + 10 * shared + seed) * (1 + better),
                **options,
            )
    runs, _ = read_folder(tmp_path)
    effects = effect_frame(runs).set_index(["choice", "value", "among"])
    assert list(effects.index) == [
        ("shared", "1", "term=off"),
        ("shared", "1", "term=on"),
        ("term", "on", "shared=0"),
        ("term", "on", "shared=1"),
    ]
    assert effects["perplexity_mean"].iloc[0] == pytest.approx((80 / 70 + 81 / 71) / 2 - 1)
    assert effects[["perplexity_min", "perplexity_max"]].iloc[2].tolist() == pytest.approx([-0.01, 0.02])
    shown = table(findings(tmp_path), "Design choices at equal budget").rows
    assert shown[0][:4] == ["shared=1", "0", "term=off", "2"]
    assert shown[0][6].startswith("+14.")
    assert shown[2][6] == "± +0.5% (-1.0 to +2.0)"
    assert effect_frame(runs, "1")["reference"].tolist()[:2] == ["1", "1"]


def test_the_value_without_a_term_is_the_reference_wherever_it_stands(tmp_path):
    for place, name in enumerate(("adjacent-0.1", "off", "srp-0.3")):
        write_run(tmp_path, f"{name}-seed0", weight=0.1 * place)
    assert set(effect_frame(read_folder(tmp_path)[0])["reference"]) == {"off"}


def test_runs_of_another_budget_are_not_compared(tmp_path):
    write_run(tmp_path, "a-seed0")
    write_run(tmp_path, "b-seed0", tokens=99)
    assert effect_frame(read_folder(tmp_path)[0]).empty


def test_the_published_order_has_all_signs_and_its_reverse_has_none(tmp_path):
    runs, _ = read_folder(write_designs(tmp_path / "same", PAPER))
    agreed = agreement(beside_published(runs))
    assert list(agreed["term"]) == ["none", "LocalConsistency 0.15"]
    for column in ("spearman_srp", "spearman_sd"):
        assert agreed[column].tolist() == pytest.approx([1, 1] if column == "spearman_srp" else [rank()] * 2)
    assert list(agreed["signs"]) == [9, 9]
    assert list(agreed["effects"]) == [9, 9]
    turned, _ = read_folder(write_designs(tmp_path / "turned", {name: 0.9 - srp for name, srp in PAPER.items()}))
    assert agreement(beside_published(turned))[["signs", "spearman_srp"]].to_numpy().tolist() == [[0, -1], [0, -1]]


def rank():
    """Of the published SRP with the published balance: the synthetic runs' balance follows their SRP."""
    ranks = published().rank()
    return ranks["srp"].corr(ranks["sd"])


def test_ours_stand_beside_the_published(tmp_path):
    found = findings(write_designs(tmp_path, PAPER, terms=("off",)))
    rows = {row[0]: row for row in table(found, "The published designs").rows}
    assert rows["ActFewer"][1:8] == ["none", "2", "27.4", "27.1", "-16.4", "-16.4", "same"]
    assert rows["Baseline"][7] == ""
    assert table(found, "Agreement with the published designs").rows[0][:3] == ["none", "9 of 9", "1.00"]


@pytest.mark.parametrize("designs", [{"Baseline": 0.4, "NoLB": 0.5}, {"NoLB": 0.5, "OverLB": 0.3, "ActMore": 0.5}])
def test_too_few_designs_or_none_to_start_from_are_not_held_against_the_published(designs, tmp_path):
    assert beside_published(read_folder(write_designs(tmp_path, designs))[0]).empty


def test_a_report_of_one_run_has_no_comparison(tmp_path):
    write_run(tmp_path, "a-seed0")
    titles = [one.title for one in findings(tmp_path).tables()]
    assert titles[0] == "Overview"
    assert "Gate" not in titles
    assert "Design choices at equal budget" not in titles


def test_the_overview_is_over_seeds(tmp_path):
    write_demo(tmp_path, seeds=(0, 1))
    row = table(findings(tmp_path), "Overview").rows[0]
    assert row[:5] == ["none-off", "32/4", "none", "2", "71.8"]


@pytest.mark.parametrize("baseline", [None, "off"])
def test_a_run_stands_beside_the_baseline_of_its_own_device(tmp_path, baseline):
    devices = ("one", "other")
    for device in devices:
        write_run(tmp_path / device, "off-seed0", device=device)
        write_run(tmp_path / device, "on-seed0", weight=0.1, device=device)
    write_run(tmp_path / "other", "early-seed0", weight=0.2)  # it does not say on what
    runs = [run for device in devices for run in read_folder(tmp_path / device)[0]]
    found = {(pair.run.name, pair.run.device): pair.baseline.device for pair in pair_runs(runs, baseline)}
    assert found == {("on-seed0", "one"): "one", ("on-seed0", "other"): "other", ("early-seed0", ""): "one"}


def test_a_frame_of_pairs_without_balance_keeps_its_runs(tmp_path):
    write_run(tmp_path, "off-seed0", metrics={"val/balance/cv": None})
    write_run(tmp_path, "on-seed0", weight=0.1)
    frame = pair_frame(pair_runs(read_folder(Path(tmp_path))[0]))
    assert isinstance(frame, pd.DataFrame)
    assert math.isnan(frame["cv_ratio"][0])
    assert not frame["left_out"][0]
