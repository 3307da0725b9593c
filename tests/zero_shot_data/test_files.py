"""Which files make a split. Every picture has a colour of its own, so that a missing or a foreign row shows."""

import os
from io import BytesIO

import datasets
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from tiny import make_processor

from hf_robust_clip import image_dataset, load_image_dataset
from hf_robust_clip.zero_shot_data.errors import DatasetError
from hf_robust_clip.zero_shot_data.files import _walk
from hf_robust_clip.zero_shot_data.rows import DATA_ROOT_VARIABLE

NAMES = ["ant", "bee"]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_ROOT_VARIABLE, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after every shuffled stream
    datasets.disable_progress_bars()


def table(*reds):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    pictures = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in reds]
    return Dataset.from_dict({"image": pictures, "label": [red % 2 for red in reds]}, features=features)


def write(root, *files):
    """Each file with one row; its number counts the files."""
    for red, file in enumerate(files):
        path = root / "set" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".parquet":
            table(red).to_parquet(path)
        elif path.suffix == ".jsonl":
            path.write_text(f'{{"number": {red}, "label": {red % 2}}}\n')
        elif path.suffix in (".tar", ".arrow"):
            path.write_bytes(b"")
        else:
            Image.new("RGB", (8, 8), (red, 0, 0)).save(path, "PNG")
    return str(root / "set")


def reds(folder, processor, split="train", **settings):
    data = load_image_dataset(folder, split, processor, **settings)
    return sorted(round(255 * row["pixel_values"][0, 0, 0].item()) for row in data)


