"""Make what the tests of offloading share: checkpoints on disk and the same models in memory."""

import torch
import transformers
from tiny_models import tiny_model

transformers.utils.logging.disable_progress_bar()


def save(folder, kind, dtype=torch.float32, shard="40KB"):
    """Save a tiny model of a kind in several files, and return the folder as text."""
    model = tiny_model(kind).to(dtype).eval()
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def in_memory(folder, dtype="auto", kind=transformers.AutoModelForCausalLM):
    """Return the model with transformers' eager experts, its weights where torch allocates, not in a mapped file."""
    model = kind.from_pretrained(folder, experts_implementation="eager", dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    """Return the logits of one pass."""
    return model(ids).logits


@torch.no_grad()
def read_by_token(model, ids, prompt):
    """Return the logits of reading a row: a prompt of so many tokens at once, then token by token with a KV cache."""
    output = model(ids[:, :prompt], use_cache=True)
    found = [output.logits]
    for t in range(prompt, ids.shape[1]):
        output = model(ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits)
    return torch.cat(found, dim=1)
