"""CacheAwareTraining in real Lightning runs: the routing is in the training steps, and in a validation of its own."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from parameters import parameters
from processes import on_processes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_lightning import ToyMoE, Validated, fit, layer_ids, loader, regularizer, tokens, toy

from consistency_reg import CacheAwareRouting, RouterCapture, RoutingMonitor, functional
from consistency_reg.callbacks import CacheAwareTraining
from consistency_reg.capture import RouterAdapter, Weighing
from consistency_reg.rerouting import RoutingSchedule

ADAPTERS = [RouterAdapter("^ToyTopKRouter$", weights=Weighing(normalized=False))]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def training(strength=0.5, **options):
    return CacheAwareTraining(strength, **({"guaranteed": 0, "adapters": ADAPTERS, "cache_ratio": 1.5} | options))


def by_hand(ids, batch_size, settings):
    """A loop whose step n has the (strength, cache ratio) n of ``settings``."""
    module = toy()
    optimizer = module.configure_optimizers()
    for batch, (strength, ratio) in zip(ids.split(batch_size), settings, strict=True):
        with CacheAwareRouting(module, ratio, strength, guaranteed=0, adapters=ADAPTERS):
            logits = module(batch[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(module)


def test_the_routing_of_each_step_is_that_of_its_schedule():
    module, schedule = toy(), RoutingSchedule(0.5, 1, 2, (1, 3))
    fit(module, tokens(24), 4, [training(start_step=1, ramp_steps=2, cache_ratio=[1, 3])])
    settings = [(schedule.strength_at(step), schedule.cache_ratio_at(step)) for step in range(6)]
    assert [strength for strength, _ in settings] == [0, 0, 0.25, 0.5, 0.5, 0.5]
    assert len({ratio for _, ratio in settings}) == 6
    torch.testing.assert_close(parameters(module), by_hand(tokens(24), 4, settings), rtol=0, atol=0)
    plain = toy()
    fit(plain, tokens(24), 4)
    assert not torch.allclose(parameters(module), parameters(plain))


def test_strength_0_trains_as_without():
    module, plain = toy(), toy()
    fit(module, tokens(8), 4, [training(0)])
    fit(plain, tokens(8), 4)
    torch.testing.assert_close(parameters(module), parameters(plain), rtol=0, atol=0)


class Chosen(Callback):
    """Keeps what the monitor of a user would see in a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.capture = RouterCapture(pl_module).attach()
        self.capture._begin()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen = self.capture.trace()
        self.capture.detach()


@pytest.mark.parametrize("first", [True, False])
def test_consistency_term_and_monitor_see_what_was_chosen_whoever_comes_first(first):
    class Term(type(regularizer())):
        def term(self, step, trace):
            self.seen = trace
            return super().term(step, trace)

    term, module, ids = Term(regularizer().loss, 2.0), toy(), tokens(4)
    callbacks = [training(), term, RoutingMonitor((3,))]
    before = toy()
    logged = fit(module, ids, 4, callbacks if first else callbacks[::-1], log_every_n_steps=1).callback_metrics
    with CacheAwareRouting(before, 1.5, 0.5, guaranteed=0, adapters=ADAPTERS) as routing:
        expected = layer_ids(before, ids)
    assert any(
        not torch.equal(one, other) for one, other in zip(expected, layer_ids(before, ids), strict=True)
    )  # by itself
    for layer, chosen in zip(term.seen, expected, strict=True):
        assert torch.equal(layer.expert_ids, chosen)
    assert float(logged["train/routing/misses"]) == pytest.approx(routing.misses / (routing.hits + routing.misses))
    assert float(logged["train/routing/strength"]) == 0.5
    assert float(logged["train/srp/m3"]) == pytest.approx(float(functional.srp(expected, 6, 3).srp))


def test_accumulation_1x8_equals_4x2():
    whole, accumulated = toy(), toy()
    options = {"cache_ratio": [1, 3], "ramp_steps": 2}
    fit(whole, tokens(24), 8, [training(**options)])
    fit(accumulated, tokens(24), 2, [training(**options)], accumulate_grad_batches=4)
    torch.testing.assert_close(parameters(whole), parameters(accumulated), rtol=1e-5, atol=1e-6)


def _of_two(rank: int) -> tuple:
    module, callback = judged(), training(cache_ratio=[1, 3], deployed_cache_ratio=1.5)
    gloo = DDPStrategy(process_group_backend="gloo")
    options = {"strategy": gloo, "devices": 2, "use_distributed_sampler": False}
    logged = train_and_validate(module, tokens(24)[rank::2], 4, callback, options, tokens(10, seed=3)[rank::2])
    return parameters(module), logged


def train_and_validate(module, ids, batch_size, callback, options, validation):
    trainer = Trainer(
        callbacks=[callback, RoutingMonitor((3,))], max_epochs=1, num_sanity_val_steps=0, **QUIET | options
    )
    trainer.fit(module, loader(ids, batch_size), loader(validation))
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/deployed/")}


