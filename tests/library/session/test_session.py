"""One session of a module: who shares it, whose routers it takes, and what it says where that cannot be known."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from parameters import parameters
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.utils.data import DataLoader
from toy_lightning import fit, regularizer, tokens, toy

from consistency_reg import ConsistencyRegularizer, LocalConsistencyLoss, RouterCapture, RoutingMonitor
from consistency_reg.callbacks import ExpertAgreement, RouterAnchor
from consistency_reg.session import ListenOptions, RoutingSession

B, T = 4, 12
LOSS = LocalConsistencyLoss((3, 5))
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


def right(model, ids, valid=None, document_ids=None, **inputs):
    """The loss on a trace of this model alone, with masks written by hand."""
    with RouterCapture(model) as capture, torch.no_grad():
        model(input_ids=ids, **inputs)
    return float(LOSS(capture.trace(valid, document_ids)))


def rows(ids, **more):
    return [{"input_ids": row} | {name: values[i] for name, values in more.items()} for i, row in enumerate(ids)]


class Student(LightningModule):
    """A student in training, next to a second model of some kind."""

    def __init__(self, second: nn.Module | None = None, run=None):
        super().__init__()
        self.student, self.second, self.run = tiny_model("olmoe").train(), second, run

    def training_step(self, batch, batch_idx):
        loss = self.student(**batch, labels=batch["input_ids"]).loss
        return loss if self.run is None else self.run(self, batch, loss)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.student(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.0)


def train(module, callbacks, data, **options):
    trainer = Trainer(callbacks=list(callbacks), **(QUIET | {"max_steps": 1} | options))
    loader = DataLoader(data, batch_size=B) if isinstance(data, list) else data
    trainer.fit(module, loader, loader if isinstance(data, list) else None)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


# --- who shares it ------------------------------------------------------------------------------------------------


def count(monkeypatch, owner, method):
    """How often a method is called from now on."""
    called, whole = [], getattr(owner, method)

    def counting(*args, **kwargs):
        called.append(args)
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, method, counting)
    return called


def test_a_step_with_all_callbacks_listens_builds_and_reads_once(monkeypatch):
    from consistency_reg.session import tokens

    ids = token_ids(B, T)
    callbacks = [
        ConsistencyRegularizer(LOSS),
        RouterAnchor(0.1),
        RoutingMonitor((3,)),
        ExpertAgreement(3),
        ConsistencyRegularizer(LOSS, 0.1, name="again"),
    ]
    heard = count(monkeypatch, RouterCapture, "_read")
    built = count(monkeypatch, RouterCapture, "make_trace")
    read = count(monkeypatch, tokens, "read_masks")
    train(Student(), callbacks, rows(ids, attention_mask=torch.ones_like(ids)), limit_val_batches=0)
    assert len(heard) == 2  # routers
    assert len(built) == 1
    assert len(read) == 1


def test_it_ends_with_the_last_listener_and_copies_are_free_of_it():
    model = tiny_model("olmoe")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    one = RoutingSession.of(model).listen()
    other = RoutingSession.of(model).listen(ListenOptions(layers=r"layers\.1\.", keep_inputs=True))
    assert one.session is other.session
    assert other.layer_names == ("model.layers.1.mlp.gate",)
    assert RoutingSession.of(copy.deepcopy(model)) is not one.session
    assert RoutingSession.of(pickle.loads(pickle.dumps(model))) is not one.session
    one.release()
    one.release()
    assert RoutingSession.of(model) is other.session
    other.release()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_the_trace_is_kept_until_nobody_needs_it():
    model, ids = tiny_model("olmoe"), token_ids(B, T)
    one, other = (RoutingSession.of(model).listen() for _ in range(2))
    with one.recording(), other.recording():
        model(ids)
    trace = one.trace()
    one.done()
    assert other.trace() is trace
    other.done()
    with pytest.raises(RuntimeError, match="0 of 2 routers"):
        other.trace()


def test_a_module_without_routers_is_not_joined():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mixture-of-experts routers"):
        RoutingSession.of(model).listen()
    assert not model._forward_pre_hooks


# --- which routers ------------------------------------------------------------------------------------------------


def without_gradient(module, batch, loss):
    with torch.no_grad():
        module.second(**batch)
    return loss


def in_passing(module, batch, loss):
    return loss + 0 * module.second(**batch).logits.mean().detach()


def in_the_loss(module, batch, loss):
    """A critic that judges what the student says: gradient flows through it."""
    said = module.student(**batch).logits.softmax(-1) @ module.second.get_input_embeddings().weight
    return loss + module.second(inputs_embeds=said, attention_mask=batch["attention_mask"]).logits.square().mean()


SECONDS = {
    "none": (lambda: None, None),
    "frozen teacher": (lambda: tiny_model("mixtral", 1).requires_grad_(False), without_gradient),
    "frozen teacher with autograd": (lambda: tiny_model("mixtral", 1).requires_grad_(False), in_passing),
    "frozen critic in the loss": (lambda: tiny_model("mixtral", 1).requires_grad_(False), in_the_loss),
    "moving average": (lambda: tiny_model("olmoe", 1), without_gradient),
    "model that the optimizer does not hold": (lambda: tiny_model("olmoe", 1), in_passing),
    "idle model": (lambda: tiny_model("olmoe", 1), None),
}


@pytest.mark.parametrize("second", SECONDS)
def test_the_term_is_that_of_the_model_that_is_trained(second):
    make, run = SECONDS[second]
    ids, valid = token_ids(B, T), torch.ones(B, T, dtype=torch.int64)
    valid[0, 7:] = 0
    module = Student(make(), run)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*taken together.*")
        logged = train(
            module,
            [ConsistencyRegularizer(LOSS), RouterAnchor(0.1), RoutingMonitor((3,))],
            rows(ids, attention_mask=valid),
        )
    assert logged["train/consistency/loss"] == pytest.approx(right(module.student, ids, valid.bool()), abs=1e-6)
    assert logged["train/anchor/loss"] == pytest.approx(0, abs=1e-6)
    assert "train/srp/m3" in logged
    assert "val/srp/m3" in logged
    assert "val/srp/m3/layer_01" in logged
    assert "val/srp/m3/layer_02" not in logged


def test_the_gradient_is_that_of_the_student_alone():
    ids = token_ids(B, T)
    alone, beside = Student(), Student(tiny_model("olmoe", 1).requires_grad_(False), without_gradient)
    for module in (alone, beside):
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.student.parameters(), lr=1.0)
        train(module, [ConsistencyRegularizer(LOSS, 5.0)], rows(ids))
    assert torch.equal(parameters(alone.student), parameters(beside.student))


def test_layers_name_others():
    ids, module = token_ids(B, T), Student(tiny_model("olmoe", 1), in_passing)
    logged = train(module, [ConsistencyRegularizer(LOSS, 0.0, layers="^second")], rows(ids))
    assert logged["train/consistency/loss"] == pytest.approx(right(module.second, ids), abs=1e-6)
    with pytest.raises(ValueError, match="layers must match the name of at least one router"):
        train(module, [ConsistencyRegularizer(LOSS, layers="^third")], rows(ids))


def test_two_models_in_training_are_taken_together_and_said_once():
    def both(module, batch, loss):
        return loss + module.second(**batch, labels=batch["input_ids"]).loss

    ids, module = token_ids(2 * B, T), Student(tiny_model("olmoe", 1), both)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    with pytest.warns(
        UserWarning, match=r"2 stacks is taken together: student.model.layers.*second.model.layers"
    ) as said:
        logged = train(module, [ConsistencyRegularizer(LOSS)], rows(ids), limit_val_batches=0, max_steps=2)
    assert len([one for one in said if "taken together" in str(one.message)]) == 1
    mean = (right(module.student, ids[B:]) + right(module.second, ids[B:])) / 2
    assert logged["train/consistency/loss"] == pytest.approx(mean, abs=1e-6)


# --- encoder and decoder ------------------------------------------------------------------------------------------


def switch():
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_ff=32,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=4,
        pad_token_id=0,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config).train()


class Translation(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = switch()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("length", [T, 7])
@pytest.mark.parametrize("decoder_mask", [True, False])
def test_an_encoder_and_a_decoder_have_each_its_own_term_and_mask(length, decoder_mask):
    source, target = token_ids(B, T), token_ids(B, length, seed=1)
    mask, target_mask = torch.ones(B, T, dtype=torch.int64), torch.ones(B, length, dtype=torch.int64)
    mask[0, 8:], target_mask[1, 5:] = 0, 0
    batch = {"attention_mask": mask, "labels": target}
    if decoder_mask:
        batch["decoder_attention_mask"] = target_mask
    module = Translation()
    terms = [ConsistencyRegularizer(LOSS, layers=f"^model.{part}", name=part) for part in ("encoder", "decoder")]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not read.*")
        logged = train(module, terms, rows(source, **batch))
    for part, valid in (("encoder", mask), ("decoder", target_mask if decoder_mask else None)):
        with RouterCapture(module.model, layers=f"^{part}") as capture, torch.no_grad():
            module.model(input_ids=source, **batch)
        expected = LOSS(capture.trace(None if valid is None else valid.bool()))
        assert logged[f"train/{part}/loss"] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("length", [T, 7])
def test_stacks_with_other_tokens_are_refused_with_what_to_do(length):
    batch = {"attention_mask": torch.ones(B, T, dtype=torch.int64), "labels": token_ids(B, length, seed=1)}
    with pytest.raises(ValueError, match=r"saw different tokens \(model.encoder.block.*choose one stack with layers="):
        train(Translation(), [ConsistencyRegularizer(LOSS)], rows(token_ids(B, T), **batch))


# --- several forwards of a step -----------------------------------------------------------------------------------


class Parts(LightningModule):
    """Batches of several loaders, read together or each by itself."""

    def __init__(self, together):
        super().__init__()
        self.model, self.together = tiny_model("olmoe").train(), together

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else list(batch)
        if not self.together:
            return sum(self.model(**part, labels=part["input_ids"]).loss for part in parts if part is not None)
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return self.model(**joined, labels=joined["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_batches_of_several_loaders_are_one_batch(together, names, mode):
    ids, valid = token_ids(2 * B, T), torch.ones(2 * B, T, dtype=torch.int64)
    valid[1, 7:], valid[6, 4:] = 0, 0
    data = rows(ids, attention_mask=valid)
    loaders = [DataLoader(data[:B], batch_size=B), DataLoader(data[B:], batch_size=B)]
    module = Parts(together)
    loader = CombinedLoader(dict(zip(["code", "text"], loaders, strict=True)) if names else loaders, mode)
    logged = train(module, [ConsistencyRegularizer(LOSS), RoutingMonitor((3,))], loader)
    assert logged["train/consistency/loss"] == pytest.approx(right(module.model, ids, valid.bool()), abs=1e-6)
    assert logged["trainer/tokens"] == valid.sum()


def test_forwards_of_different_lengths_stand_below_one_another():
    model = tiny_model("olmoe").train()
    listener = RoutingSession.of(model).listen()
    short, long = token_ids(2, 5), token_ids(3, 9, seed=1)
    with listener.recording():
        for ids in (short, long):
            model(ids, attention_mask=torch.ones_like(ids))
    trace = listener.trace()
    listener.release()
    with RouterCapture(model) as capture:
        model(short)
        first = capture.trace()
        model(long)
        second = capture.trace()
    for layer, one, other in zip(trace, first, second, strict=True):
        assert torch.equal(layer.expert_ids[:2, :5], one.expert_ids)
        assert torch.equal(layer.expert_ids[2:], other.expert_ids)
        assert torch.equal(layer.scores[:2, :5], one.scores)
    assert trace.valid.sum(dim=1).tolist() == [5, 5, 9, 9, 9]
    (gradient,) = torch.autograd.grad(LOSS(trace), model.model.layers[0].mlp.gate.weight)
    assert gradient.any()


def test_masks_of_ones_own_are_not_guessed_to_be_those_of_several_forwards():
    loaders = [DataLoader(rows(token_ids(B, T, seed)), batch_size=B) for seed in range(2)]
    term = ConsistencyRegularizer(LOSS, masks=lambda batch: (None, None))
    with pytest.raises(ValueError, match="ran 2 times in this step"):
        train(Parts(False), [term], CombinedLoader(loaders, "min_size"))


def test_layers_that_run_twice_in_one_forward_are_refused():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = toy().routers

        def forward(self, x):
            for _ in range(2):
                for router in self.layers:
                    x = x + router(x)[1].sum(-1, keepdim=True)
            return x

    model = Looped()
    listener = RoutingSession.of(model).listen()
    with listener.recording():
        model(torch.randn(2, 5, 8))
    with pytest.raises(RuntimeError, match="more than once in one forward"):
        listener.trace()


# --- several terms ------------------------------------------------------------------------------------------------


def test_any_number_of_terms_each_with_its_name_in_log_and_checkpoint(tmp_path):
    from consistency_reg import LoadBalanceLoss, RouterZLoss

    def terms():
        return [
            ConsistencyRegularizer(LOSS, 0.3),
            ConsistencyRegularizer(LocalConsistencyLoss((4,)), 0.2),
            ConsistencyRegularizer(LoadBalanceLoss(running=0.9), 0.1),
            ConsistencyRegularizer(RouterZLoss(), 0.01),
            RouterAnchor(0.1),
            ConsistencyRegularizer(LOSS, 0.1, layers=r"routers\.1", name="last"),
        ]

    module, kept = toy(), terms()
    run = fit(module, tokens(8), 4, kept, enable_checkpointing=True, default_root_dir=tmp_path, log_every_n_steps=1)
    names = {"consistency", "consistency_2", "balance", "z", "anchor", "last"}
    assert {key.split("/")[1] for key in run.callback_metrics if key.endswith("/loss")} == names
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = terms()
    fitted = Trainer(max_epochs=1, callbacks=again, **QUIET)
    fitted.fit(toy(), DataLoader(tokens(8), batch_size=4), ckpt_path=tmp_path / "last.ckpt")
    average = kept[2].loss.get_extra_state()["average"]
    assert average
    assert all(torch.equal(again[2].loss.get_extra_state()["average"][name], value) for name, value in average.items())


def test_the_state_of_a_term_whose_options_changed_is_read(tmp_path):
    from consistency_reg import LoadBalanceLoss

    first = ConsistencyRegularizer(LoadBalanceLoss(running=0.9), 0.1)
    run = fit(toy(), tokens(8), 4, [first], default_root_dir=tmp_path)
    run.save_checkpoint(tmp_path / "last.ckpt")
    for key in (first.state_key, "ConsistencyRegularizer"):  # the key that earlier versions wrote
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
        checkpoint["callbacks"] = {key: checkpoint["callbacks"][first.state_key]}
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        other = ConsistencyRegularizer(LoadBalanceLoss(running=0.8), 0.1)
        Trainer(max_epochs=1, callbacks=[other], **QUIET).fit(
            toy(), DataLoader(tokens(8), batch_size=4), ckpt_path=tmp_path / "changed.ckpt"
        )
        assert other.loss.get_extra_state()["average"]


# --- when the model is made ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["configure_model", "setup"])
def test_the_anchor_holds_the_routers_that_the_module_makes(hook, tmp_path):
    class Late(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = None

        def make(self, **_):
            if self.model is None:
                self.model = tiny_model("olmoe").train()

        def training_step(self, batch, batch_idx):
            return self.model(**batch, labels=batch["input_ids"]).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    setattr(Late, hook, Late.make)
    anchor, data = RouterAnchor(0.1), DataLoader(rows(token_ids(2 * B, T)), batch_size=B)
    run = Trainer(max_epochs=1, callbacks=[anchor], **QUIET)
    run.fit(Late(), data)
    first = [router.router.weight for router in anchor.loss.references]
    assert torch.equal(first[0], tiny_model("olmoe").model.layers[0].mlp.gate.weight)
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = RouterAnchor(0.1)
    Trainer(max_epochs=2, callbacks=[resumed], **QUIET).fit(Late(), data, ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(one, other.router.weight) for one, other in zip(first, resumed.loss.references, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_finder_trains_with_the_term(first, tmp_path):
    from lightning.pytorch.callbacks import LearningRateFinder

    class Tuned(type(toy())):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    def losses(weight):
        finder, term = LearningRateFinder(1e-9, 1e-8, 4, early_stop_threshold=None), regularizer(weight=weight)
        module = toy(Tuned)
        fit(module, tokens(16), 4, [finder, term] if first else [term, finder], default_root_dir=tmp_path)
        assert "training_step" not in vars(module)
        return finder.optimal_lr.results["loss"]

    with_term, without = losses(2.0), losses(0.0)
    assert all(one > other + 0.2 for one, other in zip(with_term, without, strict=True))


# --- which tokens count -------------------------------------------------------------------------------------------


def test_tokens_with_labels_alone_count_and_each_answer_is_a_document():
    """Two answers of a conversation: no window, pair or cache goes on across the question between them."""
    ids, labels = token_ids(B, T), token_ids(B, T)
    labels[:, :2] = labels[:, 6:8] = -100
    data = rows(ids, labels=labels)

    class Answers(Student):
        def training_step(self, batch, batch_idx):
            return self.student(**batch).loss

        def validation_step(self, batch, batch_idx):
            self.student(**batch)

    module = Answers()
    callbacks = [ConsistencyRegularizer(LOSS, tokens="labels"), RoutingMonitor((3,), tokens="labels")]
    logged = train(module, callbacks, data)
    assert logged["train/consistency/loss"] == pytest.approx(right(module.student, ids, labels != -100), abs=1e-6)
    answers = torch.zeros(B, T, dtype=torch.int64)
    answers[:, 6:] = 1
    same = right(module.student, ids, labels != -100, answers)
    assert logged["train/consistency/loss"] == pytest.approx(same, abs=1e-6)
    assert logged["trainer/tokens"] == ids.numel()


def test_tokens_with_labels_need_labels():
    class Unlabelled(Student):
        def training_step(self, batch, batch_idx):
            return self.student(**batch).logits.mean()

    with pytest.raises(ValueError, match=r"tokens='labels' needs labels of the tokens \[B, T\] = \[4, 12\], got none"):
        train(Unlabelled(), [ConsistencyRegularizer(LOSS, tokens="labels")], rows(token_ids(B, T)))
    with pytest.raises(ValueError, match="tokens must be 'all' or 'labels', got 'answers'"):
        ConsistencyRegularizer(LOSS, tokens="answers")


# --- what is said -------------------------------------------------------------------------------------------------


def test_pads_without_a_mask_are_said_once():
    ids = token_ids(2 * B, T)
    ids[:, 9:] = 0
    module = Student()
    with pytest.warns(UserWarning, match="end with the pad token 0 but there is no attention_mask") as said:
        train(module, [ConsistencyRegularizer(LOSS)], rows(ids), max_steps=2, limit_val_batches=0)
    assert len([one for one in said if "pad token" in str(one.message)]) == 1


@pytest.mark.parametrize("name", ["segment_ids", "lengths"])
def test_names_that_hint_at_boundaries_are_said(name):
    class Other(Student):
        def training_step(self, batch, batch_idx):
            return self.student(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    with pytest.warns(UserWarning, match=rf"\['{name}'\] of the batch may tell"):
        train(
            Other(),
            [ConsistencyRegularizer(LOSS)],
            rows(token_ids(B, T), **{name: torch.ones(B, T)}),
            limit_val_batches=0,
        )


@pytest.mark.parametrize(("name", "said"), [("segment_ids", True), ("lengths", False)])
def test_with_a_mask_only_boundaries_are_unknown(name, said):
    class Masked(Student):
        def training_step(self, batch, batch_idx):
            return self.student(batch["input_ids"], batch["attention_mask"], labels=batch["input_ids"]).loss

    columns = {"attention_mask": torch.ones(B, T, dtype=torch.int64), name: torch.ones(B, T)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Masked(), [ConsistencyRegularizer(LOSS)], rows(token_ids(B, T), **columns), limit_val_batches=0)
    assert any("may tell where documents begin" in str(one.message) for one in caught) == said


def test_documents_of_other_tokens_than_the_model_was_given_are_said():
    class Shifted(Student):
        def training_step(self, batch, batch_idx):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            return self.student(ids[:, :-1], mask[:, :-1], labels=ids[:, 1:]).loss

    columns = {"attention_mask": torch.ones(B, T, dtype=torch.int64), "document_ids": torch.arange(T).expand(B, T) // 5}
    with pytest.warns(UserWarning, match=r"\['document_ids'\] of the batch may tell where documents begin"):
        train(Shifted(), [ConsistencyRegularizer(LOSS)], rows(token_ids(B, T), **columns), limit_val_batches=0)


def test_a_mask_that_a_model_of_ones_own_is_given_is_said():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model("olmoe")

        def forward(self, tokens, pad_mask):
            return self.inner(tokens).logits.square().mean()

    class Positional(Student):
        def training_step(self, batch, batch_idx):
            return self.student(batch["input_ids"], batch["valid"])

    module = Positional()
    module.student = Own()
    with pytest.warns(UserWarning, match=r"\['pad_mask'\] of the batch may tell which tokens"):
        train(
            module, [ConsistencyRegularizer(LOSS)], rows(token_ids(B, T), valid=torch.ones(B, T)), limit_val_batches=0
        )


def test_a_mask_of_other_tokens_is_refused():
    class Shifted(Student):
        def training_step(self, batch, batch_idx):
            return self.student(input_ids=batch["input_ids"][:, :-1], labels=batch["input_ids"][:, 1:]).loss

    data = rows(token_ids(B, T), attention_mask=torch.ones(B, T, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"attention_mask must describe tokens of shape \[B, T\] = \[4, 11\], got shape \[4, 12\]"
    ):
        train(Shifted(), [ConsistencyRegularizer(LOSS)], data, limit_val_batches=0)
