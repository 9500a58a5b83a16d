"""The progress of an ablation: what each cell says of itself, the remaining time, and the display of both."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from consistency_reg.lab.ablate.grid import Cell
from consistency_reg.lab.render.table import Table
from consistency_reg.lab.render.terminal import drawn
from consistency_reg.optional import require

with require("lightning"):
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

ENDED = ("finished", "failed")
BAR = 20  # letters


@dataclass
class CellState:
    """Holds a cell as the display sees it.

    Attributes:
        status: "waiting", "running", "elsewhere" (another process works on it), "finished" or "failed".
        share: of its steps that are done, 0..1.
        set_up: seconds from its start to its first word of progress.
        pace: seconds that all of its steps take, by what was seen of them.
    """

    cell: Cell
    status: str = "waiting"
    share: float = 0.0
    set_up: float = 0.0
    pace: float | None = None
    line: str = ""
    _began: float = 0.0
    _first: tuple[float, float] | None = None

    def begin(self) -> None:
        """Note that the cell's process has started."""
        self.status, self._began, self._first = "running", time.time(), None

    def end(self, *, failed: bool) -> None:
        """Note that the cell's process has ended, or that the cell was finished before."""
        self.status, self.line = "failed" if failed else "finished", ""

    def observe(self) -> None:
        """Read what a running cell wrote of its progress since it began."""
        if self.status not in ("running", "elsewhere"):
            return
        progress = self.cell.run.read_progress()
        if progress is None or progress["written"] < self._began:
            return
        now, total = time.time(), max(progress.get("total_steps") or 1, 1)
        self.share = min(progress.get("step", 0) / total, 1.0)
        self.line = progress_line(progress)
        if self._first is None:
            self._first = now, self.share
            self.set_up = now - self._began if self._began else 0.0
        elif self.share > self._first[1]:
            self.pace = (now - self._first[0]) / (self.share - self._first[1])


def progress_line(progress: dict[str, object]) -> str:
    """Return step, loss and perplexity in one line, as far as they are known.

    Example:
        >>> progress_line({"step": 20, "total_steps": 400, "ce": 4.0, "phase": "train"})
        'train, step 20/400, loss 4.000, perplexity 54.6'
    """
    parts = [str(progress.get("phase", "")), f"step {progress.get('step', 0)}/{progress.get('total_steps', '?')}"]
    cross_entropy = progress.get("ce")
    if isinstance(cross_entropy, float | int):
        parts += [f"loss {cross_entropy:.3f}", f"perplexity {math.exp(min(cross_entropy, 700)):.1f}"]
    return ", ".join(part for part in parts if part)


def remaining_seconds(states: Sequence[CellState], jobs: int) -> float | None:
    """Return the seconds until the last cell ends, by the pace of those seen at work; None before any was."""
    seen = [state for state in states if state.pace is not None]
    if not seen:
        return None
    whole = sum((state.pace or 0.0) + state.set_up for state in seen) / len(seen)
    work = 0.0
    for state in states:
        if state.status == "waiting":
            work += whole
        elif state.status not in ENDED:
            work += (1 - state.share) * (whole if state.pace is None else state.pace)
    open_cells = sum(state.status not in ENDED for state in states)
    return work / max(1, min(jobs, open_cells))


def clock(seconds: float | None) -> str:
    """Return seconds as h:mm:ss.

    Example:
        >>> clock(3725.2), clock(None)
        ('1:02:05', '-:--:--')
    """
    if seconds is None:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


class LiveDisplay:
    """Shows a bar for all cells and one for each that runs; on a pipe or in a log, a line now and then instead.

    Args:
        jobs: cells at a time.
        console: standard error when None.
        seconds_between_lines: how often to write where no bar can be drawn.
    """

    def __init__(self, jobs: int, console: Console | None = None, seconds_between_lines: float = 15.0) -> None:
        self.jobs = jobs
        self.console = console or Console(file=sys.stderr)
        self.seconds_between_lines = seconds_between_lines
        self._live = Live(console=self.console, refresh_per_second=4)
        self._statuses: dict[str, str] = {}
        self._written = 0.0
        self._start = time.monotonic()

    def __enter__(self) -> "LiveDisplay":
        self._start = time.monotonic()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(self, states: Sequence[CellState]) -> None:
        """Show the states, as often as they are looked at."""
        for state in states:
            self._tell_change(state)
        if self.console.is_terminal:
            self._live.update(self._bars(states))
        elif time.monotonic() - self._written > self.seconds_between_lines:
            self._written = time.monotonic()
            for state in states:
                if state.line:
                    self._print(f"{state.cell.name}: {state.line}")
            self._print(self._summary(states))

    def _tell_change(self, state: CellState) -> None:
        if self._statuses.get(state.cell.name, "waiting") != state.status:
            status = "in another process" if state.status == "elsewhere" else state.status
            self._print(f"{state.cell.name}: {status}")
        self._statuses[state.cell.name] = state.status

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)

    def _summary(self, states: Sequence[CellState]) -> str:
        ended = sum(state.status in ENDED for state in states)
        spent = clock(time.monotonic() - self._start)
        return (
            f"{ended} of {len(states)} cells, {spent} so far, {clock(remaining_seconds(states, self.jobs))} remaining"
        )

    def _bars(self, states: Sequence[CellState]) -> Group:
        share = sum(1.0 if state.status in ENDED else state.share for state in states) / max(len(states), 1)
        rows = [["all", *_bar(share), self._summary(states)]]
        for state in states:
            if state.status in ("running", "elsewhere"):
                rows.append([state.cell.name, *_bar(state.share), state.line or "starting"])
        table = Table("", ["cell", "done", "bar", "now"], rows, gives_way=("bar",))
        return drawn(table, self.console.width)


def _bar(share: float) -> tuple[str, str]:
    """Return a share of the steps as a number and as a bar.

    Example:
        >>> _bar(0.25)
        ('25%', '━━━━━───────────────')
    """
    full = round(BAR * share)
    return f"{100 * share:.0f}%", "━" * full + "─" * (BAR - full)
