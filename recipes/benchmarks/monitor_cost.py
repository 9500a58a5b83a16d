"""What RoutingMonitor adds to an epoch of the quickstart recipe: 300 training steps, one validation of eight domains.

    python recipes/benchmarks/monitor_cost.py [--pairs 3] [--threads 2]

Validations without and with the monitor in turn, on rows of random tokens of the recipe's sizes.
"""

import argparse
import time

import torch
from lightning.pytorch import Callback, Trainer
from rows import append, quantiles
from torch.utils.data import DataLoader

from consistency_reg import LoadBalanceLoss, RoutingMonitor
from consistency_reg.lm.model import small_moe
from consistency_reg.lm.module import CausalMoE

VOCABULARY, T, ROWS, DOMAINS, STEPS = 2048, 256, 8, 8, 300
VALIDATION_ROWS = 16384 // T  # of each domain


def rows_of_tokens(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(VOCABULARY, (count, T), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row, "position_ids": torch.arange(T)} for row in ids]


def trainer(*callbacks: Callback, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **quiet, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = CausalMoE(
        small_moe(vocab_size=VOCABULARY, context_length=T, num_layers=3), LoadBalanceLoss(running=0.95), warmup_steps=0
    )

    def seconds(run: Trainer, *what: object) -> float:
        began = time.perf_counter()
        if what:
            run.fit(module, *what)
        else:
            domains = [DataLoader(rows_of_tokens(VALIDATION_ROWS, seed), ROWS) for seed in range(DOMAINS)]
            run.validate(module, domains, verbose=False)
        return time.perf_counter() - began

    seconds(trainer(RoutingMonitor()))
    steps = 30
    training = seconds(trainer(max_steps=steps), DataLoader(rows_of_tokens(steps * ROWS, 99), ROWS)) / steps * STEPS
    pairs = [(seconds(trainer()), seconds(trainer(RoutingMonitor()))) for _ in range(options.pairs)]
    size = {"steps": STEPS, "validation_tokens": DOMAINS * VALIDATION_ROWS * T, "layers": 3, "experts": 32, "top_k": 4}
    shares = [(monitored - plain) / (training + plain) for plain, monitored in pairs]
    append(
        "monitor_cost",
        [
            {"what": "training of an epoch", "unit": "s", **quantiles([training]), **size},
            {"what": "validation without the monitor", "unit": "s", **quantiles([plain for plain, _ in pairs]), **size},
            {"what": "what the monitor adds to an epoch", "unit": "share", **quantiles(shares), **size},
        ],
    )


if __name__ == "__main__":
    main()
