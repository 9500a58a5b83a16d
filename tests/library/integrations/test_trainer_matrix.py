"""The term's gradient in every trainer is as docs/trainers/matrix.md says; all cells in the slow tests."""

import pytest
from trainer_matrix import DOCUMENT, cells, document, examine, read, verdicts

PAGE = DOCUMENT.read_text(encoding="utf-8")
TOLD = read(PAGE)


def representatives():
    """Of each trainer, head and loss the first batch form, with the most micro-batches."""
    chosen = {(cell.trainer, cell.head, cell.loss): cell for cell in reversed(list(cells()))}
    most = {}
    for cell in cells():
        first = chosen[cell.trainer, cell.head, cell.loss]
        if cell.form == first.form:
            most[cell.trainer, cell.head, cell.loss] = cell
    return list(most.values())


def marked(cell):
    marks = [pytest.mark.slow] if "torch.compile" in cell.trainer else []
    return pytest.param(cell, marks=marks, id=str(cell))


@pytest.mark.parametrize("cell", map(marked, representatives()))
def test_each_trainer_head_and_loss_is_as_the_page_says(cell):
    assert examine(cell)[0] == TOLD[cell.key]


def test_the_page_has_every_cell():
    assert list(TOLD) == [cell.key for cell in cells()]


@pytest.mark.slow
def test_the_page_is_what_the_trainers_give():
    assert document(verdicts()) == PAGE


def test_every_refusal_names_what_to_use():
    for message in set(TOLD.values()) - {"exact"}:
        assert "ConsistencyCallback(...).add_to(trainer)" in message
        assert "scale=1 / micro-batches" in message
