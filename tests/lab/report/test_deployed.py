"""What a report finds of runs as they are deployed, with cache-aware routing: changes, ranks, parts, files."""

import math
from pathlib import Path

import pandas as pd
import pytest
from run_folders import DEPLOYED, price_row, write_demo, write_deployed, write_run

from consistency_reg.lab.pricing import rows as prices
from consistency_reg.lab.report import main, pair_runs, read_folder
from consistency_reg.lab.report.deployed import cost_of
from consistency_reg.lab.report.figures import DRAWN, explored, pictures
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.hypervolume import REFERENCE, hypervolume
from consistency_reg.lab.report.looks import Looks
from consistency_reg.lab.report.records import read_csv
from consistency_reg.lab.report.runs import loss_labels
from consistency_reg.lab.report.verdict import verdict

RANKS, PARTS = "As deployed: misses within a budget", "As deployed: what training and the bias do"
STRENGTHS = "As deployed: every strength"


def findings(runs):
    return Findings(runs, pair_runs(runs))


def table(found, title):
    (wanted,) = [one for one in found.tables() if one.title == title]
    return wanted


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return findings(read_folder(write_deployed(tmp_path_factory.mktemp("deployed")))[0])


def test_every_strength_stands_next_to_the_baseline_as_it_is(found):
    means = found.strengths.set_index(["cell", "strength"])
    for cell, (*_, points) in DEPLOYED.items():
        for strength, (cost, saved) in zip((0.0, 0.1, 0.2), points, strict=True):
            row = means.loc[cell, strength]
            assert row["perplexity_change_mean"] == pytest.approx(cost, abs=1e-12)
            assert row["misses_change_mean"] == pytest.approx(saved)
            assert (row["seeds"], row["against"]) == (2, "off")
    seed_1 = found.deployed[(found.deployed["cell"] == "off") & (found.deployed["seed"] == 1)]
    assert seed_1["perplexity_change"].tolist() == pytest.approx([0, 0.0045, 0.0205])


def test_cells_are_ranked_by_the_area_over_their_strengths_the_bias_alone_among_them(found):
    ranks = found.deployed_ranks.set_index("cell")
    assert list(ranks.index) == ["loop-0.1-srp-0.35", "srp-0.35", "off", "loop-0.1", "remoe-0.01"]
    shifted = [
        [
            (cost + (0.0 if not strength else shift), saved)
            for strength, (cost, saved) in zip((0, 1, 2), DEPLOYED["off"][3], strict=True)
        ]
        for shift in (-0.0005, 0.0005)
    ]
    volumes = [hypervolume(points, REFERENCE) / REFERENCE[0] for points in shifted]
    assert ranks.loc["off", "volume_mean"] == pytest.approx(sum(volumes) / 2)
    assert ranks.loc["loop-0.1", "left_out"] == 2
    rows = {row[0]: row for row in table(found, RANKS).rows}
    assert rows["off"][1:3] == ["no", "2"]
    assert rows["off"][5] == "-40.0% (0.1)"
    assert rows["loop-0.1-srp-0.35"][5:8] == ["-90.0% (0.2)", "-90.0% (0.2)", "-90.0% (0.2)"]
    assert rows["loop-0.1"][5] == "-50.0% (0.1)"
    assert rows["loop-0.1"][-1] == "2 of 6"


def test_training_and_the_bias_are_told_apart(found):
    rows = {row[0]: row[1:] for row in table(found, PARTS).rows}
    assert set(rows) == set(DEPLOYED) - {"off"}
    assert rows["srp-0.35"] == [
        *("0.1", "-50.0% / +0.1%", "-40.0% / +0.4%", "-76.0% / +0.3%", "+0.2%", "more than +2.0%")
    ]
    assert rows["remoe-0.01"][:2] == ["0.1", "-10.0% / +0.2%"], "no strength is within the budget: the cheapest"
    assert rows["remoe-0.01"][-2:] == ["+0.8%", "+0.7%"]


def test_the_cost_of_as_few_misses_lies_between_two_strengths():
    bias = pd.DataFrame({"misses_change_mean": [0.0, -0.4, -0.7], "perplexity_change_mean": [0.0, 0.004, 0.02]})
    assert cost_of(-0.55, bias) == pytest.approx(0.012)
    assert cost_of(-0.4, bias) == pytest.approx(0.004)
    assert math.isnan(cost_of(-0.71, bias))


def test_an_expert_that_dies_at_a_strength_leaves_that_strength_out_alone(found):
    rows = {(row[0], row[1]): row for row in table(found, STRENGTHS).rows}
    assert ("loop-0.1 (left out)", "0.2") in rows
    assert ("loop-0.1", "0.1") in rows
    assert rows["srp-0.35", "0"][3:5] == ["-50.0%", "+0.1% (+0.0 to +0.1)"] or rows["srp-0.35", "0"][3] == "-50.0%"
    assert rows["srp-0.35", "0.1"][-1] == "90.0"


