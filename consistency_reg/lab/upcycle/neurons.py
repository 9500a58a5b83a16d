"""Group the neurons of a dense MLP into equal parts by co-activation on a calibration text."""

import torch
from torch import Tensor

ROUNDS = 12  # of k-means; the assignment has settled long before on all models that were tried


def neuron_strength(gate: Tensor, up: Tensor, down: Tensor, activation: torch.nn.Module, inputs: Tensor) -> Tensor:
    """Return how strongly each neuron of a gated MLP writes on each token.

    The MLP is ``down(activation(gate x) * up x)``; neuron j writes ``activation(g_j x) * (u_j x)`` times column j of
    ``down``, and its strength is the norm of that.

    Args:
        gate: [F, H] weights.
        up: [F, H] weights.
        down: [H, F] weights.
        activation: of the gate.
        inputs: [N, H] hidden states that the MLP was given.

    Returns:
        [N, F], at least 0.
    """
    written = activation(inputs @ gate.T) * (inputs @ up.T)
    return written.abs() * down.norm(dim=0)


def balanced_clusters(features: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """Return the part of each item, parts of equal size, by k-means on the sphere.

    Each round gives the pairs of item and center their places in the order of their cosine, the most similar first,
    as long as the part has room; then centers move to the mean of their items. The best round counts.

    Args:
        features: [F, M], a row for each item; F a multiple of ``parts``.
        parts: how many.
        generator: draws the first centers.

    Returns:
        [F] int64 in 0..parts-1.

    Raises:
        ValueError: F is no multiple of ``parts``.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
        >>> part = balanced_clusters(rows, 2, torch.Generator().manual_seed(0))
        >>> bool(part[0] == part[2]), bool(part[1] == part[3]), part.bincount().tolist()
        (True, True, [2, 2])
    """
    items = len(features)
    if items % parts:
        raise ValueError(f"parts must divide the {items} items, got {parts}")
    points = torch.nn.functional.normalize(features.float(), dim=1)
    centers = points[torch.randperm(items, generator=generator)[:parts]]
    best, best_similarity = torch.zeros(items, dtype=torch.int64), -float("inf")
    for _ in range(ROUNDS):
        similarity = points @ centers.T
        part = _fill(similarity, items // parts)
        total = float(similarity.gather(1, part[:, None]).sum())
        if total <= best_similarity:
            break
        best, best_similarity = part, total
        sums = torch.zeros_like(centers).index_add_(0, part, points)
        centers = torch.nn.functional.normalize(sums, dim=1)
    return best


def _fill(similarity: Tensor, room: int) -> Tensor:
    """Assign items to parts of ``room`` places each, the most similar pairs first: [F, P] -> [F]."""
    items, parts = similarity.shape
    part, left = [-1] * items, [room] * parts
    for pair in similarity.flatten().argsort(descending=True).tolist():
        item, center = divmod(pair, parts)
        if part[item] < 0 and left[center]:
            part[item] = center
            left[center] -= 1
    return torch.tensor(part)


def router_weights(inputs: Tensor, strength: Tensor, scale: float, ridge: float = 1e-2) -> Tensor:
    """Return the weights of a linear router that predicts which experts write most.

    A ridge regression from the inputs to the strength of each expert, less that expert's mean so that no expert is
    preferred everywhere; then all weights are scaled so that the logits have standard deviation ``scale``.

    Args:
        inputs: [N, H] hidden states.
        strength: [N, E] how strongly each expert writes.
        scale: standard deviation of the logits on the inputs; 0 makes every expert equal.
        ridge: times the mean of the inputs' squares, added to the diagonal of the normal equations.

    Returns:
        [E, H] float32.
    """
    inputs, strength = inputs.double(), strength.double()
    target = (strength - strength.mean(dim=0)) / strength.std(dim=0).clamp_min(1e-12)
    gram = inputs.T @ inputs
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, inputs.T @ target).T
    spread = (inputs @ weights.T).std()
    return (weights * (scale / spread.clamp_min(1e-12))).float()
