"""A converted prompt learner is the function that its trainer computes; what can't be one is refused by its name."""

import logging

import pytest
import torch
from plain_forward import image_feature, text_feature
from prompt_learner_files import TRAINERS, texts, towers
from prompted_clip import NAMES, TEMPLATE, make_base, make_images
from torch.nn import functional as F
from transformers import CLIPModel

from hf_robust_clip.modeling import CLIPForZeroShotClassification, with_adapter
from hf_robust_clip.modeling.prompt_learners import prompt_learner_adapter, trained_template
from hf_robust_clip.normalisation import has_adapter

VISION, TEXT = 20, 16


@pytest.fixture
def base():
    return make_base()


def expected(base, learned):
    """Image features and class embeddings by a forward in plain tensor operations."""
    weights = {name: value.detach() for name, value in base.state_dict().items()}
    vision, text = ([p.double() for p in prompts] for prompts in (learned.vision, learned.text))
    pixels = (make_images() - base.image_mean) / base.image_std
    rows = [base.processor.tokenizer(TEMPLATE.replace("{}", name)).input_ids for name in NAMES]
    images_ND = torch.stack([image_feature(weights, base.config, x, vision) for x in pixels])
    texts_CD = torch.stack([text_feature(weights, base.config, row, text) for row in rows])
    return images_ND, F.normalize(texts_CD, dim=1)


