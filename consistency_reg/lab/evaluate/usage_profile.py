"""Write how often each expert is used, for engines that pin experts in memory."""

from consistency_reg.functional.balance import usage_counts
from consistency_reg.lab.evaluate.traces import Recording
from consistency_reg.tracking.usage_profile import usage_profile


def usage_lines(recording: Recording) -> str:
    """Return the usage profile of a recording: how many tokens used each expert of each layer."""
    layers = zip(recording.expert_ids, recording.num_experts, strict=True)
    return usage_profile(usage_counts(ids.long(), E, recording.valid) for ids, E in layers)
