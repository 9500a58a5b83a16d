"""The first ten minutes: README alone, the wheel in a new virtual environment, a module that knows nothing of us."""

import re
import subprocess

import pytest
from places import ROOT
from wandb_file import read_run
from wheels import built_wheel, new_python, user_environment

OWN_MODULE = """
import sys
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader
from transformers import OlmoeConfig, OlmoeForCausalLM

class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = OlmoeForCausalLM(OlmoeConfig(
            vocab_size=256, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=0, output_router_logits=True))

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

text = torch.tensor(list(open(sys.executable, "rb").read(64 * 64))).view(64, 64)
rows = [{"input_ids": row, "labels": row} for row in text]
module, train, validation = Mine(), DataLoader(rows[:48], batch_size=8), DataLoader(rows[48:], batch_size=8)
logger = WandbLogger(project="moe", mode="offline")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Give the interpreter of a new virtual environment with the wheel and README's extras."""
    folder = tmp_path_factory.mktemp("new")
    (extras,) = set(re.findall(r"pip install 'consistency-reg(\[all\])'", (ROOT / "README.md").read_text()))
    return new_python(folder, "-c", ROOT / "constraints.txt", f"{built_wheel(folder)}{extras}")


@pytest.mark.slow
def test_three_lines_of_readme_in_a_module_of_ones_own_fill_the_panels_of_a_wandb_run(python, tmp_path):
    readme = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    added = re.sub(r"# trainer.fit\(.*", "", readme).replace(
        "Trainer(callbacks", "Trainer(logger=logger, log_every_n_steps=2, max_epochs=3, callbacks"
    )
    assert added.count("Trainer(logger") == 1
    (tmp_path / "train.py").write_text(OWN_MODULE + added + "\ntrainer.fit(module, train, validation)\n")
    command = [str(python), "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=user_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path)
    names = {name for row in run.history for name in row}
    assert {"val/srp/m16", "val/static_srp", "val/cache/lru_2k", "val/balance/cv", "val/balance/max_mean"} <= names
    assert {"val/routing/0", "val/cache/curve", "val/experts", "tradeoff/val_loss", "tradeoff/srp_m16"} <= names
    assert {"train/consistency/loss", "train/consistency/weight", "train/consistency/weighted"} <= names
    assert sum("val/srp/m16" in row for row in run.history) == 3  # each validation
    assert run.summary["best/val_loss"] == min(row["val_loss"] for row in run.history if "val_loss" in row)
    assert run.axes["*"] == "trainer/global_step"
