import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_processor
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from hf_robust_clip.zero_shot_data.loading import (
    DATA_ROOT_VARIABLE,
    ImageDataset,
    collate_images,
    load_image_dataset,
    to_pixels,
)

ROOT = os.environ.get(DATA_ROOT_VARIABLE)
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
LABELS = [0, 1, 2, 2, 1, 0]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No data root of the machine, nothing from the Hub, nothing left in the user's cache."""
    monkeypatch.delenv(DATA_ROOT_VARIABLE, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def table(labels=LABELS, label_column="label", feature=None, image_column="image"):
    """Six pictures of one colour each, so that a row is known by its picture."""
    features = Features({image_column: datasets.Image(), label_column: feature or ClassLabel(names=["a", "b", "c"])})
    pictures = [Image.new("RGB", (8, 8), colour) for colour in COLOURS]
    return Dataset.from_dict({image_column: pictures, label_column: list(labels)}, features=features)


def write(root, name, split, rows):
    folder = root / name / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def images(processor):
    return ImageDataset(table(), processor, ("a", "b", "c"), "user/colours", "local", "train")


def seen(data):
    """(first pixel's colour, label) of each image."""
    return [(tuple((255 * row["pixel_values"][:, 0, 0]).int().tolist()), row["labels"]) for row in data]


# ---- choosing classes and images


def test_images_and_labels(images):
    assert seen(images) == list(zip(COLOURS, LABELS, strict=True))
    assert images[0]["pixel_values"].shape == (3, 8, 8)
    batch = images.__getitems__([5, 2])
    assert seen(batch) == [(COLOURS[5], 0), (COLOURS[2], 2)]


def test_only_relabels_in_the_order_given(images):
    chosen = images.only(["c", "a"])
    assert chosen.class_names == ("c", "a")
    assert seen(chosen) == [(COLOURS[0], 1), (COLOURS[2], 0), (COLOURS[3], 0), (COLOURS[5], 1)]
    assert seen(images) == list(zip(COLOURS, LABELS, strict=True)), "the dataset itself stays as it was"


def test_only_twice_equals_the_last_one_alone(images):
    twice = images.only(["c", "b", "a"]).only(["b", "c"])
    assert seen(twice) == seen(images.only(["b", "c"]))
    assert twice.class_names == ("b", "c")
    with pytest.raises(ValueError, match="class 'a' is not in user/colours"):
        images.only(["c", "b"]).only(["a"])


def test_only_of_an_unknown_class(images):
    with pytest.raises(ValueError, match=r"class 'd' is not in user/colours; its first: \['a', 'b', 'c'\]"):
        images.only(["a", "d"])


def test_first_draws_once_and_for_good(images):
    assert images.first(None) is images
    assert images.first(6) is images
    drawn = seen(images.first(3))
    assert len(set(drawn)) == 3
    assert drawn == seen(images.first(3)) != seen(images.first(3, seed=1))
    assert set(drawn) < set(seen(images))
    assert drawn != seen(images)[:3], "the head of a sorted dataset would be one class"


@pytest.mark.parametrize("count", [0, -1])
def test_first_of_nothing_is_refused(images, count):
    with pytest.raises(ValueError, match=f"{count}"):
        images.first(count)


# ---- pictures to pixels


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_pictures_of_every_mode_become_rgb(mode):
    """Also where the checkpoint's processor would leave them as they are."""
    processor = make_processor()
    processor.image_processor.do_convert_rgb = False
    pixels = to_pixels(processor, [Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)])
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.ones_like(pixels))


def test_grey_is_alike_in_all_channels_and_not_normalised(processor):
    pixels = to_pixels(processor, [Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)])
    expected = torch.arange(64).view(1, 1, 8, 8).expand(1, 3, 8, 8) * 4 / 255
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_resize_comes_before_the_centre_crop(processor):
    """A bright centre of 8 x 8 in 16 x 16: shrunk to a quarter without `resize`, kept whole with it."""
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    picture[4:12, 4:12] = 255
    pictures = [Image.fromarray(picture)]
    assert 0.2 < to_pixels(processor, pictures).mean() < 0.3
    assert to_pixels(processor, pictures, resize=16).min() == 1


# ---- batches


def example(value=0.5, size=8, **more):
    return {"pixel_values": torch.full((3, size, size), value), **more}


def test_collate():
    batch = collate_images([example(0.0, labels=2), example(1.0, labels=np.int64(1))])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert (batch["labels"].tolist(), batch["labels"].dtype) == ([2, 1], torch.int64)
    assert set(collate_images([example(), example(labels=1)])) == {"pixel_values"}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([example(), example(float("nan"))], "contain NaN"),
        ([example(), example(float("inf"))], "outside"),
        ([example(1.01)], "outside"),
        ([example(-0.01)], "outside"),
        ([example(200.0)], r"leave them in 0\.\.255"),
        ([example(), example(size=6)], "differ in shape within a batch"),
    ],
)
def test_collate_refuses(examples, message):
    with pytest.raises(ValueError, match=message):
        collate_images(examples)


