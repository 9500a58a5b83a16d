"""The tables of the offloading benchmark in the docs are those of the committed rows."""

import csv
import math

import pytest
from places import ROOT

from consistency_reg.lab.offload.page import SOURCE, a_token, benchmark_tables, by_slots, main, read_rows

NUMBERS = {
    "unit": "tokens/s",
    "speed_up_median": 1.0,
    "misses_per_token": 3.0,
    "hit_rate": 0.75,
    "mb_per_token": 9.4,
    "p50_ms": 16.4,
    "p99_ms": 34.6,
    "predicted_tokens_per_s": 50.0,
    "over_floor_median": 1.05,
    "perplexity_change": 0.016,
    "emulated_gb_per_s": "",
    "device": "AMD EPYC",
    "threads": 1,
    "disk": "vda",
    "file_system": "ext4",
}


@pytest.fixture
def rows(tmp_path):
    """Reads rows of the benchmark, given by what each differs in."""

    def read(*differing):
        path = tmp_path / "offload.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["arm", "bias", "cache_ratio", "median", *NUMBERS])
            writer.writeheader()
            writer.writerows({"arm": "baseline", "bias": 0.0, "cache_ratio": 2.0, "median": 30.0} | NUMBERS | row
                             for row in differing)  # fmt: skip
        return read_rows(path)

    return read


def test_the_page_has_the_tables_of_the_committed_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "deploying.md").read_text()
    assert f"<!-- report {SOURCE}: " in page
    copy = tmp_path / "deploying.md"
    copy.write_text(page)
    assert main([str(copy)]) == 0
    assert copy.read_text() == page, "make results"


def test_arms_stand_against_slots_whatever_was_measured_when(rows):
    found = rows(
        {"cache_ratio": math.inf, "median": 100.0},
        {"cache_ratio": 1.5, "median": 9.0},
        {"arm": "regularized", "bias": 0.2, "median": 90.0, "speed_up_median": 3.0},
        {"arm": "regularized", "bias": 0.1, "median": 60.0, "speed_up_median": 2.0},
        {"arm": "baseline", "median": 30.0},
    )
    table = by_slots("", found)
    assert table.header == ["arm", "bias", "1.5K", "2K", "all"]
    assert table.rows == [
        ["baseline", "", "9.00 (1.00x)", "30.0 (1.00x)", "100.0 (1.00x)"],
        ["regularized", "0.1", "", "60.0 (2.00x)", ""],
        ["regularized", "0.2", "", "90.0 (3.00x)", ""],
    ]
    assert [row[:3] for row in a_token("", found).rows] == [
        ["1.5K", "baseline", ""],
        ["2K", "baseline", ""],
        ["2K", "regularized", "0.1"],
        ["2K", "regularized", "0.2"],
        ["all", "baseline", ""],
    ]


def test_the_last_measurement_of_an_arm_counts(rows):
    assert by_slots("", rows({"median": 30.0}, {"median": 31.0})).rows == [["baseline", "", "31.0 (1.00x)"]]


def test_a_slower_disk_and_another_machine_have_tables_of_their_own(rows):
    titles = [table.title for table in benchmark_tables(rows({}, {"emulated_gb_per_s": 0.1}))]
    assert titles == [
        "Decoding from the disk: tokens/s by slots",
        "Decoding from the disk: a token",
        "Decoding at 100 MB/s: tokens/s by slots",
        "Decoding at 100 MB/s: a token",
    ]
    titles = {table.title for table in benchmark_tables(rows({}, {"disk": "nvme0n1"}))}
    assert len(titles) == 4
    assert any("ext4 on nvme0n1" in title for title in titles)
