"""Fine-tuning a checkpoint: what learns, what is reported before and after, and that a plain checkpoint comes out."""

import json
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from places import ROOT
from run_folders import write_run
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, tiny_model, token_ids

from consistency_reg import functional
from consistency_reg.capture import RouterCapture
from consistency_reg.lab import train as fit
from consistency_reg.lab.ablate import load_grid
from consistency_reg.lab.ablate.command import check_cells
from consistency_reg.lab.model import count_parameters
from consistency_reg.lab.pretrained import PARTS, attention_matrices, pretrained_moe, save_plain, trainable
from consistency_reg.lab.recipe import pair_digest
from consistency_reg.lab.report.finetuning import fine_tuning_tables
from consistency_reg.lab.report.runs import read_folder
from consistency_reg.lab.run_progress import RunProgress

RECIPES = ROOT / "recipes"
SMALL = {  # two domains, documents shorter than rows
    "data.domains": "[math, cpp]",
    "data.corpus_bytes": 60_000,
    "data.sequence_length": 64,
    "data.batch_size": 2,
    "data.validation_tokens": 256,
    "model.warmup_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
    "wandb_project": "",
}
SMALL_MODEL = {
    "data.vocab_size": 300,
    "model.model.init_args.hidden_size": 32,
    "model.model.init_args.num_layers": 2,
    "model.model.init_args.num_heads": 2,
    "model.model.init_args.expert_size": 8,
}
RELOAD = """
import sys, torch, transformers
folder, *names = sys.argv[1:]
for name in names:
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}").eval()
    with torch.no_grad():
        torch.save(model(torch.load(f"{folder}/ids.pt")).logits, f"{folder}/{name}/logits.pt")
assert not {"peft", "consistency_reg"} & set(sys.modules)
"""


