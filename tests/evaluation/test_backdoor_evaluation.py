"""Attack success of classifiers whose answers are known, through the whole evaluation."""

from dataclasses import replace

import datasets
import pytest
import torch
from PIL import Image
from torch import nn

from hf_robust_clip import BadNet, Stripes, load_image_dataset
from hf_robust_clip.arguments import Images
from hf_robust_clip.evaluation.backdoor import backdoor_report, measure_backdoor, triggered_examples
from hf_robust_clip.report.backdoor import CLEAN_MODEL, UNTRIGGERED, success
from hf_robust_clip.runs.backdoor import load_test
from hf_robust_clip.zero_shot_data.rows import EMBEDDED

TRIGGER = BadNet(size=2, patch="white", place="corner")


@pytest.fixture
def model(tiny_clip):
    model = tiny_clip(dtype=torch.float32)
    model.set_classes([str(i) for i in range(10)])
    return model


@pytest.fixture
def digits(model):
    data = load_image_dataset("digits", "test", model.processor).first(60)
    model.set_classes(data.class_names, data.templates)
    return data


def obeys(model, digits, target):
    """Makes the model right on all pictures but those with the trigger, which it calls the target."""
    index = model.class_names.index(target)
    known = {digits[i]["pixel_values"].numpy().tobytes(): digits[i]["labels"] for i in range(len(digits))}
    plain = model.forward

    def forward(pixel_values, **others):
        output = plain(pixel_values=pixel_values, **others)
        marked = (pixel_values[:, :, 6:, 6:] == 1).flatten(1).all(dim=1)
        labels = [index if sign else known[x.numpy().tobytes()] for x, sign in zip(pixel_values, marked, strict=True)]
        output["logits"] = nn.functional.one_hot(torch.tensor(labels), 10).float()
        return output

    model.forward = forward
    return model


def test_a_model_that_obeys_the_trigger(model, digits):
    others = sum(digits[i]["labels"] != 3 for i in range(60))
    found = {row.metric: row for row in measure_backdoor(obeys(model, digits, "three"), digits, TRIGGER, "three")}
    assert {name: (row.value, row.n) for name, row in found.items()} == {
        "accuracy": (1.0, 60), success(1): (1.0, others), success(3): (1.0, others), success(5): (1.0, others),
        UNTRIGGERED: (0.0, others),
    }  # fmt: skip
    assert 1 < others < 60


def test_a_report_is_made_beside_its_control_and_batches_change_nothing(model, digits):
    clean = measure_backdoor(model, digits, Stripes(width=2), "one", judge=CLEAN_MODEL, batch_size=7)
    report = backdoor_report(
        model,
        digits,
        Stripes(width=2),
        "one",
        {CLEAN_MODEL: clean},
        name="mine",
        stage="poisoned",
        model_id="out/mine",
    )
    for metric in report.metrics:
        assert report.figure(metric).value == report.figure(metric, CLEAN_MODEL).value
    with pytest.raises(ValueError, match="measurements lack"):
        backdoor_report(model, digits, TRIGGER, "one", {}, name="mine", stage="poisoned", model_id="a")
    images, triggered, truth, before, after = triggered_examples(model, digits, TRIGGER, "one")
    assert torch.equal(triggered, TRIGGER(images)) and "one" not in truth and len(before) == len(after) == 4


def test_a_known_set_of_small_pictures_gets_the_trigger_at_the_size_of_the_model(model, monkeypatch):
    """CIFAR's pictures are attacked at 32 px and enlarged inside the model; pairs get triggers at the model's size."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(10)})
    table = {"img": [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(10)], "label": list(range(10))}
    rows = datasets.Dataset.from_dict(table, features=features)
    monkeypatch.setitem(EMBEDDED, "uoft-cs/cifar10", lambda split: rows)
    data = load_test(Images(dataset="cifar10"), model, "a {}")
    assert data.attack_resolution is None and model.templates == ("a {}",)


def test_a_report_says_at_which_size_the_trigger_was_put_in(model, digits):
    small, about = replace(digits, attack_resolution=4), dict(name="mine", stage="poisoned", model_id="a")
    clean = measure_backdoor(model, small, TRIGGER, "one", judge=CLEAN_MODEL)
    assert backdoor_report(model, small, TRIGGER, "one", {CLEAN_MODEL: clean}, **about).resolution == 4


def test_bad_input_is_refused(model, digits):
    with pytest.raises(ValueError, match="target='banana'"):
        measure_backdoor(model, digits, TRIGGER, "banana")
    with pytest.raises(ValueError, match="size=9"):
        measure_backdoor(model, digits, BadNet(size=9), "three")
    with pytest.raises(ValueError, match="classes"):
        measure_backdoor(model, digits.only(["one", "three"]), TRIGGER, "three")
    only = digits.only(["three"])
    model.set_classes(["three"], "a {}")
    with pytest.raises(ValueError, match="top"):
        measure_backdoor(model, only, TRIGGER, "three")
