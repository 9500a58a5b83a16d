"""The fine-tuner's day: a checkpoint is tuned by the command, by transformers' Trainer and by TRL, and judged.

The commands and lines are those of docs/finetuning.md, docs/trainers/transformers.md, docs/trainers/trl.md and
docs/deploying.md.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from typed import SMALL, shell, write_text

from consistency_reg import CacheAwareRouting, LocalConsistencyLoss
from consistency_reg.integrations import ConsistencyCallback, RoutingMonitorCallback

# The checkpoint that somebody has.
shell(f"consistency-reg fit --config quickstart --run_dir runs/base --consistency.weight 0 {SMALL}")
write_text("my.jsonl")

# The command, with its control, on text of one's own.
short = "--data my.jsonl --trainer.max_steps 4 --data.sequence_length 64 --data.batch_size 2 --trainer.accelerator cpu"
short += " --data.validation_tokens 512 --model.warmup_steps 1 --consistency.warmup_steps 1"
shell(f"consistency-reg fit --config recipes/finetune.yaml --model runs/base --run_dir runs/tuned {short}")
shell(
    f"consistency-reg fit --config recipes/finetune.yaml --model runs/base --run_dir runs/control {short} "
    "--consistency.weight 0"
)
shell("consistency-reg report runs/tuned runs/control")

# transformers' Trainer on the same checkpoint.
place = "runs/base/model"
tokenizer = AutoTokenizer.from_pretrained(place)
texts = [json.loads(line)["text"] for line in Path("my.jsonl").read_text().splitlines()]
ids = [torch.tensor(tokenizer(text)["input_ids"][:64]) for text in texts]
rows = [{"input_ids": one, "labels": one} for one in ids if len(one) == 64]
model = AutoModelForCausalLM.from_pretrained(place)
args = TrainingArguments(
    "trainer", max_steps=4, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2, logging_steps=1,
    report_to="none", use_cpu=True,
)  # fmt: skip
trainer = Trainer(model, args, train_dataset=rows[:-4], eval_dataset=rows[-4:])
ConsistencyCallback(LocalConsistencyLoss(), weight=0.35, warmup_steps=1).add_to(trainer)
RoutingMonitorCallback().add_to(trainer)
trainer.train()
trainer.save_model("trainer/model")
Path("trainer/history.json").write_text(json.dumps(trainer.state.log_history))

# TRL's SFTTrainer.
model = AutoModelForCausalLM.from_pretrained(place)
args = SFTConfig(
    "trl", max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False
)
args.dataset_kwargs = {"skip_prepare_dataset": True}  # the rows are tokens already
args.router_aux_loss_coef = 0.0  # Granite's configuration lacks what TRL's own balance loss reads
tokens = Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in rows]})
trainer = SFTTrainer(model, args, train_dataset=tokens, processing_class=tokenizer)
ConsistencyCallback(LocalConsistencyLoss(), weight=0.35).add_to(trainer)
trainer.train()
Path("trl/history.json").write_text(json.dumps(trainer.state.log_history))

# Before and after, on text of one's own, as it is and as it would be deployed.
shell(
    "consistency-reg evaluate before=runs/base after=runs/tuned --data my.jsonl --max-tokens 4096 --sequence-length 64 "
    "--replicates 0 --cache-ratios 1,2 --cache-aware 0,0.1 --device cpu"
)
tuned = AutoModelForCausalLM.from_pretrained("runs/tuned/model")
with CacheAwareRouting(tuned, cache_ratio=2.0, strength=0.1) as routing, torch.no_grad():
    written = tuned.generate(ids[0][None, :8], max_new_tokens=8, min_new_tokens=8, do_sample=False)
print(f"generated {written.shape[1]} tokens with {routing.hits} hits and {routing.misses} misses")
