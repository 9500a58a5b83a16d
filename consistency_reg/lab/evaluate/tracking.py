"""What was measured in wandb: a run for each model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from consistency_reg.lab.evaluate.measure import Evaluation
from consistency_reg.lab.provenance import git_commit, package_versions
from consistency_reg.lab.wandb_login import open_run
from consistency_reg.optional import require
from consistency_reg.reading import size_name


def log_to_wandb(project: str, evaluations: Sequence[Evaluation], pictures: Mapping[str, Path], folder: Path) -> None:
    """Log the numbers and pictures of each model; offline, into ``folder``, where there is no login."""
    with require("wandb"):
        import wandb
    origin = {"versions": package_versions(), "git_commit": git_commit()}
    for one in evaluations:
        config = {"model": one.recording.model, **origin, **one.recording.about}  # a trace has an origin of its own
        name = one.recording.model
        run = open_run(project, folder, name=name, job_type="evaluate", config=config)
        try:
            shown = {f"val/{name}": value for name, value in scalars(one).items()}
            run.log(shown | {f"evaluation/{name}": wandb.Image(str(path)) for name, path in pictures.items()})
        finally:
            run.finish()


def scalars(one: Evaluation) -> dict[str, float]:
    """The numbers of one model under the names that a training run gives them in validation, without their "val/"."""
    values = {"static_srp": float(next(iter(one.srp.values())).static_srp), "balance/min_share": one.min_share}
    for m, result in one.srp.items():
        values[f"srp/m{m}"] = float(result.srp)
        values[f"rho_hat/m{m}"] = float(result.size_ratio)
        values[f"local_gain/m{m}"] = float(result.local_gain)
    for cache, rates in ({f"sch_m{m}": rates for m, rates in one.sch.items()} | one.policies).items():
        for ratio in one.cache_ratios:
            name = f"cache/{cache}_{size_name(ratio)}"
            values[name] = float(rates.at(ratio))
            if rates.shared is not None:
                values[f"{name}_shared"] = float(rates.shared.at(ratio))
    values["balance/cv"] = fmean(float(layer.cv) for layer in one.balance.layers)
    if (perplexity := one.recording.perplexity()) is not None:
        values["ppl"] = perplexity
    for kind, found in one.kinds.items():
        values[f"specialization/{kind}"] = float(found.mean)
        values[f"specialization/{kind}_srp_spearman"] = float(found.spearman)
    return values