@pytest.mark.slow
def test_two_processes_give_the_parameters_and_the_deployed_validation_of_one(tmp_path):
    (even, logged), (_, other) = on_processes(2, _of_two, tmp_path)
    one, callback = judged(), training(cache_ratio=[1, 3], deployed_cache_ratio=1.5)
    expected = train_and_validate(one, tokens(24), 8, callback, {}, tokens(10, seed=3))
    torch.testing.assert_close(even, parameters(one), rtol=1e-5, atol=1e-6)
    assert logged == other == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    ids, options = tokens(32), {"enable_checkpointing": True, "default_root_dir": tmp_path}

    def callback():
        return training(start_step=2, ramp_steps=10, cache_ratio=[1, 3])

    straight, resumed = toy(), toy()
    fit(straight, ids, 4, [callback()], max_epochs=2)
    fit(toy(), ids, 4, [callback()], max_epochs=1, **options).save_checkpoint(tmp_path / "half.ckpt")
    trainer = Trainer(callbacks=[callback()], max_epochs=2, **QUIET)
    trainer.fit(resumed, DataLoader(TensorDataset(ids), batch_size=4), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(parameters(straight), parameters(resumed), rtol=0, atol=0)


# --- validation ---------------------------------------------------------------------------------------------------


class Judged(Validated):
    def token_losses(self, batch):
        (ids,) = batch
        return nn.functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def judged():
    return toy(Judged)


@pytest.mark.parametrize("first", [True, False])
def test_validation_is_with_and_without_the_routing_under_names_that_say_which(first):
    module, ids = judged(), tokens(10, seed=3)
    callbacks = [training(), RoutingMonitor((3,), (1.5,), ())]
    trainer = Trainer(callbacks=callbacks if first else callbacks[::-1], **QUIET)
    (logged,) = trainer.validate(module, loader(ids), verbose=False)
    own = layer_ids(module, ids)
    with CacheAwareRouting(module, 1.5, 0.5, guaranteed=0, adapters=ADAPTERS), torch.no_grad():
        chosen, losses = layer_ids(module, ids), module.token_losses((ids,))
    for prefix, layers in (("val", own), ("val/deployed", chosen)):
        assert logged[f"{prefix}/srp/m3"] == pytest.approx(float(functional.srp(layers, 6, 3).srp))
        hits = torch.stack([functional.cache_hit_rate(layer, 6, policy="lru") for layer in layers]).mean(dim=0)
        assert logged[f"{prefix}/cache/lru_1.5k"] == pytest.approx(float(hits[2]))
    assert logged["val/deployed/cache/lru_1.5k"] > logged["val/cache/lru_1.5k"]
    assert logged["val/deployed/ce"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert logged["val/deployed/ppl"] == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    with torch.no_grad():
        assert logged["val/ce"] == pytest.approx(float(module.token_losses((ids,)).mean()), rel=1e-5)
    assert (logged["val/deployed/strength"], logged["val/deployed/cache_ratio"]) == (0.5, 1.5)
    assert 0 < logged["val/deployed/agreement"] < 1


def test_a_model_that_was_trained_without_can_be_validated_with_it():
    (logged,) = Trainer(callbacks=[training(0, deployed_strength=0.5)], **QUIET).validate(
        judged(), loader(tokens(10, seed=3)), verbose=False
    )
    assert logged["val/deployed/strength"] == 0.5


def test_several_domains_each_have_a_perplexity():
    sets = [loader(tokens(6, seed=3)), loader(tokens(6, seed=4))]

    class Two(Judged):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0][:, :-1])

    trainer = Trainer(callbacks=[training()], limit_val_batches=1, **QUIET)
    trainer.validate(toy(Two), sets, verbose=False)
    logged = trainer.callback_metrics
    mean = (logged["val/deployed/ce/0"] + logged["val/deployed/ce/1"]) / 2
    assert float(logged["val/deployed/ce"]) == pytest.approx(float(mean), rel=1e-5)
    assert logged["val/deployed/ce/0"] != logged["val/deployed/ce/1"]


def test_strength_0_has_no_deployed_validation_and_no_hooks():
    module = judged()
    (logged,) = Trainer(callbacks=[training(0)], **QUIET).validate(module, loader(tokens(6, seed=3)), verbose=False)
    assert not [name for name in logged if "deployed" in name]


def test_a_module_without_token_losses_is_told_so():
    module, trainer = toy(Validated), Trainer(callbacks=[training()], **QUIET)
    with pytest.warns(UserWarning, match=r"Validated has no method token_losses\(batch\)"):
        trainer.validate(module, loader(tokens(6, seed=3)), verbose=False)


# --- what is refused, and left behind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strength": -0.1}, "strength must be a finite number"),
        ({"strength": float("nan")}, "strength must be a finite number"),
        ({"start_step": -1}, "start_step must be >= 0"),
        ({"ramp_steps": "5"}, "ramp_steps must be >= 0"),
        ({"cache_ratio": 0.5}, "cache_ratio must be a number of at least 1"),
        ({"cache_ratio": [3, 1]}, "cache_ratio must be a number of at least 1"),
        ({"cache_ratio": []}, "cache_ratio must be a number of at least 1"),
        ({"deployed_strength": -1}, "strength must be a finite number"),
        ({"method": "best"}, "method must be one of"),
        ({"method": "max_rank"}, "must be a rank, a whole number"),
    ],
)
def test_values_out_of_range_are_refused_at_once(options, said):
    with pytest.raises(ValueError, match=said):
        training(**options)


@pytest.mark.parametrize("options", [{"guaranteed": 3}, {"adapters": []}])
def test_what_does_not_fit_the_model_is_refused_before_the_first_step(options):
    module = toy()
    with pytest.raises(ValueError, match=r"must lie|does not weigh"):
        fit(module, tokens(8), 4, [training(**options)])
    torch.testing.assert_close(parameters(module), parameters(toy()), rtol=0, atol=0)


@pytest.mark.parametrize("output", ["tensor", "wrong"])
def test_it_lets_go_of_the_model_at_the_end_and_after_an_error(output):
    module = toy(ToyMoE, output=output)
    if output == "wrong":
        with pytest.raises(Exception, match="loss"):
            fit(module, tokens(8), 4, [training()])
    else:
        fit(module, tokens(8), 4, [training()])
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
