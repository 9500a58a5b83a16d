"""The command ``consistency-reg price``."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from consistency_reg.lab.arguments.price import STRENGTHS, parser
from consistency_reg.lab.pricing.rows import Row, read, with_changes
from consistency_reg.lab.pricing.runs import price_missing
from consistency_reg.lab.pricing.show import bought, price_table
from consistency_reg.lab.pricing.strengths import check_strengths
from consistency_reg.lab.render.outputs import check_writable
from consistency_reg.lab.render.table import percent
from consistency_reg.lab.render.terminal import print_tables
from consistency_reg.lab.run_folder import RunFolder, runs_within


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``consistency-reg price``: measure what is missing, keep it next to each run, and print a table."""
    options = _options(argv)
    command = shlex.join(["consistency-reg", "price", *(argv or ())])
    folders = finished_runs(options.runs)
    for folder in folders:
        check_writable("the folder of the run", folder)
    for folder in folders:
        new = 0
        for row in price_missing(
            folder,
            command,
            device=options.device,
            domains=options.domains,
            strengths=options.cache_aware,
            cache_ratios=options.cache_ratios,
            method=options.method,
            guaranteed=options.guaranteed,
        ):
            new += 1
            print(_said(row), flush=True)
        print(f"{RunFolder(folder).prices}: {new or 'no'} row{'' if new == 1 else 's'} added", flush=True)
    rows = list(chain.from_iterable(with_changes(read(RunFolder(folder).prices)) for folder in folders))
    print_tables([price_table(rows)])
    for sentence in bought(rows):
        print(sentence)
    print(f"Next: consistency-reg report {shlex.join(map(str, options.runs))}")
    return 0


def finished_runs(places: Sequence[Path]) -> list[Path]:
    """Return the folders of the finished runs in these places, and say on standard error which runs are not finished.

    Raises:
        ValueError: a place without a finished run.
    """
    found: list[Path] = []
    for place in places:
        finished, unfinished = runs_within(place)
        if not finished:
            raise ValueError(f"{place} must hold a finished run, with a result.json")
        if unfinished:
            names = ", ".join(one.name for one in unfinished)
            print(f"{place}: left out, not finished: {names}", file=sys.stderr)
        found += finished
    return list(dict.fromkeys(found))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, without those that could only be refused after a model has been read."""
    options = parser().parse_args(argv)
    if options.cache_aware is None:
        if options.method != "prior":
            raise ValueError(f"--method {options.method} needs --cache-aware: ranks of max_rank, shares of cumulative")
        options.cache_aware = [STRENGTHS]
    for name in ("cache_aware", "cache_ratios", "domains"):  # with spaces or commas between them
        setattr(options, name, list(dict.fromkeys(chain.from_iterable(getattr(options, name)))))
    check_strengths(options.cache_aware, options.method)
    if not options.cache_ratios or not all(1 <= ratio < math.inf for ratio in options.cache_ratios):
        raise ValueError(f"--cache-ratios must be numbers of at least 1, got {options.cache_ratios}")
    if options.guaranteed < 0:
        raise ValueError(f"--guaranteed must be 0 or more, got {options.guaranteed}")
    if 0 not in options.cache_aware:
        options.cache_aware = [0.0, *options.cache_aware]  # what all others are compared with
    return options


def _said(row: Row) -> str:
    settings = f"{row['run']}, {row['slots']} slots, strength {row['strength']:g}"
    return f"{settings}: perplexity {row['perplexity']:.2f}, misses {percent(row['misses'])}%"
