"""A share of each class that is held out of the training."""

from collections import Counter

import pytest
from transformers import CLIPProcessor

from hf_robust_clip import digits_clip_path, load_image_dataset


@pytest.fixture(scope="module")
def digits():
    processor = CLIPProcessor.from_pretrained(digits_clip_path())
    return load_image_dataset("digits", "train", processor).only(["three", "one", "two"])


def ids(data):
    return [row["image"]["bytes"] for row in data.rows]


def labels(data):
    return [data._answer(label) for label in data.rows[data.label_column]]


def test_each_class_gives_its_share_once(digits):
    train, held = digits.held_out(0.3, seed=1)
    whole, parts = Counter(ids(digits)), Counter(ids(train)) + Counter(ids(held))
    assert whole == parts and len(train) + len(held) == len(digits)
    count = Counter(labels(digits))
    assert Counter(labels(held)) == {label: round(0.3 * own) for label, own in count.items()}
    assert train.class_names == held.class_names == digits.class_names


def test_the_draw_follows_the_seed_the_class_and_nothing_else(digits):
    _, held = digits.held_out(0.3, seed=1)
    assert ids(digits.held_out(0.3, seed=1)[1]) == ids(held) != ids(digits.held_out(0.3, seed=2)[1])
    _, alone = digits.only(["two"]).held_out(0.3, seed=1)
    assert ids(alone) == [own for own, label in zip(ids(held), labels(held), strict=True) if label == 2]
    assert ids(digits.shots(5, seed=1)) != ids(digits.held_out(0.05, seed=1)[1])


def test_held_out_pictures_are_prepared_as_for_an_evaluation(digits):
    from dataclasses import replace

    train, held = replace(digits, augment=True).held_out(0.2)
    assert "picture" in train[0] and "pixel_values" in held[0]


@pytest.mark.parametrize("share", [0, 1, -0.5, True, "a"])
def test_a_share_that_is_none_is_refused(share, digits):
    with pytest.raises(ValueError, match="share="):
        digits.held_out(share)


def test_a_class_keeps_at_least_one_image_on_either_side(digits):
    few = digits.shots(2)
    train, held = few.held_out(0.01)
    assert len(train) == len(held) == 3
    for data, share in ((few, 0.9), (digits.shots(1), 0.1)):
        with pytest.raises(ValueError, match=r"class 'three'.* none would be left"):
            data.held_out(share)