# ---- sets that are not whole


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["data/train-00000-of-00003.parquet"], "number 1 of 3"),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "number 1 of 3"),
        (["train-00001-of-00002-0123456789abcdef.parquet"], "number 0 of 2"),
        (
            ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            r"\[1, 2\]",
        ),
        (["train-00000-of-00001-0123456789ab.parquet", "train-00000-of-00001-ba9876543210.parquet"], "number 0 twice"),
        (["0000.parquet", "0002.parquet"], "number 1"),
        (["train/0001.parquet", "train/0003.parquet"], "number 2"),
        (["train/0003.parquet"], "number 1"),
        (["train-0.parquet", "train-2.parquet"], "number 1"),
        (["train/data-00000-of-00002.jsonl"], "number 1 of 2"),
        (["train-00000-of-00002.jsonl"], "number 1 of 2"),
        (["part_0.jsonl", "part_3.jsonl"], r"number 1 \(2 missing"),
        (["shards/train-00000-of-00002.tar"], "number 1 of 2"),
        (["set-000000.tar", "set-000002.tar"], "number 1 "),
        (["train/data-00001-of-00002.arrow"], "number 0 of 2"),
        (["train00000of00003.parquet"], "number 1 of 3"),
        (["train-part1of3.parquet"], "number 0 of 3"),
        (["train (1 of 2).parquet"], "number 0 of 2"),
        (["train-00001-of-00003.parquet", "train-00002-of-00003.parquet"], "number 0 of 3"),
        (["train-00000-of-00001.parquet", "train-00001-of-00001.parquet"], "2 numbers"),
        (["partial-train/0000.parquet"], "partial-train"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_that_is_not_whole_is_refused(files, what, streaming, tmp_path, processor):
    folder = write(tmp_path, *files)
    with pytest.raises(DatasetError, match=what):
        load_image_dataset(folder, "train", processor, streaming=streaming, max_images=9)


@pytest.mark.parametrize(
    "files",
    [
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["train-00000-of-00002-0123456789ab.parquet", "train-00001-of-00002-ba9876543210.parquet"],
        ["0000.parquet", "0001.parquet", "0002.parquet"],
        ["train/1.parquet", "train/2.parquet"],
        ["train-00001-of-00002.parquet", "train-00002-of-00002.parquet"],
        ["train00000of00002.parquet", "train00001of00002.parquet"],
        [
            "train/part-00000-0a8b3c4d-1e2f-4a5b-8c6d-7e8f90a1b2c3-c000.snappy.parquet",
            "train/part-00001-0a8b3c4d-1e2f-4a5b-8c6d-7e8f90a1b2c3-c000.snappy.parquet",
        ],
        ["train/of-2012.parquet", "train/of-2014.parquet"],
        ["train/log-2012-01-03.parquet", "train/log-2012-01-07.parquet"],
        ["train/set_v02.parquet"],
        ["ant/0001.png", "ant/0007.png", "bee/0003.png"],
    ],
)
def test_whole_sets_and_other_numbers_are_read(files, tmp_path, processor):
    assert reds(write(tmp_path, *files), processor) == list(range(len(files)))


def test_another_split_may_be_incomplete(tmp_path, processor):
    folder = write(tmp_path, "data/test-00000-of-00001.parquet", "data/train-00000-of-00003.parquet")
    assert reds(folder, processor, "test") == [0]
    with pytest.raises(DatasetError, match="number 1 of 3"):
        reds(folder, processor, "test+train[:1]")


def test_files_of_one_split_by_several_names(tmp_path, processor):
    folder = write(tmp_path, "train-00000-of-00001.parquet", "train-extra-00000-of-00001.parquet")
    with pytest.raises(DatasetError, match=r"'train-00000-of-00001\.parquet' and 'train-extra-00000"):
        reds(folder, processor)


@pytest.mark.parametrize(
    "other",
    ["train-old", "train_old", "old_train", "train.bak", "train2", "train (1)", "trainOld", "Train", "old/train",
     "train/0000", "train_v2", "noisy-train-00000-of-00001", "train-00000-of-00001"],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_two_files_that_could_be_one_split_are_refused(other, streaming, tmp_path, processor):
    folder = write(tmp_path, "train.parquet", f"{other}.parquet", "test.parquet")
    with pytest.raises(DatasetError, match=r"'(train\.parquet|\.|old)'"):
        reds(folder, processor, streaming=streaming, max_images=9)
    assert reds(folder, processor, "test") == [2], "another split is not concerned"
    (tmp_path / "set" / "train.parquet").unlink()
    (tmp_path / "set" / f"{other}.parquet").rename(tmp_path / "set" / "train.parquet")
    assert reds(folder, processor) == [1]


@pytest.mark.parametrize(
    "files",
    [
        ["a-train-00000-of-00001.parquet", "b-train-00000-of-00001.parquet"],
        ["train_a.parquet", "train_b.parquet"],
        ["train_v1.parquet", "train_v2.parquet"],
        ["train (1).parquet", "train (2).parquet"],
        ["a1-train.parquet", "a2-train.parquet"],
        ["train/a.parquet", "train/b.parquet"],
        ["train/a/0000.parquet", "train/b/0000.parquet"],
        ["train.jsonl", "train_old.jsonl"],
        ["a.parquet", "b.parquet"],
    ],
)
def test_files_that_would_be_joined_are_refused(files, tmp_path, processor):
    with pytest.raises(DatasetError, match=r"of split|'train'"):
        reds(write(tmp_path, *files), processor)


def test_splits_told_apart_by_numbers(tmp_path, processor):
    folder = write(tmp_path, "fold1-00000-of-00001.parquet", "fold2-00000-of-00001.parquet")
    assert (reds(folder, processor, "fold1"), reds(folder, processor, "fold2")) == ([0], [1])
    assert reds(folder, processor, "fold1+fold2") == [0, 1]


@pytest.mark.parametrize("other", ["train/ant/1.png", "train.arrow"])
def test_two_kinds_of_files_that_could_be_one_split_are_refused(other, tmp_path, processor):
    folder = write(tmp_path, "train.parquet", other, "test.parquet")
    with pytest.raises(DatasetError, match=r"'train\.parquet' and .*train"):
        reds(folder, processor)
    assert reds(folder, processor, "test") == [2]


def test_a_split_whose_name_begins_as_another(tmp_path, processor):
    """As the Hub names them: README.md tells that they are two."""
    folder = write(tmp_path, "data/test-00000-of-00001.parquet", "data/test_hard-00000-of-00001.parquet")
    with pytest.raises(DatasetError, match="test_hard-00000"):
        reds(folder, processor, "test")
    splits = [{"name": "test", "num_examples": 1}, {"name": "test_hard", "num_examples": 1}]
    (tmp_path / "set" / "README.md").write_text(f"---\ndataset_info: {{splits: {splits}}}\n---\n")
    assert reds(folder, processor, "test") == [0]
    assert reds(folder, processor, "test_hard") == [1]


def test_files_beside_those_that_a_readme_means(tmp_path, processor):
    folder = write(tmp_path, "data/test-00000-of-00001.parquet", "data/test-old.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files: [{split: test, path: 'data/test-*'}]\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    for config in (None, "default"):
        with pytest.raises(DatasetError, match=r"data/test-old\.parquet"):
            reds(folder, processor, "test", config=config)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_what_map_and_filter_leave_in_a_saved_dataset_is_no_data(several, streaming, tmp_path, processor):
    folder = tmp_path / "set"
    (datasets.DatasetDict({"train": table(0, 1, 2)}) if several else table(0, 1, 2)).save_to_disk(folder)
    saved = datasets.load_from_disk(folder)
    saved = saved["train"] if several else saved
    saved.map(lambda row: {"image": Image.new("RGB", (8, 8), (99, 0, 0))})
    saved.shuffle(seed=0).filter(lambda row: row["label"] == 1)
    assert len(list(folder.rglob("cache-*.arrow"))) > 1
    assert reds(str(folder), processor, streaming=streaming, max_images=9) == [0, 1, 2]


def test_a_saved_dataset_knows_its_split(tmp_path, processor):
    rows = table(0, 1)
    rows.info.splits = None
    Dataset(rows.data, rows.info, split=datasets.Split.TEST).save_to_disk(tmp_path / "set")
    assert reds(str(tmp_path / "set"), processor, "test") == [0, 1]
    with pytest.raises(ValueError, match="'train'"):
        reds(str(tmp_path / "set"), processor, "train")


@pytest.mark.parametrize("change", ["rows", "labels of metadata"])
def test_a_file_replaced_by_one_of_the_same_date_is_read_anew(change, tmp_path, processor):
    if change == "rows":
        folder, file = write(tmp_path, "train.parquet"), tmp_path / "set" / "train.parquet"
    else:
        folder, file = write(tmp_path, "train/1.png"), tmp_path / "set" / "train" / "metadata.csv"
        file.write_text("file_name,label\n1.png,ant\n")
    date = file.stat().st_mtime_ns
    load_image_dataset(folder, "train", processor, class_names=NAMES)
    table(3).to_parquet(file) if change == "rows" else file.write_text("file_name,label\n1.png,bee\n")
    os.utime(file, ns=(date, date))
    (row,) = load_image_dataset(folder, "train", processor, class_names=NAMES)
    assert row["labels"] == 1


def test_the_numbers_of_rows_in_the_readme_count(tmp_path, processor):
    """A trailing file that is missing shows in no name."""
    folder = write(tmp_path, "train/0000.parquet", "train/0001.parquet", "test/0000.parquet")
    splits = [{"name": "train", "num_examples": 3}, {"name": "test", "num_examples": 1}]
    (tmp_path / "set" / "README.md").write_text(f"---\ndataset_info: {{splits: {splits}}}\n---\n")
    assert reds(folder, processor, "test") == [2]
    with pytest.raises(DatasetError, match=r"'train'.*has 2 rows, 3"):
        reds(folder, processor)


def test_the_only_configuration_may_be_called_default(tmp_path, processor):
    folder = write(tmp_path, "data/train-00000-of-00001.parquet")
    assert reds(folder, processor, config="default") == [0]


def test_a_readme_that_says_nothing_is_no_error(tmp_path, processor):
    folder = write(tmp_path, "train-00000-of-00001.parquet")
    for text in ("# notes", "---\n: [\n---\n", "---\nlicense: mit\n---\n"):
        (tmp_path / "set" / "README.md").write_text(text)
        assert reds(folder, processor) == [0]


def test_a_damaged_file_is_one_line(tmp_path, processor):
    folder = write(tmp_path, "train-00000-of-00001.parquet")
    (tmp_path / "set" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"^[^\n]*'train-00000-of-00001.parquet'[^\n]*Parquet[^\n]*$"):
        reds(folder, processor)
    (tmp_path / "set" / "train-00000-of-00001.parquet").rename(tmp_path / "set" / "train.csv")
    (tmp_path / "set" / "train.csv").write_text('a,b\n1,2\n"x,3,4\n')
    with pytest.raises(OSError, match=r"in '[^\n]*set' \([^\n]*tokenizing[^\n]*$"):
        reds(folder, processor)


# ---- configurations

LAYOUTS = {
    "split in the file's name": ["plain/train-00000-of-00001.parquet", "full/train-00000-of-00001.parquet"],
    "below data": ["data/plain/train-00000-of-00001.parquet", "data/full/train-00000-of-00001.parquet"],
    "split as a folder": ["plain/train/0000.parquet", "full/train/0000.parquet"],
    "no split": ["plain/0000.parquet", "full/0000.parquet"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_of_several_configurations_must_be_named(layout, tmp_path, processor):
    folder = write(tmp_path, *LAYOUTS[layout])
    with pytest.raises(DatasetError, match=r"config.*'full', 'plain'"):
        reds(folder, processor)
    assert reds(folder, processor, config="plain") == [0]
    assert reds(folder, processor, config="full", streaming=True, max_images=5) == [1]
    assert "plain" in load_image_dataset(folder, "train", processor, config="plain").split, "reports tell it"
    with pytest.raises(DatasetError, match="config='other'"):
        reds(folder, processor, config="other")


def test_a_configuration_of_pictures(tmp_path, processor):
    files = [f"{config}/train/{name}/1.png" for config in ("clean", "noisy") for name in NAMES]
    folder = write(tmp_path, *files)
    with pytest.raises(DatasetError, match=r"config.*'clean', 'noisy'"):
        reds(folder, processor)
    assert reds(folder, processor, config="noisy") == [2, 3]


README = """---
configs:
- config_name: few
  data_files:
  - split: train
    path: a/x.parquet
- config_name: many
  data_files:
  - split: train
    path: [a/y.parquet, b/*.parquet]
  - split: valid
    path: a/x.parquet
---
"""


def test_configurations_that_the_readme_declares(tmp_path, processor):
    folder = write(tmp_path, "a/x.parquet", "a/y.parquet", "b/z.parquet")
    (tmp_path / "set" / "README.md").write_text(README)
    with pytest.raises(ValueError, match=r"config, of \['few', 'many'\]") as caught:
        reds(folder, processor)
    assert "\n" not in str(caught.value)
    assert reds(folder, processor, config="few") == [0]
    assert reds(folder, processor, config="many") == [1, 2]
    assert reds(folder, processor, "valid", config="many") == [0]
    with pytest.raises(DatasetError, match=r"config='b0'.*'few', 'many'"):
        reds(folder, processor, config="b0")


def test_a_declared_configuration_of_which_a_part_is_here(tmp_path, processor):
    folder = write(tmp_path, "few/train-00000-of-00001.parquet", "many/train-00000-of-00001.parquet")
    paths = {config: [("train", f"{config}/train-*"), ("test", f"{config}/test-*")] for config in ("few", "many")}
    configs = [
        {"config_name": config, "data_files": [{"split": split, "path": path} for split, path in pairs]}
        for config, pairs in paths.items()
    ]
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    assert reds(folder, processor, config="many") == [1]
    with pytest.raises(DatasetError, match=r"config.*'few', 'many'"):
        reds(folder, processor)


def test_a_configuration_reaches_the_hub(processor, monkeypatch, tmp_path):
    asked = []

    def load(*names, **settings):
        asked.append(names)
        if len(names) == 1:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample"
            )
        if names[1] == "c":
            raise ValueError("BuilderConfig 'c' not found. Available: ['a', 'b']")
        return table(4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert reds("user/many", processor, config="b") == [4, 5]
    for config, message in ((None, r"config, of \['a', 'b'\]\.$"), ("c", r"config='c'.*\['a', 'b'\]\.$")):
        with pytest.raises(ValueError, match=message):
            reds("user/many", processor, config=config)
    assert asked == [("user/many", "b"), ("user/many",), ("user/many", "c")]


# ---- pictures in folders


def test_class_folders_called_like_a_split(tmp_path, processor):
    """`datasets` would put test/train_station into both splits, and twice train/train_station into one."""
    files = ["train/airport/1.png", "train/train_station/1.png", "test/airport/1.png", "test/train_station/1.png"]
    folder = write(tmp_path, *files)
    for split, expected in (("train", [0, 1]), ("test", [2, 3]), ("train+test", [0, 1, 2, 3])):
        data = load_image_dataset(folder, split, processor)
        assert data.class_names == ("airport", "train station")
        assert reds(folder, processor, split) == expected
        assert [row["labels"] for row in data] == [i % 2 for i in expected]


def test_both_splits_have_the_classes_of_either(tmp_path, processor):
    folder = write(
        tmp_path, "train/ant/1.png", "train/bee/1.png", "train/cat/1.png", "test/bee/1.png", "test/ant/2.png"
    )
    for split in ("train", "test"):
        assert load_image_dataset(folder, split, processor).class_names == ("ant", "bee", "cat")
    assert [row["labels"] for row in load_image_dataset(folder, "test", processor)] == [0, 1]


def test_a_split_by_the_name_of_its_folder(tmp_path, processor):
    files = [f"{split}/{name}/1.png" for split in ("train", "val", "odd") for name in NAMES]
    folder = write(tmp_path, *files, "assets/banner.png")
    assert reds(folder, processor, "val") == [2, 3]
    assert reds(folder, processor, "odd") == [4, 5]
    assert reds(folder, processor, "validation") == [2, 3], "as `datasets` calls it"


@pytest.mark.parametrize(
    ("files", "split", "what"),
    [
        (["airport/1.png", "train_a/1.png", "train_b/1.png"], "train", "airport"),
        (["ant/1.png", "bee/1.png", "train/1.png"], "train", "'ant"),
        (["ant/1.png", "bee/1.png", "ant/test-2.png", "bee/test-2.png"], "test", "ant/1.png"),
        (["ant/1.png", "bee/1.png", "cat/1.avif"], "train", "cat/1.avif"),
        (["train/ant/1.png", "train/bee/1.png", "train/bee/2.avif"], "train", "bee/2.avif"),
        (["train/ant/1.png", "train/bee/1"], "train", "bee/1'"),
        (["train/ant/1.png", "train/bee/1.png", "train/bee/2.png.crdownload"], "train", "crdownload"),
        (["train/ant/1.png", "train/bee/1.png", "train/cat/2.svg"], "train", "cat/2.svg"),
        (["ant/1.png", "bee/1.png", "cat/1.npy"], "train", "cat/1.npy"),
        (["ant/1.png", "bee/1.png", "__cat__/1.png"], "train", "__cat__/1.png"),
        (["train/ant/1.png", "train/bee/1.png", "train/.cat/1.png"], "train", ".cat/1.png"),
        (["ant/1.png", "bee/1.png", "bee/.2.png"], "train", "bee/.2.png"),
        (["a/Test/ant/1.png", "a/Test/bee/1.png"], "train", "'test'"),
    ],
)
def test_pictures_that_would_be_left_out_or_mixed_are_refused(files, split, what, tmp_path, processor):
    folder = write(tmp_path, *files)
    with pytest.raises(DatasetError, match=what):
        load_image_dataset(folder, split, processor)


CLASSES = [f"{split}/{name}/1.png" for split in ("train", "test") for name in NAMES]


@pytest.mark.parametrize("odd", ["train/stray.png", "test/stray.png", "train/ant/nested/2.png", "test/bee/a/b/3.jpg"])
def test_a_picture_at_another_depth_than_the_others_is_named(odd, tmp_path, processor):
    """`datasets` would give none of them a label."""
    folder, split = write(tmp_path, *CLASSES, odd), odd.partition("/")[0]
    with pytest.raises(DatasetError, match=rf"^[^\n]*'{odd}'[^\n]*$"):
        load_image_dataset(folder, split, processor)
    (tmp_path / "set" / odd).unlink()
    for emptied in (tmp_path / "set" / odd).parents:
        if not any(emptied.iterdir()):
            emptied.rmdir()
    assert reds(folder, processor, split) == ([0, 1] if split == "train" else [2, 3])


def test_pictures_of_one_class_are_named(tmp_path, processor):
    with pytest.raises(DatasetError, match="'ant'"):
        reds(write(tmp_path, "train/ant/1.png", "train/ant/2.png"), processor)


def test_the_table_that_is_cut_short_is_named(tmp_path, processor):
    folder = write(tmp_path, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    second = tmp_path / "set/train-00001-of-00002.parquet"
    whole = second.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        second.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"^[^\n]*'train-00001-of-00002\.parquet'[^\n]*$"):
            reds(folder, processor)
    second.write_bytes(whole)
    assert reds(folder, processor) == [0, 1]


@pytest.mark.parametrize("text", ["configs: 3", "configs: [[a]]", "dataset_info: [3]", "dataset_info: {splits: 5}"])
def test_metadata_that_is_damaged_is_named(text, tmp_path, processor):
    folder = write(tmp_path, "train-00000-of-00001.parquet")
    (tmp_path / "set/README.md").write_text(f"---\n{text}\n---\n")
    with pytest.raises(DatasetError, match=r"^[^\n]*README\.md[^\n]*$"):
        reds(folder, processor)


def test_an_empty_class_folder_is_no_class_that_is_missing(tmp_path, processor):
    folder = write(
        tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "test") for name in ("ant", "bee", "cow"))
    )
    (tmp_path / "set" / "test" / "bee" / "1.png").unlink()
    assert load_image_dataset(folder, "test", processor).class_names == ("ant", "bee", "cow")
    (tmp_path / "set" / "train" / "cat").mkdir()
    with pytest.raises(DatasetError, match="'train/cat'"):
        reds(folder, processor)


def test_what_systems_and_people_put_beside_pictures_is_passed_over(tmp_path, processor):
    files = ["ant/.DS_Store", "ant/Thumbs.db", "ant/desktop.ini", "ant/._1.png", "bee/README", "bee/licence.txt",
             "bee/boxes.json", ".git/objects/0a", "bee/.ipynb_checkpoints/1.png", "__MACOSX/ant/1.png",
             "run.npy"]  # fmt: skip
    assert reds(write(tmp_path, "ant/1.png", "bee/1.png", *files), processor) == [0, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_the_metadata_does_not_name_are_refused(streaming, tmp_path, processor):
    folder = write(tmp_path, "train/1.png", "train/2.png", "train/more/3.png", "test/1.png")
    metadata = tmp_path / "set" / "train" / "metadata.jsonl"
    lines = [f'{{"file_name": "{file}", "label": "ant"}}\n' for file in ("1.png", "more/3.png", "2.png")]
    (tmp_path / "set" / "test" / "metadata.jsonl").write_text(lines[0])
    metadata.write_text("".join(lines[:2]))
    settings = {"class_names": NAMES, "streaming": streaming, "max_images": 9}
    for split in ("train", "train[:1]"):
        with pytest.raises(DatasetError, match=r"1 pictures.*train/2\.png"):
            reds(folder, processor, split, **settings)
    assert reds(folder, processor, "test", **settings) == [3]
    metadata.write_text("".join(lines))
    assert reds(folder, processor, **settings) == [0, 1, 2]
    metadata.write_text("".join([*lines, lines[1]]))
    with pytest.raises(DatasetError, match=r"train/more/3\.png.*twice"):
        reds(folder, processor, **settings)


def test_links_that_would_be_left_out_are_refused(tmp_path, processor):
    folder = write(tmp_path, "train/ant/1.png", "elsewhere/1.png")
    (tmp_path / "set" / "elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / "bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / "ant" / "up").symlink_to(tmp_path / "set")
    assert sum(len(files) for _, _, files in _walk(tmp_path / "set")) == 2
    with pytest.raises(DatasetError, match=r"train/bee/1\.png.*links"):  # which `datasets` leaves out
        reds(folder, processor)


@pytest.mark.parametrize("streaming", [False, True])
def test_links_within_the_dataset_are_followed(streaming, tmp_path, processor):
    write(tmp_path, "train/ant/1.png", "store/w/1.png", "test/ant/1.png", "test/bee/1.png")
    (tmp_path / "set" / "train" / "bee").symlink_to(tmp_path / "set" / "store" / "w")
    (tmp_path / "set" / "dev").symlink_to(tmp_path / "set" / "test")
    folder = str(tmp_path / "linked")
    (tmp_path / "linked").symlink_to(tmp_path / "set")
    data = load_image_dataset(folder, "train", processor, streaming=streaming, max_images=9)
    assert sorted(
        (data.class_names[row["labels"]], round(255 * row["pixel_values"][0, 0, 0].item())) for row in data
    ) == ([("ant", 0), ("bee", 1)])
    for split in ("test", "dev"):
        assert reds(folder, processor, split, streaming=streaming, max_images=9) == [2, 3]
    (tmp_path / "set" / "train" / "bee").rename(tmp_path / "set" / "train" / "bee[1]")
    with pytest.raises(
        DatasetError, match=r"train/bee\[1\]/1\.png.*links"
    ):  # whose name `datasets` takes for a pattern
        reds(folder, processor, streaming=streaming, max_images=9)


def test_tables_whose_names_say_another_split_are_refused(tmp_path, processor):
    folder = write(tmp_path, "Train.jsonl", "Test.jsonl")
    with pytest.raises(DatasetError, match=r"Test\.jsonl.*'train'.*small letters"):
        reds(folder, processor)
    folder = write(tmp_path / "other", "train_test.parquet")
    for split in ("train", "test"):
        with pytest.raises(DatasetError, match=rf"train_test\.parquet.*'{split}'(?!.*small letters)"):
            reds(folder, processor, split)


# ---- what a name stands for


def test_a_folder_called_like_a_known_dataset(tmp_path, processor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert len(load_image_dataset("digits", "test", processor)) == 500, "an empty folder is none"
    for key, other in (("digits", "working folder"), ("cifar10", "uoft-cs/cifar10")):
        (tmp_path / "set").rename(tmp_path / "x") if (tmp_path / "set").exists() else None
        write(tmp_path, *(f"{name}/1.png" for name in NAMES))
        (tmp_path / key).rmdir() if (tmp_path / key).exists() else None
        (tmp_path / "set").rename(tmp_path / key)
        with pytest.raises(ValueError, match=rf"'{key}'.*\./{key}.*{other}"):
            load_image_dataset(key, "train", processor)
        data = load_image_dataset(f"./{key}", "train", processor)
        assert (reds(f"./{key}", processor), data.class_names) == ([0, 1], ("ant", "bee"))


def test_a_folder_of_the_data_root_called_like_a_known_dataset(tmp_path, processor):
    write(tmp_path, *(f"{name}/1.png" for name in NAMES))
    (tmp_path / "set").rename(tmp_path / "cifar10")
    with pytest.raises(ValueError, match=rf"'cifar10'.*{tmp_path}/cifar10.*uoft-cs/cifar10"):
        load_image_dataset("cifar10", "train", processor, data_root=tmp_path)
    assert reds(str(tmp_path / "cifar10"), processor) == [0, 1]


def test_a_revision_or_configuration_of_rows_that_have_none(tmp_path, processor):
    folder = write(tmp_path, "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="revision='v1'"):
        reds(folder, processor, revision="v1")
    with pytest.raises(ValueError, match="revision='v1'"):
        load_image_dataset("set", "train", processor, revision="v1", data_root=tmp_path)
    for argument in ("revision", "config"):
        with pytest.raises(ValueError, match=f"{argument}='v1'"):
            load_image_dataset("digits", "test", processor, **{argument: "v1"})


# ---- rows that name files elsewhere


def hostile_rows(path):
    """Two pictures, and a row that holds no bytes but a path."""
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    whole = {"bytes": buffer.getvalue(), "path": "/etc/a.png"}  # beside bytes a path is only a name
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])})
    pictures = [whole, whole, {"bytes": None, "path": str(path)}]
    return Dataset.from_dict({"image": pictures, "label": [0, 1, 1]}, features=features)


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "elsewhere/secret.png")
    return tmp_path / "elsewhere/secret.png"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "how", ["absolute", "by dots", "chained", "https://127.0.0.1:9/a.png", "file:///etc/a.png", "s3://b/c.png"]
)
def test_a_row_that_names_a_file_elsewhere_is_refused(how, streaming, tmp_path, processor, secret):
    own = tmp_path / "own"
    own.mkdir()
    dotted = own / ".." / "elsewhere" / "secret.png"
    path = {"absolute": secret, "by dots": dotted, "chained": f"{secret}::{own}/README.md"}.get(how, how)
    (own / "README.md").touch()
    pyarrow.parquet.write_table(hostile_rows(path).data.table, own / "train-00000-of-00001.parquet")
    limit = {"streaming": True, "max_images": 3} if streaming else {}
    with pytest.raises(DatasetError, match="row"):
        load_image_dataset(str(own), "train", processor, **limit)


