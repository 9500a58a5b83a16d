"""The tensor equations: pure functions, unweighted, without state. One module a concept.

``srp``, ``sch`` and ``cache_hit_rate`` measure routing; what the modules below them share is imported from there.
"""

from consistency_reg.functional.agreement import expert_agreement
from consistency_reg.functional.balance import local_cv, overlap_rate, usage_balance, usage_counts
from consistency_reg.functional.cache_aware import cache_aware_ids
from consistency_reg.functional.cache_hits import cache_hit_rate
from consistency_reg.functional.cache_replay import cache_access_hits, replay_engine
from consistency_reg.functional.sch import sch
from consistency_reg.functional.specialization import domain_specialization, vocabulary_specialization
from consistency_reg.functional.srp import srp

__all__ = [
    "cache_access_hits",
    "cache_aware_ids",
    "cache_hit_rate",
    "domain_specialization",
    "expert_agreement",
    "local_cv",
    "overlap_rate",
    "replay_engine",
    "sch",
    "srp",
    "usage_balance",
    "usage_counts",
    "vocabulary_specialization",
]
