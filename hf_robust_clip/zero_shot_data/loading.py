"""Pictures and labels for training and evaluation: the data root first, the Hub second."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPProcessor

from ..threat_model import check_images
from .digits import digits_split
from .specs import DatasetSpec, find_spec

DATA_ROOT_VARIABLE = "HF_ROBUST_CLIP_DATA_ROOT"


@dataclass
class ImageDataset(Dataset):
    """A map-style dataset of `{"pixel_values": (3, H, W) float in [0, 1], "labels": int}`, prepared on access.

    Args:
        rows: a `datasets.Dataset` with an image and a label column.
        processor: prepares the pictures (without normalising them: that is inside the model).
        class_names: in label order.
        dataset_id, revision, split: for reports.
        image_column, label_column: names of the columns.
        resize: shorter side in pixels before the centre crop; None takes the processor's (CLIP: the crop size).
        label_map: dataset label to index among `class_names`; None leaves labels as they are.
    """

    rows: datasets.Dataset
    processor: CLIPProcessor
    class_names: tuple[str, ...]
    dataset_id: str
    revision: str
    split: str
    image_column: str = "image"
    label_column: str = "label"
    resize: int | None = None
    label_map: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch at once: `DataLoader` calls this."""
        rows = self.rows[list(indices)]
        pixels = to_pixels(self.processor, rows[self.image_column], self.resize)
        labels = rows[self.label_column]
        if self.label_map is not None:
            labels = [self.label_map[label] for label in labels]
        return [{"pixel_values": x, "labels": label} for x, label in zip(pixels, labels, strict=True)]

    def only(self, class_names: Sequence[str]) -> ImageDataset:
        """The images of some classes, relabelled 0 .. len(class_names) - 1 in the given order.

        Raises ValueError for a name that is not one of this dataset's.
        """
        unknown = [name for name in class_names if name not in self.class_names]
        if unknown:
            raise ValueError(
                f"class {unknown[0]!r} is not in {self.dataset_id}; its first: {list(self.class_names[:10])}."
            )
        old = [self.class_names.index(name) for name in class_names]
        if self.label_map is not None:
            back = {new: label for label, new in self.label_map.items()}
            old = [back[label] for label in old]
        label_map = {label: new for new, label in enumerate(old)}
        labels = self.rows[self.label_column]
        keep = [i for i, label in enumerate(labels) if label in label_map]
        changed = {"rows": self.rows.select(keep), "class_names": tuple(class_names), "label_map": label_map}
        return ImageDataset(**{**self.__dict__, **changed})

    def first(self, count: int | None, seed: int = 0) -> ImageDataset:
        """At most `count` images, drawn once by `seed`; all of them if `count` is None."""
        if count is not None and count < 1:
            raise ValueError(f"max_images={count!r} must be at least 1, or None for all.")
        if count is None or count >= len(self):
            return self
        return ImageDataset(**{**self.__dict__, "rows": self.rows.shuffle(seed=seed).select(range(count))})


def to_pixels(processor: CLIPProcessor, pictures: Sequence[Any], resize: int | None = None) -> Tensor:
    """PIL pictures to float pixels (B, 3, H, W) in [0, 1]: RGB, resized, cropped at the centre, not normalised."""
    size = {} if resize is None else {"size": {"shortest_edge": resize}}
    pictures = [picture.convert("RGB") for picture in pictures]
    return processor.image_processor(pictures, do_normalize=False, return_tensors="pt", **size).pixel_values


