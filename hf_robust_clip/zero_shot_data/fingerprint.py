"""A short text that changes when the images of an evaluation or a training do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from .dataset import ImageDataset

WHOLE = 2**30  # bytes of pictures up to which every one is read
SAMPLED = 4096  # examples that are looked at of a dataset that isn't ours


def dataset_digest(dataset: Dataset, every: bool = False) -> str:
    """16 hexadecimal digits that change when a picture, a label, their order, a class name or the preparation does.

    Of an `ImageDataset` (and of a `Subset` of one): name, size and label of every row, the bytes of all pictures up
    to 1 GiB (beyond that of evenly spaced ones), and everything that prepares them; no picture is decoded. Of any
    other dataset its length and up to 4096 evenly spaced examples.

    Args:
        every: look at every example of such a dataset.
    """
    return _digest(_parts(dataset, every))


def pictures_digest(dataset: Dataset) -> str:
    """16 hexadecimal digits that change when a picture, a label or their order does, and not with what prepares them:
    models that take other sizes see the same pictures. They are read as `dataset_digest` does; of other datasets than
    an `ImageDataset` all examples count.
    """
    if not isinstance(dataset, ImageDataset):
        return dataset_digest(dataset, every=True)
    meaning = None if dataset.label_map is None else sorted(dataset.label_map.items(), key=str)
    return _digest(itertools.chain([repr(meaning).encode()], _rows(dataset)))


def _digest(parts: Iterable[bytes]) -> str:
    found = blake2b(digest_size=8)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _parts(dataset: Any, every: bool) -> Iterator[bytes]:
    if isinstance(dataset, Subset):
        yield repr([int(i) for i in dataset.indices]).encode()
        yield from _parts(dataset.dataset, every)
    elif isinstance(dataset, ImageDataset):
        yield repr(_preparation(dataset)).encode()
        yield from _rows(dataset)
    else:
        count = len(dataset)
        yield str(count).encode()
        for i in range(0, count, 1 if every else max(1, -(-count // SAMPLED))):
            yield from _example(dataset[i])


def _preparation(data: ImageDataset) -> list[Any]:
    map_of_labels = None if data.label_map is None else sorted(data.label_map.items(), key=str)
    own = {
        name: value
        for name, value in vars(data).items()
        if name not in ("rows", "processor", "label_map", "templates", "dataset_id", "revision", "split")
    }
    image_processor = sorted(data.processor.image_processor.to_dict().items(), key=lambda item: item[0])
    return [sorted(own.items()), map_of_labels, image_processor]


def _rows(data: ImageDataset) -> Iterator[bytes]:
    rows = data.rows.select_columns([data.image_column, data.label_column]).with_format("arrow")
    total = 0
    for batch in rows.iter(1000):
        labels, pictures = batch[data.label_column].to_pylist(), stored_pictures(batch[data.image_column])
        sizes = [picture.stat().st_size if isinstance(picture, Path) else len(picture) for picture, _ in pictures]
        total += sum(sizes)
        names = [name for _, name in pictures]
        yield repr(list(zip(labels, sizes, names, strict=True))).encode()
    step = max(1, -(-total // WHOLE))
    for batch in rows.select(range(0, len(data), step)).iter(1000):
        for picture, _ in stored_pictures(batch[data.image_column]):
            yield picture.read_bytes() if isinstance(picture, Path) else picture


def stored_pictures(column: pa.ChunkedArray) -> list[tuple[bytes | Path, str | None]]:
    """Of each picture its bytes, or the file that holds them, and its name."""
    found: list[tuple[bytes | Path, str | None]] = []
    if isinstance(column.type, pa.ExtensionType):  # arrays of pixels
        arrays = (array for chunk in column.chunks for array in chunk.to_numpy(zero_copy_only=False))
        return [(np.ascontiguousarray(array).tobytes(), None) for array in arrays]
    for value in column.to_pylist():
        if not isinstance(value, dict):
            found.append((repr(value).encode(), None))
            continue
        content, path = value.get("bytes"), value.get("path")
        file = Path(path) if path and content is None and Path(path).is_file() else None
        found.append((file or content or b"", Path(path).name if path else None))
    return found


def _example(example: dict[str, Any]) -> Iterator[bytes]:
    for key in sorted(example):
        value = example[key]
        yield f"{key} {getattr(value, 'shape', '')}".encode()
        if isinstance(value, Tensor):
            yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        elif hasattr(value, "__array_interface__"):  # arrays and pictures: their text says little of what they hold
            array = np.asarray(value)
            yield f"{array.dtype} {array.shape}".encode()
            yield repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        else:
            yield repr(value).encode()
