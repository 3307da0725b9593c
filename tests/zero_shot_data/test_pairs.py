"""Pictures with captions, from wherever they are."""

import io
import tarfile

import datasets
import pytest
import torch
from PIL import Image
from tiny import make_processor

from hf_robust_clip import load_pairs, pair_dataset
from hf_robust_clip.zero_shot_data.fingerprint import dataset_digest
from hf_robust_clip.zero_shot_data.pairs import picture_keys

CAPTIONS = ["a red square", "a green one", "blue"]
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def picture(i):
    return Image.new("RGB", (8, 8), COLOURS[i])


def png(i):
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def rows(**changes):
    return datasets.Dataset.from_dict(
        {"image": [picture(i) for i in range(3)], "caption": CAPTIONS, **changes},
        features=None
        if changes
        else datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )


def check(data, split="train"):
    assert len(data) == 3 and sorted(data.captions) == sorted(CAPTIONS)
    for i, caption in enumerate(data.captions):
        example = data[i]
        colour = torch.tensor(COLOURS[CAPTIONS.index(caption)]) / 255
        assert example["captions"] == caption and set(example) == {"pixel_values", "captions"}
        torch.testing.assert_close(example["pixel_values"], colour[:, None, None].expand(3, 8, 8))
    assert len(set(picture_keys(data))) == 3
    assert repr(data).startswith("PairDataset(") and split in repr(data)


def test_rows_in_memory(processor):
    data = pair_dataset(rows(), processor)
    check(data, "all")
    other = pair_dataset(rows().map(lambda row: {"caption": row["caption"] + "!"}), processor)
    assert dataset_digest(data) != dataset_digest(other)


def test_a_folder_of_pictures_with_metadata(processor, tmp_path):
    (tmp_path / "train").mkdir()
    lines = ["file_name,caption"]
    for i, caption in enumerate(CAPTIONS):
        (tmp_path / f"train/{i}.png").write_bytes(png(i))
        lines.append(f"{i}.png,{caption}")
    (tmp_path / "train/metadata.csv").write_text("\n".join(lines))
    check(load_pairs(str(tmp_path), "train", processor))


def test_parquet(processor, tmp_path):
    rows().rename_column("caption", "text").to_parquet(tmp_path / "train-00000-of-00001.parquet")
    check(load_pairs(str(tmp_path), "train", processor))


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_files_of_webdataset(streaming, processor, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i, caption in enumerate(CAPTIONS):
            for name, content in ((f"{i}.png", png(i)), (f"{i}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    asked = {"streaming": True, "max_images": 9} if streaming else {}
    check(load_pairs(str(tmp_path), "train", processor, **asked))


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({"caption": ["a", " ", None]}, {}, "2 of 3 rows .* row 1 first"),
        ({"caption": [["a"], ["b"], ["c"]]}, {}, "caption_column"),
        ({"text": CAPTIONS}, {}, "caption_column"),
        ({}, {"caption_column": "words"}, "caption_column"),
    ],
)
def test_captions_that_are_missing_or_would_be_guessed_are_refused(changes, asked, message, processor):
    with pytest.raises(ValueError, match=message):
        pair_dataset(rows(**changes), processor, **asked)


def test_a_row_without_a_picture_is_refused_before_any_training(processor):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = {"image": [picture(0), None], "caption": CAPTIONS[:2]}
    data = pair_dataset(datasets.Dataset.from_dict(table, features=features), processor)
    assert len(picture_keys(data, [0])) == 1
    with pytest.raises(ValueError, match=r"row 1 of dataset .* no picture"):
        picture_keys(data)


def test_a_set_without_captions_is_refused(processor):
    with pytest.raises(ValueError, match="caption_column"):
        load_pairs("digits", "train", processor)
    with pytest.raises(ValueError, match="max_images"):
        load_pairs("coloured-digits", "train", processor, streaming=True)
