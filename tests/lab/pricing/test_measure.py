"""The price of cache-aware routing, on a tiny model and on a run of `consistency-reg fit`."""

import json
import math

import pytest
import torch
from architectures import draw_routers
from small_run import small_run

from consistency_reg import CacheAwareRouting, RouterCapture
from consistency_reg.lab import train as fit
from consistency_reg.lab.model import small_moe
from consistency_reg.lab.module import next_token_losses
from consistency_reg.lab.pricing.command import main
from consistency_reg.lab.pricing.measure import price
from consistency_reg.lab.pricing.rows import read, write
from consistency_reg.lab.pricing.runs import price_run
from consistency_reg.lab.pricing.show import bought, price_table

VOCABULARY, ROWS, TOKENS = 64, 3, 24


@pytest.fixture(scope="module")
def model():
    model = small_moe(VOCABULARY, 32, 2, 2, 16, num_experts=8, top_k=2, context_length=TOKENS).eval()
    draw_routers(RouterCapture(model))
    return model


@pytest.fixture(scope="module")
def batches():
    """Two domains; the rows of the second hold two documents each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, ROWS, TOKENS), generator=generator)
    begins = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    positions = torch.cat([torch.arange(10), torch.arange(TOKENS - 10)]).expand(ROWS, -1)
    labels = ids[1].clone()
    labels[:, 10] = -100
    first = {"input_ids": ids[0], "labels": ids[0], "document_ids": begins}
    second = {"input_ids": ids[1], "labels": labels, "document_ids": begins, "position_ids": positions}
    second["document_ids"] = (torch.arange(TOKENS) >= 10).long().expand(ROWS, -1)
    first["position_ids"] = torch.arange(TOKENS).expand(ROWS, -1)
    return {"one": [first], "two": [second]}


def test_strength_0_is_the_model_as_it_is(model, batches):
    (row,) = price(model, batches, strengths=[0])
    with torch.no_grad():
        losses = [
            next_token_losses(
                model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits, batch["labels"]
            )
            for of_domain in batches.values()
            for batch in of_domain
        ]
    assert row["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)
    assert row["agreement"] == 1
    assert (row["strength"], row["cache_ratio"], row["slots"], row["method"]) == (0, 2, 4, "prior")


def test_rows_are_by_cache_ratio_and_strength_and_misses_fall(model, batches):
    rows = list(price(model, batches, strengths=[0, 0.2, 1.0], cache_ratios=[1, 2]))
    assert [(row["cache_ratio"], row["strength"]) for row in rows] == [
        (ratio, s) for ratio in (1, 2) for s in (0, 0.2, 1)
    ]
    for same_ratio in (rows[:3], rows[3:]):
        misses = [row["misses"] for row in same_ratio]
        assert misses == sorted(misses, reverse=True)
        assert misses[0] > misses[2]
        agreement = [row["agreement"] for row in same_ratio]
        assert agreement == sorted(agreement, reverse=True)
    for row in rows:
        assert row["misses_with_first_uses"] >= row["misses"]
        assert row["perplexity"] == pytest.approx(math.exp(row["cross_entropy"]))
        one_expert = 3 * 32 * 16 * 4  # SwiGLU's three matrices in fp32
        assert row["bytes_per_token"] == pytest.approx(row["misses_with_first_uses"] * 2 * 2 * one_expert)


def test_a_row_in_one_forward_is_what_generation_sees_token_by_token(model, batches):
    batch = {name: value[:1] for name, value in batches["one"][0].items()}
    (row,) = price(model, {"one": [batch]}, strengths=[0.3])
    nats, cache = [], None
    with CacheAwareRouting(model, 2, 0.3) as routing, torch.no_grad():
        for t in range(TOKENS - 1):
            output = model(batch["input_ids"][:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            nats.append(torch.nn.functional.cross_entropy(output.logits[:, -1], batch["input_ids"][:, t + 1]))
        model(batch["input_ids"][:, -1:], past_key_values=cache)
    assert row["cross_entropy"] == pytest.approx(float(torch.stack(nats).mean()), rel=1e-5)
    assert row["misses_with_first_uses"] == routing.misses / (routing.hits + routing.misses)


def test_documents_shorter_than_a_segment_are_priced_without_the_measures_of_segments(model, batches, tmp_path):
    batch = {name: value[:, :10] for name, value in batches["one"][0].items()}
    (row,) = price(model, {"one": [batch]}, strengths=[0.3])
    assert math.isfinite(row["perplexity"])
    assert 0 < row["misses"] < 1
    assert math.isnan(row["srp/m16"])
    write(tmp_path / "prices.csv", [{"run": "first", "seed": 0} | row])
    (kept,) = read(tmp_path / "prices.csv")
    assert kept["misses"] == pytest.approx(row["misses"])


@pytest.mark.parametrize("settings", [{"strengths": [0, -1]}, {"cache_ratios": [0.5]}, {"guaranteed": 3}])
def test_bad_settings_are_refused_before_the_first_forward(settings, model, batches, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=r"must (be|lie)"):
        next(price(model, batches, **settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and where it keeps its text."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONSISTENCY_REG_CACHE", str(folder / "cache"))
        assert fit.main(small_run(folder / "run")) == 0
        yield folder / "run"


def test_a_finished_run_is_priced_on_its_own_validation_text_and_its_rows_are_kept(run, capsys):
    path = run / "prices.csv"
    assert main([str(run), "--cache-aware", "0.5", "--cache-ratios", "1,2"]) == 0
    assert "Next: consistency-reg report" in capsys.readouterr().out
    before = path.read_text()
    assert main([str(run.parent), "--cache-aware", "0", "0.5"]) == 0
    assert "no rows added" in capsys.readouterr().out
    assert path.read_text() == before
    assert main([str(run), "--cache-aware", "0", "--domains", "math"]) == 0
    rows = read(path)
    settings = [(row["cache_ratio"], row["strength"], row.get("domains", "")) for row in rows]
    assert settings == [(1, 0, ""), (1, 0.5, ""), (2, 0, ""), (2, 0.5, ""), (2, 0, "math")]
    logged = json.loads((run / "result.json").read_text())["metrics"]
    as_it_is = rows[2]
    assert as_it_is["perplexity"] == pytest.approx(logged["val/ppl"], rel=1e-5)
    assert 1 - as_it_is["misses"] == pytest.approx(logged["val/cache/lru_2k"], rel=1e-5)
    assert as_it_is["balance/cv"] == pytest.approx(logged["val/balance/cv"], rel=1e-5)
    assert rows[-1]["perplexity"] == pytest.approx(logged["val/ppl/math"], rel=1e-5)
    assert (as_it_is["run"], as_it_is["seed"], as_it_is["loss"]) == ("run", 0, "LocalConsistency")
    assert as_it_is["command"] == f"consistency-reg price {run} --cache-aware 0.5 --cache-ratios 1,2"
    assert json.loads(as_it_is["versions"])["torch"]


def test_what_is_kept_is_not_measured_again_and_a_method_starts_from_the_same_model(run, capsys, monkeypatch):
    assert main([str(run), "--cache-aware", "0.5"]) == 0
    assert main([str(run), "--cache-aware", "4", "--method", "max_rank"]) == 0
    assert "prices.csv: 1 row added" in capsys.readouterr().out
    monkeypatch.setattr("consistency_reg.lab.pricing.runs.load", None)
    assert main([str(run), "--cache-aware", "4", "--method", "max_rank"]) == 0


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a finished run, with a result\.json"):
        next(price_run(tmp_path))
    with pytest.raises(ValueError, match=r"must hold a finished run, with a result\.json"):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cache-aware", "-1"], "--cache-aware must be strengths of 0 or more"),
        (["--cache-ratios", "0.5"], "--cache-ratios must be numbers of at least 1"),
        (["--method", "max_rank"], "--method max_rank needs --cache-aware"),
        (["--method", "max_rank", "--cache-aware", "0.5"], "must be a rank, a whole number, got 0.5"),
        (["--guaranteed", "-1"], "--guaranteed must be 0 or more"),
    ],
)
def test_bad_options_are_named_before_anything_is_read(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        main([str(tmp_path), *options])


def test_a_strength_that_costs_too_much_buys_nothing_whatever_the_order_of_the_rows():
    row = {"model": "olmoe", "slots": 16, "misses": 0.2, "misses_change": -0.4, "strength": 0.1}
    as_it_is = {"model": "olmoe", "slots": 16, "misses": 0.3, "misses_change": 0.0, "strength": 0.0}
    dead = {"balance/min_share": 0.01}
    nothing = "every strength costs more, or lets an expert fall below a tenth of its fair share."
    rows = [row | {"perplexity_change": 0.02}, as_it_is | dead | {"perplexity_change": 0.0}]
    for order in (rows, rows[::-1]):
        assert bought(order) == [f"olmoe, 16 slots: +0.5% perplexity buys nothing: {nothing}"]
    rows = [row | dead | {"perplexity_change": 0.001}, as_it_is | {"perplexity_change": 0.0}]
    for order in (rows, rows[::-1]):
        assert bought(order) == [f"olmoe, 16 slots: +0.5% perplexity buys nothing: {nothing}"]


def test_an_expert_that_is_hardly_used_without_the_bias_does_not_speak_against_it():
    as_it_is = {"model": "olmoe", "slots": 16, "balance/min_share": 0.01, "strength": 0.0, "misses_change": 0.0}
    rows = [
        as_it_is | {"misses": 0.3, "perplexity_change": 0.0},
        as_it_is | {"misses": 0.2, "perplexity_change": 0.001, "misses_change": -0.33, "strength": 0.1},
    ]
    assert bought(rows) == ["olmoe, 16 slots: +0.5% perplexity buys -33.0% misses (strength 0.1, +0.1%)."]


def test_a_strength_that_costs_little_and_saves_nothing_is_not_called_dear():
    as_it_is = {"model": "olmoe", "slots": 16, "strength": 0.0, "perplexity_change": 0.0, "misses_change": math.nan}
    rows = [as_it_is | {"misses": 0.0}, as_it_is | {"misses": 0.0, "strength": 0.1, "perplexity_change": 0.001}]
    nothing = "no strength that costs as little has fewer misses."
    for order in (rows, rows[::-1]):
        assert bought(order) == [f"olmoe, 16 slots: +0.5% perplexity buys nothing: {nothing}"]


def test_rows_of_several_methods_are_told_apart():
    row = {"run": "a", "slots": 8, "cache_ratio": 2.0, "perplexity": 70.0, "misses_change": 0.0} | {
        "perplexity_change": 0.0,
        "guaranteed": 1,
    }
    rows = [
        row | {"method": "prior", "strength": 0.0, "misses": 0.4},
        row | {"method": "prior", "strength": 1.0, "misses": 0.3, "misses_change": -0.25},
        row | {"method": "max_rank", "strength": 1.0, "misses": 0.2, "misses_change": -0.5},
    ]
    assert [cells[2] for cells in price_table(rows).rows] == ["0", "1, prior", "1, max_rank"]
    assert bought(rows) == ["a, 8 slots: +0.5% perplexity buys -50.0% misses (strength 1, max_rank, +0.0%)."]
    assert [cells[2] for cells in price_table(rows[:2]).rows] == ["0", "1"]
    rows[2] |= {"method": "prior", "guaranteed": 0}
    assert [cells[2] for cells in price_table(rows).rows] == ["0", "1, 1 guaranteed", "1, 0 guaranteed"]
