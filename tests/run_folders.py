"""Run folders as ``consistency-reg fit`` leaves them, with numbers of our choice and nothing trained."""

import json
from pathlib import Path

from consistency_reg.lab.pricing import rows as rows_module

DOMAINS = ("cpp", "python", "symbolic", "docs", "math", "speeches", "encyclopedia", "scripture")


def result(name, /, *, seed=0, shared=0, weight=0.0, loss="LocalConsistencyLoss", perplexity=70.0, hits=0.4, **changes):
    """Return what result.json holds; ``changes``: ``metrics``, ``data`` and ``trainer`` settings, or keys of it."""
    srp = 0.3 + hits / 2
    metrics = {
        "val/ppl": perplexity,
        "val/ce": 4.2,
        **{f"val/ppl/{domain}": perplexity + 5 * index for index, domain in enumerate(DOMAINS)},
        **{f"val/srp/m{m}": srp - m / 1000 for m in (4, 16, 64)},
        **{f"val/rho_hat/m{m}": 1 + m / 100 for m in (4, 16, 64)},
        **{f"val/srp/m16/layer_{layer:02d}": srp + (layer - 1) / 50 for layer in range(3)},
        "val/srp/m16/cpp": srp,
        "val/static_srp": 0.25,
        "val/local_gain/m16": srp - 0.016 - 0.25,
        "val/cache/lru_k": hits - 0.1,
        "val/cache/lru_2k": hits,
        "val/cache/lru_25pct": hits,
        "val/overlap": hits - 0.12,
        "val/balance/sd": 3.75,
        "val/balance/cv": 0.3,
        "val/balance/max_mean": 1.8,
        "val/balance/min_share": 0.4,
        "val/balance/local_cv/m16": 0.9,
        **changes.pop("metrics", {}),
    }
    config = {
        "seed_everything": seed,
        "run_dir": f"runs/{name}",
        "model": {
            "model": {
                "class_path": "consistency_reg.lab.model.small_moe",
                "init_args": {"num_experts": 32, "top_k": 4, "shared_experts": shared, "seed": seed},
            },
            "balance_weight": changes.pop("balance_weight", 0.05),
        },
        "data": {"sequence_length": 512, "validation_tokens": 1000, "num_workers": 0, **changes.pop("data", {})},
        "trainer": {"max_steps": 400, **changes.pop("trainer", {})},
        "consistency": {
            "loss": {"class_path": f"consistency_reg.losses.{loss}", "init_args": changes.pop("options", {})},
            "weight": weight,
        },
        "routing": changes.pop("routing", {}),
    }
    return {
        "name": name,
        "config": config,
        "seed": seed,
        "command": f"consistency-reg fit --config recipes/quickstart.yaml --run_dir runs/{name}",
        "git_commit": "0123456789ab",
        "versions": {"torch": "2.13.0"},
        "corpus": {domain: f"{domain:0<64}" for domain in DOMAINS},
        "parameters": {"total": 3_500_000 + shared, "active": 1_200_000},
        "wall_time_s": 150.5,
        "tokens_per_s": 8000.0,
        "tokens": 1_228_800,
        "steps": 400,
        "wandb_dir": f"runs/{name}/wandb/offline-run-1",
        "metrics": metrics,
        **changes,
    }


def write_run(parent, name, /, *, labels=None, course=(), **options):
    """Write a finished run; ``labels``: of its cell; ``course``: (step, perplexity, LRU hit rate) of validations."""
    folder = Path(parent, name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "result.json").write_text(json.dumps(result(name, **options)))
    if labels is not None:
        (folder / "cell.json").write_text(json.dumps({"labels": labels}))
    if course:
        rows = [f"{step},{4.5},," for step in range(9, 400, 10)]  # training's rows lie between
        rows += [f"{step},,{perplexity},{hits}" for step, perplexity, hits in course]
        (folder / "metrics.csv").write_text("\n".join(["step,train/ce,val/ppl,val/cache/lru_25pct", *rows]) + "\n")
    return folder


