"""Write how often each expert is used, for engines that pin experts in memory."""

import torch

from consistency_reg.lab.evaluate.traces import Recording


def usage_lines(recording: Recording) -> str:
    """Return ``layer expert count`` lines, a use of an expert counted once for each token: a usage profile.

    Layers are numbered from 0 in the model's order; experts of a layer come in their order, unused ones with 0.
    """
    lines = []
    for layer, (ids, E) in enumerate(zip(recording.expert_ids, recording.num_experts, strict=True)):
        counts = torch.bincount(ids[recording.valid].flatten().long(), minlength=E)
        lines += [f"{layer} {expert} {count}\n" for expert, count in enumerate(counts.tolist())]
    return "".join(lines)
