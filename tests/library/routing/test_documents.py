"""Documents: the same as literal loops over tokens, with padding anywhere."""

import torch
from hypothesis import given
from reference import documents
from strategies import routings

from consistency_reg.routing.documents import document_ends, document_lengths, document_positions


@given(routings())
def test_positions_count_the_tokens_of_a_document(routing):
    expected = torch.full(routing.valid.shape, -1)
    for n, first, end in documents(*routing.arrays):
        expected[n, first:end] = torch.arange(end - first)
    assert torch.equal(document_positions(tuple(routing.valid.shape), **routing.masks), expected)


def test_masks_may_be_left_out():
    valid = torch.tensor([[True, False, True]])
    assert document_positions((1, 3)).tolist() == [[0, 1, 2]]
    assert document_positions((1, 3), valid).tolist() == [[0, -1, 0]]
    assert document_positions((1, 3), None, torch.tensor([[4, 4, 2]])).tolist() == [[0, 1, 0]]
    assert document_positions((2, 0)).shape == (2, 0)


def test_a_document_id_that_comes_back_is_a_new_document():
    assert document_positions((1, 5), None, torch.tensor([[1, 1, 2, 1, 1]])).tolist() == [[0, 1, 0, 0, 1]]


def test_padding_ends_a_document_even_if_its_id_goes_on():
    valid = torch.tensor([[True, True, False, True, True]])
    assert document_positions((1, 5), valid, torch.zeros(1, 5, dtype=torch.int64)).tolist() == [[0, 1, -1, 0, 1]]


@given(routings())
def test_lengths_are_those_of_the_documents(routing):
    expected = torch.zeros(routing.valid.shape, dtype=torch.int64)
    for n, first, end in documents(*routing.arrays):
        expected[n, first:end] = end - first
    position = document_positions(tuple(routing.valid.shape), **routing.masks)
    assert torch.equal(document_lengths(position), expected)


def test_a_pad_and_a_new_document_end_a_document():
    assert document_ends(torch.tensor([[0, 1, -1, 0, 0, 1]])).tolist() == [[False, True, False, True, False, True]]
