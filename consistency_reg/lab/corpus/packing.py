"""Rows of equal length out of documents of any length, and the order in which training sees them.

T tokens of a row, B rows of a batch. A row holds pieces of documents side by side; every piece is a document to all
that follows: positions start anew, nothing is predicted across its edge, no attention crosses it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from consistency_reg.lab.corpus.tokens import Tokens

IGNORED = -100  # what torch's and transformers' cross-entropy leave out


class PackedRows(Dataset):
    """Holds the documents of one split as rows of T tokens; only the last row may be shorter, then it is padded.

    An item is a dict of

    - ``input_ids`` [T] int64,
    - ``labels`` [T] int64: ``input_ids``, but -100 on padding and on the first token of each piece. Models of
      transformers shift them on their own: the logits at t predict ``labels[t + 1]``,
    - ``attention_mask`` [T] bool: True for real tokens,
    - ``document_ids`` [T] int64: the document's number in the split, -1 on padding,
    - ``position_ids`` [T] int64: from 0 in each piece, and in the padding,
    - ``domain``: the number of the domain.

    Args:
        tokens: the documents.
        sequence_length: T, at least 2.
        domain: the number that every item carries.
        pad_id: the id of padding.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, *, domain: int = 0, pad_id: int = 0) -> None:
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, one token predicts the next, got {sequence_length}")
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.domain = domain
        self.pad_id = pad_id

    @cached_property
    def whole_rows(self) -> int:
        """Return the number of rows without padding."""
        return len(self.tokens.ids) // self.sequence_length

    @cached_property
    def predicted_tokens(self) -> int:
        """Return the number of tokens that have a label."""
        return self._predicted(0, len(self.tokens.ids))

    def __len__(self) -> int:
        rest = self.whole_rows * self.sequence_length
        return self.whole_rows + (self._predicted(rest, len(self.tokens.ids)) > 0)  # a row without a label has no loss

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"row must lie in 0..{len(self) - 1}, got {row}")
        T = self.sequence_length
        first = row * T
        place = np.arange(first, min(first + T, len(self.tokens.ids)))
        document = np.searchsorted(self.tokens.starts, place, side="right") - 1
        position = place - np.maximum(self.tokens.starts[document], first)
        ids = self.tokens.ids[place].astype(np.int64)
        padding = T - len(place)
        return {
            "input_ids": _padded(ids, padding, self.pad_id),
            "labels": _padded(np.where(position == 0, IGNORED, ids), padding, IGNORED),
            "attention_mask": _padded(np.ones(len(place), bool), padding, False),
            "document_ids": _padded(document, padding, -1),
            "position_ids": torch.from_numpy(np.concatenate([position, np.arange(padding)])),
            "domain": self.domain,
        }

    def _predicted(self, first: int, last: int) -> int:
        """Count the tokens of ids[first:last] that have a label: all but each piece's first. ``first`` begins a row."""
        starts = self.tokens.starts
        inside = starts[np.searchsorted(starts, first) : np.searchsorted(starts, last)]
        return last - first - len(np.union1d(inside, np.arange(first, last, self.sequence_length)))


class MixedRows(DistributedSampler):
    """Orders the rows of several domains by the seed alone.

    The order is an endless sequence of rounds; a round has one row of each domain, in a random order. Each domain goes
    through its rows in a random order and then, newly shuffled, again. An epoch is as many rounds as it takes to see
    as many rows as there are; domains of unequal size are seen more or less than once in it, and go on in the next
    epoch where they stopped.

    With P processes, process r takes the rows r, r + P, r + 2P, ... so that a step sees the same rows for every P at
    the same P * B. Being a ``DistributedSampler`` keeps Lightning from putting its own in its place.

    Args:
        rows: how many rows each domain has; the domains lie one after the other in the data set.
        seed: another seed, another order.
        rank: r, this process.
        world_size: P.
    """

    def __init__(self, rows: Sequence[int], *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(sum(rows)), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.rows = tuple(rows)
        self.start = 0  # how many rows of this process the next pass leaves out
        self.given = 0  # how many of them it was given in this epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another one than before begins at its start."""
        if epoch != self.epoch:
            self.start = self.given = 0
        super().set_epoch(epoch)

    def order(self) -> np.ndarray:
        """Return the rows of this epoch for all processes."""
        D = len(self.rows)
        rounds = -(-sum(self.rows) // D)
        place_R = self.epoch * rounds + np.arange(rounds)
        offsets = np.cumsum([0, *self.rows])
        order_RD = np.empty((rounds, D), np.int64)
        for domain, size in enumerate(self.rows):
            cycle_R, row_R = place_R // size, place_R % size
            for cycle in np.unique(cycle_R):
                shuffled = np.random.default_rng([self.seed, domain, cycle]).permutation(size)
                order_RD[cycle_R == cycle, domain] = offsets[domain] + shuffled[row_R[cycle_R == cycle]]
        return np.random.default_rng([self.seed, D, self.epoch]).permuted(order_RD, axis=1).ravel()

    def __iter__(self) -> Iterator[int]:
        mine = self.order()[: len(self) * self.num_replicas][self.rank :: self.num_replicas]
        self.given, self.start = self.start, 0
        return iter(mine[self.given :].tolist())

    def __len__(self) -> int:
        rounds = -(-sum(self.rows) // len(self.rows))
        return rounds * len(self.rows) // self.num_replicas


class ResumableLoader(DataLoader):
    """Loads rows in the order of :class:`MixedRows`; a checkpoint can put it back in the midst of an epoch.

    Lightning keeps its ``state_dict`` in the checkpoint. It counts the rows that all processes were given, so a run may
    go on with another number of processes or another batch size.
    """

    sampler: MixedRows
    unfinished: Callable[[], int] | None = None  # how many batches were given out but not trained on

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: Lightning asks for the iterator, sets the epoch, and only then may the order be drawn
        for batch in super().__iter__():
            self.sampler.given += self.batch_size or 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return where the run stands: the epoch, and the rows of it that were trained on."""
        unfinished = self.unfinished() if self.unfinished is not None else 0
        done = self.sampler.given - unfinished * (self.batch_size or 1)
        return {"epoch": self.sampler.epoch, "rows": done * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass where the state was saved."""
        self.sampler.set_epoch(state["epoch"])
        self.sampler.start = self.sampler.given = state["rows"] // self.sampler.num_replicas


def _padded(values: np.ndarray, padding: int, value: int | bool) -> Tensor:
    return torch.from_numpy(np.pad(values, (0, padding), constant_values=value))
