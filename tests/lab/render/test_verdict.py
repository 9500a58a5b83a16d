"""The two sentences at the end of a command: what was saved, what it cost, whether balance held, what to try next."""

import json
import math

import pytest
from places import ROOT
from run_folders import write_demo, write_run

from consistency_reg.lab.render.verdict import Outcome, advise, compare, describe, of_models, of_run
from consistency_reg.lab.report import main, pair_runs, read_folder
from consistency_reg.lab.report.findings import Findings
from consistency_reg.lab.report.records import read_csv
from consistency_reg.lab.report.verdict import verdict
from consistency_reg.lab.run_folder import RunFolder
from consistency_reg.lab.run_verdict import verdict as verdict_of_fit

OFF = {
    "val/cache/lru_2k": 0.4,
    "val/cache/lru_25pct": 0.5,
    "val/ppl": 70.0,
    "val/srp/m16": 0.5,
    "val/static_srp": 0.25,
    "val/balance/cv": 0.3,
    "val/balance/min_share": 0.4,
}
ON = OFF | {"val/cache/lru_25pct": 0.75, "val/ppl": 70.14, "val/balance/cv": 0.33}


def outcome(**changes):
    usual = {"misses": -0.5, "perplexity": 0.002, "smallest_share": 0.4, "cv_ratio": 1.1, "seeds": 3}
    return Outcome(name="on", against="off", cache="LRU misses at 2K", **usual | changes)


def test_a_comparison_says_what_was_saved_what_it_cost_and_whether_balance_held():
    assert str(compare("on", ON, "off", OFF)) == (
        "on has 50.0% fewer LRU misses at 25% of the experts for +0.2% perplexity against off, and balance held "
        "(smallest share 0.40, global CV over the baseline's 1.10)."
    )
    dead = ON | {"val/balance/min_share": 0.04}
    assert "but balance did not hold (smallest share 0.04" in str(compare("on", dead, "off", OFF))
    worse = ON | {"val/cache/lru_25pct": 0.4}
    assert "on has 20.0% more LRU misses" in str(compare("on", worse, "off", OFF))


def test_what_was_not_measured_is_not_made_up():
    said = str(compare("on", {"val/ppl": 70.0}, "off", {"val/ppl": 70.0}))
    assert said == (
        "on has no cache misses that were measured for +0.0% perplexity against off, and balance was not measured."
    )
    assert "nan" not in describe("on", {}) + str(compare("on", {}, "off", OFF)) + str(of_models({"a": {}, "b": OFF}))


def test_a_cache_that_both_were_measured_at_is_spoken_of():
    without_share = {name: value for name, value in ON.items() if "25pct" not in name}
    assert "LRU misses at 2 x K" in str(compare("on", without_share, "off", OFF))


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"smallest_share": 0.05}, "a smaller --consistency.weight, or a larger --model.balance_weight"),
        ({"cv_ratio": 1.6}, "a larger --model.balance_weight"),
        ({"perplexity": 0.02}, "a smaller --consistency.weight"),
        ({"misses": 0.0}, "nothing is saved yet"),
        ({"misses": math.nan}, "nothing is saved yet"),
        ({"seeds": 1}, "other seeds"),
        ({}, "a larger --consistency.weight: up to +0.5% perplexity there is room"),
        ({"perplexity": 0.004}, "evaluate the model on text of your own"),
    ],
)
def test_the_advice_follows_from_the_outcome(changes, advice):
    assert advice in advise(outcome(**changes))


def test_a_run_by_itself_is_told_to_have_a_baseline_and_a_baseline_a_term():
    alone = of_run("first", ON, has_term=True)
    assert alone.found == (
        "first has LRU misses at 25% of the experts of 25.0% at perplexity 70.1, SRP m=16 50.0% (static SRP 25.0%), "
        "and no expert is dead (smallest share 0.40, global CV 0.33)."
    )
    assert "--consistency.weight 0, and" in alone.advice
    assert "--consistency.weight 0.35" in of_run("off", OFF, has_term=False).advice
    tuned = of_run("tuned", ON, before=OFF, has_term=True)
    assert "50.0% fewer LRU misses at 25% of the experts for +0.2% perplexity against the checkpoint" in tuned.found
    assert "the control" in tuned.advice
    assert "--consistency.weight 0.35" in of_run("control", OFF, before=OFF, has_term=False).advice


