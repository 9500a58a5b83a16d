"""Slow, obvious oracles: literal loops over the definitions, in NumPy and plain Python.

Nothing here is shared with the package, so that a mistake cannot be made twice in the same way.
"""

from fractions import Fraction
from math import exp, factorial

import numpy as np


def documents(valid, document_ids):
    """Return the documents of a batch as (row, first token, one past the last), in reading order."""
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
    """Count H[n, e, j], the windows of m tokens of sequence n on which expert e is active j times."""
    N = len(expert_ids)
    H = np.zeros((N, num_experts, m + 1), dtype=np.int64)
    for n, first, end in documents(valid, document_ids):
        for p in range(first, end - m + 1):
            for e in range(num_experts):
                f = sum(1 for t in range(p, p + m) if e in expert_ids[n, t])
                H[n, e, f] += 1
    return H


def usage_oracle(expert_ids, num_experts, valid):
    """Count how many valid tokens each expert is active on."""
    usage = np.zeros(num_experts, dtype=np.int64)
    for n, t in np.argwhere(valid):
        for e in expert_ids[n, t]:
            usage[e] += 1
    return usage


def best_f1_oracle(H):
    """Return (F1, threshold, P, TP, A) of one histogram, F1 an exact fraction; the first maximum kept."""
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
    """Return the best F1 of a set that never changes, over the most used experts, as an exact fraction."""
    total = int(sum(usage))
    best, hits = Fraction(0), 0
    for size, count in enumerate(sorted((int(u) for u in usage), reverse=True), start=1):
        hits += count
        best = max(best, Fraction(2 * hits, size * tokens + total) if tokens else Fraction(0))
    return best


# --- bootstrap ----------------------------------------------------------------------------------------------------


def poisson_weight_oracle(sequence, replicate, seed):
    """Return how often a replicate draws a sequence: SplitMix64 in plain integers, then the Poisson(1) quantile."""

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix(mix((replicate + seed * golden) % 2**64))
    uniform = Fraction(mix((key + sequence * golden) % 2**64) >> 11, 2**53)
    weight, below, term = 0, 0.0, exp(-1)
    while weight < 18:
        below += term / factorial(weight)
        if uniform < Fraction(round(below * 2**53), 2**53):
            break
        weight += 1
    return weight


def resampled_means_oracle(rates_by_row, weights):
    """Return the mean over documents in every replicate, documents being drawn with their row; NaN for an empty one."""
    means = []
    for w in weights:
        drawn = [rate for row, rate in rates_by_row for _ in range(int(w[row]))]
        means.append(sum(drawn) / len(drawn) if drawn else float("nan"))
    return means


# --- caches -------------------------------------------------------------------------------------------------------


def cache_hits_oracle(document, size, policy, m=None, replay="token", cold="free"):
    """Count the hits of one document, [T, K] ids, with a cache of ``size`` slots that is really simulated.

    ``policy`` is "lru", "lfu", "belady" or "sch" with its window of m tokens.
    """
    hit = cache_access_hits_oracle(document, size, policy, m, replay, cold)
    return sum(sum(token) for token in hit)


def cache_access_hits_oracle(document, size, policy, m=None, replay="token", cold="free"):
    """Return whether each access of one document hits, [T][K]; see :func:`cache_hits_oracle`."""
    if replay == "access":
        alone = cache_access_hits_oracle([[e] for token in document for e in token], size, policy, m, "token", cold)
        found = iter(hit for (hit,) in alone)
        return [[next(found) for _ in token] for token in document]
    T = len(document)
    resident, used_at, uses, hits = set(), {}, {}, []

    def next_use(e, t, served):
        accesses = [(u, k) for u in range(t, T) for k, x in enumerate(document[u]) if x == e]
        return next((a for a in accesses if not (a[0] == t and e in served)), (T, 0))

    def window_uses(e, t, served):
        return sum(1 for u in range(t, min(t + m, T)) if e in document[u] and not (u == t and e in served))

    def priority(e, t, served):
        u, k = next_use(e, t, served)
        first = {
            "lru": lambda: 0,
            "lfu": lambda: uses[e],
            "belady": lambda: (-u, -k),
            "sch": lambda: window_uses(e, t, served),
        }[policy]()
        return first, used_at[e]

    for t in range(T):
        known, first_uses = set(uses), 0
        hits.append([])
        for e in document[t]:
            if e in known:
                hits[-1].append(e in resident)
            else:
                hits[-1].append(cold == "free" and size > len(known) + first_uses)
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
    """Count each document's hits for every size of a fixed set of the most used experts; the lower id first on ties."""
    usage = [sum(e in token for document in corpus for token in document) for e in range(num_experts)]
    by_usage = sorted(range(num_experts), key=lambda e: (-usage[e], e))
    return [
        [sum(e in by_usage[:size] for token in document for e in token) for size in range(1, num_experts + 1)]
        for document in corpus
    ]


