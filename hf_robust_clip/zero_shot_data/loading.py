"""Pictures and labels for training and evaluation: the data root first, the Hub second."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPProcessor

from ..checks import checked_images, checked_labels
from ..modeling import check_classes
from .digits import digits_split
from .specs import DatasetSpec, find_spec, plain, prompt_templates

DATA_ROOT_VARIABLE = "HF_ROBUST_CLIP_DATA_ROOT"
STREAM_BUFFER = 1000  # rows among which a streamed set is shuffled; its shards are shuffled too


@dataclass
class ImageDataset(Dataset):
    """A map-style dataset of `{"pixel_values": (3, H, W) float in [0, 1], "labels": int}`, prepared on access.

    With `augment` it is one of `{"picture": (3, H, W) uint8, "labels": int}`: whole pictures, each of its own size.
    Reading raises ValueError for a picture that can't be decoded, naming its row.

    Args:
        rows: a `datasets.Dataset` with an image and a label column.
        processor: prepares the pictures (without normalising them: that is inside the model).
        class_names: in label order.
        dataset_id, revision, split: for reports.
        image_column, label_column: names of the columns.
        resize: shorter side in pixels before the centre crop; None takes the processor's (CLIP: the crop size). It
            counts only at the model's own size: pictures prepared at a smaller `resolution` are resized to that.
        label_map: dataset label to index among `class_names`; None leaves labels as they are.
        attack_resolution: side in pixels at which this set is attacked; None is the model's input size.
        templates: prompts for `set_classes`, with `{}` for the class name.
        augment: give the whole decoded RGB pictures, neither resized nor cropped, for `RandomResizedCrop`; `resize`
            and `attack_resolution` don't count then.
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
    label_map: dict[Any, int] | None = None
    attack_resolution: int | None = None
    templates: tuple[str, ...] = ()
    augment: bool = False

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures: the attack resolution, but never more than the model's input size."""
        side = model_side(self.processor)
        return side if self.attack_resolution is None else min(self.attack_resolution, side)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch at once: `DataLoader` calls this."""
        try:
            rows = self.rows[list(indices)]
            pictures = rows[self.image_column]
            pixels: Sequence[Tensor] | Tensor
            if self.augment:
                pixels = [torch.from_numpy(np.array(x.convert("RGB"))).permute(2, 0, 1).contiguous() for x in pictures]
            else:
                pixels = to_pixels(self.processor, pictures, self.resize, self.resolution)
        except (OSError, SyntaxError, AttributeError) as error:  # Pillow's, and that of a missing picture
            raise ValueError(self._unreadable(indices)) from error
        labels = rows[self.label_column]
        if self.label_map is not None:
            labels = [self.label_map[label] for label in labels]
        key = "picture" if self.augment else "pixel_values"
        return [{key: x, "labels": int(label)} for x, label in zip(pixels, labels, strict=True)]

    def only(self, class_names: Sequence[str]) -> ImageDataset:
        """The images of some classes, relabelled 0 .. len(class_names) - 1 in the given order.

        Raises ValueError for a name that is not one of this dataset's.
        """
        unknown = [name for name in class_names if name not in self.class_names]
        if unknown:
            raise ValueError(
                f"class {unknown[0]!r} is not in {self.dataset_id}; its first: {list(self.class_names[:10])}."
            )
        new = {self.class_names.index(name): i for i, name in enumerate(class_names)}
        now = self.label_map or {i: i for i in range(len(self.class_names))}
        label_map = {label: new[i] for label, i in now.items() if i in new}
        labels = self.rows[self.label_column]
        keep = [i for i, label in enumerate(labels) if label in label_map]
        return replace(self, rows=self.rows.select(keep), class_names=tuple(class_names), label_map=label_map)

    def first(self, count: int | None, seed: int = 0) -> ImageDataset:
        """At most `count` images, drawn once by `seed`; all of them if `count` is None."""
        if count is not None and count < 1:
            raise ValueError(f"max_images={count!r} must be at least 1, or None for all.")
        if count is None or count >= len(self):
            return self
        return replace(self, rows=self.rows.shuffle(seed=seed).select(range(count)))

    def shots(self, per_class: int | None, seed: int = 0) -> ImageDataset:
        """`per_class` images of every class, in dataset order, drawn once by `seed`; all images if it is None.

        The draw of a class depends on `seed`, its name and its own rows alone, so `only` may come before or after,
        and the images of a smaller `per_class` are among those of a larger one. No picture is decoded.

        Raises ValueError for a `per_class` that is no whole number of at least 1, and a class with fewer images.
        """
        if per_class is None:
            return self
        if not isinstance(per_class, int) or isinstance(per_class, bool) or per_class < 1:
            raise ValueError(f"shots: per_class={per_class!r} must be a whole number of at least 1, or None for all.")
        count = len(self.class_names)
        index = {i: i for i in range(count)} if self.label_map is None else self.label_map
        labels = self.rows.select_columns([self.label_column]).with_format("arrow")[:][self.label_column]
        coded = labels.combine_chunks().dictionary_encode("encode")
        codes_N = coded.indices.to_numpy()
        class_N = np.array([index.get(label, -1) for label in coded.dictionary.to_pylist()], dtype=int)[codes_N]
        by_class_N = np.argsort(class_N, kind="stable")
        starts = np.searchsorted(class_N[by_class_N], np.arange(count + 1))
        sizes = np.diff(starts)
        if sizes.min() < per_class:
            least = int(sizes.argmin())
            mend = f"lower `shots` to {sizes[least]}" if sizes[least] else "leave the class out"
            raise ValueError(
                f"class {self.class_names[least]!r} of dataset {self.dataset_id!r}, split {self.split!r} has "
                f"{sizes[least]} images, fewer than the {per_class} asked for (`shots`); {mend}."
            )
        chosen = []
        for name, start, size in zip(self.class_names, starts, sizes, strict=False):
            key = blake2b(f"{seed} {name}".encode(), digest_size=16).digest()
            draws = np.random.default_rng(int.from_bytes(key, "little")).random(size)
            chosen.append(by_class_N[start + np.argsort(draws, kind="stable")[:per_class]])
        return replace(self, rows=self.rows.select(np.sort(np.concatenate(chosen))))

    def _unreadable(self, indices: Sequence[int]) -> str:
        """Which of some rows holds the picture that can't be read, and why."""
        for index in indices:
            try:
                self.rows[index][self.image_column].convert("RGB")
            except Exception as error:
                return (
                    f"row {index} of dataset {self.dataset_id!r}, split {self.split!r}: the picture in column "
                    f"{self.image_column!r} can't be read ({error}); replace the file or leave the row out."
                )
        return f"a picture among rows {list(indices)} of dataset {self.dataset_id!r} can't be prepared."


