"""SigLIP against transformers' own model, tokenizer and pipeline, and what isn't taken for one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CLASS_NAMES, make_clip, make_processor
from tiny_siglip import make_siglip, make_siglip_config, make_siglip_processor, tiny_siglip
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GemmaTokenizer,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
    pipeline,
)
from transformers.utils import is_sentencepiece_available

from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.pgd import pgd
from hf_robust_clip.modeling import (
    AutoModelForZeroShotClassification,
    CLIPForZeroShotClassification,
    SiglipForZeroShotClassification,
)
from hf_robust_clip.threat_model import ThreatModel

TEMPLATES = ("this is a photo of a {}", "{}, 2 of it")


@pytest.fixture(scope="module")
def model():
    return tiny_siglip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in float32, written by this package."""
    found = tmp_path_factory.mktemp("siglip")
    tiny_siglip(dtype=torch.float32).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def plain(folder):
    return SiglipModel.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture
def images(tiny_batch):
    return tiny_batch(5)[0]


def token_ids(names, template="this is a photo of a {}", source=None):
    """By the processor, as SigLIP's documentation asks for it."""
    processor = make_siglip_processor() if source is None else AutoProcessor.from_pretrained(source)
    texts = [template.replace("{}", name) for name in names]
    return processor(text=texts, padding="max_length", max_length=64, return_tensors="pt")


# ---- what it computes


def test_logits_are_those_of_the_plain_model(folder, plain, images):
    """With labels for the cross-entropy, in which the bias cancels."""
    own = AutoModelForZeroShotClassification.from_pretrained(folder, dtype=torch.float64).eval()
    assert type(own) is SiglipForZeroShotClassification
    own.set_classes(CLASS_NAMES, TEMPLATES[0])
    expected = plain(**token_ids(CLASS_NAMES, source=folder), pixel_values=(images - 0.5) / 0.5).logits_per_image
    labels = torch.arange(5)
    found = own(images, labels=labels)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-10)
    unbiased = found.logits - plain.logit_bias
    torch.testing.assert_close(found.cosine * plain.logit_scale.exp(), unbiased, rtol=0, atol=1e-10)
    assert found.logit_scale.shape == ()
    assert found.loss.item() == pytest.approx(F.cross_entropy(unbiased, labels).item(), abs=1e-10)


def test_several_templates_are_averaged_as_unit_vectors(model, plain, images):
    model.set_classes(CLASS_NAMES, TEMPLATES)
    features = [plain.get_text_features(**token_ids(CLASS_NAMES, t)).pooler_output for t in TEMPLATES]
    mean = sum(F.normalize(feature, dim=1) for feature in features)
    torch.testing.assert_close(model.class_embeds, F.normalize(mean, dim=1), rtol=0, atol=1e-10)


def test_padding_is_read(model, plain):
    """Were texts cut after the longest, as CLIP's are, their features would be others."""
    ids = token_ids(["two"]).input_ids
    own = plain.get_text_features(input_ids=ids).pooler_output
    cut = plain.get_text_features(input_ids=ids[:, :-20]).pooler_output
    assert F.cosine_similarity(own, cut).item() < 0.999
    assert torch.equal(model.tokenize(["This is a photo of a TWO"]), ids)
    torch.testing.assert_close(model.encode_captions(ids), F.normalize(own, dim=1), rtol=0, atol=1e-10)


def test_an_image_does_not_depend_on_its_batch(model, images):
    together = model(images).logits
    for i in range(len(images)):
        torch.testing.assert_close(model(images[i : i + 1]).logits[0], together[i], rtol=0, atol=1e-10)


def test_frozen_class_embeddings_are_computed_once_and_follow_the_weights(images, monkeypatch):
    model, calls = tiny_siglip(), []
    own = model.encode_texts
    monkeypatch.setattr(model, "encode_texts", lambda *args: calls.append(args) or own(*args))
    before = model(images).logits
    assert torch.equal(model(images).logits, before)
    assert not calls
    model.text_model.head.bias.data[0] += 0.5
    assert not torch.allclose(model(images).logits, before)
    assert len(calls) == 1


