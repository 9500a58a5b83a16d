"""An artifact of a wandb run holds the files that it was given."""

import pytest
import wandb
from wandb_file import read_run

from consistency_reg.tracking.artifacts import log_artifact


def test_an_artifact_holds_the_files_it_was_given(tmp_path):
    report = tmp_path / "report.html"
    report.write_text("<p>")
    with wandb.init(project="mine", dir=tmp_path) as open_run:
        log_artifact(open_run, "report of runs/demo", "report", [report])
        with pytest.raises(FileNotFoundError, match=r"absent.html is no file"):
            log_artifact(open_run, "report", "report", [tmp_path / "absent.html"])
    assert ("report", "report-of-runs-demo", ["report.html"]) in read_run(tmp_path).artifacts
