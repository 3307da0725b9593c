"""Attack success of classifiers whose answers are known, through the whole evaluation."""

import pytest
import torch
from torch import nn

from hf_robust_clip import BadNet, Stripes, load_image_dataset
from hf_robust_clip.evaluation.backdoor import backdoor_report, measure_backdoor, triggered_examples
from hf_robust_clip.report.backdoor import CLEAN_MODEL, UNTRIGGERED, success

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