# --- Routing that knows the cache ---------------------------------------------------------------------------------


def cache_aware_oracle(scores, top_k, slots, strength, guaranteed, valid, document_ids, method):
    """Return (ids, hits) by (row, token) of a router [N, T, E] that prefers the experts in a simulated LRU cache."""
    ids, hits = {}, {}
    for n, first, end in documents(valid, document_ids):
        cache, ranges = [], []  # least recently used first
        for t in range(first, end):
            z = scores[n, t]
            by_z = sorted(range(len(z)), key=lambda e: -z[e])
            ranges.append(max(z) - min(z))
            if method == "prior":
                bonus = strength * sum(ranges) / len(ranges)
                order = sorted(by_z, key=lambda e: -(z[e] + (bonus if e in cache else 0)))
            else:
                reach = int(strength) if method == "max_rank" else 0
                p = np.exp(z - max(z)) / np.exp(z - max(z)).sum()
                while method == "cumulative" and sum(p[e] for e in by_z[:reach]) < strength and reach < len(z):
                    reach += 1
                order = sorted(by_z, key=lambda e: not (e in by_z[:reach] and e in cache))
            best = by_z[:guaranteed]
            chosen = (best + [e for e in order if e not in best])[:top_k]
            ids[n, t] = sorted(chosen, key=lambda e: -z[e])
            hits[n, t] = [e in cache for e in ids[n, t]]
            for e in reversed(ids[n, t]):  # the best becomes the most recent
                if e in cache:
                    cache.remove(e)
                cache.append(e)
            del cache[: max(0, len(cache) - slots)]
    return ids, hits


# --- balance ------------------------------------------------------------------------------------------------------


def cv_oracle(values):
    """Return standard deviation over mean; 0 when the mean is 0."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return variance**0.5 / mean if mean else 0.0


def local_cv_oracle(expert_ids, num_experts, m, valid, document_ids):
    """Return the mean CV of the experts' usage in all windows of m tokens, or in all documents when m is None."""
    found = []
    for n, first, end in documents(valid, document_ids):
        length = end - first if m is None else m
        for p in range(first, end - length + 1):
            found.append(
                cv_oracle([sum(e in expert_ids[n, t] for t in range(p, p + length)) for e in range(num_experts)])
            )
    return sum(found) / len(found) if found else 0.0


def overlap_oracle(expert_ids, valid, document_ids):
    """Count the experts that tokens share with their predecessor, and the experts of tokens that have one."""
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
    """Return ReMoE's loss on distributions p [N, T, E]."""
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
    """Return StickyMoE's soft-hard loss on distributions p [N, T, E]."""
    costs = []
    for n, first, end in documents(valid, document_ids):
        for t in range(first + 1, end):
            s = first + (t - first) // window * window
            step = np.sum((p[n, t] - p[n, t - 1]) ** 2)
            drift = np.sum((p[n, t] - p[n, s]) ** 2)
            costs.append(smooth * step + anchor * (t - s) / window * drift)
    return _mean(costs)


def adjacent_oracle(p, valid, document_ids):
    """Return 1 - <p_t, p_{t-1}> on distributions p [N, T, E]."""
    return _mean([1 - float(p[n, t] @ p[n, t - 1]) for n, t in _pairs(valid, document_ids, 1)])


def bles_oracle(p, expert_ids, valid, document_ids):
    """Return CoSMoEs' block-wise loss on distributions p [N, T, E]."""
    pairs = list(_pairs(valid, document_ids, 1))
    H = sum(len(set(expert_ids[n, t]) ^ set(expert_ids[n, t - 1])) for n, t in pairs)
    steps = sum(float(np.abs(p[n, t] - p[n, t - 1]).sum()) for n, t in pairs)
    return H // 2 / (len(pairs) * expert_ids.shape[-1]) * steps / int(valid.sum()) if pairs else 0.0


