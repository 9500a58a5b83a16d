"""Make multiple-choice questions of text: a passage, its continuation, and those of other passages."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Item:
    """Holds a passage and what may follow it.

    Attributes:
        context: token ids of the passage.
        choices: token ids of the continuations, all of one length.
        right: number of the passage's own continuation.
    """

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    right: int


def make_items(
    documents: Sequence[Sequence[int]],
    count: int,
    context: int = 12,
    continuation: int = 4,
    choices: int = 4,
    seed: int = 0,
) -> list[Item]:
    """Return questions whose wrong answers are continuations of other passages, of the same document where it has more.

    Documents are cut into passages that do not overlap; passages, wrong answers and the place of the right one are
    drawn by the seed. All models of one tokenizer get the same questions.

    Args:
        documents: token ids of each document.
        count: number of questions.
        context: tokens of a passage.
        continuation: tokens of what follows it.
        choices: answers to choose among.
        seed: of the draws.

    Raises:
        ValueError: a number below its least; too few passages, or too few that go on in different ways.

    Example:
        >>> items = make_items([range(40)], 2, context=3, continuation=2)
        >>> [item.choices[item.right][0] - item.context[-1] for item in items]
        [1, 1]
    """
    least = {"count": (count, 1), "context": (context, 1), "continuation": (continuation, 1), "choices": (choices, 2)}
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")
    length = context + continuation
    cut = [[tuple(ids[k : k + length]) for k in range(0, len(ids) - length + 1, length)] for ids in documents]
    passages = [(passage, document) for document, parts in enumerate(cut) for passage in parts]
    endings = [sorted({passage[context:] for passage in parts}) for parts in cut]
    every = sorted({ending for of_document in endings for ending in of_document})
    if len(passages) < count or len(every) < choices:
        raise ValueError(
            f"documents must hold {count} passages of {length} tokens, and {choices} continuations that differ, "
            f"got {len(passages)} and {len(every)}"
        )
    random = Random(seed)
    return [
        _item(passage, context, [endings[document], every], choices, random)
        for passage, document in random.sample(passages, count)
    ]


def _item(
    passage: tuple[int, ...],
    context: int,
    endings: Sequence[Sequence[tuple[int, ...]]],
    choices: int,
    random: Random,
) -> Item:
    """Return a question; the wrong answers are of the first endings, and of the later ones where those are too few."""
    own = passage[context:]
    answers: list[tuple[int, ...]] = []
    for known in endings:
        drawn = random.sample(known, min(len(known), 2 * choices))
        answers += [ending for ending in drawn if ending != own and ending not in answers]
    answers = answers[: choices - 1]
    right = random.randrange(choices)
    answers.insert(right, own)
    return Item(passage[:context], tuple(answers), right)
