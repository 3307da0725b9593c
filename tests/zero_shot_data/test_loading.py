import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from tiny import make_processor

from hf_robust_clip.zero_shot_data.loading import (
    ImageDataset,
    collate_images,
    load_image_dataset,
    read_class_names,
    to_pixels,
)
from hf_robust_clip.zero_shot_data.rows import DATA_ROOT_VARIABLE
from hf_robust_clip.zero_shot_data.specs import DatasetSpec

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
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after every shuffled stream
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
    with pytest.raises(ValueError, match=r"class 'd' is not in user/colours: \['a', 'b', 'c'\]"):
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
    assert set(collate_images([example(), example()])) == {"pixel_values"}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([example(), example(float("nan"))], "contain NaN"),
        ([example(), example(float("inf"))], "outside"),
        ([example(1.01)], "outside"),
        ([example(1 + 2e-6)], r"1\.000002\], outside"),
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
    write(tmp_path, "user/colours", "train", table(label_column="colour", feature=Value("int64")))
    with pytest.raises(ValueError, match=r"no label column 'label' or .*; its columns: .*'colour'.*label_column"):
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


@pytest.mark.parametrize("name", ["/nowhere/set", "./set", "../set", "~/nowhere/set", "a/b/c"])
def test_a_path_that_is_not_there_is_no_name_on_the_hub(name, tmp_path, processor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **settings: pytest.fail("nothing is to be asked for"))
    with pytest.raises(OSError, match=f"'{name}'.*path") as caught:
        load_image_dataset(name, "train", processor, data_root=tmp_path)
    assert "data root" not in str(caught.value)


