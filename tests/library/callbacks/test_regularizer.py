"""ConsistencyRegularizer in real Lightning runs: what it adds, when, and that it adds it once."""

import copy
import csv
import functools
import json
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from parameters import parameters
from processes import on_processes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_lightning import Sharded, ToyMoE, fit, regularizer, tokens, toy

from consistency_reg import ConsistencyRegularizer, LocalConsistencyLoss, RouterCapture
from consistency_reg.callbacks import RouterAnchor, batch_masks


@pytest.mark.parametrize("output", ["tensor", "dict"])
def test_one_step_is_the_step_of_loss_plus_weighted_term(output):
    ids = tokens(4)
    expected = toy()
    with RouterCapture(expected) as capture:
        cross_entropy = nn.functional.cross_entropy(expected(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    (cross_entropy + 2.0 * LocalConsistencyLoss(segment_lengths=(3, 5))(capture.trace())).backward()
    torch.optim.SGD(expected.parameters(), lr=0.5).step()

    module = toy(output=output)
    fit(module, ids, 4, [regularizer()])
    torch.testing.assert_close(parameters(module), parameters(expected), rtol=0, atol=0)


def test_weight_zero_is_training_without_it():
    plain, with_callback = toy(), toy()
    fit(plain, tokens(12), 4)
    fit(with_callback, tokens(12), 4, [regularizer(weight=0.0)])
    assert torch.equal(parameters(plain), parameters(with_callback))


def test_the_module_is_given_back_after_training():
    module = toy()
    fit(module, tokens(4), 4, [regularizer()])
    assert "training_step" not in module.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    copy.deepcopy(module)


def test_a_training_step_of_the_instance_comes_back_whatever_lay_over_it():
    module = toy()
    own = module.training_step = functools.partial(ToyMoE.training_step, module)
    fit(module, tokens(4), 4, [regularizer(), RouterAnchor(0.1)])
    assert module.training_step is own


def test_a_copy_or_pickle_of_the_module_in_training_is_free_of_the_term(tmp_path):
    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.copied, self.pickled = copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))

    plain, copies = toy(), Copies()
    fit(plain, tokens(4), 4)
    fit(toy(), tokens(4), 4, [regularizer(weight=0.0), copies])
    for one in (copies.copied, copies.pickled):
        assert torch.equal(parameters(one), parameters(plain))
        assert one.training_step.__self__ is one
    again = copies.copied
    fit(again, tokens(4), 4)
    fit(plain, tokens(4), 4)
    assert torch.equal(parameters(again), parameters(plain))


def test_a_failing_step_gives_the_module_back():
    module = toy(output="wrong")
    with pytest.raises(RuntimeError, match=r"'loss'.*got keys \['cost'\]"):
        fit(module, tokens(4), 4, [regularizer()])
    assert "training_step" not in module.__dict__


def test_a_step_that_is_skipped_stays_skipped():
    module = toy(output="none")
    before = parameters(module)
    fit(module, tokens(4), 4, [regularizer()])
    assert torch.equal(before, parameters(module))


def test_accumulation_of_equal_micro_batches_is_one_batch():
    """SRP is a statistic of a batch: micro-batches that hold the same rows must give exactly its gradient once."""
    two = tokens(2)
    whole, accumulated = toy(), toy()
    fit(whole, two.repeat(12, 1), 8, [regularizer()])
    fit(accumulated, two.repeat(12, 1), 2, [regularizer()], accumulate_grad_batches=4)
    torch.testing.assert_close(parameters(whole), parameters(accumulated), rtol=1e-5, atol=1e-6)