def model_side(processor: CLIPProcessor) -> int:
    """Side in pixels of the pictures a processor makes."""
    return processor.image_processor.crop_size["height"]


def to_pixels(
    processor: CLIPProcessor, pictures: Sequence[Any], resize: int | None = None, resolution: int | None = None
) -> Tensor:
    """PIL pictures to float pixels (B, 3, H, W) in [0, 1]: RGB, resized, cropped at the centre, not normalised.

    Args:
        resize: shorter side before the crop; None takes the processor's.
        resolution: side to resize and crop to, where it is smaller than the processor's own.
    """
    changed: dict[str, dict[str, int]] = {} if resize is None else {"size": {"shortest_edge": resize}}
    if resolution is not None and resolution < model_side(processor):
        changed = {
            "size": {"shortest_edge": resolution},
            "crop_size": {"height": resolution, "width": resolution},
        }
    pictures = [picture.convert("RGB") for picture in pictures]
    return processor.image_processor(pictures, do_normalize=False, return_tensors="pt", **changed).pixel_values


def collate_images(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collect examples into a batch: `{"pixel_values": (B, 3, H, W), "labels": (B,)}`, labels if all have them.

    Whole pictures (`ImageDataset.augment`) stay a list of B tensors (3, H, W), `"pictures"`, in place of pixel_values.
    Raises ValueError for pixels outside [0, 1], for images of unequal size, and whole pictures among prepared ones.
    """
    whole = sum("picture" in example for example in examples)
    if 0 < whole < len(examples):
        raise ValueError(
            f"{whole} of {len(examples)} examples of a batch hold a whole picture, the others pixel_values; give all "
            "the datasets the same `augment`."
        )
    batch: dict[str, Any]
    if whole:
        batch = {"pictures": [example["picture"] for example in examples]}
    else:
        shapes = {tuple(example["pixel_values"].shape) for example in examples}
        if len(shapes) > 1:
            raise ValueError(
                f"pixel_values differ in shape within a batch: {sorted(shapes)}; resize and crop them alike."
            )
        pixels_BCHW = torch.stack([example["pixel_values"] for example in examples])
        batch = {"pixel_values": checked_images(pixels_BCHW, "pixel_values")}
    if all("labels" in example for example in examples):
        batch["labels"] = checked_labels([np.asarray(example["labels"]) for example in examples])
    return batch


def read_class_names(path: str | Path) -> list[str]:
    """Class names in label order from a UTF-8 file: one name per line, or a JSON list of texts.

    Raises OSError if the file can't be read, ValueError for a file that holds no names, a blank or a repeated name.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    lines = text.rstrip().splitlines()
    if text.lstrip().startswith("["):
        try:
            lines = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"class names in {str(path)!r} begin like a JSON list but are none: {error}.") from error
    names = [name.strip() if isinstance(name, str) else name for name in lines]
    try:
        check_classes(names, "{}")
    except ValueError as error:
        raise ValueError(f"class names in {str(path)!r}: {error} (the first is class_names[0])") from error
    return names


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
    templates: str | None = None,
    streaming: bool = False,
    max_images: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Load one split of a dataset.

    Args:
        name: a dataset of `specs.py` by its key or Hub id (`"digits"` needs no download), a Hub id, or a folder that
            `load_dataset` reads: parquet files, or pictures in one folder per class.
        split: `"train"`, `"test"` (whatever a known dataset calls it), `"all"` where a row of `specs.py` has it, or
            the dataset's own name for it; `"train+test"` joins two, `"train[:1000]"` is a part.
        data_root: looked at first, for a folder `<data_root>/<Hub id>` in Hub layout; default the environment variable
            HF_ROBUST_CLIP_DATA_ROOT.
        revision: Hub revision; None takes that of the known dataset, or the newest.
        class_names: in label order, where the dataset doesn't know them or they should read otherwise. Labels that
            are texts are looked up among them.
        label_column: where it is neither that of the known dataset nor `label`, `labels`, `cls` or the only column
            of class labels.
        resize: shorter side before the centre crop.
        templates: key in `templates.json`; None takes the known dataset's, or PMG-AFT's.
        streaming: read only `max_images` rows of a shuffled stream, and keep those, without downloading the rest.
        max_images: at most so many images, drawn once by `seed`; None for all.
        seed: of that draw.

    Raises OSError if it can't be found, saying what to put where; ValueError for a missing split or column, a set
    without rows, and labels that don't fit the class names.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images={max_images!r} must be at least 1, or None for all.")
    if streaming and max_images is None:
        raise ValueError("streaming=True needs max_images: the number of rows to read from the stream.")
    spec = find_spec(name)
    dataset_id = spec.hub_id if spec else name
    prompts = prompt_templates(templates or (spec.templates if spec else "pmg_aft"))
    asked, split = split, spec.splits.get(split, split) if spec else split
    if dataset_id == "digits":
        rows, found = digits_split(split), "scikit-learn"
    else:
        rows, found = _load_rows(spec, dataset_id, split, data_root, revision, streaming)
    if spec and spec.test_every and asked in ("train", "test"):
        rows = _every(rows, spec.test_every, asked == "test")
        split = f"{asked}, where every {spec.test_every}th row of {split} is test"
    features = rows.features
    if features is None:  # some formats tell their columns only when they are read
        raise ValueError(f"the stream of dataset {dataset_id!r} doesn't tell its columns; use streaming=False.")
    column = _label_column(features, spec, label_column, dataset_id)
    image_column = _image_column(features, spec, dataset_id)
    if isinstance(rows, datasets.IterableDataset):
        rows = _read_stream(rows, spec, image_column, max_images, seed)
    elif spec and spec.frames_of:
        rows = _middle_frames(rows, spec.frames_of)
    if len(rows) == 0:
        raise ValueError(f"dataset {dataset_id!r} has no rows in split {split!r}; check its files.")
    if not isinstance(features[image_column], datasets.Image):  # parquet without the Hub's notes on features
        rows = rows.cast_column(image_column, datasets.Image())
    label_names = getattr(features[column], "names", None)
    names = class_names or (spec.names_in_label_order(label_names) if spec else None) or label_names
    if not names:
        raise ValueError(f"dataset {dataset_id!r} doesn't name its classes; give class_names in label order.")
    names, _ = check_classes(names, prompts)
    if label_names is not None and len(names) < len(label_names):
        raise ValueError(
            f"class_names has {len(names)} names, but dataset {dataset_id!r} has {len(label_names)} labels."
        )
    keys = spec.label_keys() if spec and label_names is None else None
    if keys is not None and len(keys) != len(names):
        keys = None  # names for other labels than those of the row
    label_map = _label_map(rows, column, names, keys, dataset_id)
    data = ImageDataset(
        rows,
        processor,
        names,
        dataset_id,
        found,
        split,
        image_column,
        column,
        resize,
        label_map,
        spec.attack_resolution if spec else None,
        prompts,
    )
    return data.first(max_images, seed)


