"""The model card of a trained run: README.md in its model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistency_reg.lab.files import write_atomically
from consistency_reg.measures import shown_in
from consistency_reg.optional import require
from consistency_reg.reading import VALIDATION, Reading

with require("transformers"):
    from huggingface_hub import ModelCardData


def write_card(result: Mapping[str, Any], folder: Path) -> Path:
    """Write the card of a run into the folder of its model; the path of the card."""
    path = folder / "README.md"
    write_atomically(path, card(result))
    return path


def card(result: Mapping[str, Any]) -> str:
    """The card of a run as Markdown with the hub's header.

    Args:
        result: what ``result.json`` holds.
    """
    tags = ["mixture-of-experts", "expert-offloading", "consistency-reg"]
    header = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags).to_yaml()
    metrics, sizes, term = result["metrics"], result["parameters"], result["config"]["consistency"]
    weight = term["weight"]
    loss = ((term.get("loss") or {}).get("class_path") or "LocalConsistencyLoss").rpartition(".")[2]
    trained = f"with {loss} at weight {weight:g}" if weight else "without a consistency term"
    shown = [reading.within(VALIDATION) for reading in shown_in("card")]
    rows = "\n".join(_row(reading, metrics[reading.name]) for reading in shown if reading.name in metrics)
    corpus = "\n".join(f"| {domain} | `{sha256}` |" for domain, sha256 in result["corpus"].items())
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"""---
{header}
---

# {result["name"]}

A mixture-of-experts language model of {sizes["total"]:,} parameters, {sizes["active"]:,} of them active, trained on
{result["tokens"]:,} tokens in {result["steps"]:,} steps {trained}. A model for experiments, not for use.

| of the validation | | what it is |
|---|---|---|
{rows}

Perplexity compares only between models of one tokenizer and text. High SRP with low local gain, or a smallest usage
near 0, is a collapsed router, not a consistent one.

## How it was made

```
{result["command"]}
```

Commit `{result["git_commit"] or "unknown"}`, seed {result["seed"]}; {versions}; on {result["device"]}.

| domain | SHA-256 of its text |
|---|---|
{corpus}
"""


def _row(reading: Reading, value: float) -> str:
    return f"| {reading.label} | {value:.4g} | {reading.measure.meaning} |"
