"""Digests of files and lines that were written, by which damage to them is seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from xxhash import xxh3_64

CHUNK = 2**22  # bytes that are read at once
PASSING = (
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "architectures",
)  # where and how it was stored


def digest(content: bytes) -> str:
    """16 hexadecimal digits that change with any byte."""
    return xxh3_64(content).hexdigest()


def file_digest(path: str | Path) -> str:
    """`digest` of what a file holds."""
    found = xxh3_64()
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def digests(folder: str | Path, files: Iterable[Path]) -> dict[str, str]:
    """The digests of files in a folder, by their names relative to it."""
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in sorted(files)}


def damaged_file(folder: str | Path, written: Mapping[str, str]) -> str | None:
    """What is wrong with the first file of a folder that is not as `digests` found it; None if nothing is."""
    for name, own in written.items():
        path = Path(folder, name)
        if not path.is_file():
            return f"{name} is missing"
        if file_digest(path) != own:
            return f"{name} is cut short or changed"
    return None


def signed(text: str) -> str:
    """A line of a file: a text without line breaks, and its digest."""
    return f"{text} {digest(text.encode())}\n"


def unsigned(line: bytes) -> str:
    """The text of a signed line without its line break. Raises ValueError for any other line."""
    text, _, own = line.rpartition(b" ")
    if digest(text) != own.decode("ascii", "replace"):
        raise ValueError("the line is damaged, or was written by something else")
    return text.decode()


def plain(value: Any) -> Any:
    """A value as JSON can hold it, the same in every process."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic | Tensor | np.ndarray):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration, sorted, without what says where it was loaded from, how it was stored and by which
    version: what else of a model its weights don't tell, heads and activations among it.
    """
    return {
        name: without_places(value) if isinstance(value, Mapping) else value
        for name, value in sorted(config.items())
        if name not in PASSING
    }
