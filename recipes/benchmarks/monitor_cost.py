"""What RoutingMonitor adds to the quickstart recipe: measures of every tenth training step, and four validations of
eight domains with tables and pictures for wandb (offline).

    python recipes/benchmarks/monitor_cost.py [--pairs 5] [--threads 2]

Pieces of training, and validations, without and with the monitor in turn, on random tokens of the recipe's sizes.
"""

import argparse
import tempfile
import time

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from rows import append, quantiles
from torch.utils.data import DataLoader

from consistency_reg import LoadBalanceLoss, RoutingMonitor
from consistency_reg.lab.model import small_moe
from consistency_reg.lab.module import CausalMoE

VOCABULARY, T, ROWS, DOMAINS, STEPS, VALIDATIONS = 2048, 256, 8, 8, 300, 4
VALIDATION_ROWS = 16384 // T  # of each domain
PIECE = 30  # training steps that are timed at once
CACHE_RATIOS = (1, 1.5, 2, 3, 4, 6, 8)


def rows_of_tokens(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(VOCABULARY, (count, T), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row, "position_ids": torch.arange(T)} for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = CausalMoE(
        small_moe(vocab_size=VOCABULARY, context_length=T, num_layers=3), LoadBalanceLoss(running=0.95), warmup_steps=0
    )
    folder = tempfile.TemporaryDirectory()
    logger = WandbLogger(save_dir=folder.name, offline=True)
    training = DataLoader(rows_of_tokens(PIECE * ROWS, seed=99), ROWS)
    domains = [DataLoader(rows_of_tokens(VALIDATION_ROWS, seed), ROWS) for seed in range(DOMAINS)]

    def seconds(*callbacks: Callback) -> tuple[float, float]:
        """Of the recipe's training steps, and of its validations."""
        trainer = Trainer(
            accelerator="cpu",
            max_steps=PIECE,
            log_every_n_steps=10,
            logger=logger,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began = time.perf_counter()
        trainer.fit(module, training)
        trained = time.perf_counter()
        trainer.validate(module, domains, verbose=False)
        return (trained - began) / PIECE * STEPS, (time.perf_counter() - trained) * VALIDATIONS

    seconds(RoutingMonitor(cache_ratios=CACHE_RATIOS))
    pairs = [(seconds(), seconds(RoutingMonitor(cache_ratios=CACHE_RATIOS))) for _ in range(options.pairs)]
    size = {
        "steps": STEPS,
        "validations": VALIDATIONS,
        "validation_tokens": DOMAINS * VALIDATION_ROWS * T,
        "layers": 3,
        "experts": 32,
        "top_k": 4,
    }

    def row(what: str, unit: str, values: list[float]) -> dict[str, object]:
        return {"what": what, "unit": unit, **quantiles(values), **size}

    append(
        "monitor_cost",
        [
            row("training without the monitor", "s", [plain[0] for plain, _ in pairs]),
            row("validations without the monitor", "s", [plain[1] for plain, _ in pairs]),
            row("added in training", "share", [(with_it[0] - plain[0]) / sum(plain) for plain, with_it in pairs]),
            row("added in validations", "share", [(with_it[1] - plain[1]) / sum(plain) for plain, with_it in pairs]),
            row("added to the run", "share", [sum(with_it) / sum(plain) - 1 for plain, with_it in pairs]),
        ],
    )
    logger.experiment.finish()
    folder.cleanup()


if __name__ == "__main__":
    main()