def collate_images(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack examples into a batch. Raises ValueError for pixels outside [0, 1] and for images of unequal size."""
    shapes = {tuple(example["pixel_values"].shape) for example in examples}
    if len(shapes) > 1:
        raise ValueError(f"pixel_values differ in shape within a batch: {sorted(shapes)}; resize and crop them alike.")
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    check_images(batch["pixel_values"], "pixel_values")
    if all("labels" in example for example in examples):
        batch["labels"] = torch.tensor([int(example["labels"]) for example in examples])
    return batch


def load_image_dataset(
    name: str,
    split: str,
    processor: CLIPProcessor,
    *,
    data_root: str | Path | None = None,
    revision: str | None = None,
    class_names: Sequence[str] | None = None,
    label_column: str | None = None,
    resize: int | None = None,
) -> ImageDataset:
    """Load one split of a dataset.

    Args:
        name: a dataset of `specs.py` (`"digits"` needs no download), a Hub id, or a folder that `load_dataset` reads.
        split: `"train"`, `"test"` (whatever a known dataset calls it), or the dataset's own name for it.
        data_root: looked at first, for a folder `<data_root>/<name>` in Hub layout; default the environment variable
            HF_ROBUST_CLIP_DATA_ROOT.
        revision: Hub revision; None takes the newest.
        class_names: in label order, where the dataset doesn't know them or they should read otherwise.
        label_column: where it is neither that of the known dataset nor `label`/`labels`.
        resize: shorter side before the centre crop.

    Raises OSError if it can't be found, saying what to put where; ValueError for a missing split or column.
    """
    if name == "digits":
        rows, spec, found = digits_split(split), find_spec(name), "scikit-learn"
    else:
        spec = find_spec(name)
        asked, split = split, spec.splits.get(split, split) if spec else split
        rows, found = _load_rows(name, split, data_root, revision)
        if spec and spec.test_every and asked in ("train", "test"):
            rows = rows.select([i for i in range(len(rows)) if (i % spec.test_every == 0) == (asked == "test")])
            split = f"{asked}, where every {spec.test_every}th row of {split} is test"
    column = _label_column(rows, spec, label_column, name)
    pictures = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    image_column = spec.image_column if spec else next(iter(pictures), "image")
    if image_column not in rows.column_names:
        raise ValueError(f"dataset {name!r} has no column {image_column!r}; its columns: {rows.column_names}.")
    feature = rows.features[column]
    names = class_names or (spec.names_in_label_order(getattr(feature, "names", None)) if spec else None)
    names = names or getattr(feature, "names", None)
    if not names:
        raise ValueError(f"dataset {name!r} doesn't name its classes; give class_names in label order.")
    if len(names) < (getattr(feature, "num_classes", None) or 0):
        raise ValueError(f"class_names has {len(names)} names, but dataset {name!r} has {feature.num_classes} labels.")
    return ImageDataset(rows, processor, tuple(names), name, found, split, image_column, column, resize)


def _load_rows(
    name: str, split: str, data_root: str | Path | None, revision: str | None
) -> tuple[datasets.Dataset, str]:
    root = Path(data_root or os.environ.get(DATA_ROOT_VARIABLE, ""))
    folders = [folder for folder in (root / name, Path(name)) if folder.is_dir() and any(folder.iterdir())]
    source = str(folders[0]) if folders else name
    base = split.partition("[")[0]  # "train[:1000]" is a part of "train"
    try:
        if not folders:
            return datasets.load_dataset(source, split=split, revision=revision), revision or "main"
        files = [str(path) for path in sorted(folders[0].rglob("*.parquet")) if path.name.startswith(f"{base}-")]
        if files:
            return datasets.load_dataset("parquet", data_files={base: files}, split=split), "local"
        return datasets.load_dataset(source, split=split), "local"
    except ValueError as error:
        raise ValueError(f"dataset {name!r} has no split {split!r}: {error}") from error
    except Exception as error:  # the Hub client raises many kinds of errors for "not there"
        raise OSError(
            f"can't load dataset {name!r} ({str(error).splitlines()[0]}). Put its parquet files in "
            f"<data root>/{name}/ and name the root by data_root or {DATA_ROOT_VARIABLE}, or let the Hub be reached "
            f"(gated sets: accept their terms and log in)."
        ) from error


def _label_column(rows: datasets.Dataset, spec: DatasetSpec | None, asked: str | None, name: str) -> str:
    wanted = [asked] if asked else [spec.label_column] if spec else ["label", "labels"]
    for column in wanted:
        if column in rows.column_names:
            return column
    raise ValueError(
        f"dataset {name!r} has no label column {' or '.join(map(repr, wanted))}; its columns: {rows.column_names}. "
        "Name it by label_column."
    )
