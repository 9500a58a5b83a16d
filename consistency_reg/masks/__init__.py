"""Read which tokens of a batch are real and where its documents begin, in every form that trainers give them."""

from consistency_reg.masks.batches import Masks, Shape, given_by, has_tokens, named_arguments, token_ids, token_shape
from consistency_reg.masks.reading import batch_masks, count_tokens, labelled_tokens, read_masks

__all__ = [
    "Masks",
    "Shape",
    "batch_masks",
    "count_tokens",
    "given_by",
    "has_tokens",
    "labelled_tokens",
    "named_arguments",
    "read_masks",
    "token_ids",
    "token_shape",
]
