"""Models and data under which a robust accuracy would mean nothing: an error, or a loud word."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from hf_robust_clip import (
    RTPT,
    TPT,
    CLIPForZeroShotClassification,
    DefenceBlind,
    EvaluationSettings,
    digits_clip_path,
    evaluate_robustness,
    load_image_dataset,
)
from hf_robust_clip.attacks.auto_attack import AutoAttack, auto_attack
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.evaluation.loop import adversarial_examples
from hf_robust_clip.threat_model import ThreatModel

NAMES = dict(name="model", task="digits", model_id="id")
SETTINGS = EvaluationSettings(["8/255"], attack=PGD(2))


@pytest.fixture
def pair():
    """The embedded model, right on nearly all of forty digits."""
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).requires_grad_(False).eval()
    data = load_image_dataset("digits", "test", model.processor).first(40)
    model.set_classes(data.class_names)
    return model, data


# ---- classes


@pytest.mark.parametrize("names", ["another order", "fewer", "others"])
@pytest.mark.parametrize("how", ["evaluate", "examples", "defence"])
def test_classes_other_than_the_models_are_refused(names, how, pair):
    model, data = pair
    other = {
        "another order": tuple(reversed(data.class_names)),
        "fewer": data.class_names[:6],
        "others": tuple(f"{name} apples" for name in data.class_names),
    }[names]
    data = replace(data, class_names=other)
    runs = {
        "evaluate": lambda: evaluate_robustness(model, data, SETTINGS, **NAMES),
        "examples": lambda: adversarial_examples(model, data, SETTINGS),
        "defence": lambda: evaluate_robustness(
            model, data, replace(SETTINGS, view=DefenceBlind()), defence=RTPT(num_views=2, selected=0.5), **NAMES
        ),
    }
    with pytest.raises(ValueError, match="class"):
        runs[how]()


def test_either_mend_gives_the_right_figure(pair):
    model, data = pair
    backwards = replace(
        data, class_names=tuple(reversed(data.class_names)), label_map={label: 9 - label for label in range(10)}
    )
    reports = [evaluate_robustness(model, backwards.only(model.class_names), SETTINGS, **NAMES)]
    model.set_classes(backwards.class_names)
    reports.append(evaluate_robustness(model, backwards, SETTINGS, **NAMES))
    assert all(report.clean_accuracy > 0.95 for report in reports)
    assert reports[0].robust_accuracy == reports[1].robust_accuracy


# ---- logits that are no numbers


def nan_weights(model):
    model.vision_model.post_layernorm.weight.data[0] = math.nan


def nan_text(model):
    model.text_projection.weight.data[0, 0] = math.nan


def nan_mean(model):
    model.image_mean.data[0] = math.nan


def endless_scale(model):
    model.logit_scale.data.fill_(89.0)


@pytest.mark.parametrize("harm", [nan_weights, nan_text, nan_mean, endless_scale])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [PGD(2), AutoAttack(num_steps=2, num_queries=3)], ids=["pgd", "autoattack"])
def test_a_model_without_finite_logits_has_no_accuracy(harm, norm, attack, pair):
    model, data = pair
    harm(model)
    settings = EvaluationSettings(["8/255"], norm=norm, attack=attack)
    with pytest.raises(FloatingPointError, match="clean"):
        evaluate_robustness(model, data.first(4), settings, **NAMES)


def test_the_stage_in_which_logits_break_is_named(pair, monkeypatch):
    model, data = pair
    own = CLIPForZeroShotClassification.forward
    data = data.first(8)
    clean = torch.stack([data[i]["pixel_values"] for i in range(8)])

    def breaks_under_attack(self, pixel_values, *args):
        output = own(self, pixel_values, *args)
        moved = ~(pixel_values[:, None] == clean).flatten(2).all(dim=2).any(dim=1)
        return replace(output, logits=torch.where(moved[:, None], torch.nan, output.logits))

    monkeypatch.setattr(CLIPForZeroShotClassification, "forward", breaks_under_attack)
    with pytest.raises(FloatingPointError, match=r"pgd at L-inf eps=8/255"):
        evaluate_robustness(model, data, SETTINGS, **NAMES)


# ---- gradients that say nothing


def saturated(model):
    """Logits so far apart that the cross-entropy of the right class is 0 in float32, and its gradient too."""
    model.logit_scale.data.fill_(math.log(1e6))


@pytest.mark.parametrize("harm", [saturated, None])
def test_a_blind_attack_is_said_loudly(harm, pair, caplog):
    model, data = pair
    if harm is not None:
        harm(model)
    with caplog.at_level(logging.WARNING):
        report = evaluate_robustness(model, data.first(20), EvaluationSettings(["24/255"], attack=PGD(5)), **NAMES)
    assert ("blind" in caplog.text) == (harm is not None) == (report.zero_gradient_share > 0.05)
    assert report.robust_accuracy[24 / 255] > 0.5 if harm else report.robust_accuracy[24 / 255] < 0.2


class Constant(nn.Module):
    """The same logits for every image: the first class wins by being first."""

    def forward(self, pixels):
        return pixels.flatten(1)[:, :1] * 0 + torch.zeros(len(pixels), 5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"])
def test_constant_logits_are_what_they_are(name, norm):
    """Right exactly on the images of that class; nothing to be gained by any attack, and no crash."""
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 4, 0])
    suite = AutoAttack((name,), num_steps=3, num_queries=5)
    adv, left = auto_attack(Constant(), images, labels, ThreatModel(0.2, norm), version=suite)
    assert left == {"clean": 0.5, name: 0.5}
    assert torch.equal(adv, images)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_fast_gradients_need_a_float32_model(dtype, pair):
    model, data = pair
    with pytest.raises(ValueError, match="precision"):
        evaluate_robustness(model.to(dtype), data.first(2), replace(SETTINGS, precision="fast"), **NAMES)


def test_tuning_in_half_precision_stays_finite_or_falls_back(pair):
    """AdamW's epsilon is 0 in float16, and so are the smallest gradients."""
    model, data = pair
    images = torch.stack([data[i]["pixel_values"] for i in range(3)])
    tpt = TPT(num_views=4, selected=0.5)
    exact = tpt.predict(model, images)
    half = tpt.predict(model.half(), images)
    assert half.logits.isfinite().all() and all(value.isfinite().all() for value in half.prompts.values())
    assert not half.fell_back.any()
    torch.testing.assert_close(half.logits, exact.logits, rtol=0, atol=1.0)