def test_a_run_is_compared_with_its_baseline_among_its_neighbours(tmp_path):
    write_run(tmp_path, "on", weight=0.3, hits=0.7, perplexity=70.14)
    write_run(tmp_path, "other-seed", seed=1)
    (tmp_path / "notes").mkdir()
    write_run(tmp_path, "broken")
    (tmp_path / "broken" / "result.json").write_text("{")
    folder = RunFolder(tmp_path / "on")
    assert "on has LRU misses" in verdict_of_fit(folder).found
    write_run(tmp_path, "off", hits=0.4, perplexity=70.0)
    said = verdict_of_fit(folder)
    assert "on has 50.0% fewer LRU misses at 25% of the experts for +0.2% perplexity against off" in said.found
    assert "other seeds" in said.advice
    assert "--consistency.weight 0.35" in verdict_of_fit(RunFolder(tmp_path / "off")).advice


def test_the_baseline_that_is_asked_for_has_neither_the_goal_nor_the_routing_of_the_run(tmp_path):
    folder = write_run(tmp_path, "on", weight=0.3)
    result = json.loads((folder / "result.json").read_text())
    result["config"]["consistency"] |= {"budget": {"ce": 0.01}, "reference": "runs/off", "max_weight": None}
    result["config"]["routing"] = {"strength": 0.1, "start_step": 0}
    (folder / "result.json").write_text(json.dumps(result))
    off = "--consistency.weight 0 --consistency.budget null --consistency.reference null --routing.strength 0"
    assert f"the same command with {off}, and" in verdict_of_fit(RunFolder(folder)).advice
    runs, _ = read_folder(folder)
    assert "--consistency.weight 0 --routing.strength 0 and" in verdict(Findings(runs, [])).advice


def test_models_stand_next_to_the_first():
    assert "b has 50.0% fewer" in of_models({"a": OFF, "b": ON}).found
    assert of_models({"a": ON, "b": OFF}, "Next: this.").found.startswith("a has LRU misses")
    assert of_models({"a": ON}, "Next: this.").advice == "Next: this."


def test_a_report_ends_with_its_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_demo("runs", seeds=(0, 1, 2))
    assert main(["runs", "--out", "out"]) == 0
    found, advice = capsys.readouterr().out.splitlines()[-2:]
    assert found == (
        "none-on has 38.5% fewer LRU misses at 25% of the experts for +0.6% perplexity against none-off, the means of "
        "3 seeds, and balance held (at worst smallest share 0.40, global CV over the baseline's 1.00)."
    )
    assert advice.startswith("Next: a smaller --consistency.weight")


def test_a_report_without_pairs_asks_for_a_baseline(tmp_path):
    write_run(tmp_path, "on-seed0", weight=0.3)
    assert "--consistency.weight 0 and" in verdict(Findings(read_folder(tmp_path)[0], [])).advice
    rows = [read_csv(ROOT / "recipes" / "results" / "demo.csv")[0]]
    assert "--consistency.weight 0.35" in verdict(Findings(rows, [])).advice


def test_a_committed_frontier_names_the_cell_with_the_fewest_misses_within_the_budget():
    runs = read_csv(ROOT / "recipes" / "results" / "frontier.csv")
    said = verdict(Findings(runs, pair_runs(runs)))
    assert said.found.startswith("srp-0.35 has 52.0% fewer LRU misses at 25% of the experts for +0.5% perplexity")


def test_a_fit_with_cache_aware_routing_says_what_it_has_as_deployed(tmp_path):
    deployed = {"val/deployed/ppl": 70.21, "val/deployed/cache/lru_2k": 0.88, "val/deployed/strength": 0.1}
    deployed |= {"val/deployed/cache_ratio": 2.0}
    write_run(tmp_path, "on", weight=0.3, hits=0.7, perplexity=70.14, metrics=deployed)
    alone = verdict_of_fit(RunFolder(tmp_path / "on")).found
    assert "As deployed (cache-aware routing of strength 0.1, 2 x K slots) on has 60.0% fewer LRU misses" in alone
    assert "+0.1% perplexity against the model as it is." in alone
    write_run(tmp_path, "off", hits=0.4, perplexity=70.0)
    assert verdict_of_fit(RunFolder(tmp_path / "on")).found.endswith(
        "on has 80.0% fewer LRU misses for +0.3% perplexity against off."
    )


def test_an_idle_expert_on_one_domain_is_no_collapse():
    dead = OFF | {"val/balance/min_share": 0.0}
    assert "its router collapsed: an expert is used at 0.00" in describe("model", dead)
    said = describe("model", dead, one_domain=True)
    assert "collapsed" not in said
    assert "on text of this domain alone an expert is used at 0.00 of its fair share" in said
