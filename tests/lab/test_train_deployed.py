"""`consistency-reg fit` with cache-aware routing: what the run holds of the model as it is and as it is deployed."""

import csv
import json

import pytest
import torch
from small_run import small_run
from transformers import AutoModelForCausalLM

from consistency_reg import CacheAwareRouting, RouterCapture
from consistency_reg.lab import train as fit
from consistency_reg.lab.pricing.runs import price_run
from consistency_reg.lab.recipe import consistency_term, pair_digest, term_options

CHANGES = {"routing.strength": 0.3, "routing.start_step": 0, "routing.ramp_steps": 2, "trainer.max_steps": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs "off", "deployed" (trained without) and "loop"."""
    folder = tmp_path_factory.mktemp("runs")
    assert fit.main(small_run(folder / "off")) == 0
    assert fit.main(small_run(folder / "deployed", changes={"routing.deployed_strength": 0.3})) == 0
    assert fit.main(small_run(folder / "loop", changes=CHANGES)) == 0
    return folder


def result(run):
    return json.loads((run / "result.json").read_text())


def test_a_result_holds_perplexity_and_misses_as_it_is_and_as_deployed(runs):
    for name in ("deployed", "loop"):
        metrics = result(runs / name)["metrics"]
        as_it_is, deployed = price_run(runs / name, strengths=[0, 0.3])
        for row, prefix in ((as_it_is, "val"), (deployed, "val/deployed")):
            assert row["perplexity"] == pytest.approx(metrics[f"{prefix}/ppl"], rel=1e-4)
            assert 1 - row["misses"] == pytest.approx(metrics[f"{prefix}/cache/lru_2k"], rel=1e-4)
        assert deployed["agreement"] == pytest.approx(metrics["val/deployed/agreement"], rel=1e-4)
        assert metrics["val/deployed/cache/lru_2k"] > metrics["val/cache/lru_2k"]
        assert deployed["trained_strength"] == (0.3 if name == "loop" else 0)


def test_training_without_the_routing_is_the_same_whether_it_is_deployed_or_not(runs):
    off, deployed = result(runs / "off")["metrics"], result(runs / "deployed")["metrics"]
    assert {name: value for name, value in deployed.items() if "deployed" not in name} == off


def test_the_log_of_a_run_trained_with_it_shows_its_strength(runs):
    rows = list(csv.DictReader(next((runs / "loop").glob("**/metrics.csv")).open()))
    shown = [float(row["train/routing/strength"]) for row in rows if row.get("train/routing/strength")]
    assert shown == pytest.approx([0, 0.15, 0.3])
    assert any(row.get("val/deployed/ppl") for row in rows)


def test_the_model_says_how_it_was_trained_and_how_to_deploy_it(runs):
    settings = {"cache_ratio": 2.0, "strength": 0.3, "guaranteed": 1, "method": "prior"}
    assert result(runs / "loop")["deployment"] == settings
    assert json.loads((runs / "loop" / "model" / "config.json").read_text())["cache_aware_routing"] == settings
    card = (runs / "loop" / "model" / "README.md").read_text()
    assert "cache-aware routing of strength 0.3 in its forward pass" in card
    assert "CacheAwareRouting.from_config(model)" in card
    assert "| perplexity |" in card.partition("## How to deploy it")[2]
    model = AutoModelForCausalLM.from_pretrained(runs / "loop" / "model")
    with CacheAwareRouting.from_config(model, cache_ratio=3.0) as routing, torch.no_grad(), RouterCapture(model):
        model(torch.randint(300, (2, 16)))
    assert (routing.strength, routing.cache_ratio) == (0.3, 3.0)


def test_a_model_that_is_deployed_as_it_is_says_nothing_of_it(runs):
    assert "deployment" not in result(runs / "off")
    assert "How to deploy" not in (runs / "off" / "model" / "README.md").read_text()
    assert "cache-aware" not in (runs / "deployed" / "model" / "README.md").read_text().partition("## How")[0]
    model = AutoModelForCausalLM.from_pretrained(runs / "off" / "model")
    with pytest.raises(ValueError, match="must have cache_aware_routing, as `consistency-reg fit` writes it, got None"):
        CacheAwareRouting.from_config(model)


def test_a_run_trained_with_it_pairs_with_the_plain_baseline(runs):
    configs = {name: result(runs / name)["config"] for name in ("off", "deployed", "loop")}
    for config in configs.values():
        config["trainer"]["max_steps"] = 2
    earlier = {key: value for key, value in configs["off"].items() if key != "routing"}
    assert len({pair_digest(config) for config in (*configs.values(), earlier)}) == 1
    for config in (*configs.values(), earlier):
        config["consistency"]["weight"] = 0.0
    assert [consistency_term(configs[name]) for name in ("off", "deployed", "loop")] == [
        ("none", 0.0),
        ("none", 0.0),
        ("CacheAware", 0.3),
    ]
    assert term_options(configs["loop"])["routing.ramp_steps"] == 2
    assert term_options(configs["deployed"]) == term_options(configs["off"]) == term_options(earlier)


def test_a_run_of_an_earlier_version_without_the_section_is_gone_on_with(runs, capsys):
    path = runs / "off" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    begin = lines.index("routing:\n")
    end = next(n for n in range(begin + 1, len(lines)) if not lines[n].startswith(" "))
    path.write_text("".join(lines[:begin] + lines[end:]))
    assert fit.main(small_run(runs / "off")) == 0
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another recipe \(routing\.strength: 0\.0 there, 0\.1 now"):
        fit.main(small_run(runs / "off", changes={"routing.strength": 0.1}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"routing.strength": -1}, "strength must be a finite number of at least 0, got -1"),
        ({"routing.cache_ratio": 0.5}, "cache_ratio must be a number of at least 1"),
        ({"routing.method": "best", "routing.strength": 0.1}, "method must be one of"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        fit.main(small_run(tmp_path / "run", changes=changes))
    assert not (tmp_path / "run").exists()
