"""The model card: what the hub reads of it, and what a reader asks first."""

from huggingface_hub import ModelCard
from run_folders import result

from consistency_reg.lab.card import card

BASE = {"class_path": "consistency_reg.lab.pretrained.pretrained_moe"}


def fine_tuned(path, train="router"):
    before = {"val/ppl": 80.0, "val/srp/m16": 0.4}
    run = result("tuned", weight=0.35, before=before, trainable_parameters=12_288, device="cpu")
    run["config"]["model"]["model"] = BASE | {"init_args": {"path": path, "train": train}}
    return run


def test_a_model_from_scratch_says_what_it_was_trained_on_and_what_was_measured():
    text = card(result("mine", weight=0.35, device="cpu"))
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", None)
    values = {one.metric_type: one.metric_value for one in data.eval_results}
    assert values["perplexity"] == 70.0
    assert values["val/srp/m16"] == 0.5 - 0.016
    assert "trained on\n1,228,800 tokens in 400 steps with LocalConsistencyLoss at weight 0.35." in text
    assert "| perplexity | 70 | how well the model predicts text" in text


def test_a_fine_tuned_model_names_its_base_what_was_trained_and_before_and_after():
    text = card(fine_tuned("allenai/OLMoE-1B-7B-0924"))
    data = ModelCard(text).data
    assert data.base_model == "allenai/OLMoE-1B-7B-0924"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert "fine-tuned from\n`allenai/OLMoE-1B-7B-0924` on 1,228,800 tokens" in text
    assert "What was trained: the routers alone (12,288 parameters)." in text
    assert "| of the validation | before | after | what it is |" in text
    assert "| perplexity | 80 | 70 | " in text
    assert "| static SRP |  | 0.25 | " in text


def test_a_base_that_is_a_folder_here_is_no_link_for_the_hub(tmp_path):
    text = card(fine_tuned(str(tmp_path), train="lora"))
    assert ModelCard(text).data.base_model is None
    assert f"fine-tuned from\n`{tmp_path}` on" in text
    assert "What was trained: the routers, and low-rank updates" in text