@pytest.mark.parametrize("path", ["../elsewhere/a.parquet", "/etc/a.parquet", "http://127.0.0.1:9/a.parquet"])
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_a_readme_names_no_files_elsewhere(key, path, tmp_path, processor):
    own = tmp_path / "own"
    own.mkdir()
    pyarrow.parquet.write_table(hostile_rows("x").data.table, own / "train-00000-of-00001.parquet")
    (own / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {key}: {path}\n---\n")
    with pytest.raises(DatasetError, match="outside"):
        load_image_dataset(str(own), "train", processor)


def test_rows_in_memory_may_name_files_of_this_disk_and_no_addresses(processor, secret):
    data = image_dataset(hostile_rows(secret), processor)
    assert (data[2]["pixel_values"][0] == 1).all()
    with pytest.raises(DatasetError, match="https"):
        image_dataset(hostile_rows("https://127.0.0.1:9/a.png"), processor)


def test_pictures_in_class_folders_are_the_datasets_own(tmp_path, processor):
    for name in ("cat", "dog"):
        (tmp_path / "own/train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "own/train" / name / "a.png")
    assert len(load_image_dataset(str(tmp_path / "own"), "train", processor)) == 2


@pytest.mark.parametrize(
    ("files", "two"),
    [
        (["test/ant/flickr/1.png", "test/ant/google/2.png", "test/bee/flickr/3.png"], ["test/ant/flickr", "test/bee"]),
        (["test/small/ant/1.png", "test/small/other/1.png", "test/large/other/1.png"], ["test/large", "test/small"]),
        (["test/blur/1/ant/1.png", "test/blur/1/bee/1.png", "test/blur/2/ant/1.png"], ["blur/1/ant", "blur/2/ant"]),
        (["blur/1/ant/1.png", "blur/1/bee/1.png", "fog/1/ant/1.png", "fog/1/bee/1.png"], ["blur/1/ant", "fog/1/ant"]),
    ],
)
def test_folders_between_split_and_classes_are_refused(files, two, tmp_path, processor):
    folder, split = write(tmp_path, *files), "test" if files[0].startswith("test") else "train"
    with pytest.raises(DatasetError) as caught:
        reds(folder, processor, split)
    assert not [text for text in two if text not in str(caught.value)]


def test_the_folder_whose_children_are_classes_is_the_dataset(tmp_path, processor):
    files = [f"test/blur/{severity}/{name}/1.png" for severity in (1, 2) for name in NAMES]
    folder = write(tmp_path, *files)
    assert reds(f"{folder}/test/blur/2", processor) == [2, 3]
    with pytest.raises(DatasetError, match=r"'1/ant' and '2/ant'"):
        reds(folder, processor, config="blur")
    assert reds(folder, processor, config="1") == [0, 1]


def test_a_readme_may_join_folders_by_name(tmp_path, processor):
    files = [f"photos/{source}/{name}/1.png" for source in ("flickr", "google") for name in NAMES]
    folder = write(tmp_path, *files)
    for paths, joined in ((["photos/flickr/**", "photos/google/*/*.png"], True), (["photos/**"], False)):
        configs = [{"config_name": "all", "data_files": [{"split": "train", "path": paths}]}]
        (tmp_path / "set" / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
        if joined:
            assert reds(folder, processor) == [0, 1, 2, 3]
        else:
            with pytest.raises(DatasetError, match=r"'photos/flickr/ant' and 'photos/google/ant'"):
                reds(folder, processor)


@pytest.mark.parametrize("ending", ["Png", "PNG", "Jpeg"])
def test_endings_of_any_case(ending, tmp_path, processor):
    files = [f"{split}/{name}/1.{ending}" for split in ("train", "test") for name in NAMES]
    assert reds(write(tmp_path, *files), processor, "test") == [2, 3]


def test_signs_of_patterns_in_the_path_are_named(tmp_path, processor):
    """As patterns, `data [v2]` would mean `data v`."""
    for name in ("data v", "data [v2]"):
        folder = write(tmp_path / name, "train.parquet")
    with pytest.raises(OSError, match=r"data \[v2\]/set' has '\['"):
        reds(folder, processor)


@pytest.mark.parametrize("split", ["test", ""])
def test_classes_that_are_all_links_elsewhere_are_named(split, tmp_path, processor):
    elsewhere = write(tmp_path, "ant/1.png", "bee/1.png")
    (tmp_path / "links" / split).mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "links" / split / name).symlink_to(f"{elsewhere}/{name}")
    with pytest.raises((OSError, ValueError), match=r"ant.* link"):
        reds(str(tmp_path / "links"), processor, split or "train")


@pytest.mark.parametrize("name", ["fold{}", "fold_{}", "test_r{}", "test{}", "test200{}"])
def test_a_word_with_a_number_is_a_split_and_no_part(name, tmp_path, processor):
    files = [f"{name.format(i)}.parquet" for i in (1, 2, 3)]
    folder = write(tmp_path, *files)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=r"split"):
            reds(folder, processor, split)
    assert reds(folder, processor, name.format(2)) == [1]


@pytest.mark.parametrize("names", [("Train", "Valid", "Test"), ("training", "dev", "eval"), ("train", "val", "test")])
@pytest.mark.parametrize("kind", ["{}.parquet", "{}.PARQUET", "{}/ant/1.png", "saved"])
def test_splits_by_another_word_for_them(names, kind, tmp_path, processor):
    pictures = kind.endswith(".png")
    if kind == "saved":
        folder = str(tmp_path / "set")
        sets = {name: table(red) for red, name in enumerate(names)}
        datasets.DatasetDict(sets).save_to_disk(folder)
    else:
        files = [kind.format(name) for name in names]
        folder = write(tmp_path, *files, *(path.replace("ant", "bee") for path in files[: pictures * 3]))
    for red, asked in enumerate(("train", "validation", "test")):
        expected = [red, red + 3] if pictures else [red]
        assert reds(folder, processor, asked) == reds(folder, processor, names[red]) == expected
    assert reds(folder, processor, "validation+test[:1]") == ([1, 2, 4] if pictures else [1, 2])
    if not pictures:
        return
    for name in NAMES:
        extra = tmp_path / "set" / "validation" / name / "1.png"
        extra.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (9, 0, 0)).save(extra)
    assert reds(folder, processor, "validation") == [9, 9], "by its own name first"
