"""What a process that runs an offloaded model really reads and really holds."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from offloading import in_memory
from places import ROOT

SIZES = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 2, "num_local_experts": 64}
EXPERT_BYTES = 3 * 128 * 1024 * 4
EXPERTS_BYTES = 2 * 64 * EXPERT_BYTES  # 201 MB

READ = """
import json, sys, torch
from consistency_reg import OffloadedExperts

def read_bytes():
    return int(next(line.split()[1] for line in open("/proc/self/io") if line.startswith("read_bytes")))

ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))
offloaded = OffloadedExperts(sys.argv[1], slots=4)
with offloaded as model, torch.no_grad():
    output = model(ids[:, :4], use_cache=True)
    offloaded.forget()
    before = read_bytes()
    for t in range(4, 20):
        output = model(ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
    read = read_bytes() - before
    found = offloaded.statistics()
print(json.dumps({"read": read, "misses": found.misses, "bytes_read": found.bytes_read, "way": found.way}))
"""

GENERATE = """
import resource, sys, threading, torch
import transformers
from transformers import AutoModelForCausalLM, GraniteMoeSharedForCausalLM
from consistency_reg import OffloadedExperts

transformers.utils.logging.disable_progress_bar()
threading.stack_size(2**18)  # stacks count, though nothing is in them
place, limit, offload = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "offloaded"
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + limit, held + limit))
ids = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(0))
if offload:
    with OffloadedExperts(place, slots=2, read_ahead=1, threads=1) as model:
        text = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
else:
    model = AutoModelForCausalLM.from_pretrained(place)
    text = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
print(text.tolist())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.GraniteMoeSharedConfig(
        vocab_size=64, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, **SIZES
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    path = tmp_path_factory.mktemp("large")
    transformers.GraniteMoeSharedForCausalLM(config).save_pretrained(path)
    return path


def run(code, *arguments):
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # what malloc only reserves for threads counts as well
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False, env=environment)


def test_the_process_reads_the_missed_experts_and_nothing_else(folder):
    done = run(READ, folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if found["way"] != "direct":
        pytest.skip("the file system of the temporary folder has no O_DIRECT")
    assert found["misses"] > 20
    assert found["bytes_read"] == found["misses"] * EXPERT_BYTES
    assert found["read"] == pytest.approx(found["bytes_read"], rel=0.02)


def test_experts_of_four_times_the_memory_limit_generate_and_not_without_offloading(folder):
    limit = EXPERTS_BYTES // 4
    within = run(GENERATE, folder, limit, "offloaded")
    assert within.returncode == 0, within.stderr[-2000:]
    without = run(GENERATE, folder, limit, "whole")
    assert without.returncode != 0
    assert "memory" in without.stderr.lower()
    expected = in_memory(folder).generate(ids(), max_new_tokens=8, do_sample=False, use_cache=True)
    assert json.loads(within.stdout.splitlines()[-1]) == expected.tolist()


def ids():
    """The prompt of the processes."""
    return torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(0))