def test_a_patch_embedding_is_what_equal_tokens_would_be_pooled_to(model, images):
    found = model(images, output_patches=True).patch_embeds
    hidden = model.vision_model(pixel_values=(images - 0.5) / 0.5).last_hidden_state
    assert found.shape == (5, 4, 16)
    for patch in range(4):
        alike = hidden[:, patch : patch + 1].expand(-1, 3, -1)
        torch.testing.assert_close(found[:, patch], model.vision_model.head(alike), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pgd_finds_what_a_float64_oracle_finds(plain, images, dtype):
    """Its own loop, on the plain model with normalised pixels and softmax cross-entropy."""
    labels, eps, step = torch.tensor([0, 1, 2, 3, 4]), 8 / 255, 2 / 255
    ids = token_ids(CLASS_NAMES)

    def losses(pixels):
        return F.cross_entropy(plain(**ids, pixel_values=2 * pixels - 1).logits_per_image, labels, reduction="none")

    oracle = images.clone()
    for _ in range(5):
        oracle.requires_grad_()
        (grad,) = torch.autograd.grad(losses(oracle).sum(), oracle)
        moved = oracle.detach() + step * grad.sign()
        oracle = (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)
    model = tiny_siglip(dtype=dtype)
    adv = pgd(
        lambda x: cross_entropy(model(x).logits, labels),
        images.to(dtype),
        ThreatModel("8/255"),
        num_steps=5,
        step_size="2/255",
        random_start=False,
    )
    torch.testing.assert_close(
        losses(adv.double()), losses(oracle), rtol=0, atol=1e-9 if dtype.itemsize == 8 else 1e-3
    )
    assert (losses(adv.double()) > losses(images)).all()


def test_the_pipeline_gives_the_same_scores_without_this_package(folder):
    """Of texts in capitals too: this tokenizer lower-cases them, as SigLIP2's own class does."""
    own = SiglipForZeroShotClassification.from_pretrained(folder).eval()
    own.set_classes(CLASS_NAMES, "This is a photo of a {}")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    pixels = own.processor.image_processor(picture, do_normalize=False, return_tensors="pt").pixel_values
    scores = dict(zip(CLASS_NAMES, own(pixels).logits[0].sigmoid().tolist(), strict=True))
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    assert type(classify.model) is SiglipModel
    found = classify(picture, candidate_labels=list(CLASS_NAMES), hypothesis_template="This is a photo of a {}")
    assert {row["label"]: row["score"] for row in found} == pytest.approx(scores, abs=1e-6)


# ---- tokenizers


def with_tokenizer(**changes):
    processor = make_siglip_processor(**changes)
    return SiglipForZeroShotClassification.from_siglip(make_siglip(processor).double(), processor).eval()


def test_texts_are_lower_cased_where_the_tokenizer_keeps_capitals(model):
    """SigLIP2's published repositories name Gemma's tokenizer, which does."""
    model.set_classes(CLASS_NAMES, TEMPLATES[0])
    other = with_tokenizer(tokenizer_cls=GemmaTokenizer)
    assert other.processor.tokenizer("A").input_ids != other.processor.tokenizer("a").input_ids
    other.set_classes([name.title() for name in CLASS_NAMES], "This is a photo of a {}")
    assert torch.equal(other.class_embeds, model.class_embeds)
    assert other.context_length == model.context_length == len("this is a photo of a".replace(" ", "_"))


@pytest.mark.parametrize(
    ("changes", "template", "named"),
    [
        (dict(model_input_names=["input_ids", "attention_mask"]), "{}", "model_input_names"),
        (dict(add_eos_token=False), "{}", "add_eos_token"),
        ({}, "{} \u20ac", "doesn't know part"),
        ({}, "{}" + " very" * 13, "64 fit"),
    ],
    ids=["padding is masked", "texts without end", "unknown letter", "too long"],
)
def test_texts_that_would_be_read_otherwise_are_refused(changes, template, named):
    with pytest.raises(ValueError, match=named):
        with_tokenizer(**changes).set_classes(["cat", "dog"], template)


# ---- checkpoints


def test_a_checkpoint_is_whole_and_keeps_its_bias(folder, plain):
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["SiglipModel"]
    assert plain.logit_bias.item() == -3.0
    assert set(load_file(folder / "model.safetensors")) == set(plain.state_dict())
    assert AutoTokenizer.from_pretrained(folder).padding_side == "right"


@pytest.mark.parametrize("missing", ["logit_bias", "vision_model.head.probe"])
def test_missing_weights_are_an_error(folder, tmp_path, missing):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=missing):
        AutoModelForZeroShotClassification.from_pretrained(tmp_path)


def changed_config(folder, tmp_path, **changes):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "siglip2"}, "naflex"),
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"model_type": None}, "model_type=None"),
        ({"vision_config": {"image_size": [8, 8]}}, r"image_size=\[8, 8\]"),
        ({"vision_config": {"vision_use_head": False, "patch_size": 4, "image_size": 8}}, "vision_use_head"),
    ],
    ids=["naflex", "another family", "no family", "no square", "no head"],
)
def test_what_is_no_siglip_of_fixed_resolution_is_refused(folder, tmp_path, changes, named):
    if "vision_config" in changes:
        own = json.loads((folder / "config.json").read_text())["vision_config"]
        changes = {"vision_config": {**own, **changes["vision_config"]}}
    with pytest.raises(OSError, match=named):
        AutoModelForZeroShotClassification.from_pretrained(changed_config(folder, tmp_path, **changes))


@pytest.mark.skipif(is_sentencepiece_available(), reason="the library is there")
def test_a_tokenizer_that_needs_a_library_says_which(folder, tmp_path):
    """SigLIP's first repositories name it."""
    changed_config(folder, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "SiglipTokenizer"}))
    (tmp_path / "tokenizer.json").rename(tmp_path / "spiece.model")
    with pytest.raises(OSError, match="SentencePiece"):
        AutoModelForZeroShotClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(("tower", "kind"), [(SiglipVisionModel, "image"), (SiglipTextModel, "text")])
def test_a_tower_alone_is_refused(tmp_path, tower, kind):
    config = make_siglip_config(make_siglip_processor())
    tower(getattr(config, tower.config_class.base_config_key)).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=f"the {kind} tower of a SigLIP alone"):
        AutoModelForZeroShotClassification.from_pretrained(tmp_path)


def test_texts_of_another_width_than_images_are_refused():
    config = make_siglip_config(make_siglip_processor())
    config.text_config.projection_size = 8
    with pytest.raises(ValueError, match="projection_size=8"):
        SiglipForZeroShotClassification(config)


def test_families_are_told_apart(folder, tmp_path):
    processor = make_processor()
    CLIPForZeroShotClassification.from_clip(make_clip(processor), processor).save_pretrained(tmp_path)
    assert type(AutoModelForZeroShotClassification.from_pretrained(tmp_path)) is CLIPForZeroShotClassification
    assert type(AutoModelForZeroShotClassification.from_pretrained("digits-clip")) is CLIPForZeroShotClassification
    with pytest.raises(OSError, match="'siglip', not 'clip'"):
        CLIPForZeroShotClassification.from_pretrained(folder)
    with pytest.raises(OSError, match="from_pretrained"):
        AutoModelForZeroShotClassification()
