"""The model card of a trained run: README.md in its model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consistency_reg.lab.render.markdown import markdown
from consistency_reg.lab.render.table import Table
from consistency_reg.measures import shown_in
from consistency_reg.measures.reading import VALIDATION, Reading
from consistency_reg.optional import require

with require("transformers"):
    from huggingface_hub import EvalResult, ModelCardData

CARD = "README.md"  # in the folder of the model, where the hub looks for it
PARTS = {
    "router": "the routers alone",
    "lora": "the routers, and low-rank updates of the attention's matrices, which are merged",
    "lora_experts": "the routers, and low-rank updates of the matrices of attention and experts, which are merged",
    "all": "all weights",
}


def card(result: Mapping[str, Any]) -> str:
    """Return the card of a run as Markdown with the hub's header.

    Args:
        result: what ``result.json`` holds.
    """
    corpus = "\n".join(f"| {domain} | `{sha256}` |" for domain, sha256 in result["corpus"].items())
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"""---
{_header(result)}
---

# {result["name"]}

{_origin(result)}
A model for experiments, not for use.

{_measured(result)}

Perplexity compares only between models of one tokenizer and text. High SRP with low local gain, or a smallest usage
near 0, is a collapsed router, not a consistent one.

{_deployment(result)}## How it was made

```
{result["command"]}
```

Commit `{result["git_commit"] or "unknown"}`, seed {result["seed"]}; {versions}; on {result["device"]}.

| domain | SHA-256 of its text |
|---|---|
{corpus}
"""


def _header(result: Mapping[str, Any]) -> str:
    """Return the hub's metadata: what the model is, what it was made of, and what was measured."""
    base = _base(result)
    on_hub = base and not Path(base["path"]).expanduser().exists()  # a folder here is nothing that the hub could link
    found: dict[str, Any] = {"base_model": base["path"], "base_model_relation": "finetune"} if base and on_hub else {}
    shown = _shown(result)
    if shown:
        found["model_name"] = result["name"]
        found["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"validation text of {', '.join(result['corpus'])}",
                metric_type="perplexity" if reading.measure.key == "ppl" else reading.name,
                metric_name=reading.label,
                metric_value=result["metrics"][reading.name],
            )
            for reading in shown
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "expert-offloading", "consistency-reg"],
        **found,
    ).to_yaml()


def _origin(result: Mapping[str, Any]) -> str:
    """Return sentences on what was trained, from where on, and how."""
    sizes, term = result["parameters"], result["config"]["consistency"]
    weight = term["weight"]
    loss = ((term.get("loss") or {}).get("class_path") or "LocalConsistencyLoss").rpartition(".")[2]
    how = f"with {loss} at weight {weight:g}" if weight else "without a consistency term"
    if strength := (result["config"].get("routing") or {}).get("strength"):
        how += f", and cache-aware routing of strength {strength:g} in its forward pass"
    size = f"{sizes['total']:,} parameters, {sizes['active']:,} of them active"
    seen = f"{result['tokens']:,} tokens in {result['steps']:,} steps"
    base = _base(result)
    if base is None:
        return f"A mixture-of-experts language model of {size}, trained on\n{seen} {how}."
    part = PARTS.get(str(base.get("train")), str(base.get("train")))
    learned = f" ({result['trainable_parameters']:,} parameters)" if "trainable_parameters" in result else ""
    return (
        f"A mixture-of-experts language model of {size}, fine-tuned from\n`{base['path']}` on {seen} {how}.\n"
        f"What was trained: {part}{learned}."
    )


def _base(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the recipe's options of the checkpoint that the run began with; None for a run from scratch."""
    given = (result["config"].get("model") or {}).get("model") or {}
    arguments = given.get("init_args") or {}
    return arguments if arguments.get("path") and "train" in arguments else None


def _shown(result: Mapping[str, Any]) -> list[Reading]:
    readings = [reading.within(VALIDATION) for reading in shown_in("card")]
    return [reading for reading in readings if reading.name in result["metrics"]]


def _measured(result: Mapping[str, Any]) -> str:
    """Return the table of measures; of a fine-tuned model with those of its checkpoint on the same text."""
    before, after = result.get("before") or {}, result["metrics"]
    header = ["of the validation", *(["before", "after"] if before else [""]), "what it is"]
    rows = [
        [
            reading.label,
            *([_number(before.get(reading.name))] if before else []),
            _number(after[reading.name]),
            reading.measure.meaning,
        ]
        for reading in _shown(result)
    ]
    return markdown(Table("", header, rows)).strip()


def _deployment(result: Mapping[str, Any]) -> str:
    """Return the section about deployment, its cost and what it saves; empty for a model that is deployed as it is."""
    settings, metrics = result.get("deployment"), result["metrics"]
    if not settings:
        return ""
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    deployed = {reading: metrics.get(reading.within(f"{VALIDATION}/deployed").name) for reading in _shown(result)}
    rows = [
        [reading.label, _number(metrics[reading.name]), _number(value)]
        for reading, value in deployed.items()
        if value is not None
    ]
    return f"""## How to deploy it

Its routers are to prefer the experts that are in the cache, as `config.json` says under `cache_aware_routing`:

```python
from consistency_reg import CacheAwareRouting

with CacheAwareRouting.from_config(model):  # CacheAwareRouting(model, {arguments})
    model.generate(...)
```

{markdown(Table("", ["of the validation", "as it is", "deployed so"], rows)).strip()}

"""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
