"""Rows that can't be read, columns that could be meant, and rows that are in memory already."""

import io
import re
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image, PngImagePlugin
from tiny import make_processor
from torch.utils.data import DataLoader, Subset

from hf_robust_clip import image_dataset, load_image_dataset
from hf_robust_clip.arguments import Images
from hf_robust_clip.cli import main
from hf_robust_clip.runs.evaluate import read
from hf_robust_clip.runs.shared import load_data
from hf_robust_clip.zero_shot_data.dataset import ImageDataset, collate_images
from hf_robust_clip.zero_shot_data.errors import DatasetError
from hf_robust_clip.zero_shot_data.fingerprint import dataset_digest

CONFIG = Path(__file__).parents[2] / "recipes/configs/evaluate.yaml"
NAMES = ["ant", "bee"]
BAD = 3


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module", autouse=True)
def impatient():
    """Torch waits 5 s for each worker of a loader that failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ROBUST_CLIP_DATA_ROOT", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after every shuffled stream
    datasets.disable_progress_bars()


def content(red=0, size=(8, 8), **settings):
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, "PNG", **settings)
    return file.getvalue()


def rows(count=6):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    table = {
        "image": [{"bytes": content(i), "path": None} for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return Dataset.from_dict(table, features=features)


def reds(data):
    return [round(255 * row["pixel_values"][0, 0, 0].item()) for row in data]


# ---- rows that can't be read


def bomb():
    """A PNG whose header says 100,000 x 100,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def too_much_text():
    about = PngImagePlugin.PngInfo()
    about.add_text("about", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return content(pnginfo=about)


def noisy():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def floats():
    file = io.BytesIO()
    Image.new("F", (8, 8), 200.0).save(file, "TIFF")
    return file.getvalue()


FAULTS = {
    "no picture": lambda: b"nothing",
    "cut short": lambda: noisy()[:1000],
    "bomb": bomb,
    "too much text": too_much_text,
    "no bytes": lambda: b"",
    "nothing": lambda: None,
    "no such file": lambda: "nowhere/7.png",
    "a mode of unknown range": floats,
}


def faulty(fault, processor, **settings):
    table = rows().cast_column("image", datasets.Image(decode=False)).to_list()
    bad = FAULTS[fault]()
    table[BAD]["image"] = (
        {"bytes": None, "path": bad} if isinstance(bad, str) else bad and {"bytes": bad, "path": "7.png"}
    )
    if bad == b"":
        table[BAD]["image"] = {"bytes": b"", "path": None}
    return ImageDataset(Dataset.from_list(table, features=rows().features), processor, ("ant", "bee"), "user/set",
                        "local", "test", **settings)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("num_workers", "augment"), [(0, False), (0, True), (1, False)])
def test_the_row_is_named_in_one_line(fault, augment, num_workers, processor):
    data = faulty(fault, processor, augment=augment)
    loader = DataLoader(data, batch_size=2, collate_fn=collate_images, num_workers=num_workers)
    batches = iter(loader)
    next(batches)
    place = rf"^row {BAD}( \((7|nowhere/7)\.png\))? of dataset 'user/set', split 'test': .*'image'"
    with pytest.raises(DatasetError, match=place) as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert [example["labels"] for example in Subset(data, [0, 5]).__getitems__([0, 1])] == [0, 1]


def test_the_row_is_that_of_the_table_whatever_was_drawn(processor):
    data = faulty("no picture", processor)
    for part, place in ((data.only(["bee"]), 1), (replace_rows(data, [5, BAD, 0]), 1), (data.shots(3), BAD)):
        with pytest.raises(DatasetError, match=rf"^row {BAD} "):
            part[place]
    drawn = data.first(5)
    place = next(i for i in range(5) if drawn.rows._indices.column(0)[i].as_py() == BAD)
    with pytest.raises(DatasetError, match=rf"^row {BAD} "):
        drawn[place - 5]


