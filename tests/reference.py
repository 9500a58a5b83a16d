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


# --- caches -------------------------------------------------------------------------------------------------------


def cache_hits_oracle(document, size, policy, m=None):
    """Hits of one document, [T, K] ids, with a cache of ``size`` slots that is really simulated.

    ``policy`` is "lru", "lfu", "belady" or "sch" with its window of m tokens.
    """
    T = len(document)
    resident, used_at, uses, hits = set(), {}, {}, 0

    def next_use(e, t, served):
        return next((u for u in range(t, T) if e in document[u] and not (u == t and e in served)), T)

    def window_uses(e, t, served):
        return sum(1 for u in range(t, min(t + m, T)) if e in document[u] and not (u == t and e in served))

    def priority(e, t, served):
        first = {
            "lru": lambda: 0,
            "lfu": lambda: uses[e],
            "belady": lambda: -next_use(e, t, served),
            "sch": lambda: window_uses(e, t, served),
        }[policy]()
        return first, used_at[e]

    for t in range(T):
        before, known, first_uses = set(resident), set(uses), 0
        for e in document[t]:
            if e in known:
                hits += e in before
            else:
                hits += size > len(known) + first_uses
                first_uses += 1
        served = set()
        for k, e in enumerate(document[t]):
            served.add(e)
            uses[e] = uses.get(e, 0) + 1
            used_at[e] = (t, k)
            if e not in resident:
                if len(resident) == size:
                    resident.remove(min(resident, key=lambda r: priority(r, t, served)))
                resident.add(e)
    return hits


def fixed_set_hits_oracle(corpus, num_experts):
    """Hits of each document, for every size of a fixed set of the most used experts; the lower id first on ties."""
    usage = [sum(e in token for document in corpus for token in document) for e in range(num_experts)]
    by_usage = sorted(range(num_experts), key=lambda e: (-usage[e], e))
    return [
        [sum(e in by_usage[:size] for token in document for e in token) for size in range(1, num_experts + 1)]
        for document in corpus
    ]


# --- balance ------------------------------------------------------------------------------------------------------


def cv_oracle(values):
    """Standard deviation over mean; 0 when the mean is 0."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return variance**0.5 / mean if mean else 0.0


def local_cv_oracle(expert_ids, num_experts, m, valid, document_ids):
    """Mean over all windows of m tokens (all documents when m is None) of the CV of the experts' usage in it."""
    found = []
    for n, first, end in documents(valid, document_ids):
        length = end - first if m is None else m
        for p in range(first, end - length + 1):
            found.append(
                cv_oracle([sum(e in expert_ids[n, t] for t in range(p, p + length)) for e in range(num_experts)])
            )
    return sum(found) / len(found) if found else 0.0


def overlap_oracle(expert_ids, valid, document_ids):
    """(experts that a token shares with its predecessor, experts of tokens that have one), summed."""
    shared = accesses = 0
    for n, first, end in documents(valid, document_ids):
        for t in range(first + 1, end):
            shared += len(set(expert_ids[n, t]) & set(expert_ids[n, t - 1]))
            accesses += len(expert_ids[n, t])
    return shared, accesses


# --- published losses ---------------------------------------------------------------------------------------------


def _mean(values):
    return sum(values) / len(values) if values else 0.0


def _sym_kl(p, q):
    return 0.5 * float(np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p)))


def _pairs(valid, document_ids, distance):
    for n, first, end in documents(valid, document_ids):
        for t in range(first + distance, end):
            yield n, t


def remoe_oracle(p, expert_ids, valid, document_ids, *, smooth, lag, working_set, distances, window):
    """ReMoE's loss on distributions p [N, T, E]."""
    K = expert_ids.shape[-1]
    shares = [sum(p[n, t, e] for e in expert_ids[n, t - 1]) / K for n, t in _pairs(valid, document_ids, 1)]
    loss = -np.log(_mean(shares) + 1e-8) if shares else 0.0

    def divergences(d):
        return [_sym_kl(p[n, t], p[n, t - d]) for n, t in _pairs(valid, document_ids, d)]

    loss += smooth * _mean(divergences(1))
    loss += lag * _mean([_mean(divergences(d)) for d in distances if divergences(d)])
    entropies = []
    for n, first, end in documents(valid, document_ids):
        for start in range(first, end - window + 1, window):
            q = np.mean([p[n, t] for t in range(start, start + window)], axis=0)
            entropies.append(-float(np.sum(q * np.log(q))))
    return loss + working_set * _mean(entropies)


def sticky_oracle(p, valid, document_ids, *, smooth, anchor, window):
    """StickyMoE's soft-hard loss on distributions p [N, T, E]."""
    costs = []
    for n, first, end in documents(valid, document_ids):
        for t in range(first + 1, end):
            s = first + (t - first) // window * window
            step = np.sum((p[n, t] - p[n, t - 1]) ** 2)
            drift = np.sum((p[n, t] - p[n, s]) ** 2)
            costs.append(smooth * step + anchor * (t - s) / window * drift)
    return _mean(costs)


def adjacent_oracle(p, valid, document_ids):
    """1 - <p_t, p_{t-1}> on distributions p [N, T, E]."""
    return _mean([1 - float(p[n, t] @ p[n, t - 1]) for n, t in _pairs(valid, document_ids, 1)])


def melinoe_oracle(requests, kept, valid, document_ids, *, top_k, slots, decay):
    """MELINOE's soft misses per token; ``kept`` [N, T, E] is what the cache takes up of the ``requests``."""
    E = requests.shape[-1]
    misses = []
    for n, first, end in documents(valid, document_ids):
        c, Z = np.full(E, slots / E), 1.0
        for t in range(first, end):
            misses.append(float(requests[n, t] @ (1 - c)))
            Z_next = decay * Z + top_k / slots
            c = (decay * Z * c + kept[n, t]) / Z_next
            Z = Z_next
    return _mean(misses)


def anchor_oracle(p, p_ref, valid):
    """KL(p ‖ p_ref) averaged over the valid tokens."""
    return _mean([float(np.sum(p[n, t] * np.log(p[n, t] / p_ref[n, t]))) for n, t in np.argwhere(valid)])


# --- specialization -----------------------------------------------------------------------------------------------


def grouped_usage_oracle(expert_ids, num_experts, group_ids, num_groups, valid):
    """How many valid tokens of each group each expert is active on: [G, E]."""
    usage = np.zeros((num_groups, num_experts), dtype=np.int64)
    for n, t in np.argwhere(valid):
        for e in expert_ids[n, t]:
            usage[group_ids[n, t], e] += 1
    return usage


def domain_specialization_oracle(usage, tokens):
    """For each expert, the CV over the domains that have tokens of its usage share; NaN if it is never used."""
    found = []
    for e in range(usage.shape[1]):
        shares = [usage[d, e] / tokens[d] for d in range(len(tokens)) if tokens[d]]
        found.append(cv_oracle(shares) if any(shares) else float("nan"))
    return found


def vocabulary_specialization_oracle(usage, favourites):
    """For each expert, the share of its activations that its most frequent token ids hold; NaN if it is never used."""
    found = []
    for e in range(usage.shape[1]):
        counts = sorted(usage[:, e], reverse=True)
        found.append(sum(counts[:favourites]) / sum(counts) if sum(counts) else float("nan"))
    return found