def melinoe_oracle(requests, kept, valid, document_ids, *, top_k, slots, decay):
    """Return MELINOE's soft misses per token; ``kept`` [N, T, E] is what the cache takes up of the ``requests``."""
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
    """Return KL(p ‖ p_ref) averaged over the valid tokens."""
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
    """Return for each expert the CV over the domains that have tokens of its usage share; NaN if it is never used."""
    found = []
    for e in range(usage.shape[1]):
        shares = [usage[d, e] / tokens[d] for d in range(len(tokens)) if tokens[d]]
        found.append(cv_oracle(shares) if any(shares) else float("nan"))
    return found


def vocabulary_specialization_oracle(usage, favourites):
    """Return for each expert the share of its uses that its most frequent token ids hold; NaN if it is never used."""
    found = []
    for e in range(usage.shape[1]):
        counts = sorted(usage[:, e], reverse=True)
        found.append(sum(counts[:favourites]) / sum(counts) if sum(counts) else float("nan"))
    return found


# --- Local-consistency losses -------------------------------------------------------------------------------------


def windows_oracle(m, valid, document_ids):
    """Return every window of m tokens of one document, as (row, its tokens)."""
    return [(n, range(p, p + m)) for n, first, end in documents(valid, document_ids) for p in range(first, end - m + 1)]


def srp_worth_oracle(expert_ids, num_experts, m, valid, document_ids):
    """Return g[n, t, e], the worth to SRP of activating e on t: ``(2 R - F1*) / D``, summed over the windows over t."""
    worth = np.zeros((*valid.shape, num_experts))
    F1, threshold, P, _, A = best_f1_oracle(
        window_histograms_oracle(expert_ids, num_experts, m, valid, document_ids).sum(axis=(0, 1))
    )
    for n, tokens in windows_oracle(m, valid, document_ids):
        for e in range(num_experts):
            R = 1 if sum(1 for t in tokens if e in expert_ids[n, t]) >= threshold else 0
            for t in tokens:
                worth[n, t, e] += (2 * R - float(F1)) / (P + A)
    return worth


def relaxed_srp(soft, expert_ids, num_experts, m, valid, document_ids):
    """Return SRP with the activations made soft, and all that the hard ones decide held fixed, less a constant.

    ``sum over windows w and experts e of (2 R[e, w] - F1*) * sum_{t in w} soft[t, e] / D``, where R, F1* and
    ``D = m * sum(R) + sum(f)`` are those of the hard activations. None where there is no window.
    """
    windows = windows_oracle(m, valid, document_ids)
    if not windows:
        return None
    F1, threshold, P, _, A = best_f1_oracle(
        window_histograms_oracle(expert_ids, num_experts, m, valid, document_ids).sum(axis=(0, 1))
    )
    total = 0.0
    for n, tokens in windows:
        for e in range(num_experts):
            f = sum(1 for t in tokens if e in expert_ids[n, t])
            R = 1 if f >= threshold else 0
            total += (2 * R - float(F1)) * sum(soft[n, t, e] for t in tokens) / (P + A)
    return total


def srp_at_fixed_sets(activations, expert_ids, num_experts, m, valid, document_ids):
    """Return ``2 sum(R f) / (m sum(R) + sum(f))`` for any activations, with the resident sets R of ``expert_ids``."""
    _, threshold, P, _, _ = best_f1_oracle(
        window_histograms_oracle(expert_ids, num_experts, m, valid, document_ids).sum(axis=(0, 1))
    )
    hits = used = 0.0
    for n, tokens in windows_oracle(m, valid, document_ids):
        for e in range(num_experts):
            resident = sum(1 for t in tokens if e in expert_ids[n, t]) >= threshold
            f = sum(activations[n, t, e] for t in tokens)
            hits += f if resident else 0.0
            used += f
    return 2 * hits / (P + used)


def lru_residents_oracle(expert_ids, num_experts, slots, valid, document_ids):
    """Return [N, T, E] what a literal LRU cache of ``slots`` holds before each token; empty at a document's start."""
    resident = np.zeros((*valid.shape, num_experts), dtype=bool)
    for n, first, end in documents(valid, document_ids):
        cache = []  # least recently used first
        for t in range(first, end):
            resident[n, t, cache] = True
            for e in expert_ids[n, t]:
                if e in cache:
                    cache.remove(e)
                elif len(cache) == slots:
                    cache.pop(0)
                cache.append(int(e))
    return resident


def lru_hits_oracle(expert_ids, num_experts, slots, valid, document_ids):
    """Return (hits, accesses), hits counted against the cache as it was before the token; a first use never hits."""
    resident = lru_residents_oracle(expert_ids, num_experts, slots, valid, document_ids)
    tokens = np.argwhere(valid)
    hits = sum(1 for n, t in tokens for e in expert_ids[n, t] if resident[n, t, e])
    return hits, len(tokens) * expert_ids.shape[-1]


