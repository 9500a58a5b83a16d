"""A row of the table of measures is all that a value which a metric's results hold needs to be shown everywhere."""

import csv
import io

import pytest
import torch
from run_folders import result

from consistency_reg import measures
from consistency_reg.lab.card import card
from consistency_reg.lab.evaluate.measure import measure
from consistency_reg.lab.evaluate.records import to_csv
from consistency_reg.lab.evaluate.tables import tables
from consistency_reg.lab.evaluate.traces import Recording
from consistency_reg.lab.render.measures_page import measures_table
from consistency_reg.lab.report.pairs import Pair
from consistency_reg.lab.report.runs import run_from_result
from consistency_reg.lab.report.tables import overview_table, pair_table, run_tables
from consistency_reg.lab.workspace import workspace
from consistency_reg.measures.reading import AS_PAIR, LAYER, MODEL, Measure
from consistency_reg.metrics import RoutingBalance
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import RoutingMeasures

TWIN = Measure(
    "balance/twin",
    "the twin",
    "the SD of usage under another name",
    AS_PAIR,
    "Balance",
    of=(MODEL, LAYER),
    metric="balance",
    name="balance_twin",
    attribute="sd",
    over_layers="mean",
    shown={"runs": ({},), "overview": ({},), "pairs": ({},), "card": ({},)},
)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setattr(measures, "MEASURES", (*measures.MEASURES, TWIN))


@pytest.fixture
def ids():
    return [torch.rand(4, 24, 8, generator=torch.Generator().manual_seed(0)).topk(2).indices for _ in range(2)]


def test_metric_and_monitor_have_it_of_model_and_layers(ids):
    trace = RoutingTrace(ids, 8)
    metric = RoutingBalance.from_trace(trace, [4])
    metric.update(trace)
    values = metric.compute()
    assert values["balance_twin"] == values["balance_sd"] > 0
    assert "balance_twin_layer_01" in values
    monitored = RoutingMeasures((4,), (1.0,), ())
    monitored.add(trace)
    measured = monitored.results(["all"])
    assert measured.model["balance/twin"] == measured.model["balance/sd"]
    assert "balance/twin/layer_01" in measured.layers


def test_evaluate_has_it_in_table_rows_and_log(ids):
    rows = len(ids[0])
    recording = Recording("toy", ids, [8, 8], ["a", "b"], torch.ones(4, 24).bool(), torch.zeros(rows).long(), ["all"])
    evaluation = measure(recording, segment_lengths=[4], replicates=0)
    assert evaluation.values["balance/twin"] == evaluation.values["balance/sd"]
    (balance,) = (table for table in tables([evaluation]) if table.title == "Balance")
    assert "the twin" in balance.header
    rows_of_csv = list(csv.DictReader(io.StringIO(to_csv([evaluation]))))
    assert [row["layer"] for row in rows_of_csv if row["measure"] == "balance_twin"] == ["a", "b"]


def test_a_report_has_it_over_cells_and_of_each_run():
    run = run_from_result(result("toy", metrics={"val/balance/twin": 0.123}))
    overview = overview_table([run])
    assert dict(zip(overview.header, overview.rows[0], strict=True))["the twin"] == "0.12"
    (of_runs,) = (table for table in run_tables([run]) if "the twin" in table.header)
    assert dict(zip(of_runs.header, of_runs.rows[0], strict=True))["the twin"] == "0.123"
    baseline = run_from_result(result("none", metrics={"val/balance/twin": 0.1}))
    of_pair = pair_table([Pair(run, baseline)])
    assert dict(zip(of_pair.header, of_pair.rows[0], strict=True))["the twin"] == "+23.0%"


def test_card_workspace_and_docs_have_it():
    assert "| the twin | 0.25 |" in card(result("toy", metrics={"val/balance/twin": 0.25}, device="cpu"))
    (section,) = (one for one in workspace("team", "project").sections if one.name == "Balance")
    assert ["val/balance/twin"] in [panel.y for panel in section.panels]
    assert measures_table().rows[-1][:2] == ["val/balance/twin", "the twin"]
