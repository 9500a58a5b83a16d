"""A stand-in for ``consistency-reg fit`` that keeps the contract of run folders and trains nothing.

Recipe keys: ``steps`` and ``seconds`` (of each step), ``fail`` (crash at that step), ``kill`` (be killed then). It goes
on from the step that it had reached, as fit does, and notes in the run folder every start and every clash with another
process at work there.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main(argv):
    configs = [Path(argv[i + 1]) for i, argument in enumerate(argv) if argument == "--config"]
    run_dir = Path(argv[argv.index("--run_dir") + 1])
    config = {}
    for path in configs:
        config |= yaml.safe_load(path.read_text())
    with (run_dir / "starts.txt").open("a") as starts:
        starts.write(f"{os.getpid()} {os.environ.get('WANDB_RUN_GROUP')} {os.environ.get('OMP_NUM_THREADS')}\n")
    at_work, reached = run_dir / "at_work", run_dir / "reached"
    if at_work.exists() and Path("/proc", at_work.read_text()).exists():
        (run_dir / "clash").touch()
    at_work.write_text(str(os.getpid()))
    first = int(reached.read_text()) if reached.exists() else 0
    for step in range(first, config["steps"]):
        print(f"step {step}", flush=True)
        if config.get("fail") == step:
            raise MemoryError(f"no memory left at step {step}")
        if config.get("kill") == step:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(config["seconds"])
        reached.write_text(str(step + 1))
        progress = {"step": step + 1, "total_steps": config["steps"], "ce": 4.0, "phase": "train"}
        (run_dir / "progress.json").write_text(json.dumps(progress))
    (run_dir / "result.json").write_text(json.dumps({"name": run_dir.name, "config": config}))


if __name__ == "__main__":
    main(sys.argv[1:])
