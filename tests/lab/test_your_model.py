"""docs/your_model.md: its commands are taken by ``fit``, and its sizes are those of the models that they name."""

import json
import re
import shlex

import pytest
import torch
from datasets import Dataset
from places import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from consistency_reg.lab import train as fit
from consistency_reg.lab.corpus.sources import Text
from consistency_reg.lab.corpus.tokens import train_tokenizer
from consistency_reg.lab.model import count_parameters
from consistency_reg.lab.pretrained import trainable

PAGE = (ROOT / "docs" / "your_model.md").read_text()
PUBLISHED = {  # config.json of the models on the hub
    "allenai/OLMoE-1B-7B-0924": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
}


def commands(name):
    """The words of each command of that name on the page, without ``consistency-reg NAME``."""
    blocks = re.findall(r"```\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith(f"consistency-reg {name} ")]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders with the published configurations and a small tokenizer, by hub id."""
    root = tmp_path_factory.mktemp("hub")
    documents = Dataset.from_dict({"text": ["experts on small devices " * 50]})
    tokenizer = train_tokenizer({"words": Text(documents, documents, "words")}, 300, cache_dir=root)
    found = {}
    for name, config in PUBLISHED.items():
        folder = root / name
        folder.mkdir(parents=True)
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        found[name] = str(folder)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_fit_takes_the_command_and_builds_the_model(name, places):
    given = [words for words in commands("fit") if name in words]
    assert len(given) == 1
    fit.check_config([places.get(word, word) for word in given[0]])


@pytest.mark.parametrize(("name", "column"), [("allenai/OLMoE-1B-7B-0924", 1), ("Qwen/Qwen3-30B-A3B", 2)])
def test_the_pages_sizes_are_the_models(name, column, places):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("|")]
    said = {row[0]: row[column] for row in rows if len(row) == 3}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(places[name]))
    total, active = count_parameters(model)
    learning = sum(p.numel() for p in trainable(model, "router").parameters() if p.requires_grad)
    assert said["parameters, total / active per token"] == f"{total / 1e9:.2f}B / {active / 1e9:.2f}B"
    assert said["what learns: the routers"] == f"{learning / 1e6:.1f}M"
    bytes_each = 2 if "bfloat16" in said["weights in memory"] else 4
    assert said["weights in memory"].startswith(f"{total * bytes_each / 1e9:.1f} GB in")
    config = PUBLISHED[name]
    sizes = (config["num_hidden_layers"], config["num_experts"], config["num_experts_per_tok"])
    assert said["layers, experts, active"] == "{}, {}, {}".format(*sizes)


def test_the_tokens_are_those_of_the_commands():
    for words in commands("fit"):
        if "finetune" not in words:
            continue
        given = dict(zip(words[::2], words[1::2], strict=True))
        rows = int(given["--data.batch_size"]) * int(given["--trainer.accumulate_grad_batches"])
        step = rows * int(given["--data.sequence_length"])
        assert f"{given['--trainer.max_steps']} steps of {step:,}" in PAGE


def test_the_page_is_short():
    assert len(PAGE.split()) <= 700