def write_demo(parent, seeds=(0,)):
    """Write the four runs of the demo, for each seed."""
    for seed in seeds:
        for shared, label in enumerate(("none", "shared")):
            perplexity = 71.3 + 2 * shared + seed
            write_run(parent, f"{label}-off-seed{seed}", seed=seed, shared=shared, perplexity=perplexity, hits=0.48)
            options = {"seed": seed, "shared": shared, "weight": 0.3, "perplexity": perplexity * 1.006}
            write_run(parent, f"{label}-on-seed{seed}", hits=0.68 - shared / 50, **options)
    return Path(parent)


# Weight -> changes of perplexity and of LRU misses, of three losses of which the first dominates.
LOSSES = {
    "srp": (
        "LocalConsistencyLoss",
        {0.1: (-0.002, -0.30), 0.2: (0.003, -0.52), 0.4: (0.02, -0.70), 0.8: (0.06, -0.85)},
    ),
    "remoe": ("ReMoELoss", {0.02: (0.004, -0.25), 0.04: (0.011, -0.45), 0.08: (0.03, -0.60), 0.16: (0.055, -0.72)}),
    "sticky": ("StickyLoss", {0.5: (0.006, -0.10), 1.0: (0.015, -0.22), 2.0: (0.04, -0.35), 4.0: (0.09, -0.50)}),
}


def write_losses(parent, seeds=(0, 1, 2)):
    """Write a grid of three losses at four weights, with its baselines; remoe's largest weight collapses."""
    for seed in seeds:
        base, misses = 70.0 + 2 * seed, 0.5 + seed / 100
        _write_cell(parent, "off", seed, base, misses)
        for name, (loss, weights) in LOSSES.items():
            for weight, (cost, saved) in weights.items():
                perplexity, fewer = base * (1 + cost + 0.001 * (seed - 1)), misses * (1 + saved - 0.02 * (seed - 1))
                collapses = (name, weight) == ("remoe", 0.16)
                metrics = {
                    "val/balance/min_share": 0.02 if collapses else 0.3,
                    "val/balance/cv": 0.9 if collapses else 0.3 + seed / 100,
                    "val/balance/local_cv/m16": 1.2 - saved,
                }
                options = {"loss": loss, "weight": weight, "metrics": metrics}
                _write_cell(parent, f"{name}-{weight}", seed, perplexity, fewer, **options)
    return Path(parent)


def _write_cell(parent, cell, seed, perplexity, misses, *, metrics=None, **options):
    """Write a cell with three validations, and the hit rates of six cache sizes."""
    hits = 1 - misses
    sizes = {f"val/cache/lru_{ratio:g}k": 1 - misses ** (ratio / 2) for ratio in (3, 4, 6, 8)}
    course = [(99, 1.4 * perplexity, hits - 0.2), (199, 1.2 * perplexity, hits - 0.1), (399, perplexity, hits)]
    course += [(400, perplexity, hits)]
    options |= {"metrics": sizes | (metrics or {}), "course": course, "labels": {"cell": cell}}
    write_run(parent, f"{cell}-seed{seed}", seed=seed, perplexity=perplexity, hits=hits, **options)


def write_designs(parent, srp, seeds=(0, 1), terms=("off", "on")):
    """Write runs of an ablation over designs, each without and with the term; ``srp``: design -> SRP at m = 16."""
    for seed in seeds:
        for place, (design, value) in enumerate(srp.items()):
            for term in terms:
                weight = 0.15 if term == "on" else 0.0
                measured = value + 0.005 * seed + 0.5 * weight
                options = {"seed": seed, "weight": weight, "labels": {"design": design, "term": term}}
                options |= {"metrics": {"val/srp/m16": measured, "val/balance/sd": 10 * value}}
                options |= {"balance_weight": 0.05 + place / 100}
                write_run(parent, f"{design}-{term}-seed{seed}", perplexity=70.0 + seed - 9 * value, **options)
    return Path(parent)