MISTYPED = {
    "my/pictres": "'my/pictures'?",
    "my/other": "'my' holds no 'other'",
    "cifar01": "'cifar10'?",
    "Digits": "'digits'?",
    "pictures.parquet": "is a file",
    "my/empty": "is empty",
}


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_name_is_told_what_is_near(name, tmp_path, processor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my/pictures", "my/empty"):
        Path(folder).mkdir(parents=True)
    Path("pictures.parquet").touch()
    with pytest.raises(OSError, match=re.escape(MISTYPED[name])) as caught:
        load_image_dataset(name, "train", processor)
    assert "data root" not in str(caught.value)


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


# ---- attack resolution


@pytest.mark.parametrize(("attack", "model", "expected"), [(32, 224, 32), (96, 64, 64), (None, 48, 48), (32, 32, 32)])
def test_resolution_is_the_smaller_of_both(attack, model, expected):
    data = ImageDataset(table(), make_processor(model), ("a", "b", "c"), "x", "local", "train",
                        attack_resolution=attack)  # fmt: skip
    assert data.resolution == expected
    assert data[0]["pixel_values"].shape == (3, expected, expected)
    assert data.first(2).resolution == data.only(["a"]).resolution == expected


def test_at_native_resolution_no_pixel_changes():
    """The longer side is cropped at the centre."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    processor = make_processor(64)
    native = to_pixels(processor, [Image.fromarray(pixels)], resolution=32)
    expected = torch.from_numpy(pixels[:, 4:36]).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(native, expected, rtol=0, atol=1e-6)
    assert to_pixels(processor, [Image.fromarray(pixels)], resolution=64).shape[-1] == 64


# ---- a part of a stream


def many(labels, feature=None):
    """Pictures whose red and green tell the row."""
    features = Features({"image": datasets.Image(), "label": feature or ClassLabel(names=["a", "b", "c"])})
    pictures = [Image.new("RGB", (8, 8), (i % 256, i // 256, 0)) for i in range(len(labels))]
    return Dataset.from_dict({"image": pictures, "label": list(labels)}, features=features)


def numbers(data):
    return [red + 256 * green for (red, green, _), _ in seen(data)]


def test_a_stream_gives_a_seeded_part_of_the_rows(tmp_path, processor):
    write(tmp_path, "user/many", "train", many([i % 3 for i in range(300)]))

    def load(count=20, seed=0):
        return load_image_dataset("user/many", "train", processor, data_root=tmp_path, streaming=True,
                                  max_images=count, seed=seed)  # fmt: skip

    data = load()
    assert isinstance(data.rows, datasets.Dataset) and len(data) == 20
    drawn = numbers(data)
    assert len(set(drawn)) == 20 and drawn != sorted(drawn) and max(drawn) > 100
    assert [label for _, label in seen(data)] == [number % 3 for number in drawn]
    assert numbers(load()) == drawn != numbers(load(seed=1))
    assert len(load(count=1000)) == 300
    assert len(data.only(["b"])) == sum(number % 3 == 1 for number in drawn)


def test_a_stream_keeps_the_bytes_of_a_picture(tmp_path, processor):
    """Decoding and encoding anew would change a JPEG's pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.jpg", quality=60)
    content = (tmp_path / "noise.jpg").read_bytes()
    rows = [{"image": {"bytes": content, "path": "noise.jpg"}, "label": 1}]
    write(tmp_path, "user/noise", "train", Dataset.from_list(rows, features=table().features))
    data = load_image_dataset("user/noise", "train", processor, data_root=tmp_path, streaming=True, max_images=1)
    assert data.rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"] == content


def test_a_stream_reads_no_more_than_its_buffer(tmp_path, processor, monkeypatch):
    write(tmp_path, "user/many", "train", many([0] * 300))
    read = []
    shuffle = datasets.IterableDataset.shuffle

    def counting(stream, **arguments):
        return shuffle(stream.map(lambda row: read.append(1) or row, features=stream.features), **arguments)

    monkeypatch.setattr(datasets.IterableDataset, "shuffle", counting)
    monkeypatch.setattr("hf_robust_clip.zero_shot_data.rows.STREAM_BUFFER", 50)
    load_image_dataset("user/many", "train", processor, data_root=tmp_path, streaming=True, max_images=10)
    assert 50 <= len(read) <= 61


def test_streaming_with_rows_of_the_table(tmp_path, processor):
    """PACS: one split, of which every fifth row is test."""
    names = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    write(tmp_path, "flwrlabs/pacs", "train", many([6] * 30, ClassLabel(names=names)))
    data = load_image_dataset("pacs", "test", processor, data_root=tmp_path, streaming=True, max_images=30)
    assert sorted(numbers(data)) == list(range(0, 30, 5))
    write(tmp_path, "flwrlabs/ucf101", "test", table(label_column="label"))
    with pytest.raises(ValueError, match="'flwrlabs/ucf101' is stored as frames of videos; load it with streaming=F"):
        load_image_dataset("ucf101", "test", processor, data_root=tmp_path, streaming=True, max_images=3)


@pytest.mark.parametrize("streaming", [{}, {"streaming": True, "max_images": 60}], ids=["whole", "stream"])
def test_rows_of_some_domains(streaming, tmp_path, processor):
    """PACS without its sketches, of which every fifth row of the whole is test, and the sketches alone."""
    names = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    domains = ["photo", "art_painting", "cartoon", "sketch"]
    rows = many([6] * 40, ClassLabel(names=names)).add_column("domain", [i % 4 for i in range(40)])
    write(tmp_path, "flwrlabs/pacs", "train", rows.cast_column("domain", ClassLabel(names=domains)))
    found = {
        key: load_image_dataset(key, split, processor, data_root=tmp_path, **streaming)
        for key, split in (("pacs_sketch", "test"), ("pacs_without_sketch", "test"), ("pacs_without_sketch", "train"))
        if not (streaming and split == "train")
    }
    assert sorted(numbers(found["pacs_sketch"])) == list(range(3, 40, 4))
    assert "rows of domain sketch" in found["pacs_sketch"].split
    rest = sorted(numbers(found["pacs_without_sketch"]))
    test = [i for i in range(0, 40, 5) if i % 4 != 3]
    assert rest == (test if streaming else [i for i in range(40) if i % 4 != 3 and i % 5])
    write(tmp_path, "flwrlabs/pacs", "train", many([6] * 40, ClassLabel(names=names)))
    with pytest.raises(ValueError, match="'domain' has no class labels"):
        load_image_dataset("pacs_sketch", "test", processor, data_root=tmp_path, **streaming)


def test_streaming_needs_a_number_of_images(tmp_path, processor):
    with pytest.raises(ValueError, match="streaming=True needs max_images"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path, streaming=True)
    with pytest.raises(ValueError, match="max_images=0 must be at least 1"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path, streaming=True, max_images=0)


def test_a_stream_of_unknown_columns(processor, monkeypatch):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"image": 1}]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision, streaming: stream)
    with pytest.raises(ValueError, match="the stream of dataset 'user/x' doesn't tell its columns"):
        load_image_dataset("user/x", "train", processor, streaming=True, max_images=1)


