"""Real data-parallel processes on one machine, for what a loss computes over all of them."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PORT_FILE, RESULT = "rendezvous", "result_{}.pt"


def on_processes(count, function, folder, *args):
    """Run ``function(rank, *args)`` in ``count`` processes of a gloo group; return what each of them returned.

    Trainers find the environment that torchrun gives, and the group that there is: no port is taken.
    """
    mp.spawn(_work, args=(count, function, str(folder), args), nprocs=count)
    return [torch.load(folder / RESULT.format(rank), weights_only=False) for rank in range(count)]


def _work(rank, count, function, folder, args):
    torch.set_num_threads(1)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/{PORT_FILE}", rank=rank, world_size=count)
    torch.save(function(rank, *args), f"{folder}/{RESULT.format(rank)}")
    dist.barrier()  # else who is done first closes connections on which another still waits
    dist.destroy_process_group()
    os._exit(0)  # a DDP module or a mesh keeps gloo's threads, which may abort an interpreter that finalizes
