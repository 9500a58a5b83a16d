"""The former import paths of modules that have moved.

They work for one release, with a DeprecationWarning that names the new path, so that saved recipes, configs and pickles
still resolve.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {  # former path below consistency_reg -> present path; a package takes its modules along
    "ablation": "lab.ablate",
    "callbacks.batches": "callbacks.trainer_state",
    "callbacks.pictures": "tracking.pictures",
    "callbacks.tradeoff": "tracking.tradeoff",
    "capture.joining": "capture.traces",
    "capture.rerouting": "capture.weighing",
    "cli": "lab.cli",
    "documents": "routing.documents",
    "evaluate": "lab.evaluate.command",
    "evaluation": "lab.evaluate",
    "files": "lab.files",
    "forwards": "rerouting.forwards",
    "functional.cache": "functional.cache_hits",
    "functional.policies": "cache_policies",
    "hints": "masks.hints",
    "hooks": "capture.hooks",
    "kernels.cache": "kernels.cache_hits",
    "lab.evaluate.deployed": "lab.pricing.measure",
    "lab.evaluate.usage_profile": "lab.evaluate.records",
    "lm": "lab",
    "lm.cache": "lab.corpus.disk_cache",
    "lm.cleaning": "lab.corpus.cleaning",
    "lm.corpus": "lab.corpus.text",
    "lm.data": "lab.corpus.data",
    "lm.fit": "lab.train",
    "lm.math_problems": "lab.corpus.math_problems",
    "lm.packing": "lab.corpus.packing",
    "lm.run": "lab.run_progress",
    "lm.sources": "lab.corpus.sources",
    "lm.tokens": "lab.corpus.tokens",
    "lm.tracking": "lab.run_loggers",
    "losses.distributed": "distributed",
    "metrics.cache": "metrics.cache_hits",
    "metrics.hit_rates": "metrics.simulated_caches",
    "provenance": "lab.provenance",
    "reading": "measures.reading",
    "report.markdown": "lab.render.markdown",
    "report.page": "lab.render.page",
    "report.plots": "lab.report.looks",
    "report.recipe": "lab.recipe",
    "report": "lab.report",
    "running_caches": "rerouting.running_caches",
    "tracking.measures": "tracking.accumulate",
    "tracking.usage_profile": "tracking.experts",
    "tracking.workspace": "lab.workspace",
    "usage": "lab.usage",
    "wandb_login": "lab.wandb_login",
}
SPLIT = {  # former path of a module that is several now, or part of another -> what has all of its names
    "in_the_loop": "rerouting",
    "losses.consistency": "losses",
    "losses.published": "losses",
    "metrics.plots": "metrics.base",
}
ROOT = "consistency_reg."


def present_path(path: str) -> str | None:
    """Return where a module that had ``path`` is now; None if it has not moved.

    Example:
        >>> present_path("consistency_reg.lm.model"), present_path("consistency_reg.lm.fit"), present_path("torch.nn")
        ('consistency_reg.lab.model', 'consistency_reg.lab.train', None)
    """
    former = path.removeprefix(ROOT)
    if former == path:
        return None
    if former in SPLIT:
        return ROOT + SPLIT[former]
    package, rest = former, ""
    while package:
        if package in MOVED:
            return ROOT + MOVED[package] + (f".{rest}" if rest else "")
        package, _, last = package.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
    return None


def former_path(path: str) -> str:
    """Return the first path that a class or module had, which digests of recipes are made of.

    Example:
        >>> former_path("consistency_reg.lab.model.small_moe")
        'consistency_reg.lm.model.small_moe'
        >>> former_path("consistency_reg.LocalConsistencyLoss")
        'consistency_reg.LocalConsistencyLoss'
    """
    longest_first = sorted(MOVED.items(), key=lambda item: (-len(item[1]), item[0]))
    for former, present in longest_first:
        if path == ROOT + present or path.startswith(f"{ROOT}{present}."):
            return ROOT + former + path.removeprefix(ROOT + present)
    return path


class MovedModules(MetaPathFinder, Loader):
    """Imports a former path as a module that hands out the attributes of the present one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a former path, and None for every other name."""
        return None if present_path(fullname) is None else ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and let the module hand out what its successor has."""
        present = present_path(module.__name__)
        assert present is not None
        warnings.warn(
            f"{module.__name__} has moved to {present}; the former path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        successor = import_module(present)

        def attribute(name: str) -> Any:
            return getattr(successor, name)

        module.__getattr__ = attribute  # type: ignore[method-assign]


def install() -> None:
    """Let former paths be imported."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
