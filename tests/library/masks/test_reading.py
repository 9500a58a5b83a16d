"""The one reader of batches: every form of mask, position and boundary gives the tokens and documents that it means."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consistency_reg.masks import batch_masks, count_tokens, labelled_tokens, read_masks
from consistency_reg.routing.documents import document_positions

PAD = 0


@st.composite
def batches(draw, *, padded=True, sides=("right", "left")):
    """(valid [B, T], document ids [B, T]): rows of documents, padded on one side."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    valid = torch.ones(B, T, dtype=torch.bool)
    for row in range(B):
        if padded:
            pads = draw(st.integers(0, T - 1))
            side = draw(st.sampled_from(sides))
            if pads:
                valid[row, -pads:] = side != "right"
                valid[row, :pads] &= side != "left"
    begins = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)))
    return valid, begins.long().cumsum(dim=1)


def same(found, valid, document_ids=None):
    """Whether what was read splits the tokens into the same documents."""
    right = document_positions(tuple(valid.shape), valid, document_ids)
    return torch.equal(document_positions(tuple(valid.shape), *found), right)


def square(valid, document_ids=None, *, window=None):
    """[B, T, T], where a causal query attends."""
    token = torch.arange(valid.shape[1])
    attended = (token[:, None] >= token[None]) & valid[:, None, :]
    if document_ids is not None:
        attended = attended & (document_ids[:, :, None] == document_ids[:, None, :])
    if window is not None:
        attended = attended & (token[:, None] - token[None] < window)
    return attended