def _load_rows(
    spec: DatasetSpec | None,
    name: str,
    split: str,
    data_root: str | Path | None,
    revision: str | None,
    streaming: bool,
) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """The rows of a split, and the revision for reports: from the data root or a folder, else from the Hub."""
    root = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    places = [*([Path(root, name)] if root else []), Path(name)]
    folders = [folder for folder in places if folder.is_dir() and any(folder.iterdir())]
    revision = revision or (spec.revision if spec else None)
    unseen = " (this row of specs.py was not checked against the Hub)" if spec and not spec.checked else ""
    try:
        if not folders:
            rows = datasets.load_dataset(name, split=split, revision=revision, streaming=streaming)
            return rows, revision or "main"
        parts = [part.partition("[")[0] for part in split.split("+")]  # "train[:1000]" is a part of "train"
        parquet = sorted(folders[0].rglob("*.parquet"))
        files = {part: [str(path) for path in parquet if path.name.startswith(f"{part}-")] for part in parts}
        if all(files.values()):
            return datasets.load_dataset("parquet", data_files=files, split=split, streaming=streaming), "local"
        return datasets.load_dataset(str(folders[0]), split=split, streaming=streaming), "local"
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"dataset {name!r} has no rows in split {split!r}; check its files.") from error
        raise ValueError(f"dataset {name!r} has no split {split!r}{unseen}: {error}") from error
    except Exception as error:  # the Hub client raises many kinds of errors for "not there"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"can't load dataset {name!r}{unseen} ({reason}). Put its parquet files in <data root>/{name}/ (hf "
            f"download --repo-type dataset {name} --local-dir <data root>/{name}) and name the root by data_root or "
            f"{DATA_ROOT_VARIABLE}, or let the Hub be reached (gated sets: accept their terms and log in)."
        ) from error


