"""A short text that changes when the images of an evaluation or a training do."""

from __future__ import annotations

from collections.abc import Iterator
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
SAMPLED = 256  # examples that are looked at of a dataset that isn't ours


def dataset_digest(dataset: Dataset) -> str:
    """16 hexadecimal digits that change when a picture, a label, their order, a class name or the preparation does.

    Of an `ImageDataset` (and of a `Subset` of one): name, size and label of every row, the bytes of all pictures up
    to 1 GiB (beyond that of evenly spaced ones), and everything that prepares them; no picture is decoded. Of any
    other dataset its length and up to 256 evenly spaced examples.
    """
    found = blake2b(digest_size=8)
    for part in _parts(dataset):
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _parts(dataset: Any) -> Iterator[bytes]:
    if isinstance(dataset, Subset):
        yield repr([int(i) for i in dataset.indices]).encode()
        yield from _parts(dataset.dataset)
    elif isinstance(dataset, ImageDataset):
        yield repr(_preparation(dataset)).encode()
        yield from _rows(dataset)
    else:
        count = len(dataset)
        yield str(count).encode()
        for i in range(0, count, max(1, -(-count // SAMPLED))):
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
        labels, pictures = batch[data.label_column].to_pylist(), _pictures(batch[data.image_column])
        sizes = [len(content or b"") for content, _ in pictures]
        total += sum(sizes)
        names = [name for _, name in pictures]
        yield repr(list(zip(labels, sizes, names, strict=True))).encode()
    step = max(1, -(-total // WHOLE))
    for batch in rows.select(range(0, len(data), step)).iter(1000):
        yield from (content for content, _ in _pictures(batch[data.image_column]) if content)


def _pictures(column: pa.ChunkedArray) -> list[tuple[bytes | None, str | None]]:
    """Bytes and name of each picture; of one that lies in a file of its own its name with its size."""
    found: list[tuple[bytes | None, str | None]] = []
    for value in column.to_pylist():
        if not isinstance(value, dict):
            found.append((repr(value).encode(), None))
            continue
        path = value.get("path")
        file = Path(path) if path and value.get("bytes") is None else None
        name = None if not path else Path(path).name
        found.append((value.get("bytes"), f"{name} {file.stat().st_size}" if file and file.is_file() else name))
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
