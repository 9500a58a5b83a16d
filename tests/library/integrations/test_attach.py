"""attach(): the term in a model's own loss, whoever trains it; what it leaves alone, and what it refuses."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from accelerate import Accelerator
from parameters import parameters
from tiny_models import COMMON, KINDS, tiny_model, token_ids
from torch.utils.data import DataLoader

from consistency_reg import LocalConsistencyLoss, RouterCapture
from consistency_reg.integrations import attach

B, T = 4, 12
LOSS = LocalConsistencyLoss((3, 5), scope="sequence")


def step(model, loss):
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return parameters(model)


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what it adds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("return_dict", [True, False])
def test_one_step_is_the_step_of_loss_plus_weighted_term(kind, return_dict):
    ids = token_ids(B, T)
    plain, attached = tiny_model(kind).train(), tiny_model(kind).train()
    with RouterCapture(plain) as capture:
        loss = plain(ids, labels=ids).loss
    expected = step(plain, loss + 5.0 * LOSS(capture.trace()))

    attach(attached, LOSS, weight=5.0)
    output = attached(ids, labels=ids, return_dict=return_dict)
    assert torch.equal(step(attached, output.loss if return_dict else output[0]), expected)


def test_weight_zero_is_training_without_it():
    ids = token_ids(B, T)
    plain, attached = tiny_model("olmoe").train(), tiny_model("olmoe").train()
    attach(attached, LOSS, weight=0.0)
    assert torch.equal(step(plain, plain(ids, labels=ids).loss), step(attached, attached(ids, labels=ids).loss))


@pytest.mark.parametrize("by_name", [True, False])
def test_masks_are_those_of_the_forward(by_name):
    ids, valid = token_ids(B, T), torch.ones(B, T, dtype=torch.int64)
    valid[1, 7:], valid[2, :4] = 0, 0
    positions = torch.arange(T).expand(B, T) % 6  # two documents a row
    model = tiny_model("olmoe").train()
    term = attach(model, LOSS)
    given = {"input_ids": ids, "attention_mask": valid, "position_ids": positions}
    model(**given, labels=ids) if by_name else model(*given.values(), labels=ids)
    with RouterCapture(model) as capture:
        model(**given, labels=ids)
    expected = LOSS(capture.trace(valid=valid.bool(), document_ids=(torch.arange(T) // 6).expand(B, T)))
    assert term.value == expected.item()
    assert term.value != pytest.approx(LOSS(capture.trace()).item(), abs=1e-4)


def test_masks_of_ones_own():
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    seen = {}

    def masks(given):
        seen.update(given)
        return torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.int64)

    attach(model, LOSS, masks=masks)
    model(ids, labels=ids)
    assert torch.equal(seen["input_ids"], ids)


def test_the_handle_reads_and_sets():
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    term = attach(model, LOSS, weight=0.5)
    assert term.weight == 0.5
    assert term.value != term.value  # NaN: nothing was measured yet
    assert term.per_layer == {}
    with_half = model(ids, labels=ids).loss
    assert list(term.per_layer) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert sum(term.per_layer.values()) / 2 == pytest.approx(term.value)
    term.weight = 2.5
    torch.testing.assert_close(model(ids, labels=ids).loss, with_half + 2.0 * term.value)


# --- what it leaves alone -----------------------------------------------------------------------------------------


def test_evaluation_and_generation_are_as_they_were():
    plain, attached = tiny_model("olmoe"), tiny_model("olmoe")
    ids = token_ids(B, T)
    term = attach(attached, LOSS, weight=5.0)
    for training in (False, True):
        with torch.no_grad():
            output = [model.train(training)(ids, labels=ids).loss for model in (plain, attached)]
        assert torch.equal(*output)
    assert torch.equal(plain.eval()(ids, labels=ids).loss, attached.eval()(ids, labels=ids).loss)
    generated = [model.generate(ids[:, :4], max_new_tokens=3, do_sample=False) for model in (plain, attached)]
    assert torch.equal(*generated)
    assert term.term is None
    with pytest.raises(RuntimeError, match="0 of 2 routers"):
        term._listener.trace()  # nothing of them is kept


def test_detaching_leaves_the_model_as_it_was():
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    before, hooks = model(ids, labels=ids).loss, count_hooks(model)
    with attach(model, LOSS) as term:
        assert model(ids, labels=ids).loss > before
        term.attach()
        once = model(ids, labels=ids).loss
        torch.testing.assert_close(once, before + 0.35 * term.value)
    value = term.value
    assert count_hooks(model) == hooks
    assert torch.equal(model(ids, labels=ids).loss, before)
    assert term.value == value
    term.detach()
    term.attach()
    assert torch.equal(model(ids, labels=ids).loss, once)


def test_a_second_term_of_the_kind_is_warned_of():
    """A notebook's cell that is run again."""
    model = tiny_model("olmoe")
    first = attach(model, LOSS)
    with pytest.warns(UserWarning, match="a LocalConsistencyLoss is attached to this OlmoeForCausalLM already"):
        second = attach(model, LOSS)
    second.detach()
    first.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, LOSS)