def test_accumulation_1x8_equals_4x2_where_each_row_is_its_own_statistic():
    whole, accumulated = toy(), toy()
    fit(whole, tokens(24), 8, [regularizer(scope="sequence")])
    fit(accumulated, tokens(24), 2, [regularizer(scope="sequence")], accumulate_grad_batches=4)
    torch.testing.assert_close(parameters(whole), parameters(accumulated), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(parameters(whole), parameters(toy()))


def _of_two(rank: int, folder: str) -> dict:
    def train(term: ConsistencyRegularizer, module: ToyMoE | None = None) -> torch.Tensor:
        gloo = {"process_group_backend": "gloo"}
        strategy = DDPStrategy(**gloo) if module is None else ModelParallelStrategy(2, 1, **gloo)  # data, tensor
        module = module or toy()
        fit(module, tokens(24)[rank::2], 4, [term], strategy=strategy, devices=2, use_distributed_sampler=False)
        return parameters(module)

    found = {"ddp": train(regularizer()), "fsdp2": train(regularizer(), toy(Sharded))}
    for name, goal in _goals(folder).items():
        term = regularizer(response_steps=2, max_weight=20.0, **goal)
        train(term)
        found[name] = term.weight_at(10)
    return found


def _goals(folder) -> dict[str, dict]:
    return {
        "target": {"target": {"srp/m5": 0.7}},
        "budget": {"budget": {"ce": 0.05}, "reference": f"{folder}/reference.json"},
    }


def test_two_processes_give_the_parameters_and_weights_of_one(tmp_path):
    """3 steps of 8 rows, of which rank 0 has the even ones."""
    (tmp_path / "reference.json").write_text(json.dumps({"step": [0, 1, 2], "train/ce": [3.6, 3.6, 3.6]}))
    even, odd = on_processes(2, _of_two, tmp_path, str(tmp_path))
    one = toy()
    fit(one, tokens(24), 8, [regularizer()])
    for strategy in ("ddp", "fsdp2"):
        torch.testing.assert_close(even[strategy], parameters(one), rtol=1e-5, atol=1e-6)
    for name, goal in _goals(tmp_path).items():
        term = regularizer(response_steps=2, max_weight=20.0, **goal)
        fit(toy(), tokens(24), 8, [term])
        assert even[name] == odd[name] == pytest.approx(term.weight_at(10), rel=1e-4)
        assert even[name] != 2.0


NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("16-mixed", marks=NEEDS_GPU)])
def test_mixed_precision_with_clipping_trains_finite(precision):
    module = toy()
    accelerator = "gpu" if precision == "16-mixed" else "cpu"
    fit(module, tokens(16), 4, [regularizer()], precision=precision, gradient_clip_val=1.0, accelerator=accelerator)
    assert parameters(module).isfinite().all()
    assert not torch.equal(parameters(module), parameters(toy()))


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    ids, options = tokens(32), {"enable_checkpointing": True, "default_root_dir": tmp_path}

    def callback():
        return regularizer(warmup_steps=6)

    straight = toy()
    fit(straight, ids, 4, [callback()], max_epochs=2)
    first = fit(toy(), ids, 4, [callback()], max_epochs=1, **options)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = toy()
    trainer = Trainer(
        callbacks=[callback()],
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(ids), batch_size=4, shuffle=False)
    trainer.fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(parameters(straight), parameters(resumed), rtol=0, atol=0)


def test_what_is_logged(tmp_path):
    callback = regularizer(warmup_steps=2, end_step=5, cooldown_steps=2)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(toy(), tokens(24), 4, [callback], logger=logger, log_every_n_steps=1)
    with Path(tmp_path, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/consistency/loss"]]
    assert [float(row["train/consistency/weight"]) for row in rows] == [0, 1.0, 2.0, 2.0, 1.0, 0]
    for row in rows:
        raw, weight = float(row["train/consistency/loss"]), float(row["train/consistency/weight"])
        assert 0 < raw < 1
        assert float(row["train/consistency/weighted"]) == pytest.approx(raw * weight, rel=1e-5)
        mean = (float(row["train/consistency/layer_00"]) + float(row["train/consistency/layer_01"])) / 2
        assert mean == pytest.approx(raw, rel=1e-5)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_must_be_a_number_from_zero(weight):
    with pytest.raises(ValueError, match="weight must be a finite number >= 0"):
        ConsistencyRegularizer(weight=weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cooldown_steps": 10}, "cooldown_steps needs an end_step, got cooldown_steps=10 alone"),
        ({"end_step": -1}, "end_step must be >= 0, got -1"),
        (
            {"start_step": 100, "warmup_steps": 50, "cooldown_steps": 20, "end_step": 169},
            r"end_step must be at least start_step \+ warmup_steps \+ cooldown_steps = 170, got 169",
        ),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyRegularizer(**options)


def test_manual_optimization_is_refused_with_what_to_do():
    module = toy()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"manual optimization.*LocalConsistencyLoss"):
        fit(module, tokens(4), 4, [regularizer()])


def test_a_model_without_routers_is_refused():
    class Dense(ToyMoE):
        def __init__(self):
            super().__init__()
            self.routers = nn.ModuleList()

    with pytest.raises(ValueError, match="mixture-of-experts routers, got Dense"):
        fit(Dense(), tokens(4), 4, [regularizer()])


def test_frozen_routers_are_refused():
    module = toy()
    module.embed.requires_grad_(False)
    module.routers.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no gradient"):
        fit(module, tokens(4), 4, [regularizer()])


def test_one_row_of_positions_is_that_of_all_rows():
    """transformers broadcasts it."""
    ids, positions = torch.zeros(3, 5, dtype=torch.int64), torch.tensor([[0, 1, 2, 0, 1]])
    _, document_ids = batch_masks({"input_ids": ids, "position_ids": positions})
    assert document_ids.tolist() == [[0, 0, 0, 1, 1]] * 3


def test_masks_of_a_batch():
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0]]), "position_ids": torch.tensor([[0, 1, 0, 0]])}
    valid, document_ids = batch_masks(batch)
    assert valid.tolist() == [[True, True, True, False]]
    assert document_ids.tolist() == [[0, 0, 1, 2]]
    own = batch | {"document_ids": torch.tensor([[5, 5, 5, 5]])}
    assert batch_masks(own)[1] is own["document_ids"]
    assert batch_masks([torch.zeros(1)]) == (None, None)