def test_parts_and_sums_of_splits(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table())
    write(tmp_path, "user/colours", "val", table([2] * 6))
    data = load_image_dataset("user/colours", "val[:2]+train[4:]", processor, data_root=tmp_path)
    assert seen(data) == [(COLOURS[0], 2), (COLOURS[1], 2), (COLOURS[4], 1), (COLOURS[5], 0)]


def test_max_images_without_a_stream(tmp_path, processor):
    write(tmp_path, "user/many", "train", many([0] * 30))
    data = load_image_dataset("user/many", "train", processor, data_root=tmp_path, max_images=7, seed=3)
    whole = load_image_dataset("user/many", "train", processor, data_root=tmp_path)
    assert numbers(data) == numbers(whole.first(7, seed=3)) and len(data) == 7


# ---- a user's own pictures


def test_a_folder_of_pictures_per_class(tmp_path, processor):
    for name, colour in (("Zürich cats", COLOURS[0]), ("犬", COLOURS[1])):
        folder = tmp_path / "own" / "train" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (9, 8), colour).save(folder / "1.png")
    for streaming in (False, True):
        data = load_image_dataset(str(tmp_path / "own"), "train", processor, streaming=streaming, max_images=5)
        assert data.class_names == ("Zürich cats", "犬")
        assert sorted(seen(data)) == sorted([(COLOURS[0], 0), (COLOURS[1], 1)])
    assert (data.attack_resolution, data.templates) == (None, ("This is a photo of a {}",))


def test_a_parquet_folder_without_notes_on_its_features(tmp_path, processor):
    """As other programs write it: pictures as bytes, labels as texts."""
    import pyarrow
    import pyarrow.parquet

    rows = table(feature=Value("int64")).cast_column("image", datasets.Image(decode=False))
    plain = pyarrow.table({"image": [{"bytes": row["image"]["bytes"], "path": None} for row in rows],
                           "label": ["A", "b", "c c", "c_c", "b", "A"]})  # fmt: skip
    (tmp_path / "own").mkdir()
    pyarrow.parquet.write_table(plain, tmp_path / "own" / "train-0.parquet")
    for streaming in (False, True):
        data = load_image_dataset(str(tmp_path / "own"), "train", processor, class_names=["c c", "b", "a"],
                                  streaming=streaming, max_images=6)  # fmt: skip
        assert sorted(seen(data)) == sorted(zip(COLOURS, [2, 1, 0, 0, 1, 2], strict=True))
    assert sorted(seen(data.only(["a", "c c"]))) == sorted(zip((*COLOURS[:1], *COLOURS[2:4], COLOURS[5]),
                                                               [0, 1, 1, 0], strict=True))  # fmt: skip
    with pytest.raises(ValueError, match=r"the label 'A', which is none of the 2 class names \(c c, b, ...\)"):
        load_image_dataset(str(tmp_path / "own"), "train", processor, class_names=["c c", "b"])


def test_text_labels_that_differ_in_signs_only(tmp_path, processor):
    write(tmp_path, "user/tongues", "train", table(["C", "C++", "C#", "C", "C", "C"], feature=Value("string")))
    data = load_image_dataset("user/tongues", "train", processor, data_root=tmp_path, class_names=["C#", "C", "C++"])
    assert [label for _, label in seen(data)] == [1, 2, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="the label 'C', which is none"):
        load_image_dataset("user/tongues", "train", processor, data_root=tmp_path, class_names=["C#", "c", "C++"])