# ---- a state of other pictures or another configuration


def exchanged(data, keep):
    """The same names, labels and number of pictures; all are black but those kept."""
    rows = [row if i in keep else {**row, "image": Image.new("RGB", (8, 8))} for i, row in enumerate(data.rows)]
    return replace(data, rows=Dataset.from_list(rows, features=data.rows.features))


def test_an_evaluation_of_other_pictures_is_another_evaluation(pair, tmp_path):
    model, data = pair
    first = evaluate_robustness(model, data, SETTINGS, state_dir=tmp_path, **NAMES)
    assert evaluate_robustness(model, data, SETTINGS, state_dir=tmp_path, **NAMES) == first
    with pytest.raises(ValueError, match="dataset"):
        evaluate_robustness(model, exchanged(data, {0, 20, 39}), SETTINGS, state_dir=tmp_path, **NAMES)


@pytest.mark.parametrize("where", ["vision_config", "text_config"])
def test_an_evaluation_of_another_activation_is_another_evaluation(where, pair, tmp_path):
    model, data = pair
    evaluate_robustness(model, data.first(4), SETTINGS, state_dir=tmp_path, **NAMES)
    config = model.config.to_dict()
    config[where]["hidden_act"] = "relu"
    other = CLIPForZeroShotClassification(type(model.config)(**config))
    other.load_state_dict(model.state_dict())
    other.set_processor(model.processor)
    other.set_classes(data.class_names)
    with pytest.raises(ValueError, match="model"):
        evaluate_robustness(other, data.first(4), SETTINGS, state_dir=tmp_path, **NAMES)
