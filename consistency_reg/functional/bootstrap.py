"""Confidence intervals in one streaming pass: a Poisson bootstrap over sequences.

A bootstrap draws N sequences of N with replacement; how often a sequence is drawn is close to Poisson(1), independently
of the others. So each replicate weighs every sequence by a Poisson number and its statistic is a weighted sum, to which
batches add as they come. The weight is a hash of (seed, replicate, number of the sequence): the same however the data
is cut into batches or spread over processes.
"""

import math

import torch
from torch import Tensor

CHUNK_SEQUENCES = 256  # bounds the [replicates, sequences] weights
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: steps of it spread over all 64 bits


def poisson_weights(sequence_index: Tensor, replicates: int, seed: int = 0) -> Tensor:
    """Return how often each replicate draws each sequence, Poisson(1): [N] int64 sequence numbers -> [R, N] uint8.

    Example:
        >>> poisson_weights(torch.arange(8), replicates=2)
        tensor([[0, 2, 1, 0, 3, 0, 0, 0],
                [1, 0, 0, 0, 1, 1, 1, 0]], dtype=torch.uint8)
    """
    replicate_R = torch.arange(replicates, device=sequence_index.device)
    key_R = _mix(_mix(replicate_R + _signed(seed * GOLDEN % 2**64)))
    uniform_RN = _shift(_mix(key_R[:, None] + sequence_index * _signed(GOLDEN)), 11)  # 53 bits
    weight_RN = torch.zeros(uniform_RN.shape, dtype=torch.uint8, device=sequence_index.device)
    for bound in _poisson_bounds():
        weight_RN += uniform_RN >= bound
    return weight_RN


def resampled_sums(statistic: Tensor, sequence_index: Tensor, replicates: int, seed: int = 0) -> Tensor:
    """Return the sum over sequences of a statistic in every replicate.

    Args:
        statistic: [N, ...], one entry for each sequence; integers or float64.
        sequence_index: [N] int64, the number of each sequence in the data set.
        replicates: R.
        seed: of the weights.

    Returns:
        [R, ...] in the dtype of the statistic; integers are exact while sums over 256 sequences stay below 2^53.
    """
    flat = statistic.flatten(1)
    total = torch.zeros(replicates, flat.shape[1], dtype=statistic.dtype, device=statistic.device)
    for part, index in zip(flat.split(CHUNK_SEQUENCES), sequence_index.split(CHUNK_SEQUENCES), strict=True):
        drawn = poisson_weights(index, replicates, seed).double() @ part.double()  # integers have no fast product
        total += drawn.to(total.dtype)
    return total.view(replicates, *statistic.shape[1:])


def percentile_interval(replicates: Tensor, level: float = 0.95) -> Tensor:
    """Return the central interval of a bootstrap: [..., R] values of the replicates, NaN for an empty one -> [..., 2].

    Example:
        >>> percentile_interval(torch.arange(101.0).double())
        tensor([ 2.5000, 97.5000], dtype=torch.float64)
    """
    tail = (1 - level) / 2
    at = torch.tensor([tail, 1 - tail], dtype=replicates.dtype, device=replicates.device)
    return replicates.nanquantile(at, dim=-1).movedim(0, -1)


def _poisson_bounds() -> list[int]:
    """Return ``2^53 P(X <= k)`` for k = 0, 1, ...: a uniform of 53 bits that reaches the first n is a Poisson n."""
    bounds, below = [], 0.0
    for k in range(19):
        below += math.exp(-1) / math.factorial(k)
        bounds.append(round(below * 2**53))
    return [bound for bound in bounds if bound < 2**53]


def _mix(x: Tensor) -> Tensor:
    """Mix 64 bits by the finalizer of SplitMix64 (public domain, S. Vigna), a bijection in which every bit counts."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Return the bits shifted to the right with zeros coming in; torch's own shift keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """Return the int64 with the bits of a uint64."""
    return x - (1 << 64) if x >= 1 << 63 else x