def check(core, wanted):
    core.set_classes(NAMES, TEMPLATE)
    with torch.no_grad():
        found = core(make_images())
    for values, plain in zip((found.image_embeds, found.class_embeds), wanted, strict=True):
        torch.testing.assert_close(values, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_features_are_those_of_a_plain_forward(trainer, base, tmp_path):
    learned = TRAINERS[trainer](VISION, TEXT)
    whole = learned.weights if trainer == "coop" else {**learned.weights, **towers(base)}
    wanted = expected(base, learned)
    model = prompt_learner_adapter(whole, base)
    check(model.get_base_model(), wanted)
    model.save_pretrained(tmp_path)
    check(with_adapter(make_base(), tmp_path), wanted)


def test_half_precision_files_and_parallel_models_are_read(base):
    learned = TRAINERS["ivlp"](VISION, TEXT)
    weights = {f"module.{key}": value.half() for key, value in {**learned.weights, **towers(base)}.items()}
    learned.vision, learned.text = ([p.half() for p in prompts] for prompts in (learned.vision, learned.text))
    wanted = expected(base, learned)
    check(prompt_learner_adapter(weights, base).get_base_model(), wanted)


@pytest.mark.parametrize(
    ("context", "count", "template"),
    [
        ("a photo of a", 2, "a photo of a {}."),
        ("x x x", 3, "X X X {}."),
        ("a photo of a {}.", 2, None),  # FAP's, braces and all
        ("a b c", 2, None),
    ],
)
def test_the_template_of_the_training_is_told_where_the_file_says_it(context, count, template, base, caplog):
    weights = {"prompt_learner.ctx": torch.ones(count, TEXT), **texts(base, context, list(NAMES[:4]), count)}
    assert trained_template(weights, base) == template
    with caplog.at_level(logging.WARNING):
        prompt_learner_adapter(weights, base)
    assert "zero ." in caplog.text
    assert "CLASS_TOKEN_POSITION" in caplog.text


def without(*names):
    return lambda weights: {key: value for key, value in weights.items() if not key.endswith(names)}


def changed(name, change):
    return lambda weights: {key: change(value) if key.endswith(name) else value for key, value in weights.items()}


def plus(key, *size):
    return lambda weights: {**weights, key: torch.ones(*size)}


def renamed(name, other):
    return lambda weights: {other if key == name else key: value for key, value in weights.items()}


BLOCKS = "image_encoder.transformer.resblocks"
DEEP = f"{BLOCKS}.1.VPT_shallow"
WRONG = {
    "a context for each class": ("coop", changed("ctx", lambda x: x.expand(5, -1, -1)), "ctx"),
    "CoCoOp": ("coop", plus("meta_net.linear1.weight", 2, TEXT), "meta_net"),
    "TAME": ("ivlp", plus(f"{BLOCKS}.1.expert_prompts", 4, 3, VISION), "expert_prompts"),
    "an unknown key": ("maple", plus("prompt_learner.scale", 1), "prompt_learner.scale"),
    "an unknown key of a tower": ("ivlp", plus("image_encoder.adapter.weight", 1), "image_encoder.adapter.weight"),
    "prompts after ln_pre": ("ivlp", renamed("image_encoder.VPT", f"{BLOCKS}.0.VPT_shallow"), "blocks.0"),
    "no first layer": ("vpt", without("encoder.VPT"), "layer 0"),
    "a layer in the middle": ("vpt", without(DEEP), "layer 1"),
    "too deep": ("vpt", plus(f"{BLOCKS}.3.VPT_shallow", 3, VISION), "blocks.3"),
    "another width": ("ivlp", changed(DEEP, lambda x: x[:, :-1]), "blocks.1"),
    "another count": ("ivlp", changed(DEEP, lambda x: x[:-1]), "blocks.1"),
    "no maps": ("maple", without("weight", "bias"), "compound_prompts_text"),
    "one map less": ("maple", without("projections.1.weight", "projections.1.bias"), "layer 2"),
    "half a map": ("fap", without("projections.0.bias"), "layer 1"),
    "no map for the deep layers": (
        "fap",
        without(*(f"{i}.{leaf}" for i in "01" for leaf in ("weight", "bias"))),
        "layer",
    ),
    "no map for the first layer": ("fap", without("proj.weight", "proj.bias"), "layer 0"),
    "a map of another width": ("maple", changed("proj.weight", lambda x: x.T), "proj.weight"),
    "maps and prompts of both": ("maple", plus("prompt_learner.compound_prompts_image.0", 2, VISION), "layer 1"),
    "maps and vision prompts of their own": ("maple", plus(DEEP, 2, VISION), "VPT_shallow"),
    "no context": ("maple", without("ctx"), "ctx"),
    "too few for the maps": ("fap", changed("ctx", lambda x: x[:1]), "compound_prompts_image"),
    "values that are none": ("vpt", changed(DEEP, lambda x: x / 0), "blocks.1"),
    "whole numbers": ("vpt", changed(DEEP, lambda x: x.long()), "blocks.1"),
    "no prompts": ("vpt", lambda weights: {"logit_scale": torch.tensor(1.0)}, "weights"),
    "another normalisation": ("vpt", plus("normalize.mean", 1, 3, 1, 1), "normalize.mean"),
    "too many for the context": ("coop", changed("ctx", lambda x: x.repeat(10, 1)), "num_text_tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_an_adapter_is_refused_and_the_base_left_alone(case, base):
    trainer, change, about = WRONG[case]
    with pytest.raises(ValueError, match=rf"^[^\n]*{about}[^\n]*$"):
        prompt_learner_adapter(change(TRAINERS[trainer](VISION, TEXT).weights), base)
    assert not has_adapter(base)


@pytest.mark.parametrize(
    "name",
    ["image_encoder.transformer.resblocks.2.mlp.c_fc.bias", "text_encoder.text_projection", "logit_scale",
     "image_encoder.transformer.resblocks.0.attn.in_proj_weight", "image_encoder.conv1.weight"],
)  # fmt: skip
def test_prompts_of_another_clip_are_refused(name, base):
    weights = {**TRAINERS["ivlp"](VISION, TEXT).weights, **towers(base)}
    with pytest.raises(ValueError, match=name):
        prompt_learner_adapter({**weights, name: 1.01 * weights[name]}, base)
    assert not has_adapter(base)


def test_texts_of_another_clip_are_refused(base):
    weights = {"prompt_learner.ctx": torch.ones(2, TEXT), **texts(make_base(seed=1), "a photo of a", ["a", "b"], 2)}
    with pytest.raises(ValueError, match="token_prefix"):
        prompt_learner_adapter(weights, base)
    cut = {"prompt_learner.ctx": torch.ones(3, TEXT), **texts(base, "a photo of a", ["a", "b"], 2)}
    with pytest.raises(ValueError, match="token_suffix"):
        prompt_learner_adapter(cut, base)


def test_a_base_that_is_no_plain_classifier_is_refused(base):
    weights = TRAINERS["vpt"](VISION, TEXT).weights
    with pytest.raises(TypeError, match="base"):
        prompt_learner_adapter(weights, make_base(cls=CLIPModel))
    prompt_learner_adapter(weights, base)
    assert isinstance(base, CLIPForZeroShotClassification)
    with pytest.raises(ValueError, match="base"):
        prompt_learner_adapter(weights, base)
