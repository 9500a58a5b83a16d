"""Make the pictures and tables of a validation: fixed texts, the cache curve, experts, domains."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from consistency_reg import measures as table
from consistency_reg.measures import parse
from consistency_reg.measures.reading import SHARE, Reading, layer_name
from consistency_reg.optional import require
from consistency_reg.routing import RoutingTrace
from consistency_reg.tracking.accumulate import Measured, RoutingMeasures
from consistency_reg.tracking.board import Board, Table
from consistency_reg.tracking.experts import COLUMNS

with require("plots"):
    from consistency_reg.tracking.figures import Sample, cache_curve, mean_curve, pixels, routing_heatmap

SAMPLE_TOKENS = 64
STAGE = "val"


class RoutingPictures:
    """Keep the routing of a few texts of a validation and draw it: the same texts every time.

    Args:
        samples: how many texts, the first row of as many domains.
        decode: gives the text of a list of token ids; tokens have no names when None.
    """

    def __init__(self, samples: int, decode: Callable[[list[int]], str] | None = None) -> None:
        self.samples = samples
        self.decode = decode
        self._kept: dict[int, Sample] = {}
        self._texts: dict[int, Tensor] = {}  # token ids at the first validation

    def keep(self, trace: RoutingTrace, token_ids: Tensor | None, domain: int, name: str, board: Board) -> None:
        """Keep the first row of the first batch of a domain, if its text is one to draw.

        Args:
            trace: routing of the batch.
            token_ids: [B, T] of the batch; None where they are not known.
            domain: its number.
            name: its name.
            board: is warned if the text is another one than before.
        """
        if domain >= self.samples:
            return
        kept = trace.valid_mask[0].nonzero().flatten()[:SAMPLE_TOKENS]
        text = None if token_ids is None or token_ids.shape[1] < trace.shape[1] else token_ids[0, kept].cpu()
        if text is not None and not torch.equal(self._texts.setdefault(domain, text), text):
            board.warn("the first row of a validation dataloader changes: its pictures of routing do not compare")
        self._kept[domain] = Sample(
            name=name,
            expert_ids=[expert_ids[0, kept].cpu() for expert_ids in trace.expert_ids],
            num_experts=[layer.num_experts for layer in trace],
            layer_names=[layer_name(layer) for layer in range(len(trace))],
            document_ids=None if trace.document_ids is None else trace.document_ids[0, kept].cpu(),
            tokens=None if text is None or self.decode is None else [str(self.decode([t])) for t in text.tolist()],
        )

    def show(self, measured: Measured, measures: RoutingMeasures, board: Board) -> None:
        """Draw what was kept and measured, show it, and forget the texts' routing."""
        samples, self._kept = self._kept, {}
        figures = {f"{STAGE}/routing/{sample.name}": routing_heatmap(sample) for sample in samples.values()}
        figures[f"{STAGE}/cache/curve"] = cache_curve(measured.hit_rates, measures.cache_shares)
        board.media({key: pixels(figure) for key, figure in figures.items()}, tables(measured, measures))


def tables(measured: Measured, measures: RoutingMeasures) -> dict[str, Table]:
    """Return the tables of a validation by name: experts, hit rates by cache size, and domains if there are several."""
    columns = [f"SRP m{measures.usual_length}" if name == "SRP" else name for name in COLUMNS]
    curve = [
        [ratio, rate, "2K" if ratio == 2 else None] for ratio, rate in zip(*mean_curve(measured.hit_rates), strict=True)
    ]
    shown = {
        f"{STAGE}/experts": Table(columns, [expert.row() for expert in measured.experts]),
        f"{STAGE}/cache/hit_rates": Table(["cache ratio", "LRU hit rate", "mark"], curve),
    }
    if measured.domains:
        shown[f"{STAGE}/domains"] = domain_table(measured.domains, measured.tokens)
    return shown


def domain_table(domains: Mapping[str, Mapping[str, Any]], tokens: Mapping[str, int]) -> Table:
    """Return a row for each domain with all that is measured of it, in the order of the table of measures."""
    names = list(dict.fromkeys(name for values in domains.values() for name in values))
    place = {measure.key: number for number, measure in enumerate(table.MEASURES)}
    readings = [reading for name in names if (reading := parse(name)) is not None]
    readings.sort(key=lambda reading: place[reading.measure.key])
    rows = [
        [domain, tokens.get(domain), *(_shown(reading, values) for reading in readings)]
        for domain, values in domains.items()
    ]
    return Table(["domain", "tokens", *map(_header, readings)], rows)


def _header(reading: Reading) -> str:
    unit = f" [{reading.measure.unit}]" if reading.measure.unit == SHARE else ""
    return f"{reading.label}{unit}"


def _shown(reading: Reading, values: Mapping[str, Any]) -> float | None:
    if reading.name not in values:
        return None
    value = float(values[reading.name])
    return 100 * value if reading.measure.unit == SHARE else value
