"""Training a SigLIP: parts, adapters, teachers, captions, division of updates."""

import pytest
import torch
from peft import LoraConfig
from tiny_siglip import tiny_siglip
from training_script import arguments, state, tiny_data, tiny_model
from transformers import SiglipModel

from hf_robust_clip import FARE, PMGAFT, ClipPromptConfig, Contrastive, RobustClipTrainer
from hf_robust_clip.modeling import AutoModelForZeroShotClassification
from hf_robust_clip.runs.train_settings import LORA_TARGETS


def trained(folder, objective, model=None, data=None, peft_config=None, teacher=None, **changes):
    """A trainer after its training, and the names of what has changed."""
    model = tiny_siglip() if model is None else model
    args = arguments(folder, **{"max_steps": 1, **changes})
    trainer = RobustClipTrainer(
        model, args, objective, tiny_data() if data is None else data, peft_config=peft_config, teacher=teacher
    )
    before = state(trainer.model)
    trainer.train()
    after = state(trainer.model)
    return trainer, {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_the_image_encoder_is_trained_and_saved_as_a_plain_siglip(tmp_path):
    trainer, moved = trained(tmp_path, PMGAFT.released_preset())
    assert moved
    assert all(name.startswith("vision_model.") for name in moved)
    assert {"vision_model.head.probe", "vision_model.head.mlp.fc1.weight"} <= moved
    trainer.save_model(str(tmp_path / "saved"))
    plain = SiglipModel.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    own = trainer.classifier()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in own.state_dict().items())
    again = AutoModelForZeroShotClassification.from_pretrained(tmp_path / "saved")
    assert again.normalisation == own.normalisation
    assert again.normalisation[0] != [0.5] * 3, "the objective has its own"


def test_last_layers_are_trained_with_norm_and_pooling_head(tmp_path):
    _, moved = trained(tmp_path, PMGAFT(), trainable_layers=1)
    parts = ("vision_model.encoder.layers.1.", "vision_model.post_layernorm.", "vision_model.head.")
    assert all(any(name.startswith(part) for name in moved) for part in parts)
    assert all(name.startswith(parts) for name in moved)


def test_lora_reaches_the_layers_and_leaves_the_pooling_head_alone(tmp_path):
    lora = LoraConfig(r=2, target_modules=LORA_TARGETS)
    _, moved = trained(tmp_path, PMGAFT(), peft_config=lora)
    assert moved
    assert all(".vision_model.encoder.layers." in name and ".self_attn." in name for name in moved)
    with pytest.raises(ValueError, match=r"attention\.out_proj"):
        trained(tmp_path, PMGAFT(), peft_config=LoraConfig(r=2, target_modules=["out_proj"]))


def test_vision_prompts_are_trained_alone(tmp_path):
    trainer, moved = trained(
        tmp_path, PMGAFT(), peft_config=ClipPromptConfig(design="V", vision_depth=2), eval_attack_steps=1
    )
    assert len(moved) == 2
    assert all(".clip_prompt_tokens." in name for name in moved)
    metrics = trainer.evaluate(tiny_data(4))
    assert 0 <= metrics["eval_robust_accuracy"] <= metrics["eval_clean_accuracy"] <= 1


def test_a_teacher_of_another_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model_type is clip|patch_size"):
        trained(tmp_path, FARE(), teacher=tiny_model())


def test_captions_train_both_towers_and_the_scale_but_not_the_bias(tmp_path):
    model = tiny_siglip(class_names=None)
    _, moved = trained(tmp_path, Contrastive(), model, tiny_data(captions=True))
    assert {"logit_scale", "text_model.head.weight", "vision_model.head.probe"} <= moved
    assert "logit_bias" not in moved


def test_an_update_may_be_divided(tmp_path):
    """Eight images at once, or eight times one."""
    objective, divided = PMGAFT.released_preset(), dict(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    once, _ = trained(tmp_path, objective)
    parts, _ = trained(tmp_path, objective, **divided)
    for name, value in state(once.model).items():
        torch.testing.assert_close(state(parts.model)[name], value, rtol=0, atol=1e-9)


@pytest.mark.slow  # resuming knows nothing of families
def test_a_training_goes_on_where_it_stopped(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=2)
    whole, _ = trained(tmp_path / "whole", PMGAFT(), **settings)
    args = arguments(tmp_path / "whole", **settings)
    again = RobustClipTrainer(tiny_siglip(), args, PMGAFT(), tiny_data())
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    for name, value in state(whole.model).items():
        assert torch.equal(state(again.model)[name], value)
