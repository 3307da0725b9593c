"""Pictures with captions: a row is what CLIP is trained on.

A dataset's rows are found and read as those with labels are (`loading.py`): a folder of pictures with `metadata.csv`
or `.jsonl`, parquet, tar files of WebDataset's kind (read whole, or `streaming`), or a Hub id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow.compute as pc
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import CLIPProcessor

from ..crops import grey_levels
from .dataset import ImageDataset
from .errors import DatasetError, cut
from .fingerprint import stored_pictures
from .rows import TEXTS, check_files_of, find_rows, image_column_of, read_stream
from .specs import find_spec, plain

CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "title", "sentence", "description")


@dataclass(repr=False)
class PairDataset(ImageDataset):
    """A map-style dataset of `{"pixel_values": (3, H, W) float in [0, 1], "captions": str}`, prepared on access.

    As `ImageDataset`, whose `label_column` is the column of captions; it has no classes.
    """

    answer: ClassVar[str] = "captions"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dataset_id!r}, split {self.split!r}: {len(self)} pairs)"

    def _answer(self, label: Any) -> str:
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"{label!r} is no caption")
        return label

    @property
    def captions(self) -> list[str]:
        """All of them; no picture is decoded."""
        return self.rows.select_columns([self.label_column])[:][self.label_column]

    def picture_keys(self, indices: Sequence[int] | None = None) -> list[str]:
        """16 hexadecimal digits for each picture (or some), by which equal files are known; nothing is decoded.

        Raises DatasetError for a row without a picture.
        """
        rows = self.rows if indices is None else self.rows.select(list(indices))
        batches = rows.select_columns([self.image_column]).with_format("arrow").iter(1000)
        found: list[str] = []
        for stored in (stored for batch in batches for stored, _ in stored_pictures(batch[self.image_column])):
            if stored in (b"", b"None"):
                row = len(found) if indices is None else int(indices[len(found)])
                raise DatasetError(f"{self._place(row)}: there is no picture; leave the row out.")
            content = stored.read_bytes() if isinstance(stored, Path) else stored
            found.append(blake2b(content, digest_size=8).hexdigest())
        return found


class InMemory(Dataset):
    """All examples of a dataset, prepared once: for small pictures, whose preparation takes longer than a step."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.examples = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]


def load_pairs(
    name: str,
    split: str,
    processor: CLIPProcessor,
    *,
    data_root: str | Path | None = None,
    revision: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    resize: int | None = None,
    background: str | Sequence[int] = "white",
    streaming: bool = False,
    max_images: int | None = None,
    seed: int = 0,
) -> PairDataset:
    """Load one split of a dataset of pictures with captions.

    Args:
        name: `"coloured-digits"`, which needs no download, a folder that `load_dataset` reads, or a Hub id.
        caption_column: where it isn't the only one of texts that is called like one (`caption`, `text`, `txt`, ...).
        split, data_root, revision, config, image_column, resize, background, streaming, max_images, seed: as for
            `load_image_dataset`.

    Raises OSError if it can't be found; ValueError as `load_image_dataset`, and for a column of captions that would
    have to be guessed or holds no texts, and rows without a caption.
    """
    if streaming and max_images is None:
        raise ValueError("streaming=True needs max_images: the number of rows to read from the stream.")
    spec = find_spec(name)
    rows, found, places = find_rows(name, spec, split, data_root, config, revision, streaming)
    features = rows.features
    if features is None and isinstance(rows, datasets.IterableDataset):  # tar files tell theirs when they are read
        rows = rows._resolve_features()
        features = rows.features
    image_column = image_column_of(features, image_column, name)
    caption_column = caption_column_of(features, caption_column, name)
    if isinstance(rows, datasets.IterableDataset):
        rows = read_stream(rows.select_columns([image_column, caption_column]), image_column, max_images, seed)
    data = pair_dataset(
        rows, processor, image_column=image_column, caption_column=caption_column, resize=resize,
        background=background, name=name, revision=found, split=split, places=places,
    )  # fmt: skip
    return data.first(max_images, seed)  # type: ignore[return-value]  # of its own kind


