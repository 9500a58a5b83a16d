"""Answers to questions: their log-likelihoods against a loop over tokens, of dense models and of mixtures."""

import math
from types import SimpleNamespace

import pytest
import torch
from architectures import draw_routers
from dense_models import llama

from consistency_reg import CacheAwareRouting, RouterCapture
from consistency_reg.lab.cloze.answers import answered, log_likelihoods, mean_and_error
from consistency_reg.lab.cloze.items import make_items
from consistency_reg.lab.model import small_moe

VOCABULARY = 61
DOCUMENTS = [torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(d)).tolist() for d in range(4)]
ITEMS = make_items(DOCUMENTS, 5, context=9, continuation=4)


def mixture():
    model = small_moe(VOCABULARY, 32, 2, 2, 16, num_experts=8, top_k=2, context_length=64).eval()
    draw_routers(RouterCapture(model))
    return model


@torch.no_grad()
def token_by_token(model, item):
    """The log-likelihood of every answer, by generation with a KV cache that is forced to say it."""
    found = []
    for choice in item.choices:
        total, cache, row = 0.0, None, [*item.context, *choice]
        for place, token in enumerate(row[:-1]):
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            if place >= len(item.context) - 1:
                total += float(output.logits[0, -1].double().log_softmax(-1)[row[place + 1]])
        found.append(total)
    return found


@pytest.mark.parametrize("make", [llama, mixture])
def test_the_likelihood_of_an_answer_is_that_of_its_tokens(make):
    model = make()
    wanted = torch.tensor([token_by_token(model, item) for item in ITEMS])
    for batch_items in (1, 2, 8):
        found = log_likelihoods(model, ITEMS, batch_items)
        torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=1e-4)
    right = [row.argmax() == item.right for row, item in zip(wanted, ITEMS, strict=True)]
    assert answered(model, ITEMS).tolist() == list(map(float, right))


def test_cache_aware_routing_begins_with_an_empty_cache_in_every_row():
    model = mixture()
    as_it_is = log_likelihoods(model, ITEMS)
    wanted = []
    for item in ITEMS:
        answers = []
        for choice in item.choices:
            with CacheAwareRouting(model, 2.0, 0.5), torch.no_grad():
                row = torch.tensor([item.context + choice])
                nats = model(row).logits[0, :-1].double().log_softmax(-1).gather(1, row[0, 1:, None])
            answers.append(float(nats[len(item.context) - 1 :].sum()))
        wanted.append(answers)
    with CacheAwareRouting(model, 2.0, 0.5):
        found = log_likelihoods(model, ITEMS)
    torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, as_it_is, rtol=1e-4, atol=1e-4)


class CountsOn(torch.nn.Module):
    """Expects the next number."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, use_cache):
        logits = 10.0 * torch.nn.functional.one_hot((ids + 1) % 200, 200).float()
        return SimpleNamespace(logits=logits)


def test_a_model_that_knows_the_text_answers_everything():
    items = make_items([range(200)], 10, context=6, continuation=4)
    assert answered(CountsOn(), items).tolist() == [1.0] * 10


def test_the_error_is_that_of_a_mean():
    mean, error = mean_and_error(torch.tensor([1.0] * 30 + [0.0] * 70))
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])
