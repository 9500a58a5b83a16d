"""metrics.csv is what Lightning's CSVLogger writes, and loses no row whenever its process is killed."""

import csv
import math

import torch
from killed import die, dies
from lightning.pytorch.loggers import CSVLogger

from consistency_reg.lab.run_loggers import MetricsFile

ROWS = [
    ({"train/ce": torch.tensor(4.5), "epoch": 0}, 0),
    ({"train/ce": torch.tensor(4.25), "epoch": 0}, 9),
    ({"val/ppl": math.nan, "val/ce": 4.0, "epoch": 0}, 9),
    ({"train/ce": torch.tensor(4.0), "train/z": 1e-30, "epoch": 1}, 19),
]


def test_the_file_is_that_of_lightnings_logger(tmp_path):
    theirs = CSVLogger(tmp_path / "theirs", name="", version="", flush_logs_every_n_steps=1)
    (tmp_path / "ours").mkdir()
    ours = MetricsFile(tmp_path / "ours" / "metrics.csv")
    for row, step in ROWS:
        ours.log_metrics(row, step)
        theirs.log_metrics(row, step)
        theirs.save()
        assert ours.path.read_bytes() == (tmp_path / "theirs" / "metrics.csv").read_bytes()
    assert ours.save_dir == ours.log_dir == str(tmp_path / "ours")


def test_a_new_column_loses_no_row_when_the_process_is_killed(tmp_path, monkeypatch):
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for row, step in ROWS[:2]:
        metrics.log_metrics(row, step)
    for dying in ("os.fsync", "pathlib.Path.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(dying, die)
            assert dies(metrics.log_metrics, *ROWS[2]) == -9
        assert [row["step"] for row in csv.DictReader(metrics.path.read_text().splitlines())] == ["0", "9"]
    metrics.log_metrics(*ROWS[2])
    assert [row["step"] for row in csv.DictReader(metrics.path.read_text().splitlines())] == ["0", "9", "9"]