def test_the_only_column_of_class_labels_is_taken(tmp_path, processor):
    write(tmp_path, "user/kinds", "train", table(label_column="kind").add_column("number", [9] * 6))
    data = load_image_dataset("user/kinds", "train", processor, data_root=tmp_path)
    assert (data.label_column, [label for _, label in seen(data)]) == ("kind", LABELS)


def test_true_and_false_are_labels(tmp_path, processor):
    write(tmp_path, "user/flags", "train", table([True, False, True, True, False, False], feature=Value("bool")))
    data = load_image_dataset("user/flags", "train", processor, data_root=tmp_path, class_names=["no", "yes"])
    assert [row["labels"] for row in data] == [1, 0, 1, 1, 0, 0]
    assert all(type(row["labels"]) is int for row in data)


def test_a_thousand_classes_and_one(tmp_path, processor):
    thousand = [f"{letter} {i}" for i, letter in enumerate("xyzt" * 250)]
    write(tmp_path, "user/thousand", "train", many([999, 0, 500], ClassLabel(names=thousand)))
    data = load_image_dataset("user/thousand", "train", processor, data_root=tmp_path)
    assert [data.class_names[label] for _, label in seen(data)] == ["t 999", "x 0", "x 500"]
    write(tmp_path, "user/one", "train", many([0, 0], ClassLabel(names=["only"])))
    data = load_image_dataset("user/one", "train", processor, data_root=tmp_path)
    assert (data.class_names, [label for _, label in seen(data)]) == (("only",), [0, 0])


def test_classes_without_pictures_are_no_error(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table([0, 2, 2, 2, 0, 0], feature=Value("int64")))
    data = load_image_dataset("user/colours", "train", processor, data_root=tmp_path, class_names=["x", "y", "z"])
    assert [label for _, label in seen(data)] == [0, 2, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, 1, 4, 4, 1, 0], "int64", r"run from 0 to 4 \(3 different\), but there are 3 class names, for 0 .. 2"),
        ([1, 2, 3, 1, 2, 3], "int64", "run from 1 to 3"),
        ([0, -1, 0, 0, 0, 0], "int64", "run from -1 to 0"),
        ([0, 1, None, 1, 0, 0], "int64", "row 2 of dataset 'user/colours' has no label in column 'label'"),
        (["x", "y", None, "x", "y", "z"], "string", "row 2 of dataset 'user/colours' has no label"),
        ([0.5, 1, 2, 0, 1, 2], "float64", "holds 0.5, no label"),
        (["x", "y", "w", "x", "y", "z"], "string", "the label 'w', which is none of the 3 class names"),
    ],
)
def test_labels_that_fit_no_name(labels, feature, message, tmp_path, processor):
    write(tmp_path, "user/colours", "train", table(labels, feature=Value(feature)))
    with pytest.raises(ValueError, match=message):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path, class_names=["x", "y", "z"])


def test_labels_that_are_lists(tmp_path, processor):
    write(
        tmp_path, "user/colours", "train", table([[0], [1], [0], [1], [0], [1]], feature=datasets.List(Value("int8")))
    )
    with pytest.raises(ValueError, match="column 'label' of dataset 'user/colours' holds no labels but List"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path, class_names=["x", "y", "z"])


def test_missing_class_label(tmp_path, processor):
    write(tmp_path, "user/colours", "train", table([0, 1, -1, 0, 1, 2]))
    with pytest.raises(ValueError, match=r"run from -1 to 2.*leave out rows without a label"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path)


@pytest.mark.parametrize("names", [["x", "y", "x"], ["x", " ", "z"]])
def test_names_that_repeat_or_are_blank(names, tmp_path, processor):
    write(tmp_path, "user/colours", "train", table(feature=Value("int64")))
    with pytest.raises(ValueError, match="class_names"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path, class_names=names)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_set(streaming, tmp_path, processor):
    write(tmp_path, "user/colours", "train", table().select([]))
    with pytest.raises(ValueError, match="dataset 'user/colours' has no rows in split 'train'"):
        load_image_dataset("user/colours", "train", processor, data_root=tmp_path, streaming=streaming, max_images=2)


