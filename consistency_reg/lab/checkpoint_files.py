"""Checkpoints of a run that are whole or not there, whatever ends the process that writes them."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from consistency_reg.lab.files import Draft
from consistency_reg.optional import require

with require("lightning"):
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.io import TorchCheckpointIO


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint next to its place, reads it again, and only then lets it take the place of the former one.

    Lightning's own writes into the temporary folder and copies from there where that is on another file system; killed
    in the middle, or with a full disk, it leaves neither the former checkpoint nor a new one.

    Within :meth:`held` a checkpoint is written but takes its place only at :meth:`release`: Lightning saves at the end
    of a step before it logs the step, and a run that is killed between the two would go on after a step whose row of
    metrics nobody has.
    """

    def __init__(self) -> None:
        super().__init__()
        self._holds = False
        self._held: dict[Path, Draft] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: what Lightning wants to keep.
            path: of the file.
            storage_options: None; there are no options.

        Raises:
            TypeError: there are ``storage_options``.
            OSError: no space, or no right to write; names the folder. The former checkpoint is untouched.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}")
        place = Path(path).absolute()  # Lightning's own callback gives a relative folder's path as an absolute one
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Draft(place)
        with draft.writing() as file:
            torch.save(checkpoint, file)
        if problem := damage(draft.temporary):
            draft.discard()
            raise OSError(None, f"{place.name} cannot be read after it was written ({problem})", str(place.parent))
        if self._holds:
            self._held[place] = draft
        else:
            draft.commit()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep back what is saved in this context until :meth:`release`."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False

    def release(self) -> list[Path]:
        """Move the files that were kept back to their places, and return their paths."""
        held, self._held = self._held, {}
        for draft in held.values():
            draft.commit()
        return list(held)

    def discard(self) -> None:
        """Remove what was kept back."""
        held, self._held = self._held, {}
        for draft in held.values():
            draft.discard()


def let_save(trainer: Trainer, files: WholeCheckpoints) -> None:
    """Let a trainer save through ``files``, unless its strategy or a plugin saves in a way of its own."""
    try:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = files
    except NotImplementedError:  # a strategy that writes a folder with the part of each process
        pass


def damage(path: Path) -> str | None:
    """Return what is wrong with a file of ``torch.save``, every byte of which is read; None for a whole one.

    A folder, as strategies that divide a model write it, passes.
    """
    if path.is_dir():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None if broken is None else f"{broken} is not what was written"


def refuse_damaged(path: Path) -> None:
    """Raise ValueError if a checkpoint is there and damaged; the message says how to resume.

    Args:
        path: of the checkpoint that a run would resume from.
    """
    if not path.exists() or (problem := damage(path)) is None:
        return
    others = [other for other in path.parent.glob("*.ckpt") if other != path and damage(other) is None]
    newest = max(others, key=os.path.getmtime, default=None)
    way_out = f"copy {newest} over it to go on from there, or remove it" if newest else "remove it"
    raise ValueError(f"{path} is damaged ({problem}): {way_out} to begin anew, with the same command")
