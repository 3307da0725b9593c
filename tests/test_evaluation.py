from dataclasses import replace

import pytest
import torch
from training_script import digits

from hf_robust_clip import (
    CLIPForZeroShotClassification,
    EvaluationSettings,
    ThreatModel,
    digits_clip_path,
    evaluate_robustness,
    load_image_dataset,
)
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.suites import PGD

NAMES = dict(name="name", task="task", model_id="id")


@pytest.fixture(scope="module")
def undefended():
    """The embedded model, which never saw an adversarial image, and the test digits."""
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).requires_grad_(False)
    data = load_image_dataset("digits", "test", model.processor)
    model.set_classes(data.class_names)
    return model, data


def test_attack_breaks_an_undefended_model(undefended):
    """Accurate when clean, next to nothing left under a strong attack, and no gradient hidden from it."""
    report = evaluate_robustness(*undefended, EvaluationSettings(["24/255", "32/255"], attack=PGD(20)), **NAMES)
    assert report.num_images == 500
    assert report.clean_accuracy > 0.95
    assert report.robust_accuracy[24 / 255] < 0.05
    assert report.robust_accuracy[32 / 255] < 0.01
    assert report.zero_gradient_share < 0.001


def test_batch_size_changes_no_image(undefended):
    model, data = undefended
    reports = [
        evaluate_robustness(
            model, data.first(60), EvaluationSettings(["8/255", "16/255"], attack=PGD(5), batch_size=size), **NAMES
        )
        for size in (1, 16, 512)
    ]
    own = {(r.clean_accuracy, *r.robust_accuracy.values(), *r.per_class.values()) for r in reports}
    assert len(own) == 1
    assert 0.1 < reports[0].robust_accuracy[16 / 255] < reports[0].robust_accuracy[8 / 255] < 0.95


def test_counts_equal_an_attack_written_out(undefended):
    """One radius: right when clean, and right on every iterate of sign ascent from the seeded random start."""
    model, data = digits(40)
    images = torch.stack([data[i]["pixel_values"] for i in range(40)])
    labels = torch.tensor([data[i]["labels"] for i in range(40)])
    model.eval()
    threat_model, step = ThreatModel("12/255"), 2.5 * 12 / 255 / 5

    def right(pixels):
        return model(pixels).logits.argmax(1) == labels

    clean = right(images)
    adv = threat_model.random_start(images, seed=4)
    robust = clean & right(adv)
    for _ in range(5):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(adv).logits, labels).sum(), adv)
        adv = (adv.detach() + step * grad.sign()).clamp(images - 12 / 255, images + 12 / 255).clamp(0, 1)
        robust &= right(adv)
    report = evaluate_robustness(model, data, EvaluationSettings(["12/255"], attack=PGD(5), seed=4), **NAMES)
    assert report.clean_accuracy == float(clean.double().mean())
    assert report.robust_accuracy == {12 / 255: float(robust.double().mean())}
    assert report.after_each == {12 / 255: {"pgd": report.robust_accuracy[12 / 255]}}
    assert 0.1 < report.robust_accuracy[12 / 255] < 0.9
    for index, name in enumerate(model.class_names):
        own = labels == index
        expected = tuple(int(x.sum()) for x in (own, own & clean, own & robust))
        assert report.per_class[name] == expected
    assert sum(row[0] for row in report.per_class.values()) == 40


def test_radii_in_any_order_give_an_accuracy_that_never_rises(undefended):
    model, data = undefended
    given = ["16/255", 4 / 255, "12/255", "8/255"]
    reports = [
        evaluate_robustness(model, data.first(30), EvaluationSettings(radii, attack=PGD(2)), **NAMES)
        for radii in (given, sorted(given, key=lambda radius: ThreatModel(radius).eps))
    ]
    assert list(reports[0].robust_accuracy) == [4 / 255, 8 / 255, 12 / 255, 16 / 255]
    assert reports[0].robust_accuracy == reports[1].robust_accuracy
    values = [reports[0].clean_accuracy, *reports[0].robust_accuracy.values()]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    steps = [2.5 * radius / 2 for radius in reports[0].robust_accuracy]
    assert reports[0].attack_parameters["step_size"] == pytest.approx(steps)


@pytest.mark.parametrize("training", [False, True])
def test_model_comes_back_as_it_was(training, undefended):
    model, data = digits(6)
    model.train(training)
    model.visual_projection.weight.grad = torch.ones_like(model.visual_projection.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    evaluate_robustness(model, data, EvaluationSettings(["8/255"], attack=PGD(2)), **NAMES)
    assert model.training == model.vision_model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {"visual_projection.weight"}
    assert (grads["visual_projection.weight"] == 1).all()


def test_data_that_cannot_be_evaluated_are_refused(undefended):
    model, data = digits(6)
    settings = EvaluationSettings(["8/255"], attack=PGD(2))
    empty = replace(undefended[1], rows=undefended[1].rows.select([]))
    with pytest.raises(ValueError, match="dataset is empty"):
        evaluate_robustness(model, empty, settings, **NAMES)
    model.train()
    model.set_classes(["zero", "one"])
    with pytest.raises(ValueError, match="there are 2 classes"):
        evaluate_robustness(model, data, settings, **NAMES)
    assert model.training
    model.set_classes(data.class_names)
    model.processor.image_processor.crop_size = {"height": 4, "width": 4}
    with pytest.raises(ValueError, match="shape"):
        evaluate_robustness(model, data, settings, **NAMES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radii": []}, "at least one radius"),
        ({"radii": "8/255"}, "must be a list"),
        ({"radii": ["8/255", 0]}, "hold 0"),
        ({"radii": ["8"]}, "8/255"),
        ({"radii": ["1/255"], "norm": "l1"}, "norm='l1' is unknown"),
        ({"radii": ["1/255"], "batch_size": 0}, "batch_size=0"),
        ({"radii": ["1/255"], "precision": "fp16"}, "precision='fp16'"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings, message, undefended):
    model, data = undefended
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(model, data.first(2), EvaluationSettings(**settings), **NAMES)