def added(attended, dtype=torch.float32):
    return torch.where(attended, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def ids_like(valid):
    return torch.full(valid.shape, 7)


# --- masks --------------------------------------------------------------------------------------------------------

FLAT = {
    "bool": lambda valid: valid,
    "integers": lambda valid: valid.long(),
    "int32": lambda valid: valid.int(),
    "floats": lambda valid: valid.float(),
    "added": added,
    "added with infinity": lambda valid: torch.where(valid, 0.0, -float("inf")),
    "for one query": lambda valid: added(valid)[:, None, None, :],
    "bool for one query": lambda valid: valid[:, None, None, :],
}
SQUARE = {
    "bool": lambda attended: attended[:, None],
    "without heads": lambda attended: attended,
    "0 and 1": lambda attended: attended[:, None].long(),
    "floats of 0 and 1": lambda attended: attended[:, None].float(),
    "added": lambda attended: added(attended)[:, None],
    "added in bf16": lambda attended: added(attended, torch.bfloat16)[:, None],
    "added -10000": lambda attended: (1.0 - attended[:, None].float()) * -10000.0,
    "of each head": lambda attended: attended[:, None].expand(-1, 4, -1, -1),
    "with slopes": lambda attended: added(attended)[:, None] - torch.arange(attended.shape[1]) / 8,
}


@pytest.mark.parametrize("form", FLAT)
@settings(max_examples=20, deadline=None)
@given(batch=batches())
def test_masks_of_tokens(form, batch):
    valid, _ = batch
    if form == "floats" and not valid.any():
        return
    assert same(read_masks({"input_ids": ids_like(valid), "attention_mask": FLAT[form](valid)}), valid)


@pytest.mark.parametrize("form", SQUARE)
@settings(max_examples=20, deadline=None)
@given(batch=batches(), packed=st.booleans(), window=st.sampled_from([None, 2, 5]))
def test_masks_of_queries_and_keys_tell_pads_and_documents(form, batch, packed, window):
    valid, document_ids = batch
    document_ids = document_ids if packed else None
    mask = SQUARE[form](square(valid, document_ids, window=window))
    found = read_masks({"input_ids": ids_like(valid), "attention_mask": mask})
    assert same(found, valid, document_ids)


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_pads_on_the_left_that_attend_everything_are_pads(batch):
    """As kernels want it that give NaN for a query without a key."""
    valid, _ = batch
    attended = square(valid)
    attended = attended | ~attended.any(dim=-1, keepdim=True)
    if not attended.all():
        assert same(read_masks({"input_ids": ids_like(valid), "attention_mask": added(attended)[:, None]}), valid)


@pytest.mark.parametrize("window", [None, 3])
@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_pads_that_attend_themselves_are_pads(window, batch):
    """Two or more of them, which is where a mask can tell; on the left by their id."""
    valid, _ = batch
    attended = square(valid, window=window) | torch.eye(valid.shape[1], dtype=torch.bool)
    told = {"input_ids": ids_like(valid).where(valid, PAD), "attention_mask": added(attended)[:, None]}
    if not ((~valid).sum(dim=1) == 1).any() and valid.sum(dim=1).min() > 1:
        assert same(read_masks(told, pad_id=PAD), valid)


@settings(max_examples=20, deadline=None)
@given(batch=batches())
def test_bidirectional_masks_tell_pads(batch):
    valid, _ = batch
    attended = valid[:, None, :].expand(-1, valid.shape[1], -1)
    assert same(read_masks({"input_ids": ids_like(valid), "attention_mask": attended[:, None]}), valid)


@settings(max_examples=20, deadline=None)
@given(batch=batches(), packed=st.booleans())
def test_masks_for_each_kind_of_attention(batch, packed):
    valid, document_ids = batch
    document_ids = document_ids if packed else None
    full, sliding = square(valid, document_ids), square(valid, document_ids, window=2)
    chunks = torch.arange(valid.shape[1]) // 3
    chunked = full & (chunks[:, None] == chunks[None])
    for masks in (
        {"full_attention": full[:, None], "sliding_attention": sliding[:, None]},
        {"full_attention": added(full)[:, None], "chunked_attention": added(chunked)[:, None]},
        {"full_attention": full[:, None], "linear_attention": None},
    ):
        assert same(read_masks({"input_ids": ids_like(valid), "attention_mask": masks}), valid, document_ids)
    for masks in ({"full_attention": valid, "sliding_attention": valid}, {"full_attention": None, "other": valid}):
        assert same(read_masks({"input_ids": ids_like(valid), "attention_mask": masks}), valid)
    assert read_masks({"input_ids": ids_like(valid), "attention_mask": {"full_attention": None}}) == (None, None)


@settings(max_examples=10, deadline=None)
@given(batch=batches(), packed=st.booleans())
def test_masks_of_flex_attention(batch, packed):
    from torch.nn.attention.flex_attention import create_block_mask

    valid, document_ids = batch

    def mask_mod(row, head, query, key):
        attended = (query >= key) & valid[row, key]
        return attended & (document_ids[row, query] == document_ids[row, key]) if packed else attended

    B, T = valid.shape
    mask = create_block_mask(mask_mod, B, None, T, T, device="cpu")
    found = read_masks({"input_ids": ids_like(valid), "attention_mask": mask})
    assert same(found, valid, document_ids if packed else None)


def test_a_mask_of_numbers_numbers_documents():
    mask = torch.tensor([[1, 1, 2, 2, 2, 0]])
    valid, documents = torch.tensor([[True] * 5 + [False]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert same(read_masks({"attention_mask": mask}), valid, documents)


def test_a_mask_that_begins_with_a_tuned_prefix():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    told = {"input_ids": torch.ones(1, 4), "attention_mask": mask, "past_key_values": object()}
    assert read_masks(told)[0].tolist() == [[True, True, True, False]]
    with pytest.raises(ValueError, match=r"attention_mask must describe .* = \[1, 4\], got shape \[1, 6\]"):
        read_masks({"input_ids": torch.ones(1, 4), "attention_mask": mask})


# --- where documents begin ----------------------------------------------------------------------------------------


def positions_of(document_ids):
    return document_positions(tuple(document_ids.shape), None, document_ids)


def cumulative(document_ids):
    flat = document_ids + 100 * torch.arange(len(document_ids))[:, None]
    _, lengths = flat.flatten().unique_consecutive(return_counts=True)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


BOUNDARIES = {
    "document_ids": lambda d: {"document_ids": d},
    "seq_idx": lambda d: {"seq_idx": d.int()},
    "cu_seq_lens_q": lambda d: {"cu_seq_lens_q": cumulative(d)},
    "cu_seqlens": lambda d: {"cu_seqlens": cumulative(d)[None]},
    "position_ids": lambda d: {"position_ids": positions_of(d)},
    "position_ids of four": lambda d: {"position_ids": positions_of(d).expand(4, -1, -1)},
    "position_ids of three": lambda d: {"position_ids": positions_of(d).expand(3, -1, -1)},
    "all of them": lambda d: {"cu_seq_lens_q": cumulative(d), "position_ids": positions_of(d), "seq_idx": d.int()},
}


@pytest.mark.parametrize("form", BOUNDARIES)
@settings(max_examples=20, deadline=None)
@given(batch=batches(padded=False))
def test_boundaries_of_documents(form, batch):
    valid, document_ids = batch
    found = read_masks({"input_ids": ids_like(valid)} | BOUNDARIES[form](document_ids), pad_id=PAD)
    assert same(found, valid, document_ids)


@pytest.mark.parametrize("positions", [torch.tensor([0, 1, 2, 0, 1]), torch.tensor([[0, 1, 2, 0, 1]])])
@pytest.mark.parametrize("leading", [(), (3,), (4,)])
def test_one_row_of_positions_is_that_of_all_rows(positions, leading):
    """Models broadcast it."""
    positions = positions.expand(*leading, *positions.shape) if positions.dim() == 2 else positions
    _, document_ids = batch_masks({"input_ids": torch.zeros(3, 5, dtype=torch.int64), "position_ids": positions})
    assert document_ids.diff(dim=1).tolist() == [[0, 0, 1, 0]] * 3


def test_pictures_within_a_text_are_no_boundaries():
    """Time, height and width: text, a picture of 2 x 3 patches, text; then a document that begins with a picture."""
    first = [[0] * 3, [1] * 3, [2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4], [5] * 3, [6] * 3]
    second = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [2] * 3, [3] * 3]
    positions = torch.tensor(first + second).T[:, None]
    _, document_ids = batch_masks({"input_ids": torch.ones(1, 16), "position_ids": positions})
    assert document_ids.diff(dim=1).flatten().tolist() == [0] * 9 + [1] + [0] * 5


def test_positions_that_go_on_do_not_join_what_the_mask_keeps_apart():
    documents = torch.tensor([[0, 0, 1, 1]])
    mask = square(torch.ones(1, 4, dtype=torch.bool), documents)[:, None]
    _, found = read_masks({"attention_mask": mask, "position_ids": torch.arange(4)[None]})
    assert found.diff(dim=1).tolist() == [[0, 1, 0]]


# --- pads without a mask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens_q", "seq_idx"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("pad_id", [PAD, None])
def test_pads_behind_packed_documents_are_no_documents(boundaries, labels, pad_id):
    ids = torch.tensor([[5, 6, 7, 8, 9, 6, 0, 0, 0]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 3, 4]])
    told = {"input_ids": ids} | BOUNDARIES[boundaries](documents)
    if labels:
        told["labels"] = ids.masked_fill(ids == 0, -100)
    valid, found = read_masks(told, pad_id=pad_id)
    assert valid.tolist() == [[True] * 6 + [False] * 3]
    assert same((valid, found), valid, documents)


def test_a_last_document_of_one_token_is_none_of_them():
    ids, documents = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 2]])
    for pad_id in (PAD, None):
        assert read_masks({"input_ids": ids, "document_ids": documents}, pad_id=pad_id)[0].all()
    with_label = {"input_ids": torch.tensor([[5, 6, 0, 0]]), "document_ids": documents, "labels": torch.ones(1, 4)}
    assert read_masks(with_label, pad_id=PAD)[0].all()