def test_what_validation_measured_is_shown_without_pricing(tmp_path):
    runs, _ = read_folder(write_deployed(tmp_path, priced=("off",)))
    found = findings(runs)
    means = found.strengths.set_index(["cell", "strength"])
    assert means.loc["srp-0.35", 0.1]["misses_change_mean"] == pytest.approx(-0.76)
    assert means.loc["srp-0.35", 0.0]["misses_change_mean"] == pytest.approx(-0.5)
    assert ("srp-0.35", 0.2) not in means.index
    rows = {row[0]: row for row in table(found, PARTS).rows}
    assert rows["srp-0.35"][1:5] == ["0.1", "-50.0% / +0.1%", "-40.0% / +0.4%", "-76.0% / +0.3%"]


def test_a_run_without_a_baseline_stands_next_to_itself(tmp_path):
    folder = write_run(tmp_path, "on-seed0", weight=0.3, perplexity=70.0, hits=0.6)
    prices.write(
        folder / "prices.csv", [price_row("on-seed0", 0, 0.0, 70.0, 0.4), price_row("on-seed0", 0, 0.1, 70.7, 0.2)]
    )
    found = findings(read_folder(folder)[0])
    assert found.strengths["misses_change_mean"].tolist() == pytest.approx([0, -0.5])
    assert [one.title for one in found.tables() if one.title == PARTS] == []
    ranks = table(found, RANKS)
    assert [row[:2] for row in ranks.rows] == [["on", "yes, baseline missing"]]
    assert "baseline missing: against the run itself without any bias" in ranks.note


def test_runs_that_miss_nothing_as_they_are_have_no_change_of_misses_and_no_picture_of_it(tmp_path):
    folder = write_run(tmp_path, "on-seed0", weight=0.3, perplexity=70.0, hits=1.0)
    rows = [price_row("on-seed0", 0, strength, 70.0, 0.0) for strength in (0.0, 0.1)]
    prices.write(folder / "prices.csv", rows)
    found = findings(read_folder(folder)[0])
    assert "deployed" not in pictures(found)
    assert "deployed" not in [figure.name for figure in explored(found)]
    nothing = "nothing has fewer misses than its baseline within +0.5% perplexity and with balance held."
    assert verdict(found).found.endswith(f"As deployed with 2 x K slots, {nothing}")


def test_a_trained_run_without_its_baseline_is_not_taken_for_the_bias_alone(tmp_path):
    write_deployed(tmp_path)
    runs = [run for run in read_folder(tmp_path)[0] if run.cell == "loop-0.1-srp-0.35"]
    found = findings(runs)
    assert [row[1] for row in table(found, RANKS).rows] == ["yes, baseline missing"]
    said = verdict(found).found
    assert "next to itself without any bias: its baseline is not among the runs" in said
    assert "bias alone" not in said
    figure = DRAWN["deployed"].draw(found, Looks.of(found.runs, found.pairs))
    labels = {line.get_label() for line in figure.axes[0].get_lines()}
    assert "loop-0.1-srp-0.35" in labels


def test_a_cell_without_a_term_is_not_trained_whatever_it_is_compared_with(tmp_path):
    runs, _ = read_folder(write_deployed(tmp_path))
    found = Findings(runs, pair_runs(runs, "srp-0.35"), "srp-0.35")
    trained = {row[0]: row[1] for row in table(found, RANKS).rows}
    assert trained == {cell: "no" if cell == "off" else "yes" for cell in DEPLOYED}


def test_runs_without_any_have_no_such_table(tmp_path):
    found = findings(read_folder(write_demo(tmp_path))[0])
    assert not [one.title for one in found.tables() if "deployed" in one.title]
    assert "deployed" not in {figure.name for figure in explored(found)}


def test_other_caches_and_texts_are_settings_of_their_own(tmp_path):
    write_deployed(tmp_path, seeds=(0,))
    path = tmp_path / "srp-0.35-seed0" / "prices.csv"
    rows = prices.read(path)
    wide = [row | {"cache_ratio": 4.0, "slots": 16, "misses": row["misses"] / 2} for row in rows]
    other = [row | {"domains": "math"} for row in rows]
    prices.write(path, [*rows, *wide, *other])
    found = findings(read_folder(tmp_path)[0])
    assert list(dict.fromkeys(found.deployed["deployed"])) == ["2 x K slots"], "the baseline was not measured there"
    base = tmp_path / "off-seed0" / "prices.csv"
    kept = prices.read(base)
    prices.write(base, [*kept, kept[0] | {"cache_ratio": 4.0, "misses": 0.25}, kept[0] | {"domains": "math"}])
    found = findings(read_folder(tmp_path)[0])
    settings = ["2 x K slots", "4 x K slots", "2 x K slots, on math"]
    assert list(dict.fromkeys(found.deployed["deployed"])) == settings
    assert table(found, RANKS).header[1] == "cache"
    figure = next(one for one in explored(found) if one.name == "deployed")
    cells = {
        value["cell"]
        for part in figure.charts[0].spec["layer"]
        for value in part.get("data", {}).get("values", [])
        if value.get("cell")
    }
    assert cells == set(DEPLOYED)