@pytest.mark.parametrize("loss", ["srp", LocalConsistencyLoss])
def test_what_is_no_loss_is_refused(loss):
    with pytest.raises(TypeError, match=r"loss must be a RoutingLoss, such as LocalConsistencyLoss\(\), got "):
        attach(tiny_model("olmoe"), loss)


@pytest.mark.parametrize("weight", ["0.35", None, float("nan"), -1])
def test_a_weight_that_is_no_number_from_zero_is_refused(weight):
    with pytest.raises(ValueError, match="weight must be a finite number >= 0, got "):
        attach(tiny_model("olmoe"), LOSS, weight)


def test_what_keeps_the_attachment_can_be_pickled_and_copied():
    term = attach(tiny_model("olmoe"), LOSS)
    for again in (copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert again.weight == term.weight


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_free_of_it(way):
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    without = model(ids, labels=ids).loss
    attach(model, LOSS)
    model(ids, labels=ids)
    assert torch.equal(way(model)(ids, labels=ids).loss, without)
    assert model(ids, labels=ids).loss > without


def test_files_of_the_model_are_as_they_were(tmp_path):
    model, ids = tiny_model("olmoe"), token_ids(B, T)
    keys = list(model.state_dict())
    attach(model, LOSS)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


# --- micro-batches ------------------------------------------------------------------------------------------------


def test_where_a_trainer_sums_micro_batches_their_number_must_be_said():
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    given = {"labels": ids, "num_items_in_batch": torch.tensor(44)}
    with attach(model, LOSS), pytest.raises(RuntimeError, match=r"num_items_in_batch.*ConsistencyCallback.*scale=1"):
        model(ids, **given)
    loss = model(ids, **given).loss
    with attach(model, LOSS, scale=0.25):
        assert torch.equal(model(ids, **given).loss, loss)


@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_accelerate_with_accumulation_4x2_equals_1x8(first):
    """Each row is its own statistic: then the mean over micro-batches is the mean over the batch."""
    results = []
    for rows, accumulated in ((8, 1), (2, 4)):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        model = tiny_model("olmoe").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if first == "attach":
            attach(model, LOSS, weight=5.0)
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, DataLoader(token_ids(16, T), batch_size=rows, shuffle=False)
        )
        if first == "prepare":
            attach(model, LOSS, weight=5.0)
        for ids in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(ids, labels=ids).loss)
                optimizer.step()
                optimizer.zero_grad()
        results.append(parameters(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_dense_model_is_refused():
    dense = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON))
    with pytest.raises(ValueError, match=r"mixture-of-experts routers, got LlamaForCausalLM"):
        attach(dense)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_must_be_a_number_from_zero(weight):
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="weight must be a finite number >= 0"):
        attach(model, weight=weight)
    term = attach(model)
    with pytest.raises(ValueError, match="weight must be a finite number >= 0"):
        term.weight = weight


@pytest.mark.parametrize("return_dict", [True, False])
def test_missing_labels_are_told(return_dict):
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    attach(model)
    with pytest.raises(
        RuntimeError, match=r"OlmoeForCausalLM returned no loss.*give it labels.*'input_ids'.*attach\(\.\.\., scale="
    ):
        model(ids, return_dict=return_dict)


def test_frozen_routers_are_warned_of_and_the_term_acts_on_what_feeds_them():
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".gate." not in name)
    with pytest.warns(UserWarning, match="all 2 routers are frozen: the consistency term acts on what feeds them"):
        term = attach(model, LOSS, weight=1.0)
    before = tiny_model("olmoe")
    loss = model(ids, labels=ids).loss
    loss.backward()
    without = before.train()(ids, labels=ids).loss
    without.backward()
    torch.testing.assert_close(loss, without + term.value)
    assert not torch.allclose(model.model.embed_tokens.weight.grad, before.model.embed_tokens.weight.grad)


