"""Write greedy text with a GGUF file in llama.cpp, and with transformers to compare it with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import torch

from consistency_reg.optional import require

F32 = 0  # ggml's number of the type
OFF = 0  # llama.cpp's number of "no flash attention"


class LlamaCpp:
    """Runs a model in llama.cpp on the CPU, with a KV cache in float32 so that greedy text can be compared.

    Args:
        path: of a GGUF file.
        context: tokens that it reads at most.
        threads: that compute.

    Raises:
        ImportError: xllamacpp is not installed.
        RuntimeError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, *, context: int = 512, threads: int = 1) -> None:
        with require("gguf"):
            import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.verbosity = context, 1, 0
        options.n_gpu_layers, options.fit_params, options.warmup = 0, False, False
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type(F32)
        options.flash_attn_type = xllamacpp.llama_flash_attn_type(OFF)
        self._server, self._context = xllamacpp.Server(options), context
        self._address = self._server.listening_address

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of a text, as llama.cpp's tokenizer encodes a prompt."""
        return list(self._post("/tokenize", {"content": text, "add_special": True})["tokens"])

    def greedy(self, prompt: str | Sequence[int], tokens: int) -> list[int]:
        """Return the ids of the likeliest continuation, up to an end token.

        Args:
            prompt: text, which llama.cpp's tokenizer encodes, or ids.
            tokens: to write at most.

        Raises:
            ValueError: prompt and continuation are longer than the context, where llama.cpp would stop early.
        """
        ids = self.token_ids(prompt) if isinstance(prompt, str) else list(prompt)
        if (needed := len(ids) + tokens) > self._context:
            raise ValueError(f"context must be at least {needed} for {len(ids)} + {tokens} tokens, got {self._context}")
        asked = {"prompt": ids, "n_predict": tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return list(self._post("/completion", asked)["tokens"])

    def _post(self, place: str, content: dict[str, Any]) -> dict[str, Any]:
        request = Request(self._address + place, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with build_opener(ProxyHandler({})).open(request) as answer:  # the server is in this process
            found: dict[str, Any] = json.load(answer)
        return found


@torch.no_grad()
def greedy_ids(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """Return the ids of the likeliest continuation by transformers, up to an end token of its generation config.

    Args:
        model: of transformers, in memory.
        prompt: ids.
        tokens: to write at most.
    """
    ids = torch.tensor([list(prompt)])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    found: list[int] = written[0, len(prompt) :].tolist()
    return found


def same_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common.

    Example:
        >>> same_tokens([5, 6, 7], [5, 6, 8, 7])
        2
    """
    differ = (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differ, min(len(first), len(second)))
