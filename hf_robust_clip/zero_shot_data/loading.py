"""From a dataset's name, or rows in memory, to pixels with labels.

1. Rows: a known dataset (`datasets.json`), a folder, or the Hub. Files must be whole, called alike and of one
   configuration, among pictures nothing may lie that isn't read but documents, and no folder between split and class.
2. Columns: one of pictures and one of labels, one with the usual name or the only one; no other column is decoded.
3. Picture to pixels (`pictures.py`): every mode of Pillow, upright, in RGB, transparency on a background, prepared as
   the checkpoint's processor does it, in [0, 1], not normalised; what can't be scaled to that is refused.
4. Labels to names (`labels.py`): names given over named labels are matched by name, over ids stand for them in their
   natural order if there are equally many; a mapping translates; whole numbers are indices. Ids are no names.
5. A row holds its picture's bytes, or a file of the dataset's own folder: no other file or address is opened. Rows in
   memory (`image_dataset`) may name any file of this disk, so load only rows of people you trust into memory.
6. Every row can be read, or is an error of one line (`DatasetError`) that names it, from workers too.

Whatever would have to be guessed is refused, with the argument that says it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import datasets
from transformers import CLIPProcessor

from ..pictures import check_processor, check_resize, checked_colour, model_side, to_pixels
from .dataset import ImageDataset, collate_images
from .labels import ClassNames, class_names_of, names_of_spec, read_class_names, read_labels
from .rows import (
    check_files_of,
    every,
    find_rows,
    image_column_of,
    label_column_of,
    middle_frames,
    read_stream,
    rows_where,
)
from .specs import find_spec, prompt_templates

__all__ = ["ImageDataset", "class_names_of", "collate_images", "load_image_dataset", "read_class_names", "to_pixels"]


def load_image_dataset(
    name: str,
    split: str,
    processor: CLIPProcessor,
    *,
    data_root: str | Path | None = None,
    revision: str | None = None,
    config: str | None = None,
    class_names: ClassNames = None,
    image_column: str | None = None,
    label_column: str | None = None,
    resize: int | None = None,
    background: str | Sequence[int] = "white",
    templates: str | None = None,
    attack_resolution: int | Literal["model"] | None = None,
    streaming: bool = False,
    max_images: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Load one split of a dataset.

    Args:
        name: a dataset of `datasets.json` by its key or Hub id (`"digits"` needs no download), a Hub id, or a folder
            that `load_dataset` reads: parquet files, or pictures in one folder per class. A folder with the key of a
            known dataset is given as `./digits`.
        split: `"train"`, `"test"` (whatever a known dataset calls it), `"all"` where `datasets.json` has it, or the
            dataset's own name for it, or another word for that (`dev` for `validation`); `"train+test"` joins two,
            `"train[:1000]"` is a part.
        data_root: looked at first, for a folder `<data_root>/<Hub id>` in Hub layout; default the environment variable
            HF_ROBUST_CLIP_DATA_ROOT.
        revision: Hub revision; None takes that of the known dataset, or the newest.
        config: which configuration, where a dataset has several: its name on the Hub, in README.md, or its folder's.
        class_names: a list: in label order where labels are whole numbers or ids, in any order where they are names
            that are in it. A mapping {own label: name}. A key of `class_names.json`. None takes the dataset's own.
            Whole numbers from 1 are refused where the highest is among the rows, or those that these are a part of;
            a first or last class of a list that no row has is warned of.
        image_column: where it is neither that of the known dataset nor the only one, or the only one called `image`,
            `img`, `picture`, `photo`, `jpg`, `png` or `webp`. It may hold the bytes of encoded pictures too.
        label_column: where it is neither that of the known dataset nor `label`, `labels`, `cls` or the only column
            of class labels, or another is called class, category or target.
        resize: shorter side before the centre crop.
        background: what shows where a picture is transparent: name of a colour, or (red, green, blue).
        templates: key in `templates.json`; None takes the known dataset's, or PMG-AFT's.
        attack_resolution: side in pixels at which the pictures are attacked, before the model scales them up;
            `"model"` is the model's input size. None takes the known dataset's, or the model's.
        streaming: read only `max_images` rows of a shuffled stream, and keep those, without downloading the rest.
        max_images: at most so many images, drawn once by `seed`; None for all.
        seed: of that draw.

    Raises OSError if it can't be found, saying what to put where; ValueError for a missing split or column, files that
    are incomplete or of several configurations, columns that would have to be guessed, a set without rows, labels that
    don't fit the class names or are ids, and settings that don't go together.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images={max_images!r} must be at least 1, or None for all.")
    if streaming and max_images is None:
        raise ValueError("streaming=True needs max_images: the number of rows to read from the stream.")
    spec = find_spec(name)
    dataset_id = spec.hub_id if spec else name
    if attack_resolution is None:
        attack_resolution = spec.attack_resolution if spec else None
    side = None if attack_resolution == "model" else attack_resolution
    templates = templates or (spec.templates if spec else None)
    _check_settings(processor, resize, side, background, templates)
    asked, split = split, spec.splits.get(split, split) if spec else split
    rows, found, places = find_rows(name, spec, split, data_root, config, revision, streaming)
    if spec and spec.test_every and asked in ("train", "test"):
        rows = every(rows, spec.test_every, asked == "test")
        split = f"{asked}, where every {spec.test_every}th row of {split} is test"
    if spec and spec.where:
        rows = rows_where(rows, *spec.where)
        split = f"{split}, rows of {spec.where[0]} {' or '.join(spec.where[1])}"
    features = rows.features
    if features is None:  # some formats tell their columns only when they are read
        raise ValueError(f"the stream of dataset {dataset_id!r} doesn't tell its columns; use streaming=False.")
    image_column = image_column_of(features, image_column or (spec.image_column if spec else None), dataset_id)
    label_column = label_column_of(features, label_column or (spec.label_column if spec else None), dataset_id)
    if spec and spec.frames_of:
        if streaming:
            raise ValueError(f"dataset {dataset_id!r} is stored as frames of videos; load it with streaming=False.")
        rows = middle_frames(
            rows.select_columns([image_column, label_column, spec.frames_of, "frame"]), spec.frames_of
        )
    if isinstance(rows, datasets.IterableDataset):
        rows = read_stream(rows.select_columns([image_column, label_column]), image_column, max_images, seed)
    if len(rows):
        check_files_of(rows, image_column, dataset_id, places)
    if spec and len(rows):
        class_names = names_of_spec(spec, features[label_column], class_names)
    plain = isinstance(features[label_column], datasets.Value) and features[label_column].dtype.strip("u0123456789")
    if "[" in split and not streaming and plain in ("int", "float") and class_names is not None:
        whole = "+".join(dict.fromkeys(re.sub(r"\[.*?\]", "", split).split("+")))
        all_rows, _, _ = find_rows(name, spec, whole, data_root, config, revision)
        read_labels(
            all_rows, label_column, class_names, dataset_id, warn=False
        )  # of a part, labels from 1 may look right
    data = image_dataset(
        rows,
        processor,
        class_names=class_names,
        image_column=image_column,
        label_column=label_column,
        resize=resize,
        background=background,
        templates=templates,
        attack_resolution=side,
        name=dataset_id,
        revision=found,
        split=split if config is None else f"{split} of configuration {config}",
    )
    return data.first(max_images, seed)


def image_dataset(
    rows: datasets.Dataset,
    processor: CLIPProcessor,
    *,
    class_names: ClassNames = None,
    image_column: str | None = None,
    label_column: str | None = None,
    resize: int | None = None,
    background: str | Sequence[int] = "white",
    templates: str | None = None,
    attack_resolution: int | None = None,
    name: str = "rows in memory",
    revision: str = "in memory",
    split: str | None = None,
) -> ImageDataset:
    """Rows that are already in memory, a `datasets.Dataset` with pictures and labels, as an `ImageDataset`.

    Args:
        class_names, image_column, label_column, resize, background, templates: as for `load_image_dataset`.
        attack_resolution: side in pixels at which the pictures are attacked; None is the model's input size.
        name, revision, split: for reports; None takes the split that the rows know.

    Raises TypeError for rows of another type; ValueError as `load_image_dataset` does, and for rows with a transform.
    """
    if not isinstance(rows, datasets.Dataset):
        kind = type(rows).__name__
        splits = f"; give one of its splits {list(rows)}" if isinstance(rows, dict) else ""
        raise TypeError(f"rows must be a datasets.Dataset, got {kind}{splits}.")
    if rows.format["type"] == "custom":
        raise ValueError("rows have a transform, which would not be applied; give rows.with_format(None).")
    split = split or str(rows.split or "all")
    if len(rows) == 0:
        raise ValueError(f"dataset {name!r} has no rows in split {split!r}; check its files.")
    _check_settings(processor, resize, attack_resolution, background, templates)
    image_column = image_column_of(rows.features, image_column, name)
    label_column = label_column_of(rows.features, label_column, name)
    rows = rows.with_format(None).select_columns([image_column, label_column])
    check_files_of(rows, image_column, name, None)
    names, label_map = read_labels(rows, label_column, class_names, name)
    return ImageDataset(
        rows,
        processor,
        names,
        dataset_id=name,
        revision=revision,
        split=split,
        image_column=image_column,
        label_column=label_column,
        resize=resize,
        label_map=label_map,
        attack_resolution=attack_resolution,
        templates=prompt_templates(templates or "pmg_aft"),
        background=background,
    )


def _check_settings(
    processor: CLIPProcessor,
    resize: int | None,
    attack_resolution: int | None,
    background: str | Sequence[int],
    templates: str | None,
) -> None:
    """Raise ValueError for settings that are wrong whatever the rows, before these are downloaded."""
    prompt_templates(templates or "pmg_aft")
    checked_colour(background)
    check_processor(processor)
    if resize is not None:
        check_resize(resize, attack_resolution, model_side(processor))
