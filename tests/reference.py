"""Slow, obvious oracles: literal loops over the definitions, in NumPy and plain Python.

Nothing here is shared with the package, so that a mistake cannot be made twice in the same way.
"""

from fractions import Fraction

import numpy as np


def documents(valid, document_ids):
    """The documents of a batch as (row, first token, one past the last), in reading order."""
    found = []
    N, T = valid.shape
    for n in range(N):
        t = 0
        while t < T:
            if not valid[n, t]:
                t += 1
                continue
            first = t
            while t < T and valid[n, t] and document_ids[n, t] == document_ids[n, first]:
                t += 1
            found.append((n, first, t))
    return found


# --- SRP ----------------------------------------------------------------------------------------------------------


def window_histograms_oracle(expert_ids, num_experts, m, valid, document_ids):
    """H[n, e, j]: windows of m tokens of sequence n on which expert e is active j times."""
    N = len(expert_ids)
    H = np.zeros((N, num_experts, m + 1), dtype=np.int64)
    for n, first, end in documents(valid, document_ids):
        for p in range(first, end - m + 1):
            for e in range(num_experts):
                f = sum(1 for t in range(p, p + m) if e in expert_ids[n, t])
                H[n, e, f] += 1
    return H


def usage_oracle(expert_ids, num_experts, valid):
    """How many valid tokens each expert is active on."""
    usage = np.zeros(num_experts, dtype=np.int64)
    for n, t in np.argwhere(valid):
        for e in expert_ids[n, t]:
            usage[e] += 1
    return usage


def best_f1_oracle(H):
    """(F1, threshold, P, TP, A) of one histogram, F1 an exact fraction; the first maximum kept."""
    m = len(H) - 1
    A = sum(j * int(H[j]) for j in range(m + 1))
    best = None
    for a in range(m + 1):
        TP = sum(j * int(H[j]) for j in range(a, m + 1))
        P = m * sum(int(H[j]) for j in range(a, m + 1))
        F1 = Fraction(2 * TP, P + A) if P + A else Fraction(0)
        if best is None or best[0] < F1:
            best = (F1, a, P, TP, A)
    return best


def static_f1_oracle(usage, tokens):
    """The best F1 of a set that never changes, over the most used experts, as an exact fraction."""
    total = int(sum(usage))
    best, hits = Fraction(0), 0
    for size, count in enumerate(sorted((int(u) for u in usage), reverse=True), start=1):
        hits += count
        best = max(best, Fraction(2 * hits, size * tokens + total) if tokens else Fraction(0))
    return best
