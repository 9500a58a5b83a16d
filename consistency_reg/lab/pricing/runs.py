"""Price finished runs on their own validation text, and keep the rows next to each run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from consistency_reg.lab.arguments.price import STRENGTHS
from consistency_reg.lab.checkpoint import model_folder
from consistency_reg.lab.corpus.data import TextDataModule
from consistency_reg.lab.evaluate.models import load
from consistency_reg.lab.pricing.measure import price
from consistency_reg.lab.pricing.rows import Row, merge, origin, point, read, write
from consistency_reg.lab.recipe import consistency_term
from consistency_reg.lab.run_folder import RunFolder


def price_run(
    folder: Path,
    *,
    device: str = "cpu",
    domains: Sequence[str] = (),
    strengths: Sequence[float] = STRENGTHS,
    cache_ratios: Sequence[float] = (2.0,),
    method: str = "prior",
    guaranteed: int = 1,
    known: Sequence[Row] = (),
) -> Iterator[Row]:
    """Yield the rows of :func:`~consistency_reg.lab.pricing.measure.price` of a finished run, with what the run was.

    Args:
        folder: folder of the run.
        device: where the model runs, such as "cuda".
        domains: domains of the default corpus to measure on instead of the run's own validation text.
        strengths: strengths of the bias; 0 is the model as it is.
        cache_ratios: slots of each layer's cache, in units of its K.
        method: "prior", "max_rank" or "cumulative".
        guaranteed: the number of best experts that are always chosen.
        known: rows that are there already and are not measured again.

    Raises:
        ValueError: a folder without a finished run; settings that are refused.
    """
    here = RunFolder(folder)
    if not here.is_finished:
        raise ValueError(f"{folder} must hold a finished run, with a result.json")
    result = here.read_result()
    about = _about(result, domains)
    there = {point(row) for row in known}
    settings = {"method": method, "guaranteed": guaranteed}
    every = [(ratio, strength) for ratio in cache_ratios for strength in strengths]
    skip = [
        (ratio, strength)
        for ratio, strength in every
        if point(about | settings | {"cache_ratio": ratio, "strength": strength}) in there
    ]
    if len(skip) == len(every):
        return
    candidate = load(str(folder), device=torch.device(device))
    batches = _batches(result, folder, domains)
    for row in price(candidate.model, batches, strengths, cache_ratios, method, guaranteed, skip):
        yield about | row


def price_missing(folder: Path, command: str, *, device: str = "cpu", **settings: Any) -> Iterator[Row]:
    """Measure what is not kept next to the run yet, keep each row as it comes, and yield it.

    Args:
        folder: folder of the run.
        command: the command that asked, which each row is kept with.
        device: where the model runs.
        settings: settings of :func:`price_run`.
    """
    path = RunFolder(folder).prices
    kept = read(path) if path.exists() else []
    made = origin(command, device)
    for row in price_run(folder, device=device, known=kept, **settings):
        kept = merge(kept, [row | made])
        write(path, kept)
        yield row | made


def _about(result: Mapping[str, Any], domains: Sequence[str]) -> Row:
    loss, weight = consistency_term(result["config"])
    trained = (result["config"].get("routing") or {}).get("strength", 0.0)
    about = {"run": result["name"], "seed": result["seed"], "loss": loss, "weight": weight, "trained_strength": trained}
    return about | ({"domains": " ".join(domains)} if domains else {})


def _batches(result: Mapping[str, Any], folder: Path, domains: Sequence[str]) -> dict[str, Any]:
    # Another text gets the run's tokenizer: one would be trained on that text otherwise.
    other = {"domains": list(domains), "tokenizer": str(model_folder(folder))} if domains else {}
    text = TextDataModule(**{**result["config"]["data"], **other})
    text.prepare_data()
    text.setup()
    return dict(zip(text.domains, text.val_dataloader(), strict=True))
