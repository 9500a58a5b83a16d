"""The smallest run of ``consistency-reg fit`` that has everything: two domains, documents shorter than rows."""

from places import ROOT

SMALL = {
    "data.domains": "[math, cpp]",
    "data.corpus_bytes": 60_000,
    "data.vocab_size": 300,
    "data.sequence_length": 64,
    "data.batch_size": 2,
    "data.validation_tokens": 256,
    "data.num_workers": 0,
    "model.model.init_args.hidden_size": 32,
    "model.model.init_args.num_layers": 2,
    "model.model.init_args.num_heads": 2,
    "model.model.init_args.expert_size": 8,
    "model.warmup_steps": 1,
    "consistency.start_step": 0,
    "trainer.max_steps": 2,
    "trainer.accelerator": "cpu",
    "trainer.precision": 32,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
    "wandb_project": "",
}


def small_run(run_dir, recipe="quickstart", changes=None):
    """Return the arguments of ``fit`` for a recipe made small, with other keys changed; None is the recipe's own."""
    keys = SMALL | {"run_dir": run_dir} | (changes or {})
    given = [f"--{key}={value}" for key, value in keys.items() if value is not None]
    return ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *given]
