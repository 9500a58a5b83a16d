"""The table of measures: every name that is logged is in it and reads back, and metrics hold what it says."""

import csv
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from consistency_reg import measures
from consistency_reg.measures import HIT_RATE, MEASURES, MIN_SHARE, SRP, parse, shown_in
from consistency_reg.measures.reading import AS_PAIR, DOMAIN, DOWN, LAYER, MODEL, UP
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import RoutingMeasures

RESULTS = sorted((ROOT / "recipes" / "results").glob("*.csv"))


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    every = RoutingMeasures((2, 4), (1.0, 1.5), (0.25,))
    for domain in range(2):
        every.add(RoutingTrace([torch.rand(3, 12, 8).topk(2).indices for _ in range(2)], 8), domain)
    return every.results(["prose", "code"])


def test_every_name_of_a_validation_reads_back_as_what_it_is_of(measured):
    for name in measured.model:
        reading = parse(f"val/{name}")
        assert (reading.stage, reading.layer, reading.domain) == ("val", None, ""), name
        assert reading.name == f"val/{name}"
    for name in measured.parts:
        reading = parse(name)
        assert reading.name == name
        assert (reading.layer is None) != (reading.domain == ""), name
        assert (LAYER if reading.domain == "" else DOMAIN) in reading.measure.of, name


def test_a_measure_of_layers_has_a_value_for_each(measured):
    by_layer = Counter(parse(name).measure.key for name in measured.parts if parse(name).layer is not None)
    assert set(by_layer) == {one.key for one in MEASURES if LAYER in one.of and one.metric}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_columns_of_committed_rows_are_in_the_table(path):
    with path.open() as file:
        names = [name for name in next(csv.reader(file)) if name.startswith("val/")]
    assert [name for name in names if parse(name) is None or parse(name).name != name] == []


def test_keys_are_distinct_and_every_row_is_filled_in():
    assert len({measure.key for measure in MEASURES}) == len(MEASURES)
    for measure in MEASURES:
        assert measure.better in (UP, DOWN, AS_PAIR)
        assert measure.meaning
        assert not measure.meaning.endswith(".")
        assert MODEL in measure.of


@given(
    m=st.integers(2, 999), layer=st.integers(0, 200), stage=st.sampled_from(["val", "train", "val/before", "best/val"])
)
def test_a_name_reads_back(m, layer, stage):
    name = SRP.at(m).within(stage, layer=layer).name
    reading = parse(name)
    assert (reading.m, reading.layer, reading.stage, reading.name) == (m, layer, stage, name)


@given(ratio=st.integers(1, 64).map(lambda quarters: quarters / 4), share=st.integers(1, 100).map(lambda p: p / 100))
def test_the_size_of_a_cache_reads_back(ratio, share):
    assert parse(HIT_RATE.at(ratio=ratio).name).ratio == pytest.approx(ratio)
    assert parse(HIT_RATE.at(cache="sch_m16", share=share).name).share == pytest.approx(share)
    assert parse(HIT_RATE.at(cache="sch_m16", share=share).name).cache == "sch_m16"


@pytest.mark.parametrize(
    "name", ["val/cache/curve", "val/routing/prose", "srp", "val/srp/m", "lr-AdamW", "train/cache/"]
)
def test_other_names_are_not_in_the_table(name):
    assert parse(name) is None


def test_values_are_shown_in_their_unit():
    assert SRP.show(0.4567) == "45.7"
    assert MIN_SHARE.show(0.2345) == "0.23"
    assert MIN_SHARE.show(float("nan")) == ""
    assert HIT_RATE.at(share=0.25).complement == "LRU misses at 25% of the experts"
    assert HIT_RATE.at(cache="sch_m16", ratio=2).label == "SCH m=16 hits at 2 x K"
    with pytest.raises(ValueError, match="needs a ratio or a share"):
        HIT_RATE.at()


@pytest.mark.parametrize("place", ["overview", "runs", "pairs", "card"])
def test_every_place_shows_collapse_next_to_consistency(place):
    shown = {reading.measure for reading in shown_in(place)}
    assert {SRP, MIN_SHARE, measures.GLOBAL_CV} <= shown
