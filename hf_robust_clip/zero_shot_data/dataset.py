"""Rows of pictures and labels as a dataset of pixels, and batches of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPProcessor

from ..checks import checked_images, checked_labels
from ..modeling import check_classes
from ..pictures import check_resize, checked_colour, model_side, to_pixels, to_rgb
from .errors import DatasetError, one_line
from .rows import open_stored


@dataclass
class ImageDataset(Dataset):
    """A map-style dataset of `{"pixel_values": (3, H, W) float in [0, 1], "labels": int}`, prepared on access.

    With `augment` it is one of `{"picture": (3, H, W) uint8, "labels": int}`: whole pictures, each of its own size.
    Reading raises DatasetError (a ValueError of one line, from workers too) for a picture or label that can't be read,
    naming its row.

    Args:
        rows: a `datasets.Dataset` with an image and a label column; they are kept with their pictures undecoded.
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
        background: what shows where a picture is transparent: name of a colour, or (red, green, blue).

    Raises ValueError for a `background` that is no colour, and a `resize` that does nothing.
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
    background: str | Sequence[int] = "white"

    answer: ClassVar[str] = "labels"  # what an example calls that which belongs to its picture
    attacked: ClassVar[bool] = False  # whether its pictures are adversarial already

    def __repr__(self) -> str:
        about = f"{self.dataset_id!r}, split {self.split!r}: {len(self)} images of {len(self.class_names)} classes"
        return f"{type(self).__name__}({about}{', whole pictures' if self.augment else ''})"

    def __post_init__(self) -> None:
        self.background = checked_colour(self.background)
        self._keep_undecoded()
        if self.resize is not None and not self.augment:
            check_resize(self.resize, self.attack_resolution, model_side(self.processor))

    def _keep_undecoded(self) -> None:
        as_stored = datasets.Image(decode=False)
        if self.rows.features.get(self.image_column, as_stored) != as_stored:
            self.rows = self.rows.cast_column(self.image_column, as_stored)

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures: the attack resolution, but never more than the model's input size."""
        side = model_side(self.processor)
        return side if self.attack_resolution is None else min(self.attack_resolution, side)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not hasattr(index, "__index__"):
            raise TypeError(f"index {index!r} must be a whole number; of several, give .first or rows.select.")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch at once: `DataLoader` calls this."""
        beyond = [index for index in indices if not -len(self) <= index < len(self)]
        if beyond:  # by which a loop over the dataset ends, as by no other error
            raise IndexError(f"index {beyond[0]} is out of range for {len(self)} images.")
        try:
            rows = self.rows[list(indices)]
            pixels = self._prepared(rows[self.image_column])
            answers = [self._answer(value) for value in rows[self.label_column]]
        except Exception as error:  # whatever Pillow, `datasets` and the files bring
            raise DatasetError(self._fault(indices, error)) from error
        key = "picture" if self.augment else "pixel_values"
        return [{key: x, self.answer: value} for x, value in zip(pixels, answers, strict=True)]

    def _prepared(self, stored: Sequence[Any]) -> Sequence[Tensor] | Tensor:
        pictures = [self._opened(picture) for picture in stored]
        if self.augment:
            whole = [np.array(to_rgb(picture, self.background)) for picture in pictures]
            return [torch.from_numpy(array_HWC).permute(2, 0, 1).contiguous() for array_HWC in whole]
        return to_pixels(self.processor, pictures, self.resize, self.attack_resolution, self.background)

    def _opened(self, stored: Any) -> Any:
        """A picture, from what its column holds."""
        return open_stored(stored)

    def _look_at(self, stored: Any) -> None:
        """Raise what opening a picture raises."""
        to_rgb(self._opened(stored), self.background)

    def _answer(self, label: Any) -> Any:
        return int(label if self.label_map is None else self.label_map[label])

    def only(self, class_names: Sequence[str]) -> ImageDataset:
        """The images of some classes, relabelled 0 .. len(class_names) - 1 in the given order.

        Raises ValueError for a name that is not one of this dataset's, or repeated, and for none.
        """
        chosen, _ = check_classes(class_names, "{}")
        unknown = [name for name in chosen if name not in self.class_names]
        if unknown:
            raise ValueError(f"class {unknown[0]!r} is not in {self.dataset_id}: {list(self.class_names[:10])}.")
        new = {self.class_names.index(name): i for i, name in enumerate(chosen)}
        now = self.label_map or {i: i for i in range(len(self.class_names))}
        label_map = {label: new[i] for label, i in now.items() if i in new}
        labels = self.rows[self.label_column]
        keep = [i for i, label in enumerate(labels) if label in label_map]
        return replace(self, rows=self.rows.select(keep), class_names=chosen, label_map=label_map)

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
        rows_of = self._drawn_by_class(str(seed))
        sizes = [len(rows) for rows in rows_of]
        if min(sizes) < per_class:
            least = int(np.argmin(sizes))
            mend = f"lower `shots` to {sizes[least]}" if sizes[least] else "leave the class out"
            raise ValueError(
                f"class {self.class_names[least]!r} of dataset {self.dataset_id!r}, split {self.split!r} has "
                f"{sizes[least]} images, fewer than the {per_class} asked for (`shots`); {mend}."
            )
        chosen = np.concatenate([rows[:per_class] for rows in rows_of])
        return replace(self, rows=self.rows.select(np.sort(chosen)))

    def held_out(self, share: float, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
        """(images to train on, images held out): of every class of n images round(share * n), at least one, drawn once
        by `seed` and held out, in dataset order. No picture is decoded; what is held out is prepared as for an
        evaluation, without `augment`.

        Raises ValueError for a `share` that is not between 0 and 1, and a class of which nothing would be left to
        train on.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"share={share!r} of held-out images must be above 0 and below 1.")
        kept, held = [], []
        for name, rows in zip(self.class_names, self._drawn_by_class(f"held out {seed}"), strict=True):
            count = max(1, round(share * len(rows)))
            if count >= len(rows):
                raise ValueError(
                    f"class {name!r} of dataset {self.dataset_id!r}, split {self.split!r} has {len(rows)} images, of "
                    f"which none would be left beside a share of {share!r} held out; lower it, or leave the class out."
                )
            held.append(rows[:count])
            kept.append(rows[count:])
        train, test = (self.rows.select(np.sort(np.concatenate(rows))) for rows in (kept, held))
        return replace(self, rows=train), replace(self, rows=test, augment=False)

    def _drawn_by_class(self, seed: str) -> list[np.ndarray]:
        """Of each class the numbers of its rows, in an order that depends on the seed, its name and its rows alone."""
        count = len(self.class_names)
        index = {i: i for i in range(count)} if self.label_map is None else self.label_map
        labels = self.rows.select_columns([self.label_column]).with_format("arrow")[:][self.label_column]
        coded = labels.combine_chunks().dictionary_encode("encode")
        codes_N = coded.indices.to_numpy()
        class_N = np.array([index.get(label, -1) for label in coded.dictionary.to_pylist()], dtype=int)[codes_N]
        by_class_N = np.argsort(class_N, kind="stable")
        starts = np.searchsorted(class_N[by_class_N], np.arange(count + 1))
        found = []
        for name, start, size in zip(self.class_names, starts, np.diff(starts), strict=False):
            key = blake2b(f"{seed} {name}".encode(), digest_size=16).digest()
            draws = np.random.default_rng(int.from_bytes(key, "little")).random(size)
            found.append(by_class_N[start + np.argsort(draws, kind="stable")])
        return found

    def _fault(self, indices: Sequence[int], error: Exception) -> str:
        """Which of some rows can't be read, and why."""
        for index in indices:
            what, mend = "read", "replace the file or leave the row out"
            try:
                stored = self.rows[int(index)][self.image_column]
                self._look_at(stored)
                what, mend = "prepared", "correct the settings of the image processor, or leave the row out"
                self._prepared([stored])
            except Exception as of_row:
                return (
                    f"{self._place(index)}: the picture in column {self.image_column!r} can't be {what} "
                    f"({one_line(of_row)}); {mend}."
                )
            label = self.rows.select_columns([self.label_column])[int(index)][self.label_column]
            try:
                self._answer(label)
            except (KeyError, TypeError, ValueError):
                return f"{self._place(index)}: {label!r} in column {self.label_column!r} is no label of these classes."
        return f"rows {list(indices)} of dataset {self.dataset_id!r}, split {self.split!r}: {one_line(error)}"

    def source_row(self, index: int) -> int:
        """The row of an image in the table that this set was drawn from: its split as `datasets` gives it."""
        number, drawn = int(index) % len(self), self.rows._indices
        return number if drawn is None else int(drawn.column(0)[number].as_py())

    def _place(self, index: int) -> str:
        """The row in the table that this set was drawn from, and the picture's file where it has one."""
        number, row = int(index) % len(self), self.source_row(index)
        picture = self.rows.select_columns([self.image_column]).with_format("arrow")[number : number + 1]
        stored = picture[self.image_column][0].as_py()
        file = stored.get("path") if isinstance(stored, dict) else None
        return f"row {row}{f' ({file})' if file else ''} of dataset {self.dataset_id!r}, split {self.split!r}"


