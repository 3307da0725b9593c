"""The figure of a model that is right on almost every digit, on the same digits stored in many ways.

What a reader sees of a picture or a label that was misread is not an error but another accuracy.
"""

import json

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image

from hf_robust_clip import CLIPForZeroShotClassification, digits_clip_path, image_dataset, load_image_dataset
from hf_robust_clip.zero_shot_data.dataset import collate_images
from hf_robust_clip.zero_shot_data.digits import DIGIT_NAMES, digits_split
from hf_robust_clip.zero_shot_data.labels import class_names_of

COUNT = 60
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def model():
    return CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).eval()


@pytest.fixture(scope="module")
def digits():
    """(grey levels (8, 8), digit) of some test images."""
    rows = digits_split("test").select(range(COUNT))
    return [(np.array(row["image"].convert("L")), row["label"]) for row in rows]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ROBUST_CLIP_DATA_ROOT", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def accuracy(model, data):
    batch = collate_images(data.__getitems__(range(len(data))))
    model.set_classes(data.class_names)
    with torch.no_grad():
        return (model(batch["pixel_values"]).logits.argmax(dim=1) == batch["labels"]).float().mean().item()


@pytest.fixture(scope="module")
def known(model):
    data = load_image_dataset("digits", "test", model.processor)
    data.rows = data.rows.select(range(COUNT))
    figure = accuracy(model, data)
    assert figure > 0.95
    return figure


def plain(levels, path):
    Image.fromarray(levels).save(path)


def of_16_bits(levels, path):
    Image.fromarray(levels.astype(np.uint16) * 257).save(path)


def of_floats(levels, path):
    Image.fromarray(levels.astype(np.float32) / 255).save(path.with_suffix(".tiff"))


def in_alpha(levels, path):
    """White on black: transparent white would show a white background, so the digit is what is opaque and black."""
    picture = Image.new("LA", (8, 8), 0)
    picture.putalpha(Image.fromarray(255 - levels))
    picture.save(path)


def turned(levels, path):
    exif = Image.Exif()
    exif[ORIENTATION] = 8  # turn by 90 degrees anticlockwise
    Image.fromarray(levels).rotate(-90).save(path, exif=exif)


@pytest.mark.parametrize("store", [plain, of_16_bits, of_floats, in_alpha, turned])
@pytest.mark.parametrize("streaming", [False, True])
def test_pictures(store, streaming, tmp_path, model, digits, known):
    for i, (levels, digit) in enumerate(digits):
        folder = tmp_path / "set" / DIGIT_NAMES[digit]
        folder.mkdir(parents=True, exist_ok=True)
        store(levels, folder / f"{i}.png")
    names = DIGIT_NAMES[::-1]  # in another order than the folders
    data = load_image_dataset(str(tmp_path / "set"), "train", model.processor, class_names=names, streaming=streaming,
                              max_images=COUNT)  # fmt: skip
    assert accuracy(model, data) == pytest.approx(known)


LABELS = {
    "numbers as text": ([str(i + 1) for i in range(10)], {i + 1: name for i, name in enumerate(DIGIT_NAMES)}),
    "ids": ([f"n{i:08d}" for i in range(10)], {f"n{i:08d}": name for i, name in enumerate(DIGIT_NAMES)}),
    "names": (list(DIGIT_NAMES), sorted(DIGIT_NAMES)),
    "other spelling": ([name.upper() for name in DIGIT_NAMES], list(DIGIT_NAMES)),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("in_file", [False, True])
def test_labels(case, in_file, tmp_path, model, digits, known):
    """With a mask as the first column, whose pictures are black."""
    own, given = LABELS[case]
    order = sorted(own)  # as those of class folders
    columns = {"mask": datasets.Image(), "image": datasets.Image(), "label": ClassLabel(names=order)}
    rows = {
        "mask": [Image.new("L", (8, 8))] * COUNT,
        "image": [Image.fromarray(levels) for levels, _ in digits],
        "label": [order.index(own[digit]) for _, digit in digits],
    }
    if in_file:
        (tmp_path / "names").write_text(json.dumps(given))
        given = class_names_of(str(tmp_path / "names"))
    data = image_dataset(Dataset.from_dict(rows, features=Features(columns)), model.processor, class_names=given)
    assert accuracy(model, data) == pytest.approx(known)
