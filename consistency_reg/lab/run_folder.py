"""The folder of a run: its files, who works in it, how far the run is, and what came out of it.

Every command that writes or reads run folders does so through this module: ``fit`` and ``ablate`` fill them,
``report``, ``evaluate`` and the model card read them.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

from consistency_reg.lab.files import naming, remove_leftovers, write_atomically, write_json

HANDED_DOWN = "CONSISTENCY_REG_CLAIM"  # the file descriptor of a claim that a child process is given
PATIENCE = 15.0  # seconds in which what a killed owner has left, such as data workers, ends by itself
SIGNED_WITHIN = 1.0  # seconds in which a new owner has written who it is
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunFolder:
    """Names the files in the folder of a run, which need not exist yet, and reads and writes them.

    Args:
        path: where it is.

    Attributes:
        config: the whole recipe of the run, defaults included.
        result: what came out, written when the run is finished.
        metrics: what was logged since the run was resumed last.
        checkpoints: the folder of the checkpoints.
        last_checkpoint: the checkpoint that a resumed run continues from.
        model: the folder of the trained model, its tokenizer and its card.
        wandb: the folder of wandb's files.
        prices: the rows of ``consistency-reg price``.
        cell_config: the keys that a cell of an ablation changes in its recipe.
        cell_settings: the settings of an ablation's cell, and its place in the grid.
        log: what the process of a cell has printed.
        lock: what a :class:`Claim` locks, and says who has it.

    Example:
        >>> RunFolder(Path("runs/first")).last_checkpoint.as_posix()
        'runs/first/checkpoints/last.ckpt'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.result = path / "result.json"
        self.metrics = path / "metrics.csv"
        self.checkpoints = path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.model = path / "model"
        self.wandb = path / "wandb"
        self.prices = path / "prices.csv"
        self.cell_config = path / "cell.yaml"
        self.cell_settings = path / "cell.json"
        self.log = path / "log.txt"
        self._progress = path / "progress.json"
        self._wandb_id = path / "wandb-id"
        self.lock = path / "lock"

    @property
    def name(self) -> str:
        """Return the name of the run: the folder's own, also where it is given as ``.``."""
        return self.path.resolve().name

    @property
    def is_finished(self) -> bool:
        """Return whether the run came to its end."""
        return self.result.exists()

    @property
    def is_run(self) -> bool:
        """Return whether a run was begun in the folder."""
        return any(file.exists() for file in (self.result, self.cell_settings, self.config))

    @property
    def is_free(self) -> bool:
        """Return whether the folder holds nothing, or only what an ablation writes first."""
        known = (self.lock, self.cell_config)
        return not self.path.is_dir() or all(one in known or one.match(".*.part") for one in self.path.iterdir())

    def check_writable(self) -> None:
        """Raise OSError if the folder can neither be written to nor made; nothing is written."""
        place = self.path.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{os.strerror(errno.ENOTDIR)}, so no run can be there", str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "nothing can be written here", str(place))

    def write_config(self, config: str) -> None:
        """Write the recipe of a run that begins."""
        write_atomically(self.config, config)

    def set_result_aside(self) -> None:
        """Keep the result and the recipe of a finished run that is to be trained for more steps, under other names."""
        earlier, config = self.earlier_configs(), self.config.read_text()
        if config not in [path.read_text() for path in earlier]:  # else this was begun before, and killed
            write_atomically(self.path / f"config-{len(earlier) + 1}.yaml", config)
        if self.result.exists():
            self.result.rename(self.path / f"result-{len(self.earlier_configs())}.json")
        if self.prices.exists():  # of the model as it was
            self.prices.rename(self.path / f"prices-{len(self.earlier_configs())}.csv")

    def earlier_configs(self) -> list[Path]:
        """Return the recipes that the run had before it was trained for more steps."""
        return sorted(self.path.glob("config-*.yaml"), key=_number)

    def set_metrics_aside(self) -> None:
        """Keep what an interrupted run has logged as ``metrics-1.csv`` and so on; a row that was cut off goes."""
        if not self.metrics.exists():
            return
        content = self.metrics.read_bytes()
        if not content.endswith(b"\n"):
            write_atomically(self.metrics, content[: content.rfind(b"\n") + 1])
        number = max(map(_number, self.path.glob("metrics-*.csv")), default=0) + 1
        self.metrics.rename(self.path / f"metrics-{number}.csv")

    def read_result(self) -> dict[str, Any]:
        """Return what ``result.json`` holds.

        Raises:
            OSError, ValueError: there is none, or it is no JSON.
        """
        return json.loads(self.result.read_text())

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result.json``, with which the run is finished."""
        write_json(self.result, result)

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Write how far the run is."""
        write_json(self._progress, progress, durable=False)  # the next one comes in seconds

    def read_progress(self) -> dict[str, Any] | None:
        """Return how far the run said it is, with the time of that under "written"; None before it did."""
        try:
            return {**json.loads(self._progress.read_text()), "written": self._progress.stat().st_mtime}
        except (OSError, ValueError):
            return None

    def wandb_id(self, new: str) -> str:
        """Return wandb's id of the run; it is ``new`` for the first one who asks."""
        if not self._wandb_id.exists() or not self._wandb_id.stat().st_size:  # a full disk has left an empty one
            write_atomically(self._wandb_id, new)
        return self._wandb_id.read_text()

    def log_tail(self, lines: int = 8) -> list[str]:
        """Return the last lines of the log that say something; of a progress bar only its last state."""
        try:
            text = self.log.read_bytes()[-20_000:].decode(errors="replace")
        except OSError:
            return []
        shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        return [line for line in shown if line][-lines:]

    def tidy(self) -> None:
        """Remove what killed processes have left half written; only for who holds the claim."""
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)