def options(values) -> list[str]:
    return [f"--{key.replace('__', '.')}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The run folder of a small model, pretrained for two steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    recipe = ["--config", str(RECIPES / "baseline.yaml"), "--run_dir", str(folder / "seed0")]
    fit.main(recipe + options(SMALL | SMALL_MODEL | {"trainer.max_steps": 2}))
    return folder / "seed0"


@pytest.fixture
def tune(checkpoint, tmp_path):
    """Fine-tunes the checkpoint as the command does; the folder of the run."""

    def run(name="tuned", model=checkpoint, **changes):
        arguments = [
            "--model",
            str(model),
            "--config",
            str(RECIPES / "finetune.yaml"),
            "--run_dir",
            str(tmp_path / name),
        ]
        assert fit.main(arguments + options(SMALL | {"trainer.max_steps": 3} | changes)) == 0
        return tmp_path / name

    return run


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def changed(before, after):
    """The parts of the model whose weights differ, by the module's own name."""
    assert before.keys() == after.keys()
    differing = [name for name in before if not torch.equal(before[name], after[name])]
    return {"router" if ".router." in name else name.split(".")[-2] for name in differing}


def result(folder):
    return json.loads((folder / "result.json").read_text())


def logged(folder, name):
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    values = [row[header.index(name)] for row in rows]
    return [float(value) for value in values if value]


def damaged(folder, tmp_path, forget):
    """A copy of a checkpoint without the weights whose name holds ``forget``."""
    other = tmp_path / "damaged"
    other.mkdir()
    for file in (folder / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    kept = {name: value for name, value in weights(folder).items() if forget not in name}
    save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_only_the_routers_learn_and_the_architecture_stays(tune, checkpoint):
    run = tune(consistency__weight=1.0, model__learning_rate=0.1)
    assert changed(weights(checkpoint), weights(run)) == {"router"}
    assert json.loads((run / "model" / "config.json").read_text()) == json.loads(
        (checkpoint / "model" / "config.json").read_text()
    )
    routers = [value.numel() for name, value in weights(run).items() if "router" in name]
    assert result(run)["trainable_parameters"] == sum(routers)


def test_before_and_after_are_on_the_text_and_with_the_tokenizer_of_the_checkpoint(tune, checkpoint):
    run = result(tune(consistency__weight=1.0, model__learning_rate=0.1))
    pretrained = result(checkpoint)
    assert run["corpus"] == pretrained["corpus"]
    assert run["vocabulary"] == pretrained["vocabulary"]
    before, after = run["before"], run["metrics"]
    assert {name: before[name] for name in pretrained["metrics"]} == pytest.approx(pretrained["metrics"], rel=1e-4)
    assert set(before) == set(after)
    assert before["val/agreement"] == 1
    assert after["val/agreement"] == pytest.approx(
        (after["val/agreement/layer_00"] + after["val/agreement/layer_01"]) / 2
    )
    assert 0 < after["val/agreement"] < 1
    for name in ("ppl", "srp/m16", "balance/cv", "balance/local_cv/m16", "cache/lru_k", "cache/lru_2k"):
        assert before[f"val/{name}"] != after[f"val/{name}"], name
    assert after["val/cache/sch_m16_2k"] >= after["val/cache/sch_m16_k"] > 0


def test_lora_is_merged_into_a_plain_checkpoint(tune, checkpoint):
    run = tune(model__model__train="lora", model__model__lora_rank=2, model__learning_rate=0.1)
    assert changed(weights(checkpoint), weights(run)) == {"router", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert not (run / "model" / "adapter_config.json").exists()
    before, after = result(checkpoint)["parameters"], result(run)["parameters"]
    assert after == before


def test_low_rank_updates_of_experts_learn_under_the_routing_that_is_deployed(tune, checkpoint):
    run = tune(model__model__train="lora_experts", model__learning_rate=0.1, routing__strength=0.1)
    moved = {"router", "q_proj", "k_proj", "v_proj", "o_proj", "input_linear", "output_linear"}
    assert changed(weights(checkpoint), weights(run)) == moved
    assert result(run)["metrics"]["val/deployed/ppl"] > 0
    assert result(run)["parameters"] == result(checkpoint)["parameters"]


def test_a_fresh_process_of_plain_transformers_gives_equal_logits(tmp_path):
    ids = token_ids(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    trained, merged = {}, {}
    for train in PARTS:
        model = trainable(tiny_model("olmoe").eval(), train, lora_rank=2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
            trained[train] = model(ids).logits
            save_plain(model, tmp_path / train)
            merged[train] = (model.get_base_model() if "lora" in train else model)(ids).logits
    done = subprocess.run([sys.executable, "-c", RELOAD, tmp_path, *PARTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for train in PARTS:
        reloaded = torch.load(tmp_path / train / "logits.pt")
        assert torch.equal(reloaded, merged[train])
        torch.testing.assert_close(reloaded, trained[train], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", PARTS)
def test_what_is_to_learn_gets_a_gradient_and_the_rest_none(kind, train):
    model = tiny_model(kind)
    routers = {id(p) for router in RouterCapture(model).routers.values() for p in router.parameters()}
    attention = attention_matrices(model)
    tuned = trainable(model, train, lora_rank=2)
    tuned(token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    learning = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    total, active = count_parameters(model)
    assert active < total
    assert routers <= {id(parameter) for parameter in learning.values()}
    others = [name for name, parameter in learning.items() if id(parameter) not in routers]
    if train == "router":
        assert not others
    elif train == "experts":
        assert any(".experts" in name or "_linear" in name for name in others)
        assert not any("attn" in name or "embed" in name or "norm" in name for name in others)
    elif train == "lora":
        assert len(others) == 2 * len(attention)
        assert all(".lora_" in name and "attn" in name for name in others)
    elif train == "lora_experts":
        assert all(".lora_" in name for name in others)
        assert any("attn" in name for name in others)
        assert any("experts" in name or "_linear" in name for name in others)
    else:
        assert len(learning) == len(list(tuned.parameters()))
    assert all(p.grad is None for p in tuned.parameters() if not p.requires_grad)
    assert all(p.grad is not None for p in tuned.parameters() if id(p) in routers)


def test_the_anchor_holds_the_routers_back(tune):
    free, held = (
        tune(name, anchor__weight=weight, consistency__weight=2.0, model__learning_rate=0.05, trainer__max_steps=8)
        for name, weight in (("free", 0.0), ("held", 100.0))
    )
    assert result(held)["metrics"]["val/agreement"] > result(free)["metrics"]["val/agreement"]
    assert logged(held, "train/anchor/loss")[0] == pytest.approx(0, abs=1e-6)  # nothing has changed yet
    assert logged(held, "train/anchor/loss")[-1] > 0
    assert logged(held, "train/anchor/weighted")[-1] == pytest.approx(
        100 * logged(held, "train/anchor/loss")[-1], rel=1e-5
    )
    assert "train/anchor" not in (free / "metrics.csv").read_text()


def test_an_interrupted_run_goes_on_with_the_anchor_that_it_began_with(tune, monkeypatch):
    changes = {"anchor__weight": 3.0, "model__learning_rate": 0.05, "trainer__max_steps": 4, "checkpoint_every": 2}
    straight = result(tune("straight", **changes))
    began = RunProgress.on_train_batch_start

    def press_control_c(self, trainer, *args):
        began(self, trainer, *args)
        if trainer.global_step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "on_train_batch_start", press_control_c)
        with pytest.raises(SystemExit):
            tune("stopped", **changes)
    resumed = result(tune("stopped", **changes))
    assert resumed["metrics"] == pytest.approx(straight["metrics"], rel=1e-5)
    assert resumed["before"] == pytest.approx(straight["before"], rel=1e-6)


def test_each_seed_can_have_a_checkpoint_of_its_own(tune, checkpoint):
    run = tune(model=str(checkpoint).replace("seed0", "seed{seed}"))
    assert result(run)["config"]["model"]["model"]["init_args"]["path"] == str(checkpoint)


@pytest.mark.parametrize(
    ("tuned", "pretrained", "baseline"),
    [
        ("finetune", "finetune_checkpoints", "baseline"),
        ("finetune_deployed", "deployed", "off"),
        ("finetune_mature", "longer_deployed", "off"),
    ],
)
def test_every_cell_of_a_grid_is_a_recipe_that_fit_takes(
    tuned, pretrained, baseline, checkpoint, tmp_path, monkeypatch
):
    grid = load_grid(RECIPES / "ablations" / f"{tuned}.yaml")
    made = load_grid(RECIPES / "ablations" / f"{pretrained}.yaml")
    assert made.seeds == grid.seeds
    monkeypatch.chdir(tmp_path)
    for cell in made.cells:
        if not cell.name.startswith(f"{baseline}-"):
            continue
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        cell.folder.symlink_to(checkpoint)
    check_cells(grid, grid.cells, lambda arguments: fit.check_config([*arguments, *options(SMALL)]))


def test_every_cell_of_the_upcycled_mixtures_grid_is_a_recipe_that_fit_takes(checkpoint, tmp_path, monkeypatch):
    grid = load_grid(RECIPES / "ablations" / "upcycle_deployed.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "upcycle").symlink_to(checkpoint)
    check_cells(grid, grid.cells, lambda arguments: fit.check_config([*arguments, *options(SMALL)]))


def test_agreement_counts_what_two_sets_share():
    generator = torch.Generator().manual_seed(0)
    ids, other = (torch.rand(3, 5, 8, generator=generator).topk(3).indices for _ in range(2))
    valid = torch.rand(3, 5, generator=generator) < 0.7
    shares = [len(set(ids[b, t].tolist()) & set(other[b, t].tolist())) / 3 for b, t in valid.nonzero().tolist()]
    assert float(functional.expert_agreement(ids, other, valid)) == pytest.approx(sum(shares) / len(shares))
    assert float(functional.expert_agreement(ids, ids.flip(-1))) == 1
    with pytest.raises(ValueError, match=r"same shape \[B, T, K\]"):
        functional.expert_agreement(ids, other[:2])


def test_the_report_shows_before_and_after_and_says_where_the_control_is_missing(tmp_path):
    before = {"val/ppl": 80.0, "val/cache/lru_2k": 0.5}
    write_run(tmp_path, "on-seed0", weight=0.3, hits=0.7, before=before, metrics={"val/agreement": 0.62})
    (table,) = fine_tuning_tables(read_folder(tmp_path)[0])
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["perplexity"], row["LRU misses at 2 x K (%)"], row["agreement (%)"]) == (
        "80.00 -> 70.00",
        "50.0 -> 30.0",
        "62.0",
    )
    assert row["control"] == "missing"
    assert "--consistency.weight 0" in table.note

    write_run(tmp_path, "off-seed0", weight=0.0, hits=0.5, before=before)
    write_run(tmp_path, "pretrained", weight=0.0)
    (table,) = fine_tuning_tables(read_folder(tmp_path)[0])
    assert {row[0]: row[1] for row in table.rows} == {"on-seed0": "shown", "off-seed0": "is the control"}
    assert fine_tuning_tables(read_folder(tmp_path / "pretrained")[0]) == []


def refusal(arguments):
    with pytest.raises((ValueError, OSError)) as caught:
        fit.check_config(["--config", str(RECIPES / "finetune.yaml"), *arguments])
    return str(caught.value)


def test_what_is_no_checkpoint_is_refused_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = options(SMALL)
    fit.check_config(["--config", str(RECIPES / "finetune.yaml"), f"--model={checkpoint}", *small])
    assert "--model PATH_OR_ID" in refusal([])
    assert "'./nothing' does not exist" in refusal(["--model", "./nothing"])
    assert "no model can be read from 'no-one/nothing'" in refusal(["--model", "no-one/nothing"])
    assert "has neither" in refusal(["--model", str(tmp_path)])
    (tmp_path / "config.yaml").touch()
    assert "not finished" in refusal(["--model", str(tmp_path)])
    assert "must be at most 64, what model" in refusal(["--model", str(checkpoint), "--data.sequence_length=300"])
    assert "lora_rank must be at least 1" in refusal(["--model", str(checkpoint), *small, "--model.model.lora_rank=0"])
    assert "weight must be" in refusal(["--model", str(checkpoint), *small, "--anchor.weight=-1"])

    plain = tmp_path / "plain"
    tiny_model("olmoe").save_pretrained(plain)
    assert "without a tokenizer" in refusal(["--model", str(plain), *small])


def test_code_of_a_model_runs_when_it_is_allowed_by_an_option_that_there_is(tmp_path):
    (tmp_path / "own").mkdir()
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text("raise KeyError('it ran')\n")
    arguments = ["--model", str(tmp_path / "own"), *options(SMALL)]
    said = refusal(arguments)
    assert "runs code of its own: read it, then allow it with --model.model.trust_remote_code true" in said
    with pytest.raises(KeyError, match="it ran"):
        fit.check_config(["--config", "finetune", *arguments, "--model.model.trust_remote_code", "true"])


def test_the_option_of_remote_code_changes_no_digest():
    def recipe(**arguments):
        return {"model": {"model": {"class_path": "a.pretrained_moe", "init_args": {"path": "x", **arguments}}}}

    assert pair_digest(recipe(trust_remote_code=False)) == pair_digest(recipe())
    assert pair_digest(recipe(trust_remote_code=True)) != pair_digest(recipe())


def test_a_dense_model_and_one_that_is_not_causal_are_refused(tmp_path):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="It looks dense"):
        pretrained_moe(str(tmp_path / "dense"))
    transformers.SwitchTransformersConfig().save_pretrained(tmp_path / "switch")
    with pytest.raises(ValueError, match="must be a causal language model"):
        pretrained_moe(str(tmp_path / "switch"))


def test_missing_weights_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"lacks weights of its routers.*: 2 with model.layers.0"):
        pretrained_moe(str(damaged(checkpoint, tmp_path, "router")))


def test_other_missing_weights_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"lacks weights, which would be random: .*q_proj"):
        pretrained_moe(str(damaged(checkpoint, tmp_path, "q_proj")))


def test_options_out_of_range_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"train must be one of .* got 'rooter'"):
        pretrained_moe(str(checkpoint), train="rooter")
    with pytest.raises(ValueError, match="no linear layer within attention in Block"):
        attention_matrices(Block())


def test_a_matrix_of_attention_whose_name_begins_as_a_routers_is_not_taken_for_it():
    class ToyAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.gate_proj = ToyTopKRouter(4, 2), torch.nn.Linear(4, 4)

    model = torch.nn.Module()
    model.attention = ToyAttention()
    assert attention_matrices(model) == ["attention.gate_proj"]


class ToyTopKRouter(torch.nn.Linear):
    pass


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = ToyTopKRouter(4, 4)
