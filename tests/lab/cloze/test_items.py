"""Questions of text: which passages they are of, what their answers are, and which are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consistency_reg.lab.cloze.items import make_items

DOCUMENTS = [list(range(100 * d, 100 * d + 25)) for d in range(6)]


@given(st.integers(1, 12), st.integers(2, 8), st.integers(0, 5))
def test_every_question_is_a_passage_of_a_document_with_continuations_of_others(count, choices, seed):
    items = make_items(DOCUMENTS, count, context=7, continuation=3, choices=choices, seed=seed)
    assert len({item.context for item in items}) == len(items) == count
    for item in items:
        whole = [*item.context, *item.choices[item.right]]
        assert whole == list(range(whole[0], whole[0] + 10))
        assert whole[0] % 100 in (0, 10)
        assert len(set(item.choices)) == len(item.choices) == choices
        assert all(choice[0] % 10 == 7 and len(choice) == 3 for choice in item.choices)


def test_wrong_answers_are_of_the_same_document_where_it_has_enough():
    long, short = list(range(60)), list(range(100, 110))
    of_long, of_short = [], []
    for item in make_items([long, short], 7, context=7, continuation=3):
        (of_long if item.context[0] < 100 else of_short).append(item)
    assert len(of_short) == 1
    assert all(choice[0] < 100 for item in of_long for choice in item.choices)
    assert sum(choice[0] < 100 for choice in of_short[0].choices) == 3


def test_the_seed_decides_the_questions():
    first, again, other = (make_items(DOCUMENTS, 5, 7, 3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_the_right_answer_stands_everywhere():
    assert {item.right for item in make_items([range(1000)], 60, 7, 3)} == {0, 1, 2, 3}


def test_the_same_continuation_elsewhere_is_no_wrong_answer():
    documents = [[*range(d, d + 7), 1, 2, 3] for d in range(20)] + [list(range(50 + d, 60 + d)) for d in range(3)]
    for item in make_items(documents, 23, context=7, continuation=3):
        assert len(set(item.choices)) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 13}, "must hold 13 passages of 10 tokens, and 4 continuations that differ, got 12 and 12"),
        ({"count": 3, "choices": 13}, "and 13 continuations that differ, got 12 and 12"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 3, "choices": 1}, "choices must be at least 2, got 1"),
    ],
)
def test_what_the_text_does_not_give_is_said(options, said):
    with pytest.raises(ValueError, match=said):
        make_items(DOCUMENTS, context=7, continuation=3, **options)
