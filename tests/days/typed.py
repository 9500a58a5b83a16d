"""Type commands as a person would in a terminal, and say what was typed; next to the scripts of the days."""

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

# What makes a run of `consistency-reg fit` last seconds.
SMALL = (
    "--data.domains [math,cpp] --data.corpus_bytes 60000 --data.vocab_size 300 --data.sequence_length 64 "
    "--data.batch_size 2 --data.validation_tokens 256 --model.model.init_args.hidden_size 32 "
    "--model.model.init_args.num_layers 2 --model.model.init_args.num_heads 2 --model.model.init_args.expert_size 8 "
    "--trainer.max_steps 4 --trainer.val_check_interval 2 --consistency.start_step 1 --consistency.warmup_steps 1 "
    "--model.warmup_steps 1 --trainer.accelerator cpu"
)


def shell(line):
    """Run a command line of `consistency-reg`, print what it prints, and return that."""
    print(f"$ {line}", flush=True)
    program, *arguments = shlex.split(line)
    there = Path(sysconfig.get_path("scripts"), program)
    done = subprocess.run([str(there), *arguments], stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def write_text(path, documents=40):
    """Write text of one's own as JSON lines: the sources of Python's standard library, a document a module."""
    import json

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:documents]
    lines = [json.dumps({"text": source.read_text(encoding="utf-8")[:2000]}) for source in sources]
    Path(path).write_text("\n".join(lines) + "\n")
