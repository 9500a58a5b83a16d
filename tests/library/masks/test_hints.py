"""What hints at padding or boundaries without being read: by its name, where nothing that is read tells."""

import pytest
import torch

from consistency_reg.masks.hints import inner_batches, is_hint, looks_padded, unread_hints

ONE = torch.ones(1, 4)


@pytest.mark.parametrize(
    "name",
    [
        "segment_ids",
        "inputs_segmentation",
        "doc_ids",
        "document_index",
        "doc_lens",
        "sample_ids",
        "example_ids",
        "sequence_id",
        "packed_seq_params",
        "cu_seqlens_padded",
        "block_mask",
        "boundaries",
        "input_pos",
        "document_mask",
    ],
)
def test_boundaries(name):
    assert unread_hints({"input_ids": ONE}, {name: ONE}, {}) == ([name], [])
    assert unread_hints({"attention_mask": ONE}, {name: ONE}, {}) == ([name], [])
    assert unread_hints({"position_ids": ONE}, {name: ONE}, {}) == ([], [])
    assert unread_hints({"attention_mask": ONE[:, None, None].expand(1, 1, 4, 4)}, {name: ONE}, {}) == ([], [])


@pytest.mark.parametrize(
    "name", ["mask", "attn_mask", "padding_mask", "src_key_padding_mask", "pads", "lengths", "lens", "length"]
)
def test_padding(name):
    assert unread_hints({"input_ids": ONE}, {}, {name: ONE}) == ([], [name])
    assert unread_hints({"attention_mask": ONE}, {name: ONE}, {}) == ([], [])
    assert unread_hints({"position_ids": ONE}, {name: ONE}, {}) == ([], [name])


@pytest.mark.parametrize(
    "name",
    [
        "input_ids",
        "labels",
        "completion_mask",
        "assistant_masks",
        "special_tokens_mask",
        "pixel_attention_mask",
        "image_grid_thw",
        "head_mask",
        "visual_pos_masks",
        "cross_attention_mask",
        "decoder_attention_mask",
        "loss_mask",
        "bool_masked_pos",
        "max_length_q",
        "position_bias",
        "past_key_values_length",
        "input_features_mask",
        "token_type_ids",
        "position_embeddings",
        "text",
        "compass",
        "parameters",
    ],
)
def test_what_says_nothing_of_the_tokens(name):
    assert not is_hint(name, ONE)


@pytest.mark.parametrize("value", [None, 3, 0.5, True, "right", torch.tensor(4)])
def test_a_number_or_a_word_describes_no_tokens(value):
    assert not is_hint("lengths", value)


def test_what_the_model_was_not_given_of_what_is_read():
    batch = {"attention_mask": ONE, "document_ids": ONE}
    assert unread_hints({"input_ids": ONE}, batch, {}) == (["document_ids"], ["attention_mask"])
    assert unread_hints({"attention_mask": ONE}, batch, {}) == (["document_ids"], [])
    assert unread_hints({"input_ids": ONE}, batch, {}, encoder_decoder=True) == ([], [])


def test_batches_within_a_batch():
    batch = [{"code": {"attention_mask": ONE}}, ({"text": [{"doc_ids": ONE, 3: ONE, "none": None}]}, "text")]
    assert {"attention_mask", "doc_ids"} < set(inner_batches(batch))
    assert not {3, "none"} & set(inner_batches(batch))


def test_what_looks_padded():
    assert looks_padded({"input_ids": torch.tensor([[5, 6, 0, 0]])}, 0)
    assert looks_padded({"input_ids": torch.tensor([[0, 0, 5, 6]])}, 0)
    assert not looks_padded({"input_ids": torch.tensor([[5, 6, 7, 0]])}, 0)  # an end of text that is the pad, too
    assert not looks_padded({"input_ids": torch.tensor([[5, 6, 0, 0]])}, None)
