"""Predict how fast a device decodes within a memory budget: which slots fit, what is read, and what would help.

The cache is one for each layer, with equal slots, from empty slots at each document; first uses are misses, as a device
has to read them too. A token takes its computing and, one after the other, the bytes of its misses by the bandwidth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from consistency_reg.byte_sizes import show_bytes
from consistency_reg.functional.cache_hits import cache_hit_counts
from consistency_reg.lab.evaluate.traces import Recording
from consistency_reg.offload.budget import equal_slots

Row = dict[str, Any]
POLICIES = ("lru", "belady")
KV_BYTES = 2  # of an element, beside quantized weights


@dataclass(frozen=True)
class Device:
    """Hold what a device is assumed to have.

    Attributes:
        memory: bytes for weights, KV cache and slots together; each is a budget of its own.
        bandwidth: bytes per second of reads of experts.
        compute_seconds: of a token with every expert there; None leaves it out.
        bytes_per_weight: of a quantization; as the weights are saved when None.
        context: tokens in the KV cache; those that the model read at once when None.
        dense_bytes: of the weights that are no routed experts'; what the recording says when None.
    """

    memory: Sequence[int]
    bandwidth: int
    compute_seconds: float | None = None
    bytes_per_weight: float | None = None
    context: int | None = None
    dense_bytes: int | None = None

    def tokens_per_s(self, bytes_per_token: float) -> float:
        """Return the predicted speed.

        Example:
            >>> Device([0], bandwidth=1000, compute_seconds=0.5).tokens_per_s(500)
            1.0
        """
        seconds = (self.compute_seconds or 0.0) + bytes_per_token / self.bandwidth
        return 1 / seconds if seconds else math.inf


class Needs:
    """Work out the bytes that a recorded model needs of a device.

    Args:
        recording: of the model.
        device: with the options that change it.

    Attributes:
        expert_bytes: of one expert of each layer.
        dense_bytes: of all other weights.
        kv_bytes: of the KV cache, 0 where the recording does not tell.

    Raises:
        ValueError: the recording tells no bytes of an expert, or no bytes of the other weights and none are given.
    """

    def __init__(self, recording: Recording, device: Device) -> None:
        about = recording.about
        if recording.expert_bytes is None:
            raise ValueError(
                f"--memory needs the bytes of an expert, which the routing of {recording.model} does not tell"
            )
        scale, itemsize = 1.0, about.get("weight_itemsize")
        if device.bytes_per_weight is not None:
            if itemsize is None:
                raise ValueError(
                    f"--bytes-per-weight needs the dtype of the weights, which the routing of {recording.model} does "
                    "not tell: its bytes are those of the file that ran"
                )
            scale = device.bytes_per_weight / itemsize
        routed = sum(size * E for size, E in zip(recording.expert_bytes, recording.num_experts, strict=True))
        self.expert_bytes = [round(size * scale) for size in recording.expert_bytes]
        if device.dense_bytes is not None:
            self.dense_bytes = device.dense_bytes
        elif "dense_bytes" in about:
            self.dense_bytes = int(about["dense_bytes"])
        elif "weight_bytes" in about and about.get("moe_layers") == len(recording.layer_names):
            self.dense_bytes = round((about["weight_bytes"] - routed) * scale)
        else:
            raise ValueError(
                f"--memory needs the bytes of the other weights, which the routing of {recording.model} does not tell: "
                "give --dense-memory"
            )
        context = device.context or about.get("sequence_length") or 0
        each = itemsize if device.bytes_per_weight is None else KV_BYTES
        self.num_experts = recording.num_experts
        self.kv_bytes = round(about.get("kv_elements_per_token", 0) * (each or 0) * context)

    def slots(self, memory: int) -> int:
        """Return the slots of each layer that fit beside everything else, 0 for none."""
        return equal_slots(memory - self.dense_bytes - self.kv_bytes, self.expert_bytes, self.num_experts)

    def memory(self, slots: int) -> int:
        """Return the memory that so many slots of each layer take, with everything else."""
        held = sum(min(slots, E) * size for E, size in zip(self.num_experts, self.expert_bytes, strict=True))
        return self.dense_bytes + self.kv_bytes + held


class Curves:
    """Count what a token misses and reads in all layers, for every number of slots.

    Args:
        recording: of the model.
        expert_bytes: of one expert of each layer.
        device: where to count.
    """

    def __init__(self, recording: Recording, expert_bytes: Sequence[int], device: torch.device | str) -> None:
        self.top_k = [ids.shape[-1] for ids in recording.expert_ids]
        self.num_experts = recording.num_experts
        self._bytes = expert_bytes
        empty = [torch.zeros(E, dtype=torch.float64) for E in recording.num_experts]
        self._hits = {policy: [hits.clone() for hits in empty] for policy in POLICIES}
        for trace, _ in recording.chunks(device=device):
            for policy, layers in self._hits.items():
                for place, layer in enumerate(trace):
                    counts = cache_hit_counts(
                        layer.expert_ids, layer.num_experts, policy, trace.valid, trace.document_ids, cold="miss"
                    )
                    layers[place] += counts.hits.sum(dim=0).double().cpu() / recording.tokens

    def misses(self, policy: str, slots: int) -> list[float]:
        """Return the misses of a token in each layer."""
        return [
            K - float(hits[min(slots, len(hits)) - 1]) for K, hits in zip(self.top_k, self._hits[policy], strict=True)
        ]

    def loaded(self, policy: str, slots: int) -> float:
        """Return the bytes that a token reads."""
        return sum(missed * size for missed, size in zip(self.misses(policy, slots), self._bytes, strict=True))

    def hit_rate(self, policy: str, slots: int) -> float:
        """Return the hits per use of an expert."""
        return 1 - sum(self.misses(policy, slots)) / sum(self.top_k)

    def cliff(self) -> int | None:
        """Return the least slots with which LRU hits more often than as many fixed experts drawn blindly, C / E."""
        chance = sum(K / E for K, E in zip(self.top_k, self.num_experts, strict=True)) / sum(self.top_k)
        sizes = range(max(self.top_k), max(self.num_experts))
        return next((slots for slots in sizes if self.hit_rate("lru", slots) > slots * chance), None)


class Within:
    """Predicts a recorded model on a device.

    Args:
        recording: of the model.
        device: budgets, bandwidth and computing.
        count_on: where to count.

    Raises:
        ValueError: see :class:`Needs`.
    """

    def __init__(self, recording: Recording, device: Device, count_on: torch.device | str = "cpu") -> None:
        self.model, self.device = recording.model, device
        self.needs = Needs(recording, device)
        self.curves = Curves(recording, self.needs.expert_bytes, count_on)
        self.least = max(self.curves.top_k)

    @property
    def sizes(self) -> range:
        """Return every number of slots that a layer can have."""
        return range(self.least, max(self.needs.num_experts) + 1)

    def tokens_per_s(self, policy: str, slots: int) -> float:
        """Return the predicted speed."""
        return self.device.tokens_per_s(self.curves.loaded(policy, slots))

    def rows(self) -> list[Row]:
        """Return a row for each budget, the smallest first."""
        cliff = self.curves.cliff()
        about: Row = {
            "dense_bytes": self.needs.dense_bytes,
            "kv_bytes": self.needs.kv_bytes,
            "least_bytes": self.needs.memory(self.least),
            "cliff_slots": cliff,
            "cliff_bytes": None if cliff is None else self.needs.memory(cliff),
            "read_bytes_per_s": self.device.bandwidth,
            "compute_seconds": self.device.compute_seconds,
        }
        rows = []
        for memory in sorted(self.device.memory):
            slots = self.needs.slots(memory)
            row: Row = {"model": self.model, "memory_bytes": memory, "slots": slots, **about}
            row |= self._at(slots) if slots >= self.least else {}
            rows.append(row | {"advice": _advice(row, self.sizes)})
        return rows

    def _at(self, slots: int) -> Row:
        lru, belady, twice = (
            self.curves.loaded(policy, size) for policy, size in (("lru", slots), ("belady", slots), ("lru", 2 * slots))
        )
        return {
            "hit_rate": self.curves.hit_rate("lru", slots),
            "misses": sum(self.curves.misses("lru", slots)),
            "loaded_bytes": lru,
            "tokens_per_s": self.device.tokens_per_s(lru),
            "belady_tokens_per_s": self.device.tokens_per_s(belady),
            "twice_tokens_per_s": self.device.tokens_per_s(twice),
            "belady_saves": lru - belady,
            "twice_saves": lru - twice,
        }


def _advice(row: Row, sizes: range) -> str:
    """Return whether the budget, the policy or the working set is what a token waits for."""
    if row["slots"] < sizes[0]:
        return f"needs {show_bytes(row['least_bytes'])}"
    if row["slots"] >= sizes[-1]:
        return "everything fits"
    if row["cliff_slots"] is None or row["slots"] < row["cliff_slots"]:
        return "below the cliff"
    return "policy" if row["belady_saves"] > row["twice_saves"] else "working set"


def kv_elements_per_token(config: Any) -> int:
    """Return the elements of a KV cache that a token adds in all layers, 0 where the configuration does not tell.

    Example:
        >>> from types import SimpleNamespace
        >>> kv_elements_per_token(SimpleNamespace(num_hidden_layers=2, num_key_value_heads=3, head_dim=4))
        48
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", None)
    if layers is None:
        return 0
    if latent := getattr(text, "kv_lora_rank", None):  # attention over a latent keeps this and the rotary part
        return int(layers * (latent + (getattr(text, "qk_rope_head_dim", 0) or 0)))
    heads = getattr(text, "num_attention_heads", None)
    size = getattr(text, "head_dim", None) or (getattr(text, "hidden_size", 0) // heads if heads else 0)
    return int(2 * layers * (getattr(text, "num_key_value_heads", None) or heads or 0) * size)


def about_memory(model: Any) -> dict[str, int]:
    """Return what a recording keeps of a model for its needs: bytes of its weights, of one weight, and KV elements."""
    parameters = list(model.parameters())
    return {
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "weight_itemsize": parameters[0].element_size(),
        "kv_elements_per_token": kv_elements_per_token(model.config),
    }