def relaxed_hit_rate(soft, expert_ids, num_experts, slots, valid, document_ids):
    """Return ``sum_{e,t} (2 R[e, t] - hit rate) * soft[t, e] / (2 accesses)`` of LRU, as :func:`relaxed_srp`."""
    resident = lru_residents_oracle(expert_ids, num_experts, slots, valid, document_ids)
    hits, accesses = lru_hits_oracle(expert_ids, num_experts, slots, valid, document_ids)
    total = 0.0
    for n, t in np.argwhere(valid):
        for e in range(num_experts):
            total += (2 * resident[n, t, e] - hits / accesses) * soft[n, t, e] / (2 * accesses)
    return total if accesses else None


def lru_worth_oracle(expert_ids, num_experts, slots, valid, document_ids):
    """Return ``(2 R[e, t] - hit rate) / (2 accesses)`` of an LRU cache on valid tokens, as :func:`srp_worth_oracle`."""
    resident = lru_residents_oracle(expert_ids, num_experts, slots, valid, document_ids)
    hits, accesses = lru_hits_oracle(expert_ids, num_experts, slots, valid, document_ids)
    worth = np.zeros(resident.shape)
    for n, t in np.argwhere(valid):
        worth[n, t] = (2 * resident[n, t] - hits / accesses) / (2 * accesses)
    return worth


def expert_mean_oracle(values, valid, weights=None):
    """Return [E] each expert's (weighted) mean over the valid tokens; zeros where there is none."""
    means = np.zeros(values.shape[-1])
    for e in range(len(means)):
        total = weight = 0.0
        for n, t in np.argwhere(valid):
            w = 1.0 if weights is None else weights[n, t, e]
            total, weight = total + w * values[n, t, e], weight + w
        means[e] = total / weight if weight else 0.0
    return means


def margins_oracle(scores, expert_ids, valid):
    """Return theta[n, t], halfway between the lowest chosen score and the highest other one; 0 on padding."""
    theta = np.zeros(valid.shape)
    for n, t in np.argwhere(valid):
        chosen = [score for e, score in enumerate(scores[n, t]) if e in expert_ids[n, t]]
        others = [score for e, score in enumerate(scores[n, t]) if e not in expert_ids[n, t]]
        theta[n, t] = (min(chosen) + max(others)) / 2 if others else -np.inf
    return theta


def margin_membership_oracle(scores, theta, temperature):
    """Return sigmoid((score - theta) / temperature) with a given theta."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-(scores - theta[:, :, None]) / temperature))


def probability_membership_oracle(logits, top_k):
    """Return K times the softmax."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return top_k * shifted / shifted.sum(axis=-1, keepdims=True)


def central_differences(function, at, step=1e-5):
    """Return the gradient of a scalar function of an array, entry by entry."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        ahead, behind = at.copy(), at.copy()
        ahead[index] += step
        behind[index] -= step
        gradient[index] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


# --- Load balance -------------------------------------------------------------------------------------------------


def usage_share_oracle(expert_ids, num_experts, valid):
    """Return share[e], the share of the valid tokens that expert e is active on; zeros where there is no token."""
    return usage_oracle(expert_ids, num_experts, valid) / max(int(valid.sum()), 1)


def load_balance_oracle(share, probabilities, top_k, valid):
    """Return Switch's ``E/K * sum_e share[e] * (mean probability of e over the valid tokens)``."""
    E = probabilities.shape[-1]
    tokens = np.argwhere(valid)
    loss = 0.0
    for e in range(E):
        mean = sum(probabilities[n, t, e] for n, t in tokens) / max(len(tokens), 1)
        loss += E / top_k * share[e] * mean
    return loss


# --- packing ------------------------------------------------------------------------------------------------------


def packed_rows(documents, sequence_length, pad_id):
    """Return rows of (id, label, is real, document, position) by walking over all documents' tokens one by one."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    rows = []
    for first in range(0, len(stream), sequence_length):
        row = []
        for token, number in stream[first : first + sequence_length]:
            begins = not row or row[-1][3] != number
            row.append((token, -100 if begins else token, True, number, 0 if begins else row[-1][4] + 1))
        predicted = any(label != -100 for _, label, _, _, _ in row)
        padding = sequence_length - len(row)
        row += [(pad_id, -100, False, -1, position) for position in range(padding)]
        if predicted or not padding:
            rows.append(row)
    return rows


def softmax(logits):
    """Return the softmax over the last dimension."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
