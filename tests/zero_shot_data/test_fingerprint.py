"""What tells one set of images from another."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tiny import make_processor
from torch.utils.data import Subset

from hf_robust_clip.zero_shot_data import fingerprint
from hf_robust_clip.zero_shot_data.fingerprint import dataset_digest, pictures_digest
from hf_robust_clip.zero_shot_data.loading import ImageDataset

COUNT = 9


def pictures(seed=0):
    generator = np.random.default_rng(seed)
    return [PILImage.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(COUNT)]


def make(images=None, labels=None, processor=None, **settings):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    columns = {"image": images or pictures(), "label": labels or [i % 3 for i in range(COUNT)]}
    rows = Dataset.from_dict(columns, features=features)
    return ImageDataset(rows, processor or make_processor(), ("a", "b", "c"), "user/set", "local", "test", **settings)


def one_other(i):
    changed = pictures()
    changed[i] = pictures(1)[i]
    return changed


def other_resample():
    processor = make_processor()
    processor.image_processor.resample = 0
    return processor


OTHERS = {
    **{f"picture {i}": lambda i=i: make(one_other(i)) for i in range(COUNT)},
    "one label": lambda: make(labels=[0, 1, 2, 0, 1, 2, 0, 1, 1]),
    "order": lambda: replace(make(), rows=make().rows.select(range(COUNT - 1, -1, -1))),
    "fewer": lambda: replace(make(), rows=make().rows.select(range(COUNT - 1))),
    "names": lambda: replace(make(), class_names=("a", "c", "b")),
    "labels' meaning": lambda: make(label_map={0: 0, 1: 2, 2: 1}),
    "resize": lambda: make(resize=12),
    "resolution": lambda: make(attack_resolution=4),
    "processor": lambda: make(processor=other_resample()),
    "subset": lambda: Subset(make(), range(COUNT - 1)),
}


@pytest.mark.parametrize("other", list(OTHERS.values()), ids=list(OTHERS))
def test_every_change_shows(other):
    assert dataset_digest(make()) == dataset_digest(make()) != dataset_digest(other())


PREPARATION = ("names", "resize", "resolution", "processor")


@pytest.mark.parametrize("name", OTHERS)
def test_pictures_are_the_same_whatever_prepares_them(name):
    assert (pictures_digest(make()) == pictures_digest(OTHERS[name]())) == (name in PREPARATION)


def test_a_large_set_is_sampled_but_every_size_and_name_counts(monkeypatch, tmp_path):
    """Above the limit every second picture is read; of the others the size in bytes is looked at."""
    sizes = [len(row["bytes"]) for row in make().rows.with_format("arrow")[:]["image"].to_pylist()]
    monkeypatch.setattr(fingerprint, "WHOLE", sum(sizes) - 1)
    known = dataset_digest(make())
    assert known != dataset_digest(make(one_other(4)))
    smaller = pictures()
    smaller[5] = PILImage.new("RGB", (8, 8))
    assert known != dataset_digest(make(smaller))


def test_pictures_in_files_of_their_own_are_known_by_their_bytes(tmp_path):
    """Of files without compression the size is always the same."""

    def on_disk(colour):
        for i in range(COUNT):
            PILImage.new("RGB", (8, 8), (i * 9, 0, colour if i == 5 else 0)).save(tmp_path / f"{i}.bmp")
        return make([str(tmp_path / f"{i}.bmp") for i in range(COUNT)])

    known = dataset_digest(on_disk(0))
    assert known == dataset_digest(on_disk(0)) != dataset_digest(on_disk(1))


def test_every_example_of_somebody_elses_dataset_is_looked_at_where_asked(monkeypatch):
    monkeypatch.setattr(fingerprint, "SAMPLED", 3)

    def examples(label):
        return [{"pixel_values": torch.zeros(3, 2, 2), "labels": label if i == 3 else 0} for i in range(6)]

    assert dataset_digest(examples(0)) == dataset_digest(examples(1))
    assert dataset_digest(examples(0), every=True) != dataset_digest(examples(1), every=True)


def test_a_dataset_of_somebody_else(tmp_path):
    def examples(value=0.5, label=1):
        return [
            {"pixel_values": torch.full((3, 2, 2), value if i == 3 else 0.25), "labels": label if i == 4 else 0}
            for i in range(6)
        ]

    known = dataset_digest(examples())
    assert known == dataset_digest(examples())
    assert len({known, dataset_digest(examples(0.75)), dataset_digest(examples(label=2)), dataset_digest([])}) == 4


@pytest.mark.parametrize("kind", [PILImage.fromarray, lambda array: array.astype(np.float32), lambda array: array])
def test_arrays_and_pictures_of_somebody_else_are_known_by_what_they_hold(kind):
    """Large ones, of whose text the middle is left out; made anew each time, so that each has another address."""

    def examples(value=0):
        array = np.zeros((64, 64, 3), np.uint8)
        array[32, 32, 1] = value
        return [{"image": kind(array), "label": np.int64(3)}]

    assert dataset_digest(examples()) == dataset_digest(examples())
    assert dataset_digest(examples()) != dataset_digest(examples(1))
