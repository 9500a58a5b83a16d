"""The evaluator's memory is that of a chunk of rows: more rows need no more."""

from importlib import import_module

import pytest
import torch
from memory import peak_bytes

from consistency_reg.cache_policies import POLICIES
from consistency_reg.functional import cache_hit_rate, sch, srp, usage_counts
from consistency_reg.functional.balance import local_cv_means, overlap_mean

T, E, K = 64, 16, 4
CHUNK_TOKENS = 16 * T
MEASURES = {
    "srp": lambda ids, valid: srp(ids, E, (4, 16), valid),
    "srp of a model": lambda ids, valid: srp([ids, ids], E, (4, 16), valid),
    "sch": lambda ids, valid: sch(ids, E, 4, valid),
    "sch of a model": lambda ids, valid: sch([ids, ids], E, 4, valid),
    **{policy: lambda ids, valid, policy=policy: cache_hit_rate(ids, E, policy, valid) for policy in POLICIES},
    "usage": lambda ids, valid: usage_counts(ids, E, valid),
    "local CV": lambda ids, valid: local_cv_means(ids, E, [16, None], valid, chunk_tokens=CHUNK_TOKENS),
    "overlap": lambda ids, valid: overlap_mean(ids, E, valid, chunk_tokens=CHUNK_TOKENS),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
def test_memory_does_not_grow_with_the_rows(measure, monkeypatch):
    for module, name, size in (
        ("routing.checks", "CHECKED_TOKENS", CHUNK_TOKENS),
        ("functional.srp_counts", "CHUNK_TOKENS", CHUNK_TOKENS),
        ("functional.balance", "CHUNK_TOKENS", CHUNK_TOKENS),
        ("functional.cache_simulation", "CHUNK_ACCESSES", CHUNK_TOKENS * K),
    ):
        monkeypatch.setattr(import_module(f"consistency_reg.{module}"), name, size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(384, T, E, generator=generator).topk(K).indices
    valid = torch.arange(T) < torch.randint(1, T + 1, (384, 1), generator=generator)
    valid[::16] = True  # every chunk has a row of full length
    few, many = (peak_bytes(lambda rows=rows: measure(ids[:rows], valid[:rows])) for rows in (96, 384))
    assert many < 1.1 * few
