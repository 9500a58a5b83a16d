"""The same batch gives the same trace wherever it is heard, in every form of masks: that of masks written by hand."""

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_architectures import build
from tiny_models import COMMON, tiny_model, token_ids
from torch.utils.data import DataLoader
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from consistency_reg import ConsistencyRegularizer, LocalConsistencyLoss, RouterCapture, RoutingMonitor
from consistency_reg.integrations import attach
from consistency_reg.losses import RoutingLoss
from consistency_reg.session import RoutingSession

T = 24
DOCUMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 1, 14]))
POSITIONS = torch.cat([torch.arange(n) for n in (9, 1, 14)])
LOSS = LocalConsistencyLoss((2, 4))


def gpt_oss(attention="eager"):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **{**COMMON, "head_dim": 16, "sliding_window": 8}, num_local_experts=8, num_experts_per_tok=2
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def padded(rows=2):
    valid = torch.ones(rows, T, dtype=torch.bool)
    valid[0, 17:], valid[-1, :5] = False, False
    return valid


def prepared(model, ids, mask=None, positions=None):
    made = {
        "config": model.config,
        "inputs_embeds": model.get_input_embeddings()(ids).detach(),
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": None,
    }
    return create_causal_mask(**made), create_sliding_window_causal_mask(**made)


def with_mask(make, form):
    """A padded batch, whose mask is given in some form."""
    model, ids, valid = make(), token_ids(2, T), padded()
    full, sliding = prepared(model, ids, valid.long())
    mask = {"[B, T]": valid.long(), "4D": full, "dict": {"full_attention": full, "sliding_attention": sliding}}[form]
    return model, {"input_ids": ids, "attention_mask": mask}, valid, None


def packed_in_mask(make):
    model, ids = make(), token_ids(1, T)
    full, sliding = prepared(model, ids, None, POSITIONS[None])
    masks = {"full_attention": full, "sliding_attention": sliding}
    return model, {"input_ids": ids, "attention_mask": masks}, None, DOCUMENTS[None]


def packed(kind, told):
    model, inputs, _ = build(kind, 1, T)
    return model, {"input_ids": inputs["input_ids"]} | told, None, DOCUMENTS[None]


def flattened(kind, **options):
    ids = token_ids(1, T)[0]
    features = [{"input_ids": part.tolist()} for part in ids.split([9, 1, 14])]
    batch = transformers.DataCollatorWithFlattening(**options)(features)
    return tiny_model(kind), {name: value for name, value in batch.items() if name != "labels"}, None, DOCUMENTS[None]


def tuned(kind):
    model = get_peft_model(tiny_model("olmoe"), kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    valid = padded()
    valid[-1] = True  # PEFT puts its tokens before a row, pads or not
    told = {"input_ids": token_ids(2, T), "attention_mask": valid.long()}
    virtual = torch.ones(2, 5 if kind is PromptTuningConfig else 0, dtype=torch.bool)
    return model, told, torch.cat([virtual, valid], dim=1), None


FORMS = {
    "gpt-oss, mask [B, T]": lambda: with_mask(gpt_oss, "[B, T]"),
    "gpt-oss, mask [B, 1, T, T]": lambda: with_mask(gpt_oss, "4D"),
    "gpt-oss, masks by kind": lambda: with_mask(gpt_oss, "dict"),
    "gpt-oss, packed by masks": lambda: packed_in_mask(gpt_oss),
    "olmoe, document_ids": lambda: packed("olmoe", {"document_ids": DOCUMENTS[None]}),
    "olmoe, seq_idx": lambda: packed("olmoe", {"seq_idx": DOCUMENTS[None].int()}),
    "mixtral, position_ids": lambda: packed("mixtral", {"position_ids": POSITIONS[None]}),
    "deepseek_v3, cu_seq_lens": lambda: packed(
        "deepseek_v3", {"cu_seq_lens_q": torch.tensor([0, 9, 10, 24]), "cu_seq_lens_k": torch.tensor([0, 9, 10, 24])}
    ),
    "qwen3_vl_moe, position_ids [B, T]": lambda: packed("qwen3_vl_moe", {"position_ids": POSITIONS[None]}),
    "qwen3_vl_moe, position_ids [4, B, T]": lambda: packed("qwen3_vl_moe", {"position_ids": POSITIONS.expand(4, 1, T)}),
    "qwen3_vl_moe, position_ids [3, B, T]": lambda: packed("qwen3_vl_moe", {"position_ids": POSITIONS.expand(3, 1, T)}),
    "glm4v_moe, position_ids [3, B, T]": lambda: packed("glm4v_moe", {"position_ids": POSITIONS.expand(3, 1, T)}),
    "flattened": lambda: flattened("qwen3_moe"),
    "flattened, cu_seq_lens": lambda: flattened("qwen3_moe", return_position_ids=False, return_flash_attn_kwargs=True),
    "flattened, seq_idx": lambda: flattened("olmoe", return_position_ids=False, return_seq_idx=True),
    "prompt tuning": lambda: tuned(PromptTuningConfig),
    "prefix tuning": lambda: tuned(PrefixTuningConfig),
}


class Keeps(RoutingLoss):
    """Keeps the trace that it is given."""

    def per_layer(self, trace):
        self.trace = trace
        return LOSS.per_layer(trace)


class Module(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def by_attach(model, batch):
    loss = Keeps()
    with attach(model, loss):
        model(**batch, labels=batch["input_ids"])
    return loss.trace


def in_lightning(model, batch):
    loss = Keeps()
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ConsistencyRegularizer(loss)],
    )
    trainer.fit(Module(model), DataLoader([batch], batch_size=None))
    return loss.trace


def by_listening(model, batch):
    listener = RoutingSession.of(model).listen()
    with listener.recording():
        model.eval()(**batch)
    trace = listener.trace()
    listener.release()
    model.train()
    return trace


@pytest.mark.filterwarnings("ignore:all . routers are frozen")
@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_listen_gives_the_trace_of_masks_written_by_hand(form):
    model, batch, valid, document_ids = FORMS[form]()
    with RouterCapture(model.train(), layers=r"^(?!.*visual)", generation="prefix" in form) as capture, torch.no_grad():
        model(**batch)
    right = capture.trace(valid, document_ids)
    plain = capture.trace()
    if "prefix" not in form:
        assert float(LOSS(right)) != float(LOSS(plain))
    for listen in (by_attach, by_listening, in_lightning):
        trace = listen(model, batch)
        assert torch.equal(trace.positions, right.positions), listen.__name__
        for heard, wanted in zip(trace, right, strict=True):  # a LightningModule's names begin with its own
            assert heard.name.endswith(wanted.name)
        assert all(torch.equal(one.expert_ids, other.expert_ids) for one, other in zip(trace, right, strict=True))
        assert float(LOSS(trace)) == pytest.approx(float(LOSS(right)), abs=1e-6), listen.__name__


def test_the_monitor_measures_the_trace_of_the_term():
    from consistency_reg import functional

    model, batch, valid, _ = FORMS["gpt-oss, masks by kind"]()
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[RoutingMonitor((4,))],
    )
    trainer.fit(Module(model.train()), DataLoader([batch], batch_size=None))
    with RouterCapture(model) as capture, torch.no_grad():
        model(**batch)
    ids = list(capture.trace().expert_ids)
    expected = functional.srp(ids, 8, 4, valid)
    assert float(trainer.callback_metrics["train/srp/m4"]) == pytest.approx(float(expected.srp), abs=1e-6)
