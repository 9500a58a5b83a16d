"""The monitor without a trainer: what it returns to log, and what it shows on a board."""

import ast

import numpy as np
import pytest
import torch
from places import ROOT

from consistency_reg import functional
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.board import Board, Boards
from consistency_reg.tracking.monitor import MonitorCore


class Wall(Board):
    """Remembers what is shown on it."""

    def __init__(self):
        self.numbers, self.images, self.tables, self.kept, self.warnings, self.alerts = {}, {}, {}, {}, [], []

    def scalars(self, values):
        self.numbers |= values

    def media(self, images, tables):
        self.images |= images
        self.tables |= tables

    def summary(self, values):
        self.kept |= values

    def alert(self, title, text):
        self.alerts.append(title)

    def warn(self, text):
        self.warnings.append(text)


def trace(rows=3, experts=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.rand(rows, 12, experts, generator=generator).topk(2).indices for _ in range(2)]
    return RoutingTrace(ids, experts)


def validate(core, traces, logged, wall, **options):
    for domain, one in enumerate(traces):
        core.validation_batch(one, domain, name="ab"[domain], draw=True, board=wall)
    values = core.end_validation(["a", "b"])
    core.show(wall, logged, **{"step": 7, "tokens": 100} | options)
    return values


def test_a_usage_profile_counts_the_last_validation():
    core = MonitorCore((2, 4))
    with pytest.raises(RuntimeError, match="that of a validation, and none was measured"):
        core.usage_profile()
    for seed in (0, 1):
        validate(core, [trace(seed=seed)], {}, Wall())
    counts = [functional.usage_counts(ids, 8) for ids in trace(seed=1).expert_ids]
    expected = [[layer, e, int(count)] for layer, of in enumerate(counts) for e, count in enumerate(of)]
    assert [list(map(int, line.split())) for line in core.usage_profile().splitlines()] == expected


def test_a_validation_gives_measures_of_model_layers_and_domains():
    core, wall = MonitorCore((2, 4)), Wall()
    first, second = trace(), trace(5, seed=1)
    values = validate(core, [first, second], {"val/loss": 2.0}, wall)
    both = [torch.cat(ids) for ids in zip(first.expert_ids, second.expert_ids, strict=True)]
    assert float(values["srp/m4"]) == pytest.approx(float(functional.srp(both, 8, 4).srp))
    assert float(values["srp/m4/b"]) == pytest.approx(float(functional.srp(list(second.expert_ids), 8, 4).srp))
    assert {"srp/m4/layer_01", "cache/lru_2k/a", "balance/local_cv/document", "balance/min_share/layer_00"} <= set(
        values
    )
    assert core.current == {
        "SRP": pytest.approx(float(values["srp/m4"])),
        "misses": pytest.approx(1 - float(values["cache/lru_25pct"])),
    }
    assert wall.numbers["tradeoff/loss"] == 2.0
    assert wall.numbers["tradeoff/srp_m4"] == pytest.approx(float(values["srp/m4"]))
    assert wall.kept["best/trainer/tokens"] == 100
    assert wall.kept["best/trainer/global_step"] == 7


def test_pictures_and_tables_have_a_row_for_each_domain_and_expert():
    core, wall = MonitorCore((2, 4)), Wall()
    core.draw(wall)
    values = validate(core, [trace(), trace(5, seed=1)], {"val/loss": 2.0}, wall)
    assert set(wall.images) == {"val/routing/a", "val/routing/b", "val/cache/curve"}
    assert all(image.ndim == 3 and image.dtype == np.uint8 for image in wall.images.values())
    assert len(wall.tables["val/experts"].rows) == 16
    domains = wall.tables["val/domains"]
    rows = [dict(zip(domains.columns, row, strict=True)) for row in domains.rows]
    assert [(row["domain"], row["tokens"]) for row in rows] == [("a", 36), ("b", 60)]
    assert rows[1]["SRP m=4 [%]"] == pytest.approx(100 * float(values["srp/m4/b"]))
    assert rows[0]["smallest share"] == pytest.approx(float(values["balance/min_share/a"]))


def test_one_domain_has_no_table_of_domains():
    core, wall = MonitorCore((2,)), Wall()
    core.draw(wall)
    validate(core, [trace()], {"val/loss": 2.0}, wall)
    assert "val/domains" not in wall.tables