def runs_within(place: Path) -> tuple[list[Path], list[Path]]:
    """Return the finished and the unfinished runs at a place: those in it, or itself where it is one or has none.

    Raises:
        ValueError: there is no such folder.
    """
    if not place.is_dir():
        raise ValueError(f"{place} does not exist")
    inner = sorted(one for one in place.iterdir() if RunFolder(one).is_run)
    every = [place] if RunFolder(place).is_finished or not inner else inner
    finished = [one for one in every if RunFolder(one).is_finished]
    return finished, [one for one in every if one not in finished]


class Claim:
    """Holds the right to work in a run folder, which one process at a time has.

    It ends with its process, however that ends, and is shared with the child process that it is handed down to: then it
    ends with whoever of the two ends last.
    """

    def __init__(self, descriptor: int, *, inherited: bool = False) -> None:
        self.descriptor = descriptor
        self.inherited = inherited

    @classmethod
    def take(cls, folder: RunFolder) -> "Claim | None":
        """Claim a folder, which is made if it is not there; None while another process works in it.

        Raises:
            OSError: the folder cannot be written to.
        """
        if (inherited := _handed_down(folder)) is not None:
            claim = cls(inherited, inherited=True)
        else:
            with naming(folder.lock):
                folder.path.mkdir(parents=True, exist_ok=True)
                claim = cls(os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644))
            if not claim._lock():
                os.close(claim.descriptor)
                return None
        claim._sign()
        return claim

    @classmethod
    def take_or_refuse(cls, folder: RunFolder) -> "Claim":
        """Claim a folder, and wait a little where its owner has been killed.

        Raises:
            RuntimeError: another process works in it; says which.
            OSError: the folder cannot be written to.
        """
        began = time.monotonic()
        while (claim := cls.take(folder)) is None:
            owner = _owner(folder)
            patience = PATIENCE if _is_dead(owner) else 0.0 if owner else SIGNED_WITHIN
            if time.monotonic() - began > patience:
                raise RuntimeError(_refusal(folder, owner))
            time.sleep(0.1)
        return claim

    def handed_down(self) -> dict[str, str]:
        """Return what the environment of a child needs, which is also to be passed the descriptor."""
        return {HANDED_DOWN: str(self.descriptor)}

    def release(self) -> None:
        """End the claim, also for processes that it was handed down to; without effect the second time."""
        if self.descriptor < 0:
            return
        if not self.inherited:  # else it is the parent's to end
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, 0)
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)
        self.descriptor = -1

    def _lock(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                "the file system has no locks: see that no two processes work in one run folder", stacklevel=4
            )
        return True

    def _sign(self) -> None:
        """Write who works here, for others to read."""
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the name
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(owner).encode(), 0)


def refuse_claimed(folder: RunFolder) -> None:
    """Raise RuntimeError if another process that is alive works in a folder; nothing is written."""
    owner = _owner(folder)
    if not owner or _is_dead(owner) or HANDED_DOWN in os.environ:
        return
    with contextlib.suppress(OSError), open(folder.lock) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(_refusal(folder, owner)) from None


def _handed_down(folder: RunFolder) -> int | None:
    """Return the descriptor of this folder's claim that this process was given, once; None if it was not."""
    given = os.environ.get(HANDED_DOWN, "")
    try:
        descriptor = int(given)
        here, there = os.fstat(descriptor), os.stat(folder.lock)
    except (OSError, ValueError):
        return None
    if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
        return None
    del os.environ[HANDED_DOWN]
    os.set_inheritable(descriptor, False)
    return descriptor


def _owner(folder: RunFolder) -> dict[str, Any]:
    try:
        owner = json.loads(folder.lock.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Return whether an owner on this machine has ended, as far as that can be seen."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _refusal(folder: RunFolder, owner: dict[str, Any]) -> str:
    who = "another process"
    if owner:
        who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
    return f"run_dir {str(folder.path)!r} is being trained by {who}: wait for it, or choose another folder"


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
