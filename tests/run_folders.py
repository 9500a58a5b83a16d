"""Run folders as ``consistency-reg fit`` leaves them, with numbers of our choice and nothing trained."""

import json
from pathlib import Path

DOMAINS = ("cpp", "python", "symbolic", "docs", "math", "speeches", "encyclopedia", "scripture")


def result(name, /, *, seed=0, shared=0, weight=0.0, loss="LocalConsistencyLoss", perplexity=70.0, hits=0.4, **changes):
    """What result.json holds. ``changes``: ``metrics`` to add, ``data`` settings, or keys of the result."""
    srp = 0.3 + hits / 2
    metrics = {
        "val/ppl": perplexity,
        "val/ce": 4.2,
        **{f"val/ppl/{domain}": perplexity + 5 * index for index, domain in enumerate(DOMAINS)},
        **{f"val/srp/m{m}": srp - m / 1000 for m in (4, 16, 64)},
        **{f"val/rho_hat/m{m}": 1 + m / 100 for m in (4, 16, 64)},
        "val/srp/m16/layer_00": srp,
        "val/srp/m16/cpp": srp,
        "val/static_srp": 0.25,
        "val/local_gain/m16": srp - 0.016 - 0.25,
        "val/cache/lru_k": hits - 0.1,
        "val/cache/lru_2k": hits,
        "val/cache/lru_25pct": hits,
        "val/overlap": hits - 0.12,
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
                "class_path": "consistency_reg.lm.model.small_moe",
                "init_args": {"num_experts": 32, "top_k": 4, "shared_experts": shared, "seed": seed},
            },
            "balance_weight": 0.05,
        },
        "data": {"sequence_length": 512, "validation_tokens": 1000, "num_workers": 0, **changes.pop("data", {})},
        "trainer": {"max_steps": 400},
        "consistency": {"loss": {"class_path": f"consistency_reg.losses.{loss}"}, "weight": weight},
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


def write_run(parent, name, /, **options):
    """A finished run's folder."""
    folder = Path(parent, name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "result.json").write_text(json.dumps(result(name, **options)))
    return folder


def write_demo(parent, seeds=(0,)):
    """The four runs of the demo, for each seed."""
    for seed in seeds:
        for shared, label in enumerate(("none", "shared")):
            perplexity = 71.3 + 2 * shared + seed
            write_run(parent, f"{label}-off-seed{seed}", seed=seed, shared=shared, perplexity=perplexity, hits=0.48)
            options = {"seed": seed, "shared": shared, "weight": 0.3, "perplexity": perplexity * 1.006}
            write_run(parent, f"{label}-on-seed{seed}", hits=0.68 - shared / 50, **options)
    return Path(parent)
