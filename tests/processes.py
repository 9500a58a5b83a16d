"""Real data-parallel processes on one machine, for what a loss computes over all of them."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PORT_FILE, RESULT = "rendezvous", "result_{}.pt"


def on_processes(count, function, folder, *args):
    """``function(rank, *args)`` in ``count`` processes of a gloo group; -> what each of them returned."""
    mp.spawn(_work, args=(count, function, str(folder), args), nprocs=count)
    return [torch.load(folder / RESULT.format(rank), weights_only=False) for rank in range(count)]


def _work(rank, count, function, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{PORT_FILE}", rank=rank, world_size=count)
    try:
        torch.save(function(rank, *args), f"{folder}/{RESULT.format(rank)}")
    finally:
        dist.destroy_process_group()