@pytest.mark.parametrize("damage", ["no picture", "cut short", "missing"])
def test_a_picture_that_cannot_be_read(damage, tmp_path, processor):
    rows = table().cast_column("image", datasets.Image(decode=False)).to_list()
    good = rows[3]["image"]["bytes"]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    bad = {"no picture": b"nothing", "cut short": (tmp_path / "noise.png").read_bytes()[:2000], "missing": None}[
        damage
    ]
    rows[3]["image"] = bad and {"bytes": bad, "path": None}
    assert good != bad
    write(tmp_path, "user/colours", "train", Dataset.from_list(rows, features=table().features))
    data = load_image_dataset("user/colours", "train", processor, data_root=tmp_path)
    assert seen(data.__getitems__([0, 5])) == [(COLOURS[0], 0), (COLOURS[5], 0)]
    with pytest.raises(ValueError, match="row 3 of dataset 'user/colours', split 'train': the picture in column 'ima"):
        data.__getitems__([0, 3, 5])


def test_a_column_without_pictures(tmp_path, processor):
    write(tmp_path, "uoft-cs/cifar100", "test", table().remove_columns("image").add_column("img", [1] * 6)
          .rename_column("label", "fine_label"))  # fmt: skip
    with pytest.raises(ValueError, match="column 'img' of dataset 'uoft-cs/cifar100' holds no pictures but Value"):
        load_image_dataset("cifar100", "test", processor, data_root=tmp_path)


def test_a_row_that_was_not_checked_says_so(tmp_path, processor):
    write(tmp_path, "tanganke/dtd", "train", table())
    with pytest.raises(ValueError, match=r"no split 'test' \(this row of datasets.json was not checked"):
        load_image_dataset("dtd", "test", processor, data_root=tmp_path)
    with pytest.raises(
        OSError, match=r"'ethz/food101' \(this row .*<data root>/ethz/food101/ \(hf download --repo-ty"
    ):
        load_image_dataset("food101", "test", processor, data_root=tmp_path)
    with pytest.raises(OSError, match=r"'uoft-cs/cifar10' \((?!this row)"):
        load_image_dataset("cifar10", "test", processor, data_root=tmp_path)


def test_the_revision_of_a_row_reaches_the_hub(processor, monkeypatch):
    asked = []

    def load(name, split, revision, streaming):
        asked.append((name, split, revision, streaming))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load)
    pinned = DatasetSpec("b", "a/b", 3, splits={"test": "val"}, revision="abc")
    monkeypatch.setattr("hf_robust_clip.zero_shot_data.loading.find_spec", {"b": pinned}.get)
    assert load_image_dataset("b", "test", processor).revision == "abc"
    assert load_image_dataset("b", "test", processor, revision="def").revision == "def"
    assert load_image_dataset("user/c", "test", processor).revision == "main"
    assert asked == [("a/b", "val", "abc", False), ("a/b", "val", "def", False), ("user/c", "test", None, False)]


# ---- files of class names


@pytest.mark.parametrize(
    "text", ["Katze\nhot dog\n犬\n", "\ufeffKatze\r\n hot dog \r\n犬", '["Katze", "hot dog", "\\u72ac"]']
)
def test_class_names_of_a_file(text, tmp_path):
    (tmp_path / "names").write_bytes(text.encode())
    assert read_class_names(tmp_path / "names") == ["Katze", "hot dog", "犬"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\nb\n", r"names': class_names\[1\]='' is not a name"),
        ("a\nb\na\n", r"class_names\[2\]='a' repeats class_names\[0\]"),
        ("", "class_names is empty"),
        ("[]", "class_names is empty"),
        ('["a", 3]', r"class_names\[1\]=3 is not a name"),
        ('["a", ', "begin like a JSON list but are none"),
    ],
)
def test_bad_files_of_class_names(text, message, tmp_path):
    (tmp_path / "names").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / "names")
    with pytest.raises(OSError, match="nowhere"):
        read_class_names(tmp_path / "nowhere")