def collate_images(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collect examples into a batch: `{"pixel_values": (B, 3, H, W), "labels": (B,)}`, without labels if none has any;
    with `"captions"`, a list of B texts, where the examples have them.

    Whole pictures (`ImageDataset.augment`) stay a list of B tensors (3, H, W), `"pictures"`, in place of pixel_values.
    Raises DatasetError, a ValueError, for pixels outside [0, 1], for images of unequal size, whole pictures among
    prepared ones, examples with labels or captions among others, captions that are no texts, and those without pixels.
    """
    try:
        return _collated(examples)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DatasetError(one_line(error)) from error


def _collated(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for example in examples:
        if not isinstance(example, dict) or not {"picture", "pixel_values"} & example.keys():
            held = sorted(map(str, example)) if isinstance(example, dict) else type(example).__name__
            raise ValueError(f"an example has {held}, no pixel_values; image_dataset, load_image_dataset give them.")
        key, kind = ("picture", "uint8") if "picture" in example else ("pixel_values", "float")
        if not isinstance(example[key], Tensor) or example[key].dim() != 3:
            shape = getattr(example[key], "shape", None)
            of = "" if shape is None else f" of shape {tuple(shape)}"
            raise ValueError(f"{key} of an example is a {type(example[key]).__name__}{of}; give {kind} (3, H, W).")
    for key in ("labels", "captions"):
        count = sum(key in example for example in examples)
        if 0 < count < len(examples):
            raise ValueError(f"{count} of {len(examples)} examples of a batch have {key}; give all of them, or none.")
    whole = sum("picture" in example for example in examples)
    if 0 < whole < len(examples):
        raise ValueError(f"{whole} of {len(examples)} examples of a batch hold a whole picture; give one `augment`.")
    batch: dict[str, Any]
    if whole:
        batch = {"pictures": [example["picture"] for example in examples]}
    else:
        shapes = {tuple(example["pixel_values"].shape) for example in examples}
        if len(shapes) > 1:
            raise ValueError(f"pixel_values differ in shape within a batch: {sorted(shapes)}.")
        pixels_BCHW = torch.stack([example["pixel_values"] for example in examples])
        batch = {"pixel_values": checked_images(pixels_BCHW, "pixel_values")}
    if "captions" in examples[0]:
        batch["captions"] = [example["captions"] for example in examples]
        if not all(isinstance(caption, str) and caption.strip() for caption in batch["captions"]):
            raise ValueError(f"captions={batch['captions'][:3]!r} must be texts, one for each image, none empty.")
    if "labels" in examples[0]:
        batch["labels"] = checked_labels([np.asarray(example["labels"]) for example in examples])
    return batch
