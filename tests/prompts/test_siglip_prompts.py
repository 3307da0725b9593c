"""Prompts and test-time defences in a SigLIP: what works, what is refused, and adapters of another family."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from prompted_clip import randomise
from tiny import make_clip, make_processor
from tiny_siglip import make_siglip, make_siglip_processor, tiny_siglip
from transformers import SiglipModel

from hf_robust_clip import RTPT, TAPT, TPT, TTC, ClipPromptConfig, CLIPure, Ensemble
from hf_robust_clip.defences.alignment import AlignmentTargets
from hf_robust_clip.defences.fit import collect_statistics
from hf_robust_clip.modeling import CLIPForZeroShotClassification, with_adapter
from hf_robust_clip.prompts import check_prompts
from hf_robust_clip.runs.shared import load_model

DESIGNS = {
    "V": partial(ClipPromptConfig, design="V", num_vision_tokens=3, vision_depth=2),
    "pixel": partial(ClipPromptConfig, design="pixel", border_width=2),
}
ADAPTERS = {**DESIGNS, "lora": partial(LoraConfig, target_modules=["q_proj", "fc1"], init_lora_weights=False)}


def prompted(design):
    model = get_peft_model(tiny_siglip(), DESIGNS[design]())
    randomise(model, 1)
    return model.eval()


@pytest.fixture
def images(tiny_batch):
    return tiny_batch(4)[0]


@pytest.fixture(scope="module")
def clip_of_the_same_sizes():
    """In whose place a SigLIP could take every tensor of an adapter."""
    processor = make_processor()
    model = CLIPForZeroShotClassification.from_clip(make_clip(processor).double(), processor)
    assert model.config.vision_config.hidden_size == tiny_siglip().config.vision_config.hidden_size
    return model


def test_vision_prompts_stand_after_the_patches_and_are_pooled_with_them(images):
    """Against the tower's own layers, run one by one."""
    model = prompted("V")
    core, plain = model.get_base_model(), tiny_siglip()
    tokens = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [p.shape for p in tokens.values()] == [(3, 16), (3, 16)]
    tower, (first, second) = plain.vision_model, tokens.values()
    hidden = tower.embeddings((images - 0.5) / 0.5)
    hidden = tower.encoder.layers[0](torch.cat([hidden, first.expand(4, -1, -1)], dim=1), None)
    hidden = tower.encoder.layers[1](torch.cat([hidden[:, :4], second.expand(4, -1, -1)], dim=1), None)
    expected = tower.head(tower.post_layernorm(hidden))
    torch.testing.assert_close(core.encode_images(images), expected, rtol=0, atol=1e-12)
    tokens = tower.post_layernorm(hidden)
    found = core(images, output_patches=True).patch_embeds
    assert found.shape == (4, 4, 16)
    for patch in range(4):
        alone = tower.head(tokens[:, patch : patch + 1])
        torch.testing.assert_close(found[:, patch], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("design", DESIGNS)
def test_prompts_are_saved_and_loaded_on_both_kinds_of_model(design, images, tmp_path):
    model = prompted(design)
    tiny_siglip().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path)
    expected = model(images).logits
    again = load_model(str(tmp_path))
    again.set_classes(model.get_base_model().class_names)
    torch.testing.assert_close(again(images).logits, expected, rtol=0, atol=1e-6)
    siglip = make_siglip(make_siglip_processor()).double().eval()
    plain = PeftModel.from_pretrained(siglip, tmp_path)
    assert type(plain.get_base_model()) is SiglipModel
    found = plain.get_image_features(pixel_values=(images - 0.5) / 0.5).pooler_output
    torch.testing.assert_close(found, again.encode_images(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("design", ["T", "VLI", "VLJ"])
def test_text_prompts_are_refused_with_the_reason(design):
    model, settings = tiny_siglip(), dict(design=design, vision_depth=2, text_depth=2)
    before = [name for name, _ in model.named_modules()]
    for put in (get_peft_model, check_prompts):
        with pytest.raises(ValueError, match="no start token"):
            put(model, ClipPromptConfig(**settings))
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_clips_adapter_is_refused(kind, clip_of_the_same_sizes, tmp_path):
    clip = get_peft_model(copy.deepcopy(clip_of_the_same_sizes), ADAPTERS[kind]())
    clip.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="made for a CLIPForZeroShotClassification"):
        with_adapter(tiny_siglip(), tmp_path)
    with pytest.raises(OSError, match="made for a CLIPForZeroShotClassification"):
        tiny_siglip().load_adapter(str(tmp_path))
    if kind in DESIGNS:
        with pytest.raises(ValueError, match="family=clip"):
            PeftModel.from_pretrained(tiny_siglip(), tmp_path)


# ---- defences


def test_tuning_no_words_is_the_classifier_itself(images):
    """At learning rate 0 the words stand where they stood: from the first token on."""
    model = tiny_siglip(class_names=None)
    model.set_classes(["one", "two", "three"], "a b {}.")
    assert model.context_length == len("a b")
    expected = model(images).logits
    still = TPT(num_views=4, selected=0.5, learning_rate=0).predict(model, images)
    torch.testing.assert_close(still.logits, expected, rtol=0, atol=1e-10)
    tuned = TPT(num_views=4, selected=0.5, learning_rate=0.05).predict(model, images)
    assert (tuned.logits - expected).abs().max() > 1e-3
    torch.testing.assert_close(model(images).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "defence",
    [RTPT(num_views=4, selected=0.5), TTC(), Ensemble(num_views=4), CLIPure(step_size=0.5)],
    ids=lambda defence: defence.name,
)
def test_defences_work_and_judge_each_image_by_itself(defence, images):
    model = tiny_siglip()
    together = defence.predict(model, images)
    assert together.logits.isfinite().all()
    assert not together.fell_back.any()
    alone = defence.predict(model, images[2:3])
    torch.testing.assert_close(alone.logits[0], together.logits[2], rtol=0, atol=1e-9)
    differentiable = images.clone().requires_grad_()
    logits = defence.predict(model, differentiable, path="through").logits
    assert torch.autograd.grad(logits.sum(), differentiable)[0].abs().sum() > 0


def test_tapt_takes_vision_prompts_with_their_statistics(images):
    core = prompted("V").get_base_model()
    data = [{"pixel_values": image, "labels": 0} for image in images]
    statistics = collect_statistics(core, data, batch_size=2)
    assert statistics.mean.shape == (2, 4 + 3, 16)
    defence = TAPT(targets=AlignmentTargets(statistics), num_views=4, selected=0.5, gamma=1.0)
    assert defence.predict(core, images).logits.shape == (4, 7)
    with pytest.raises(ValueError, match=r"tunes prompts"):
        defence.predict(tiny_siglip(), images)
