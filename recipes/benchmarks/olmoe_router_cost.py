"""What capture and loss cost at OLMoE-1B-7B's router shapes: 16 layers, H = 2,048, E = 64, K = 8, 4,096 tokens.

    python recipes/benchmarks/olmoe_router_cost.py [--pairs 5] [--threads 2]
    python recipes/benchmarks/olmoe_router_cost.py --whole-step --device cuda

The model is that of allenai/OLMoE-1B-7B-0924, whose experts are 1,024 wide. ``OlmoeConfig()`` says 2,048, and so wide
were they in the committed rows of the whole step (to 2026-11-27), where the term's share is of twice the experts' work;
the routers, and what the term costs, are the same.

The first takes forward and backward of the 16 routers alone as the step, without and with the term in turn. The second
takes forward and backward of the whole model in bf16 (random weights, no optimizer), which needs a GPU of 40 GiB.
Memory is the peak above what stood before the step: of a process for each case on a CPU (Linux), of the allocator on a
GPU. Time on a CPU is that of the process, which other processes disturb less than the clock on the wall.
"""

import argparse
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rows import append, quantiles
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from consistency_reg import LocalConsistencyLoss, RouterCapture

ROWS, TOKENS = 2, 2048


class Routers(nn.Module):
    """The routers of the model on one hidden state, and a loss that needs their weights."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.routers = nn.ModuleList(OlmoeTopKRouter(config) for _ in range(config.num_hidden_layers))
        for router in self.routers:
            nn.init.normal_(router.weight, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack([router(hidden)[1].square().mean() for router in self.routers]).sum()


class WholeModel(nn.Module):
    """The model's loss on its own input."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.model = OlmoeForCausalLM(config).to(torch.bfloat16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, labels=ids).loss


def stepper(options: argparse.Namespace) -> tuple[RouterCapture, Tensor]:
    torch.manual_seed(0)
    config = OlmoeConfig(intermediate_size=1024)  # as published; all else is the default
    if options.whole_step:
        with torch.device(options.device):
            return RouterCapture(WholeModel(config).train()), torch.randint(config.vocab_size, (ROWS, TOKENS))
    model = Routers(config).to(options.device)
    return RouterCapture(model), torch.randn(ROWS, TOKENS, config.hidden_size, device=options.device)


def step(capture: RouterCapture, inputs: Tensor, consistency: LocalConsistencyLoss | None) -> float:
    """Seconds of one forward and backward."""
    clock = time.perf_counter if inputs.is_cuda else time.process_time
    began = clock()
    with nullcontext() if consistency is None else capture:
        loss = capture.model(inputs)
    if consistency is not None:
        loss = loss + 0.15 * consistency(capture.trace())
        capture.clear()
    loss.backward()
    capture.model.zero_grad()
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def kibibytes(name: str) -> int:
    """A figure of this process as Linux tells it: VmRSS, its memory now, or VmHWM, the most that it had."""
    (value,) = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(value)


def peak_bytes(options: argparse.Namespace, regularized: bool) -> float:
    """Bytes at the peak of a step above what stood before it."""
    if options.device != "cpu":
        capture, inputs = options.made
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(capture, inputs, LocalConsistencyLoss() if regularized else None)
        return torch.cuda.max_memory_allocated() - before
    command = [
        sys.executable,
        __file__,
        "--peak",
        "term" if regularized else "plain",
        "--threads",
        str(options.threads),
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole-step", action="store_true")
    parser.add_argument("--peak", choices=["plain", "term"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    consistency = LocalConsistencyLoss()
    capture, inputs = options.made = stepper(options)
    if options.peak:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which imports made
        before = kibibytes("VmRSS")
        step(capture, inputs, consistency if options.peak == "term" else None)
        print((kibibytes("VmHWM") - before) * 1024)
        return

    step(capture, inputs, None)
    step(capture, inputs, consistency)
    pairs = [(step(capture, inputs, None), step(capture, inputs, consistency)) for _ in range(options.pairs)]
    memory = [(peak_bytes(options, False), peak_bytes(options, True)) for _ in range(min(options.pairs, 3))]
    second = "CPU s" if options.device == "cpu" else "s"
    what = "whole step" if options.whole_step else "routers alone"
    size = {"rows": ROWS, "tokens": TOKENS, "layers": 16, "experts": 64, "top_k": 8}
    append(
        "olmoe_router_cost",
        [
            {"what": f"{what}, forward and backward", "unit": second, **quantiles([a for a, _ in pairs]), **size},
            {
                "what": f"capture and loss on top of {what}",
                "unit": second,
                **quantiles([b - a for a, b in pairs]),
                **size,
            },
            {"what": f"{what}: time with / without", "unit": "ratio", **quantiles([b / a for a, b in pairs]), **size},
            {"what": f"{what}, peak memory", "unit": "MiB", **quantiles([a / 2**20 for a, _ in memory]), **size},
            {
                "what": f"capture and loss on top of {what}, peak memory",
                "unit": "MiB",
                **quantiles([(b - a) / 2**20 for a, b in memory]),
                **size,
            },
        ],
    )


if __name__ == "__main__":
    main()
