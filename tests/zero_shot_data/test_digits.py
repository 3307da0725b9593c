import hashlib

import numpy as np
import pytest

from hf_robust_clip.zero_shot_data.digits import DIGIT_NAMES, digits_split


@pytest.fixture(scope="module")
def splits():
    return {name: digits_split(name) for name in ("train", "test")}


def pixels(rows):
    return np.stack([np.asarray(picture) for picture in rows["image"]])


def test_sizes_columns_and_names(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1297, "test": 500}
    for rows in splits.values():
        assert rows.column_names == ["image", "label"]
        assert tuple(rows.features["label"].names) == DIGIT_NAMES
        assert (rows[0]["image"].size, rows[0]["image"].mode) == ((8, 8), "RGB")


def test_split_is_stratified(splits):
    counts = {name: np.bincount(rows["label"], minlength=10) for name, rows in splits.items()}
    share = counts["test"] / (counts["test"] + counts["train"])
    assert share == pytest.approx(np.full(10, 500 / 1797), abs=0.005)


def test_split_takes_every_picture_once(splits):
    """Labels and grey sums of both parts together are those of the whole set."""
    from sklearn.datasets import load_digits

    whole = load_digits()
    expected = sorted(zip(whole.target, np.rint(whole.images * 255 / 16).sum((1, 2)), strict=True))
    found = [row for rows in splits.values()
             for row in zip(rows["label"], pixels(rows)[..., 0].astype(float).sum((1, 2)), strict=True)]  # fmt: skip
    assert sorted(found) == expected


def test_split_never_changes(splits):
    """Reports of different days compare only if the pictures are the same; the digest was taken once."""
    digests = {}
    for name, rows in splits.items():
        content = pixels(rows).tobytes() + np.array(rows["label"], dtype=np.uint8).tobytes()
        digests[name] = hashlib.sha256(content).hexdigest()[:16]
    assert digests == {"train": "529278b976bfc77e", "test": "0277f1ba62a4804d"}
    assert np.array_equal(pixels(digits_split("test")), pixels(splits["test"]))


def test_grey_levels_span_the_whole_range(splits):
    values = np.unique(pixels(splits["train"]))
    assert values.tolist() == np.rint(np.arange(17) * 255 / 16).tolist()


def test_parts_of_a_split(splits):
    whole = pixels(splits["train"])
    for part, rows in (("train[:100]", whole[:100]), ("train[1200:]", whole[1200:]), ("train[-97:]", whole[-97:])):
        assert np.array_equal(pixels(digits_split(part)), rows)
    assert len(digits_split("train[:80%]")) + len(digits_split("train[80%:]")) == len(whole)
    assert len(digits_split("train+test")) == 1797


@pytest.mark.parametrize("split", ["validation", "", "all", "train[", "train[:200%]"])
def test_unknown_split(split):
    with pytest.raises(ValueError, match="split="):
        digits_split(split)