def test_a_term_in_the_loop_is_another_term_and_its_name_is_short(found):
    labels = loss_labels(found.runs)
    assert labels["srp-0.35-seed0"] == "LocalConsistency"
    assert labels["loop-0.1-srp-0.35-seed0"] == "LocalConsistency (loop 0.1)"
    assert labels["loop-0.1-seed0"] == "CacheAware"
    overview = {row[0]: row[2] for row in table(found, "Overview").rows}
    assert overview["loop-0.1-srp-0.35"] == "LocalConsistency 0.35, loop 0.1"
    assert overview["loop-0.1"] == "CacheAware 0.1"


def test_the_verdict_names_what_is_deployed_best_next_to_the_bias_alone(found):
    said = verdict(found).found
    assert "As deployed with 2 x K slots, loop-0.1-srp-0.35 has 90.0% fewer misses for +0.4% at strength 0.2" in said
    assert "the bias alone has 40.0% fewer misses for +0.4% at strength 0.1" in said


def test_committed_rows_keep_their_prices_and_give_the_same_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_deployed("runs")
    assert main(["runs", "--append-csv", "results/deployed.csv"]) == 0
    assert "results/deployed_priced.csv: 30 rows added" in capsys.readouterr().out
    assert main(["runs", "--append-csv", "results/deployed.csv"]) == 0
    assert "results/deployed_priced.csv: 0 rows added" in capsys.readouterr().out
    Path("page.md").write_text(f"<!-- report results/deployed.csv: {RANKS} -->\n<!-- end of report -->\n")
    assert main(["results/deployed.csv", "--out", "b", "--update", "page.md"]) == 0
    assert "loop-0.1-srp-0.35" in Path("page.md").read_text()
    assert Path("b/deployed.png").read_bytes() == Path("runs/report/deployed.png").read_bytes()
    assert Path("b/table_priced.csv").read_text() == Path("results/deployed_priced.csv").read_text()
    runs = {run.name: run for run in read_csv(Path("results/deployed.csv"))}
    assert len(runs["off-seed0"].priced) == 3


def test_prices_in_a_file_of_their_own_are_a_source(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_deployed("runs", seeds=(0,))
    rows = prices.read(Path("runs/srp-0.35-seed0/prices.csv"))
    Path("runs/srp-0.35-seed0/prices.csv").unlink()
    prices.write(Path("priced.csv"), rows)
    assert main(["runs", "priced.csv", "--out", "out"]) == 0
    assert "srp-0.35" in Path("out/tables.md").read_text().split(PARTS)[1]
    with pytest.raises(ValueError, match="prices alone make no report"):
        main(["priced.csv", "--out", "out"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"perplexity": 90.0}, "prices of srp-0.35-seed0 are of another model"),
        ({"run": "gone"}, "prices of runs that are not in the report are left out: gone"),
    ],
)
def test_prices_of_another_model_are_left_out_with_a_warning(tmp_path, change, said):
    write_deployed(tmp_path, seeds=(0,))
    path = tmp_path / "srp-0.35-seed0" / "prices.csv"
    prices.write(path, [row | change for row in prices.read(path)])
    with pytest.warns(UserWarning, match=said):
        runs, _ = read_folder(tmp_path)
    assert [run.priced for run in runs if run.cell == "srp-0.35"] == [()]


def test_a_damaged_row_names_its_file_row_and_column(tmp_path):
    write_deployed(tmp_path, seeds=(0,))
    path = tmp_path / "off-seed0" / "prices.csv"
    prices.write(path, [row | {"perplexity": "many"} for row in prices.read(path)])
    with pytest.raises(ValueError, match=r"prices\.csv, row 1: perplexity must be a number, got 'many'"):
        read_folder(tmp_path)


def test_the_picture_and_the_charts_hold_every_cell(found):
    assert "deployed" in pictures(found)
    assert next(iter(DRAWN)) == "deployed"
    figure = next(one for one in explored(found) if one.name == "deployed")
    whole, cheap = (
        {
            value["cell"]
            for part in chart.spec["layer"]
            for value in part.get("data", {}).get("values", [])
            if value.get("cell")
        }
        for chart in figure.charts
    )
    assert whole == set(DEPLOYED)
    assert cheap == set(DEPLOYED)


def test_no_text_of_a_chart_is_empty(found):
    figure = next(one for one in explored(found) if one.name == "deployed")
    texts = [part for chart in figure.charts for part in chart.spec["layer"] if part["mark"].get("type") == "text"]
    assert texts
    assert all(value.get("text") for part in texts for value in part["data"]["values"])


def test_cells_of_one_term_are_told_apart_by_their_lines(tmp_path):
    write_deployed(tmp_path, seeds=(0,))
    folder = write_run(tmp_path, "srp-0.2-seed0", weight=0.2, perplexity=70.0, hits=0.6)
    rows = [price_row("srp-0.2-seed0", 0, strength, 70.0 + strength, 0.4 - strength) for strength in (0.0, 0.1)]
    prices.write(folder / "prices.csv", rows)
    found = findings(read_folder(tmp_path)[0])
    figure = DRAWN["deployed"].draw(found, Looks.of(found.runs, found.pairs))
    lines = [line for line in figure.axes[0].get_lines() if not str(line.get_label()).startswith("_")]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == len(DEPLOYED) + 1
