"""The table of experts: how much each is used, how consistent it is, and what it is for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("layer", "expert", "usage", "SRP", "domain", "share")


@dataclass(frozen=True)
class Expert:
    """Hold a row of the table of experts; the fields are its columns.

    Attributes:
        layer: its MoE layer, from 0.
        expert: its number in the layer, from 0.
        usage: its share of the layer's activations over the fair share, 1/E: 1 is fair, 0 is dead.
        srp: its own SRP.
        domain: the domain that uses it most for a token; None without domains, or if it is never used.
        share: of its activations, those in this domain, had all domains the same number of tokens; NaN without one.
    """

    layer: int
    expert: int
    usage: float
    srp: float
    domain: str | None
    share: float

    def row(self) -> list[int | float | str | None]:
        """Return the values in the order of :data:`COLUMNS`; None where there is none."""
        share = None if self.domain is None else self.share
        return [self.layer, self.expert, self.usage, self.srp, self.domain, share]


def expert_rows(
    usage: Sequence[Tensor], srp: Sequence[Tensor], domains: Mapping[str, Sequence[Tensor]]
) -> list[Expert]:
    """Return the experts of a model, layer by layer.

    Args:
        usage: for each layer [E], share of the tokens on which each expert is active; sums to K.
        srp: for each layer [E], each expert's SRP.
        domains: for each domain the same as ``usage`` over its own tokens; empty for no domains.

    Example:
        >>> usage, srp = [torch.tensor([0.75, 0.25])], [torch.tensor([0.9, 0.5])]
        >>> text = {"prose": [torch.tensor([0.9, 0.1])], "code": [torch.tensor([0.6, 0.4])]}
        >>> [(row.expert, row.usage, row.domain, round(row.share, 2)) for row in expert_rows(usage, srp, text)]
        [(0, 1.5, 'prose', 0.6), (1, 0.5, 'code', 0.8)]
    """
    names = list(domains)
    rows = []
    for layer, (usage_E, srp_E) in enumerate(zip(usage, srp, strict=True)):
        fair = usage_E / usage_E.sum().clamp_min(1e-12) * len(usage_E)
        usage_DE = torch.stack([domains[name][layer] for name in names]) if names else usage_E[None]
        most_E = usage_DE.max(dim=0)
        share_E = most_E.values / usage_DE.sum(dim=0)
        for expert, (used, srp_e, domain, share) in enumerate(
            zip(fair.tolist(), srp_E.tolist(), most_E.indices.tolist(), share_E.tolist(), strict=True)
        ):
            known = bool(names) and used > 0
            rows.append(
                Expert(layer, expert, used, srp_e, names[domain] if known else None, share if known else torch.nan)
            )
    return rows


def usage_profile(counts: Iterable[Tensor]) -> str:
    """Return a line ``layer expert count`` for each expert, as engines read it which pin experts in memory.

    Args:
        counts: for each layer [E] int64, the tokens that used the expert; experts that none used get a line too.

    Example:
        >>> usage_profile([torch.tensor([5, 0]), torch.tensor([2, 3])]).splitlines()
        ['0 0 5', '0 1 0', '1 0 2', '1 1 3']
    """
    return "".join(
        f"{layer} {expert} {count}\n"
        for layer, counts_E in enumerate(counts)
        for expert, count in enumerate(counts_E.tolist())
    )