def _every(
    rows: datasets.Dataset | datasets.IterableDataset, step: int, test: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """Every `step`-th row, or all the others."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(lambda _, i: (i % step == 0) == test, with_indices=True)
    return rows.select([i for i in range(len(rows)) if (i % step == 0) == test])


def _read_stream(
    stream: datasets.IterableDataset, spec: DatasetSpec | None, image_column: str, count: int | None, seed: int
) -> datasets.Dataset:
    """The first `count` rows of a shuffled stream, with their pictures' bytes as they are, in memory."""
    if spec and spec.frames_of:
        raise ValueError(f"dataset {spec.hub_id!r} is stored as frames of videos; load it with streaming=False.")
    features = stream.features
    if isinstance(features[image_column], datasets.Image):
        stream = stream.cast_column(image_column, datasets.Image(decode=False))
    rows = list(stream.shuffle(seed=seed, buffer_size=STREAM_BUFFER).take(count))
    return datasets.Dataset.from_list(rows, features=features) if rows else datasets.Dataset.from_dict({})


def _middle_frames(rows: datasets.Dataset, video_column: str) -> datasets.Dataset:
    """Of each video the middle one of its frames, in the order of their rows."""
    videos: dict[Any, list[tuple[int, int]]] = {}
    for i, (video, frame) in enumerate(zip(rows[video_column], rows["frame"], strict=True)):
        videos.setdefault(video, []).append((frame, i))
    return rows.select(sorted(sorted(frames)[len(frames) // 2][1] for frames in videos.values()))


def _image_column(features: datasets.Features, spec: DatasetSpec | None, name: str) -> str:
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    column = spec.image_column if spec else next(iter(pictures), "image")
    if column not in features:
        raise ValueError(f"dataset {name!r} has no column {column!r}; its columns: {list(features)}.")
    if column not in pictures and "bytes" not in (features[column] if isinstance(features[column], dict) else ()):
        raise ValueError(f"column {column!r} of dataset {name!r} holds no pictures but {features[column]}.")
    return column


def _label_column(features: datasets.Features, spec: DatasetSpec | None, asked: str | None, name: str) -> str:
    wanted = [asked] if asked else [spec.label_column] if spec else ["label", "labels", "cls"]
    for column in wanted:
        if column in features:
            return column
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not asked and not spec and len(labels) == 1:
        return labels[0]
    raise ValueError(
        f"dataset {name!r} has no label column {' or '.join(map(repr, wanted))}; its columns: {list(features)}. "
        "Name it by label_column."
    )


def _label_map(
    rows: datasets.Dataset, column: str, names: Sequence[str], keys: Sequence[str] | None, name: str
) -> dict[Any, int] | None:
    """The dataset's labels to indices among `names`; None where they are these indices already.

    Args:
        keys: the dataset's own label of each name, where it has such.

    Raises ValueError for a missing label, one that is neither a whole number nor a text, and one without a name.
    """
    if not isinstance(rows.features[column], datasets.ClassLabel | datasets.Value):
        raise ValueError(f"column {column!r} of dataset {name!r} holds no labels but {rows.features[column]}.")
    labels = rows.select_columns([column]).with_format("arrow")[:][column].unique().to_pylist()
    if None in labels:
        row = list(rows[column]).index(None)
        raise ValueError(f"row {row} of dataset {name!r} has no label in column {column!r}; leave such rows out.")
    odd = [label for label in labels if not isinstance(label, int | str)]
    if odd:
        raise ValueError(
            f"column {column!r} of dataset {name!r} holds {odd[0]!r}, which is no label: labels are whole numbers or "
            "texts. Name another column by label_column."
        )
    if keys is not None or any(isinstance(label, str) for label in labels):
        exact = {key: i for i, key in enumerate(keys or names)}
        alike = {plain(key): i for key, i in exact.items()}
        if len(alike) < len(exact):
            alike = {}  # some differ in case or signs only: then the spelling counts
        unknown = [label for label in labels if str(label) not in exact and plain(label) not in alike]
        if unknown:
            raise ValueError(
                f"column {column!r} of dataset {name!r} has the label {unknown[0]!r}, which is none of the "
                f"{len(names)} class names ({', '.join(names[:3])}, ...); give class_names that hold it."
            )
        return {label: exact[str(label)] if str(label) in exact else alike[plain(label)] for label in labels}
    low, high = min(labels), max(labels)
    if low < 0 or high >= len(names):
        raise ValueError(
            f"labels in column {column!r} of dataset {name!r} run from {int(low)} to {int(high)} ({len(labels)} "
            f"different), but there are {len(names)} class names, for 0 .. {len(names) - 1}; give one name per label, "
            "also for numbers that no picture has, and leave out rows without a label."
        )
    return None
