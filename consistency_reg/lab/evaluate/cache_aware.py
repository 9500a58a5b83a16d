"""Price cache-aware routing on the text that ``consistency-reg evaluate`` judges a model on."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from consistency_reg.lab.evaluate.models import Candidate
from consistency_reg.lab.evaluate.text import Rows
from consistency_reg.lab.pricing.measure import price
from consistency_reg.lab.pricing.rows import Row, with_changes

BATCH_ROWS = 8


def priced(
    candidate: Candidate,
    texts: Mapping[str, Rows],
    strengths: Sequence[float],
    cache_ratios: Sequence[float],
    method: str,
    batch_size: int | None = None,
) -> list[Row]:
    """Return a row for each cache ratio and strength, the model as it is (strength 0) first at each ratio.

    Args:
        candidate: a causal model with its head.
        texts: token ids by domain.
        strengths: strengths of :class:`~consistency_reg.CacheAwareRouting`.
        cache_ratios: slots of each layer's cache, in units of its K.
        method: "prior", "max_rank" or "cumulative".
        batch_size: the number of rows that are read at once.

    Raises:
        ValueError: a model that does not predict tokens; settings that are refused, before the first forward.
    """
    if not candidate.predicts:
        raise ValueError(
            f"--cache-aware needs a causal model with its head, for its perplexity: {candidate.name} is none"
        )
    batches = {domain: list(_batches(rows, batch_size or BATCH_ROWS)) for domain, rows in texts.items()}
    every = [0.0, *(strength for strength in strengths if strength)]
    rows = list(price(candidate.model, batches, every, cache_ratios, method))
    return with_changes([{"model": candidate.name} | row for row in rows])


def _batches(rows: Rows, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield rows of similar length as batches; what pads them comes after every real token and has no label."""
    ordered = sorted((torch.tensor(row) for row in rows if len(row) > 1), key=len)
    for first in range(0, len(ordered), size):
        part = ordered[first : first + size]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        yield {"input_ids": ids, "labels": ids.where(mask.bool(), -100), "attention_mask": mask}