# ---- from a data root


def test_tiny_imagenet_names_follow_its_own_labels(tmp_path, processor):
    """The feature lists three wnids in an order of its own; the test split is called valid there."""
    wnids = ["n02123045", "n01443537", "n02099601"]
    write(tmp_path, "zh-plus/tiny-imagenet", "valid", table(feature=ClassLabel(names=wnids)))
    write(tmp_path, "zh-plus/tiny-imagenet", "train", table([0] * 6, feature=ClassLabel(names=wnids)))
    data = load_image_dataset("zh-plus/tiny-imagenet", "test", processor, data_root=tmp_path)
    assert data.class_names == ("tabby", "goldfish", "golden retriever")
    assert seen(data) == list(zip(COLOURS, LABELS, strict=True))
    assert (data.dataset_id, data.revision, data.split) == ("zh-plus/tiny-imagenet", "local", "valid")
    assert {label for _, label in seen(data.only(["golden retriever"]))} == {0}
    train = load_image_dataset("zh-plus/tiny-imagenet", "train", processor, data_root=tmp_path)
    assert {label for _, label in seen(train)} == {0}


@pytest.mark.parametrize("column", ["label", "labels", "fine"])
def test_own_dataset_with_names_from_its_labels(column, tmp_path, processor, monkeypatch):
    write(tmp_path, "user/colours", "train", table(label_column=column))
    monkeypatch.setenv(DATA_ROOT_VARIABLE, str(tmp_path))
    asked = column if column == "fine" else None
    data = load_image_dataset("user/colours", "train", processor, label_column=asked)
    assert data.class_names == ("a", "b", "c")
    assert seen(data) == list(zip(COLOURS, LABELS, strict=True))


def test_own_names_and_plain_integers(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table(feature=Value("int64")))
    data = load_image_dataset("user/colours", "train", processor, data_root=tmp_path, class_names=["x", "y", "z"])
    assert data.class_names == ("x", "y", "z")
    with pytest.raises(ValueError, match="doesn't name its classes; give class_names"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path)


def test_a_folder_is_read_by_its_path(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table())
    data = load_image_dataset(str(tmp_path / "user/colours"), "train", processor)
    assert len(data) == 6


def test_missing_label_column(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table(label_column="colour"))
    with pytest.raises(
        ValueError, match=r"no label column 'label' or 'labels'; its columns: .*'colour'.*label_column"
    ):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path)
    with pytest.raises(ValueError, match="no label column 'kind'"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path, label_column="kind")


def test_image_column_of_another_name_is_found(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table(image_column="img"))
    data = load_image_dataset("user/colours", "train", processor, data_root=tmp_path)
    assert seen(data) == list(zip(COLOURS, LABELS, strict=True))


def test_missing_image_column(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table().remove_columns("image"))
    with pytest.raises(ValueError, match=r"no column 'image'; its columns: \['label'\]"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path)


def test_missing_split(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table())
    with pytest.raises(ValueError, match="dataset 'user/colours' has no split 'validation'"):
        load_image_dataset("user/colours", "validation", processor, data_root=tmp_path)


def test_missing_dataset_says_where_to_put_it(tmp_path, processor):
    """An empty folder counts as none."""
    (tmp_path / "user/nothing").mkdir(parents=True)
    message = rf"can't load dataset 'user/nothing'.*<data root>/user/nothing/.*{DATA_ROOT_VARIABLE}"
    with pytest.raises(OSError, match=message):
        load_image_dataset("user/nothing", "train", processor, data_root=tmp_path)


def test_names_fewer_than_labels_are_refused(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table())
    with pytest.raises(ValueError, match="class_names"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path, class_names=["x", "y"])


def test_digits_need_no_files(processor):
    data = load_image_dataset("digits", "test", processor)
    assert (len(data), data.class_names[:2], data.revision) == (500, ("zero", "one"), "scikit-learn")
    pixels = collate_images([data[i] for i in range(20)])["pixel_values"]
    assert (pixels.min(), pixels.max()) == (0, 1)


@pytest.mark.skipif(ROOT is None, reason=f"{DATA_ROOT_VARIABLE} is not set")
@pytest.mark.parametrize(
    ("name", "first"), [("uoft-cs/cifar10", "airplane"), ("zalando-datasets/fashion_mnist", None)]
)
def test_real_files_in_hub_layout(name, first, processor):
    if not (Path(ROOT) / name).is_dir():
        pytest.skip(f"no {name} under {DATA_ROOT_VARIABLE}")
    data = load_image_dataset(name, "test", processor, data_root=ROOT)
    assert (len(data), len(data.class_names), data.revision) == (10_000, 10, "local")
    assert first is None or data.class_names[0] == first
    batch = collate_images([data[i] for i in range(16)])
    assert len(set(batch["labels"].tolist())) > 2
    assert batch["pixel_values"].std() > 0.1