# Cell -> loss, weight, strength in training; changes of perplexity and of LRU misses against "off", by strength.
STRENGTHS = (0.0, 0.1, 0.2)
DEPLOYED = {
    "off": ("LocalConsistencyLoss", 0.0, 0.0, ((0.0, 0.0), (0.004, -0.4), (0.02, -0.7))),
    "srp-0.35": ("LocalConsistencyLoss", 0.35, 0.0, ((0.001, -0.5), (0.003, -0.76), (0.012, -0.88))),
    "loop-0.1-srp-0.35": ("LocalConsistencyLoss", 0.35, 0.1, ((0.001, -0.6), (0.002, -0.8), (0.0045, -0.9))),
    "loop-0.1": ("LocalConsistencyLoss", 0.0, 0.1, ((0.001, -0.1), (0.001, -0.5), (0.02, -0.7))),
    "remoe-0.01": ("ReMoELoss", 0.01, 0.0, ((0.002, -0.1), (0.01, -0.45), (0.03, -0.72))),
}


def write_deployed(parent, seeds=(0, 1), priced=tuple(DEPLOYED)):
    """Write a grid with cache-aware routing; cells that are not ``priced`` have what their validation measured alone.

    The largest strength of "loop-0.1" lets an expert die.
    """
    for seed in seeds:
        base, misses = 70.0 + 2 * seed, 0.5 + seed / 100
        for cell, (loss, weight, strength, points) in DEPLOYED.items():
            rows = []
            for at, (cost, saved) in zip(STRENGTHS, points, strict=True):
                share = 0.05 if (cell, at) == ("loop-0.1", 0.2) else 0.3 - at / 2
                shift = 0.0 if cell == "off" and not at else 0.0005 * (2 * seed - 1)
                rows.append(
                    price_row(f"{cell}-seed{seed}", seed, at, base * (1 + cost + shift), misses * (1 + saved), share)
                )
            as_it_is, deployed = rows[0], rows[1]
            metrics = {
                "val/deployed/ppl": deployed["perplexity"],
                "val/deployed/cache/lru_2k": 1 - deployed["misses"],
                "val/deployed/cache/lru_25pct": 1 - deployed["misses"],
                "val/deployed/balance/min_share": deployed["balance/min_share"],
                "val/deployed/balance/cv": deployed["balance/cv"],
                "val/deployed/agreement": deployed["agreement"],
                "val/deployed/strength": 0.10000000149011612,  # as float32
                "val/deployed/cache_ratio": 2.0,
            }
            options = {"loss": loss, "weight": weight, "metrics": metrics, "labels": {"cell": cell}}
            if strength:
                options["routing"] = {"strength": strength, "cache_ratio": 2.0, "guaranteed": 1, "method": "prior"}
            perplexity, hits = as_it_is["perplexity"], 1 - as_it_is["misses"]
            folder = write_run(parent, f"{cell}-seed{seed}", seed=seed, perplexity=perplexity, hits=hits, **options)
            if cell in priced:
                rows_module.write(folder / "prices.csv", rows)
    return Path(parent)


def price_row(run, seed, strength, perplexity, misses, share=0.3):
    """Return a row of ``consistency-reg price``."""
    return {
        "run": run,
        "seed": seed,
        "method": "prior",
        "strength": strength,
        "cache_ratio": 2.0,
        "guaranteed": 1,
        "slots": 8,
        "perplexity": perplexity,
        "misses": misses,
        "misses_lfu": misses + 0.05,
        "bytes_per_token": 1e6 * misses,
        "agreement": 1 - strength,
        "balance/cv": 0.3 + strength / 10,
        "balance/min_share": share,
        "command": f"consistency-reg price runs/{run}",
    }