def test_the_quality_of_several_loaders_is_their_mean_by_tokens():
    core, wall = MonitorCore((2,)), Wall()
    logged = {"val_loss/dataloader_idx_0": 2.0, "val_loss/dataloader_idx_1": 4.0}
    validate(core, [trace(3), trace(9, seed=1)], logged, wall)
    assert wall.numbers["tradeoff/val_loss"] == pytest.approx((3 * 2.0 + 9 * 4.0) / 12)
    assert wall.kept["best/val_loss"] == wall.numbers["tradeoff/val_loss"]


def test_a_validation_without_a_quality_is_warned_of_once():
    core, wall = MonitorCore((2,)), Wall()
    for _ in range(2):
        validate(core, [trace()], {"val/accuracy": 0.5}, wall)
    (warning,) = wall.warnings
    assert "no quality is logged in validation" in warning
    assert wall.numbers == {}
    with pytest.raises(ValueError, match="quality must be a metric that the module logs in validation, got 'val/bits'"):
        validate(MonitorCore((2,), quality="val/bits"), [trace()], {"val/loss": 1.0}, wall)


def test_the_best_validation_is_kept_as_a_whole_and_survives():
    core, wall = MonitorCore((2,)), Wall()
    best = validate(core, [trace()], {"val/loss": 2.0}, wall)
    validate(core, [trace(seed=5)], {"val/loss": 3.0}, wall, step=9)
    resumed = MonitorCore((2,))
    resumed.load_state_dict(core.state_dict())
    assert resumed.tradeoff.best["best/val/srp/m2"] == pytest.approx(float(best["srp/m2"]))
    assert resumed.tradeoff.best["best/trainer/global_step"] == 7


def test_a_collapsed_router_alarms_once_and_says_where():
    core, wall = MonitorCore((2,)), Wall()
    collapsed = RoutingTrace([trace().expert_ids[0], torch.zeros(3, 12, 1, dtype=torch.int64)], [8, 8])
    for _ in range(2):
        validate(core, [collapsed], {"val/loss": 2.0}, wall)
    assert wall.alerts == [
        "an expert is used less than 0.1 of its fair share",
        "the global CV of expert usage is above 1",
    ]
    assert len(wall.warnings) == 2
    assert "layer 1" in wall.warnings[0]


def test_a_term_without_gradient_alarms_at_the_next_validation():
    core, wall = MonitorCore((2,)), Wall()
    scores = torch.randn(1, 4, 8, requires_grad=True)
    one = RoutingTrace([scores.topk(2).indices], 8, scores=[scores])
    core.watch_term((one.scores[0] ** 2).sum(), one)
    core.watch_term((one.scores[0] * 0).sum(), one)
    validate(core, [trace()], {"val/loss": 2.0}, wall)
    assert wall.alerts == []
    core.watch_term((one.scores[0] * 0).sum(), one)
    validate(core, [trace()], {"val/loss": 2.0}, wall)
    assert wall.alerts == ["the consistency term has no gradient"]
    core.watch_term((one.scores[0] / 0).sum(), one)
    validate(core, [trace()], {"val/loss": 2.0}, wall)
    assert wall.alerts[1] == "the consistency term's gradient is not finite"


def test_boards_show_the_same_and_other_processes_show_nothing():
    walls = [Wall(), Wall()]
    core = MonitorCore((2,))
    core.draw(walls[0])
    validate(core, [trace()], {"val/loss": 2.0}, Boards(walls), first=False)
    assert walls[0].images == {}
    validate(core, [trace()], {"val/loss": 2.0}, Boards(walls))
    assert walls[0].images.keys() == walls[1].images.keys() != set()
    assert walls[0].kept == walls[1].kept


@pytest.mark.parametrize(
    "path", sorted((ROOT / "consistency_reg" / "tracking").glob("*.py")), ids=lambda path: path.stem
)
def test_tracking_needs_no_trainer(path):
    code = ast.parse(path.read_text())
    found = [node.module or "" for node in ast.walk(code) if isinstance(node, ast.ImportFrom)]
    found += [name.name for node in ast.walk(code) if isinstance(node, ast.Import) for name in node.names]
    of_trainers = ("lightning", "transformers", "consistency_reg.callbacks", "consistency_reg.integrations")
    assert [name for name in found if name.startswith(of_trainers)] == []