def test_tokens_behind_the_last_boundary_and_below_number_0_are_pads():
    ids = torch.ones(1, 6)
    assert read_masks({"input_ids": ids, "cu_seqlens": torch.tensor([0, 2, 4])})[0].tolist() == [
        [True] * 4 + [False] * 2
    ]
    seq_idx = torch.tensor([[0, 0, 1, 1, -1, -1]])
    assert read_masks({"input_ids": ids, "seq_idx": seq_idx})[0].tolist() == [[True] * 4 + [False] * 2]


def test_labels_are_no_mask():
    ids = torch.tensor([[5, 6, 7, 8]])
    assert read_masks({"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 8]])}) == (None, None)


# --- batches ------------------------------------------------------------------------------------------------------


def test_batches_of_any_kind():
    mask = torch.tensor([[1, 1, 0]])
    for batch in (
        {"attention_mask": mask},
        namedtuple("Batch", ["attention_mask"])(mask),
        SimpleNamespace(attention_mask=mask),
    ):
        assert batch_masks(batch)[0].tolist() == [[True, True, False]]
    for nothing in (None, mask, [mask], (mask, mask), "text", 3):
        assert batch_masks(nothing) == (None, None)


def test_tokens_are_counted_in_batches_of_batches():
    ids = torch.ones(2, 3, dtype=torch.int64)
    masked = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert count_tokens(masked) == 3
    assert count_tokens({"code": masked, "text": {"input_ids": ids}}) == 9
    assert count_tokens([masked, None, [ids, "name"]]) == 9
    assert count_tokens({"inputs_embeds": torch.ones(2, 3, 4), "labels": ids}) == 0


def test_labelled_tokens():
    labels = torch.tensor([[-100, 4, 5], [-100, -100, 6]])
    shifted = torch.tensor([[4, 5, -100], [-100, 6, -100]])
    expected = [[False, True, True], [False, False, True]]
    assert labelled_tokens({"labels": labels}, (2, 3)).tolist() == expected
    assert labelled_tokens({"shift_labels": shifted}, (2, 3)).tolist() == expected
    with pytest.raises(ValueError, match=r"needs labels of the tokens \[B, T\] = \[2, 4\], got \[2, 3\]"):
        labelled_tokens({"labels": labels}, (2, 4))


REFUSED = {
    "attention_mask": torch.ones(2, 5),
    "document_ids": torch.ones(2, 5, dtype=torch.int64),
    "seq_idx": torch.ones(3, 4, dtype=torch.int64),
    "position_ids": torch.ones(2, 5, dtype=torch.int64),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_describe_the_tokens_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must describe .* = \[2, 4\], got shape .*masks="):
        read_masks({"input_ids": torch.ones(2, 4), name: REFUSED[name]})
    with pytest.raises(ValueError, match=rf"{name} must describe .*got str"):
        read_masks({"input_ids": torch.ones(2, 4), name: "text"})


def test_a_mask_on_an_accelerator_is_read_without_a_wait_for_it():
    ids, mask = torch.ones(2, 4, dtype=torch.int64, device="meta"), torch.ones(2, 4, dtype=torch.int64, device="meta")
    valid, document_ids = read_masks({"input_ids": ids, "attention_mask": mask})  # a meta tensor has no value to read
    assert valid.shape == document_ids.shape == (2, 4)