def pair_dataset(
    rows: datasets.Dataset,
    processor: CLIPProcessor,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    resize: int | None = None,
    background: str | Sequence[int] = "white",
    name: str = "rows in memory",
    revision: str = "in memory",
    split: str | None = None,
    places: Sequence[str] | None = None,
) -> PairDataset:
    """Rows in memory as pairs. Arguments and errors are those of `load_pairs`; files of pictures that don't begin with
    one of `places`, if these are given, are refused.
    """
    if len(rows) == 0:
        raise ValueError(f"dataset {name!r} has no rows in split {split!r}; check its files.")
    image_column = image_column_of(rows.features, image_column, name)
    caption_column = caption_column_of(rows.features, caption_column, name)
    rows = rows.with_format(None).select_columns([image_column, caption_column])
    check_files_of(rows, image_column, name, places)
    _check_captions(rows, caption_column, name)
    return PairDataset(
        rows, processor, (), name, revision, split or str(rows.split or "all"), image_column, caption_column, resize,
        background=background,
    )  # fmt: skip


def caption_column_of(features: datasets.Features, asked: str | None, name: str) -> str:
    """The column of captions: the one asked for, or the only one that is called like it. Raises ValueError if it is
    missing or holds no texts, or several fit.
    """
    found = [column for column in features if column == asked or (not asked and plain(column) in CAPTION_COLUMNS)]
    if len(found) > 1:
        raise ValueError(f"dataset {name!r} has several columns of captions, {cut(found)}; choose by caption_column.")
    if not found:
        what = f"column {asked!r}" if asked else "column of captions"
        raise ValueError(f"dataset {name!r} has no {what}; its columns: {cut(list(features))}. Name caption_column.")
    if getattr(features[found[0]], "dtype", "") not in TEXTS:
        raise ValueError(f"column {found[0]!r} of dataset {name!r} holds {cut(features[found[0]])}; captions are "
                         "texts, one a row: name caption_column.")  # fmt: skip
    return found[0]


def captions_of(dataset: Any) -> list[str]:
    """All captions of a dataset of pairs, without its pictures where it knows how."""
    if isinstance(dataset, Subset):
        every = captions_of(dataset.dataset)
        return [every[int(i)] for i in dataset.indices]
    if hasattr(dataset, "captions"):
        return list(dataset.captions)
    return [_own(dataset[i], "captions") for i in range(len(dataset))]


def picture_keys(dataset: Dataset, indices: Sequence[int] | None = None) -> list[str]:
    """A text for each picture, or for some, by which equal ones are known: of the stored file, or, where a dataset has
    none, of the grey levels.
    """
    chosen = range(len(dataset)) if indices is None else indices  # type: ignore[arg-type]
    if isinstance(dataset, Subset):
        return picture_keys(dataset.dataset, [int(dataset.indices[i]) for i in chosen])
    if hasattr(dataset, "picture_keys"):
        return dataset.picture_keys(chosen)
    return [_key_of(_own(dataset[i], "pixel_values")) for i in chosen]


def _key_of(pixels: Tensor) -> str:
    return blake2b(grey_levels(pixels).cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _own(example: Any, key: str) -> Any:
    if key not in example:
        raise ValueError(f"an example has {sorted(example)}, no {key!r}; give pairs of pictures and captions.")
    return example[key]


def _check_captions(rows: datasets.Dataset, column: str, name: str) -> None:
    texts = rows.select_columns([column]).with_format("arrow")[:][column]
    blank = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), True)
    if count := pc.sum(blank).as_py():
        first = pc.index(blank, True).as_py()
        raise DatasetError(f"{count} of {len(rows)} rows of dataset {name!r} have no caption in column {column!r}, "
                           f"row {first} first; leave them out.")  # fmt: skip