def replace_rows(data, chosen):
    return ImageDataset(data.rows.select(chosen), data.processor, data.class_names, "user/set", "local", "test")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_label_without_a_class_names_its_row(num_workers, processor):
    """As after a replaced table: a loaded one is checked as a whole."""
    features = Features({"image": datasets.Image(), "label": Value("string")})
    table = Dataset.from_dict({"image": rows()["image"], "label": ["a", "b", "a", "x", None, "a"]}, features=features)
    data = ImageDataset(table, processor, ("A", "B"), "user/set", "local", "test", label_map={"a": 0, "b": 1})
    loader = DataLoader(data, batch_size=3, collate_fn=collate_images, num_workers=num_workers)
    with pytest.raises(
        DatasetError, match=r"^row 3 of dataset 'user/set', split 'test': 'x' in column 'label'[^\n]*$"
    ):
        list(loader)
    with pytest.raises(DatasetError, match=r"^row 4 .*None in column 'label'"):
        data[4]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"pixel_values": torch.full((3, 8, 8), 7.0), "labels": 0}] * 2, "pixel_values"),
        ([{"pixel_values": torch.zeros(3, 8, 8).byte(), "labels": 0}] * 2, "pixel_values"),
        ([{"pixel_values": torch.zeros(3, 8, 8), "labels": 0.5}] * 2, "labels"),
        ([{"pixel_values": torch.zeros(3, 8, 8), "labels": "ant"}] * 2, "labels"),
        ([{"pixel_values": [[0.0]], "labels": 0}] * 2, r"pixel_values.*list.*\(3, H, W\)"),
        ([{"pixel_values": np.zeros((3, 8, 8)), "labels": 0}] * 2, r"pixel_values.*ndarray of shape \(3, 8, 8\)"),
        ([{"pixel_values": Image.new("RGB", (8, 8)), "labels": 0}] * 2, r"pixel_values.* Image; .*\(3, H, W\)"),
        ([{"pixel_values": torch.zeros(1, 3, 8, 8), "labels": 0}] * 2, r"pixel_values.*\(1, 3, 8, 8\)"),
        ([{"picture": Image.new("RGB", (8, 8)), "labels": 0}] * 2, r"picture.* Image; .*\(3, H, W\)"),
        (
            [{"pixel_values": torch.zeros(3, 8, 8)}, {"pixel_values": torch.zeros(3, 8, 8), "labels": 0}],
            "1 of 2 .*labels",
        ),
        ([{"pixel_values": torch.zeros(3, 8, i + 1)} for i in range(2)], "pixel_values"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_is_none_is_one_line(examples, message, num_workers):
    with pytest.raises(DatasetError, match=message) as caught:
        list(DataLoader(examples, batch_size=2, collate_fn=collate_images, num_workers=num_workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("crop_size", {"height": 8, "width": 6}), ("resample", None), ("do_rescale", False)]
)
def test_a_fault_of_the_processor_is_no_fault_of_a_file(name, value):
    own = make_processor()
    data = image_dataset(rows(), own)
    setattr(own.image_processor, name, value)
    with pytest.raises(DatasetError, match=r"^row 0 .*image processor") as caught:
        data[0]
    assert "replace the file" not in str(caught.value)


def test_an_error_of_a_picture_does_not_end_a_loop(processor, monkeypatch):
    """A loop over a dataset ends with IndexError, which a broken picture may raise too."""
    data = faulty("no such file", processor)
    monkeypatch.setattr("hf_robust_clip.zero_shot_data.dataset.open_stored", lambda stored: [][0])
    with pytest.raises(DatasetError, match=r"^row 0 "):
        list(data)
    for index in (6, -7):
        with pytest.raises(IndexError):
            data[index]


def test_a_slice_is_no_index(processor):
    data = image_dataset(rows(), processor)
    assert data[np.int64(1)]["labels"] == data[torch.tensor(1)]["labels"] == 1
    with pytest.raises(TypeError, match=r"index slice\(None, 3, None\).*rows\.select"):
        data[:3]


def test_what_is_no_picture_has_no_address(processor):
    table = {"image": [{"bytes": b"<html>", "path": None}], "label": [0]}
    bad = Dataset.from_dict(table, features=rows().features)
    with pytest.raises(DatasetError, match=r"row 0 .*6 bytes are no picture(?!.* at 0x)"):
        image_dataset(bad, processor)[0]


def test_many_columns_are_cut_short_in_errors(processor):
    many = rows().rename_columns({"image": "0.png", "label": "cls"})
    for i in range(1, 200):
        many = many.add_column(f"{i}.image", [f"{i}"] * 6)
    with pytest.raises(ValueError, match=r"'0\.png', '1\.image'.*image_column") as caught:
        image_dataset(many, processor)
    with pytest.raises(ValueError, match=r"'kind'.*label_column") as of_labels:
        image_dataset(many, processor, image_column="0.png", label_column="kind")
    assert max(len(str(error.value)) for error in (caught, of_labels)) < 600


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    for name in NAMES:
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(content())
    (tmp_path / "set" / "bee" / "1.png").write_bytes(bomb())
    words = ["--dataset_name", str(tmp_path / "set"), "--dataset_test_split", "train", "--evaluation.num_workers", "1"]
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--config", str(CONFIG), *words, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert re.search(r"row 1 \(\S*bee/1\.png\) of dataset", error.splitlines()[-1])
    assert "Traceback" not in error


# ---- which column


def with_mask(names, kind="Image"):
    """Rows with several columns of pictures: `image` is the red one, the others can't be decoded."""
    table = {name: [{"bytes": content(7) if name == names[-1] else b"none", "path": None}] * 2 for name in names}
    feature = datasets.Image() if kind == "Image" else {"bytes": Value("binary"), "path": Value("string")}
    features = Features({**dict.fromkeys(names, feature), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({**table, "label": [0, 1]}, features=features)


@pytest.mark.parametrize("name", ["image", "img", "Image", "picture", "jpg", "png", "webp"])
@pytest.mark.parametrize("kind", ["Image", "struct"])
def test_the_column_whose_name_says_so_is_read_and_no_other(name, kind, processor):
    data = image_dataset(with_mask(["mask", "depth", name], kind), processor)
    assert (data.image_column, reds(data), data.rows.column_names) == (name, [7, 7], [name, "label"])


@pytest.mark.parametrize("names", [["image", "img"], ["mask", "depth"], ["jpg", "png"]])
def test_several_columns_of_pictures_must_be_chosen_from(names, processor, tmp_path):
    with pytest.raises(ValueError, match=rf"{names[0]}.*{names[1]}.*image_column"):
        image_dataset(with_mask(names), processor)
    assert reds(image_dataset(with_mask(names), processor, image_column=names[1])) == [7, 7]
    with_mask(names).to_parquet(tmp_path / "train-0.parquet")
    for streaming in (False, True):
        data = load_image_dataset(str(tmp_path), "train", processor, image_column=names[1], streaming=streaming,
                                  max_images=2)  # fmt: skip
        assert reds(data) == [7, 7]


def test_the_bytes_of_encoded_pictures_may_stand_alone(tmp_path, processor):
    """Beside a mask, which is an `Image` column."""
    features = Features({"mask": datasets.Image(), "image": Value("binary"), "label": ClassLabel(names=NAMES)})
    black = in_bytes(Image.new("L", (8, 8)))
    table = Dataset.from_dict(
        {"mask": [black] * 2, "image": [content(7), content(8)], "label": [0, 1]}, features=features
    )
    assert reds(image_dataset(table, processor)) == [7, 8]
    table.to_parquet(tmp_path / "train.parquet")
    for streaming in (False, True):
        data = load_image_dataset(str(tmp_path), "train", processor, streaming=streaming, max_images=2)
        assert sorted(reds(data)) == [7, 8]


@pytest.mark.parametrize(("name", "value"), [("image", "a.png"), ("Image", [1, 2]), ("images", "a.png"), ("photo", 1)])
def test_a_column_called_image_that_holds_none_is_not_passed_over(name, value, processor):
    table = rows().rename_column("image", "mask").add_column(name, [value] * 6)
    with pytest.raises(ValueError, match=rf"'{name}'.*image_column"):
        image_dataset(table, processor)
    assert reds(image_dataset(table, processor, image_column="mask")) == list(range(6))


@pytest.mark.parametrize("name", ["image_bytes", "image_path", "inputImage"])
def test_a_text_that_speaks_of_pictures_is_not_passed_over(name, processor):
    table = rows().rename_column("image", "mask").add_column(name, ["x"] * 6)
    with pytest.raises(ValueError, match=rf"'mask'.*'{name}'.*image_column"):
        image_dataset(table, processor)
    assert reds(image_dataset(rows().add_column(name, ["x"] * 6), processor)) == list(range(6))
    assert reds(image_dataset(rows().rename_column("image", "scan").add_column("image_id", [1] * 6), processor)) == (
        list(range(6))
    )


@pytest.mark.parametrize("kind", ["Image", "struct"])
def test_numbers_that_speak_of_pictures_are_none(kind, processor):
    """`scan` holds the pictures, whether as `Image` or as bytes and path."""
    table = with_mask(["scan"], kind).add_column("image_quality", [0.5, 1.0]).add_column("image_id", [1, 2])
    data = image_dataset(table.add_column("photo_ok", [True, False]), processor)
    assert (data.image_column, reds(data)) == ("scan", [7, 7])


@pytest.mark.parametrize("name", ["Label", "LABELS"])
def test_the_column_called_label_in_any_case_decides(name, processor):
    table = rows().rename_column("label", name).add_column("source", [0] * 6)
    data = image_dataset(table.cast_column("source", ClassLabel(names=["web"])), processor)
    assert (data.label_column, [row["labels"] for row in data]) == (name, [0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize("name", ["category", "Class", "target_id", "fineLabel"])
def test_another_column_that_speaks_of_labels_is_not_passed_over(name, processor):
    table = rows().rename_column("label", "source").add_column(name, [0] * 6)
    with pytest.raises(ValueError, match=rf"'source'.*'{name}'.*label_column"):
        image_dataset(table, processor)
    table = rows().rename_column("label", "source").add_column(f"{name}_weight", [0.5] * 6)
    assert image_dataset(table, processor).label_column == "source"


def test_the_only_column_of_pictures_may_have_any_name(processor):
    data = image_dataset(rows().rename_column("image", "scan"), processor)
    assert (data.image_column, reds(data)) == ("scan", list(range(6)))
    with pytest.raises(ValueError, match=r"'label'.*no pictures"):
        image_dataset(rows(), processor, image_column="label")
    with pytest.raises(ValueError, match="no column 'img'"):
        image_dataset(rows(), processor, image_column="img")


def test_several_columns_of_labels_must_be_chosen_from(processor):
    both = rows().add_column("cls", [1, 1, 1, 0, 0, 0])
    with pytest.raises(ValueError, match=r"'label', 'cls'.*label_column"):
        image_dataset(both, processor)
    data = image_dataset(both, processor, label_column="cls", class_names=NAMES)
    assert [row["labels"] for row in data] == [1, 1, 1, 0, 0, 0]
    named = rows().rename_column("label", "fine")
    two = named.add_column("coarse", [0] * 6).cast_column("coarse", ClassLabel(names=["all"]))
    with pytest.raises(ValueError, match=r"'fine', 'coarse'.*label_column"):
        image_dataset(two, processor)


def in_bytes(picture, file_format="PNG", **settings):
    file = io.BytesIO()
    picture.save(file, file_format, **settings)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("mode", [None, "RGB", "L", "RGBA", "1"])
def test_a_column_that_would_convert_is_read_as_it_is_stored(mode, processor):
    """A mode of the column drops transparency, clips 16 bits and floats, and makes masks of pictures."""
    white_is_zero = {262: 0, 274: 1}  # and an orientation, for which `datasets` copies the picture without its tags
    grey = np.full((8, 8), 257, dtype=np.uint16)
    pictures = {
        1.0: in_bytes(Image.new("RGBA", (8, 8), (0, 0, 0, 0))),
        100 / 255: in_bytes(Image.fromarray(100 * grey), "TIFF"),
        51 / 255: in_bytes(Image.fromarray(np.full((8, 8), 0.2, dtype=np.float32)), "TIFF"),
        55 / 255: in_bytes(Image.fromarray(200 * grey), "TIFF", tiffinfo=white_is_zero),
        60 / 255: in_bytes(Image.new("L", (8, 8), 60)),
    }  # fmt: skip
    features = Features({"image": datasets.Image(mode=mode), "label": ClassLabel(names=NAMES)})
    table = Dataset.from_dict({"image": list(pictures.values()), "label": [0] * len(pictures)}, features=features)
    for data in (
        image_dataset(table, processor),
        ImageDataset(table, processor, ("ant", "bee"), "user/set", "local", "test"),
    ):
        assert [row["pixel_values"].unique().tolist() for row in data] == [
            [pytest.approx(level)] for level in pictures
        ]


# ---- rows in memory


def test_rows_in_memory_are_the_same_as_from_a_folder(tmp_path, processor):
    rows().to_parquet(tmp_path / "train-0.parquet")
    known = load_image_dataset(str(tmp_path), "train", processor, resize=10)
    data = image_dataset(rows(), processor, resize=10)
    assert (data.class_names, reds(data), data.resize) == (("ant", "bee"), list(range(6)), 10)
    assert [row["labels"] for row in data] == [row["labels"] for row in known]
    assert dataset_digest(data) == dataset_digest(known)
    data = image_dataset(
        rows(), processor, attack_resolution=4, name="mine", revision="v2", split="dev", templates="tapt"
    )
    assert data[0]["pixel_values"].shape == (3, 4, 4)
    assert (data.dataset_id, data.revision, data.split, data.templates) == ("mine", "v2", "dev", ("a photo of a {}.",))


def test_formats_of_rows_do_not_matter_but_transforms_do(processor):
    for kind in ("torch", "numpy", "arrow"):
        assert reds(image_dataset(rows().with_format(kind), processor)) == list(range(6))
    with pytest.raises(ValueError, match=r"transform.*with_format"):
        image_dataset(rows().with_transform(lambda batch: batch), processor)


def test_what_are_no_rows(processor):
    with pytest.raises(TypeError, match=r"DatasetDict.*\['train', 'test'\]"):
        image_dataset(DatasetDict(train=rows(), test=rows()), processor)
    with pytest.raises(TypeError, match="IterableDataset"):
        image_dataset(rows().to_iterable_dataset(), processor)
    with pytest.raises(ValueError, match="no rows"):
        image_dataset(rows().select([]), processor)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "held"), [(rows(), r"\['image', 'label'\]"), ([(1, 2)], "tuple"), ([{}], r"\[\]")]
)
def test_a_raw_dataset_says_how_to_wrap_it(dataset, held, num_workers):
    with pytest.raises(DatasetError, match=rf"{held}.*image_dataset.*load_image_dataset"):
        list(DataLoader(dataset, batch_size=2, collate_fn=collate_images, num_workers=num_workers))


# ---- settings


def test_the_background_goes_all_the_way(tmp_path, tiny_clip):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    for name in NAMES:
        (tmp_path / "set" / name).mkdir(parents=True)
        picture.save(tmp_path / "set" / name / "1.png")
    model, folder = tiny_clip(), str(tmp_path / "set")
    digests = set()
    for background, colour in (("white", (1, 1, 1)), ("lime", (0, 1, 0)), ([0, 0, 255], (0, 0, 1))):
        for augment in (False, True):
            data = load_data(Images(folder, "train", background=background, augment=augment), model)
            example = data[1]
            pixel = example["picture"][:, 3, 3] / 255 if augment else example["pixel_values"][:, 3, 3]
            assert tuple(pixel.tolist()) == colour
            digests.add(dataset_digest(data))
    assert len(digests) == 6
    with pytest.raises(ValueError, match="background='limes'"):
        load_data(Images(folder, "train", background="limes"), model)


def test_settings_of_the_command_line_reach_the_loading(tmp_path, tiny_clip):
    folder = tmp_path / "plain"
    folder.mkdir()
    with_mask(["mask", "depth"]).rename_column("label", "kind").to_parquet(folder / "train-0.parquet")
    (tmp_path / "full").mkdir()
    with_mask(["mask", "depth"]).to_parquet(tmp_path / "full" / "train-0.parquet")
    settings = Images(str(tmp_path), "train", config="plain", image_column="depth", label_column="kind",
                            class_names={"ant": "Ameise", "bee": "Biene"})  # fmt: skip
    data = load_data(settings, tiny_clip())
    assert (reds(data), data.class_names) == ([7, 7], ("Ameise", "Biene"))
    words = ["--dataset_name", str(tmp_path), "--dataset_config", "plain", "--image_column", "depth"]
    task = Images(str(tmp_path), "test", config="plain", image_column="depth")
    assert read([*words, "--output_dir", str(tmp_path / "out")], CONFIG).tasks == (task,)


def test_a_resize_that_does_nothing_is_refused(tmp_path, tiny_clip, processor, monkeypatch):
    """At a dataset's own smaller resolution, and with random crops of whole pictures."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **settings: pytest.fail("nothing is to be loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="resize=256"):
        load_image_dataset("cifar10", "test", make_processor(64), resize=256)
    with pytest.raises(ValueError, match="resize=12"):
        image_dataset(rows(), processor, resize=12, attack_resolution=4)
    with pytest.raises(ValueError, match=r"resize=12.*augment"):
        load_data(Images("digits", resize=12, augment=True), tiny_clip())
    assert image_dataset(rows(), processor, resize=12, attack_resolution=8)[0]["pixel_values"].shape == (3, 8, 8)


def test_only_takes_names_and_no_other(processor):
    data = image_dataset(rows(), processor)
    for names in ([], ["ant", "ant"], "ant"):
        with pytest.raises(ValueError, match="class_names"):
            data.only(names)


def test_folders_with_underscores_are_named_in_words(processor, tmp_path):
    tmp_path /= "pictures"
    for name in ("golden_retriever", "tabby cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(content(i))
    data = load_image_dataset(str(tmp_path), "train", processor)
    assert data.class_names == ("golden retriever", "tabby cat")
    assert data.only(["golden retriever"]).class_names == ("golden retriever",)
    assert "\n" not in repr(data) and repr(data).endswith("4 images of 2 classes)")
    for given in (["golden_retriever", "tabby cat"], {"golden_retriever": "dog", "tabby cat": "cat"}):
        own = load_image_dataset(str(tmp_path), "train", processor, class_names=given)
        assert own.class_names == tuple(given.values() if isinstance(given, dict) else given)
    (tmp_path / "train" / "tabby_cat").mkdir()
    (tmp_path / "train" / "tabby_cat" / "0.png").write_bytes(content(9))
    with pytest.raises(ValueError, match="tabby cat"):
        load_image_dataset(str(tmp_path), "train", processor)
