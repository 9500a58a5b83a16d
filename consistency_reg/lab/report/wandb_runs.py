"""Read finished runs from wandb by its API."""

from collections.abc import Mapping
from typing import Any

from consistency_reg.lab.report.curves import QUALITY, SAVING, Curve, curve
from consistency_reg.lab.report.runs import Run, run_from_result
from consistency_reg.lab.wandb_login import login_found
from consistency_reg.optional import require

with require("plots"):
    import pandas as pd

PREFIX, STEP = "wandb:", "trainer/global_step"
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # how wandb's summary says what JSON cannot


def read_wandb(address: str) -> tuple[list[Run], list[str]]:
    """Return the finished runs of ``consistency-reg fit`` in a project or group, and the names of the others.

    Args:
        address: ``wandb:ENTITY/PROJECT`` or ``wandb:ENTITY/PROJECT/GROUP``.

    Raises:
        ValueError: an address of another form; no login; a project that cannot be read, or has no finished run.
    """
    parts = address.removeprefix(PREFIX).split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"runs of wandb are given as wandb:ENTITY/PROJECT[/GROUP], got {address!r}")
    if not login_found():
        raise ValueError(f"{address} needs a login, and there is none: run `wandb login`, or set WANDB_API_KEY")
    with require("wandb"):
        import wandb
    filters = {"group": parts[2]} if len(parts) == 3 else {}
    try:
        there = list(wandb.Api().runs("/".join(parts[:2]), filters=filters, lazy=False))
    except (ValueError, wandb.Error) as error:
        raise ValueError(f"{address} cannot be read: {error}") from error
    fitted = [run for run in there if "config" in run.config]  # not those that hold an evaluation or a report
    finished = [run for run in fitted if "result" in run.summary_metrics]
    if not finished:
        raise ValueError(f"{address} has no finished run of consistency-reg fit; runs there: {len(there)}")
    return [_run(run) for run in finished], [run.name for run in fitted if run not in finished]


def _run(run: Any) -> Run:
    """Return a run of the API, whose summary holds what result.json does, the metrics in keys of their own."""
    summary: Mapping[str, Any] = run.summary_metrics
    metrics = {key: value for key, value in summary.items() if key.startswith("val/") and _is_number(value)}
    result = {**summary["result"], "config": run.config["config"], "metrics": metrics, "wandb_dir": ""}
    return run_from_result(result, curve=_curve(run, result, metrics))


def _is_number(value: Any) -> bool:
    """Return whether a value is a number; pictures and tables are dictionaries that say where their files are."""
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in NOT_FINITE


def _curve(run: Any, result: Mapping[str, Any], metrics: Mapping[str, Any]) -> Curve:
    logged = [name for name in (QUALITY, SAVING) if name in metrics]
    rows = list(run.scan_history(keys=[STEP, *logged]))  # rows that have all of them: those of validations
    history = pd.DataFrame(rows).rename(columns={STEP: "step"})
    return curve(history, int(result["steps"]), int(result["tokens"]))