@pytest.mark.filterwarnings("ignore:all 2 routers are frozen")
def test_a_term_without_gradient_is_refused():
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    attach(model, LOSS)
    with pytest.raises(RuntimeError, match=r"the consistency term has no gradient.*frozen"):
        model(ids, labels=ids)


def test_training_past_the_model_that_is_attached_to_is_an_error():
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    attach(model, LOSS)
    with pytest.raises(RuntimeError, match=r"outside of a forward of the OlmoeForCausalLM.*attach to the module that"):
        model.model(ids)


# --- by what it is scaled -----------------------------------------------------------------------------------------


def gate_gradient(model, backward):
    model.zero_grad()
    backward()
    return model.model.layers[0].mlp.gate.weight.grad.clone()


def term_gradient(model, ids):
    with RouterCapture(model) as capture:
        model(ids)
    return torch.autograd.grad(LOSS(capture.trace()), model.model.layers[0].mlp.gate.weight)[0]


LOSSES = {  # of what the model returned, none of them with a factor that says by what it was divided
    "logits": lambda output, reward: reward * output.logits.logsumexp(-1).mean(),
    "in place": lambda output, reward: output.loss.mul_(reward),
    "log-probabilities": lambda output, reward: -reward * output.logits.log_softmax(-1)[..., 0].mean(),
    "hidden states": lambda output, reward: reward * output.hidden_states[-1].square().mean(),
    "two of them": lambda output, reward: reward * output.loss + output.hidden_states[0].mean() + output.logits.mean(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reward", [1.0, 0.5, 0.0, -0.7, -60.0])
def test_with_a_scale_the_term_is_the_same_whatever_is_trained(name, reward):
    model, ids = tiny_model("olmoe").double().train(), token_ids(B, T)
    model.set_experts_implementation("eager")  # the one that takes doubles
    right = term_gradient(model, ids)

    def backward():
        LOSSES[name](model(ids, labels=ids, output_hidden_states=True), reward).backward()

    without = gate_gradient(model, backward)
    with attach(model, LOSS, weight=5.0, scale=0.25):
        added = gate_gradient(model, backward) - without
    assert (added - 5.0 * 0.25 * right).norm() < 1e-6 * right.norm()


@pytest.mark.parametrize("name", ["logits", "log-probabilities", "hidden states"])
def test_without_a_scale_what_is_not_the_loss_is_refused(name):
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    attach(model, LOSS)
    output = model(ids, labels=ids, output_hidden_states=True)
    with pytest.raises(
        RuntimeError, match=r"something else of what it returned is trained.*ConsistencyCallback.*scale="
    ):
        LOSSES[name](output, 1.0).backward()


@pytest.mark.parametrize("rewards", [[-0.7], [0.0], [1.0, -1.0], [1.0, 0.313]])
def test_without_a_scale_a_loss_times_a_reward_is_refused(rewards):
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    attach(model, LOSS)
    for reward in rewards[:-1]:
        (reward * model(ids, labels=ids).loss).backward()
    with pytest.raises(RuntimeError, match=r"the model's loss was multiplied by .*, not for a reward.*scale="):
        (rewards[-1] * model(ids, labels=ids).loss).backward()


def test_constants_gradient_scalers_and_a_shorter_last_step_are_no_rewards():
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    term = attach(model, LOSS)
    for factor in (1 / 6, 1 / 6, 65536 / 6, 32768 / 6, 32768 / 5, 1.0):
        (factor * model(ids, labels=ids).loss).backward()
    assert 0 < term.value < 1


@pytest.mark.parametrize("scale", [None, "function"])
def test_under_a_gradient_scaler(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, ids = tiny_model("olmoe").train(), token_ids(B, T)
    with RouterCapture(model) as capture:
        loss = model(ids, labels=ids).loss
    expected = step(model, loss + 5.0 * LOSS(capture.trace()))
    model = tiny_model("olmoe").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with attach(model, LOSS, 5.0, scale=scaler.scale if scale else None), torch.autocast("cpu", enabled=False):
        scaler.scale(model(ids, labels=ids).loss).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(parameters(model), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), "0.5", [1.0]])
def test_a_scale_that_is_no_number_above_zero_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be a finite number > 0, or a function of 1, got "):
        attach(tiny_model("olmoe"), LOSS, scale=scale)


def test_a_model_that_returns_nothing_to_train_is_told():
    class Silent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model("olmoe")

        def forward(self, ids):
            return {"tokens": self.inner(ids).logits.argmax(-1)}

    model = Silent().train()
    attach(model, LOSS, scale=1.0)
    with pytest.raises(RuntimeError, match="Silent returned nothing in training that has a gradient"):
        model(token_ids(B, T))
