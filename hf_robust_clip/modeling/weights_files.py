"""Files of weights that somebody else wrote: tensors and plain values come out of them, and no code runs."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .checkpoints import UnfitWeights

TORCH_SCRIPT = "constants.pkl"  # a file of its archives alone
NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
}


class Unread:
    """What stands in the place of an object that isn't needed, and that only code could make."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


NUMPY = ("core.multiarray.scalar", "_core.multiarray.scalar", "core.multiarray._reconstruct",
         "_core.multiarray._reconstruct", "ndarray", "dtype")  # fmt: skip
UNREAD = ("argparse.Namespace", *(f"numpy.{name}" for name in NUMPY))


def read_weights_file(path: str | Path) -> dict[str, Any]:
    """What a file of weights holds: nested dictionaries and lists of tensors (on the CPU, as they were stored),
    numbers and texts; `Unread` where NumPy's numbers or the settings of a script stood.

    safetensors files are read as such, others by `torch.load(weights_only=True)`, which makes tensors and plain values
    alone; the file's beginning says which it is, not its name.

    Raises UnfitWeights for a file that is cut short, damaged, or holds objects that only code could make, a whole
    module or a TorchScript archive among them; OSError if there is none, ValueError if it holds no names.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{str(path)!r} is no file of weights; give the file itself.")
    with path.open("rb") as file:
        begin = file.read(64)
    for sign, what in NO_WEIGHTS.items():
        if begin.lower().startswith(sign):
            raise UnfitWeights(f"{path.name!r} is {what} in the place of the weights; download the file itself.")
    content = _safetensors(path) if begin[8:9] == b"{" else _unpickled(path)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path.name!r} holds a {type(content).__name__} without names; save a state_dict().")
    return dict(content)


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UnfitWeights(f"{path.name!r} is cut short or damaged ({error}); download it again.") from error


def _unpickled(path: Path) -> Any:
    """What a pickle of torch holds. torch doesn't look at an archive's checksums; they are checked first."""
    if zipfile.is_zipfile(path):
        _check_archive(path)
    stand_ins: Any = [(Unread, name) for name in UNREAD]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is damaged, or holds more than numbers, brings up
        line = " ".join(str(error).split())
        found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:class|type) ([\w.]+)", line)
        if found is None:
            reason = f"{type(error).__name__}: {line:.120}"
            raise UnfitWeights(f"{path.name!r} is cut short, damaged or no file of torch.save ({reason}).") from error
        raise UnfitWeights(
            f"{path.name!r} holds objects of {found[1] or found[2]}, which only code can make: not opened; save the "
            "model's state_dict() alone."
        ) from error


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise UnfitWeights(f"{path.name!r} is cut short or damaged ({error}); download it again.") from error
    if damaged is not None:
        raise UnfitWeights(f"{path.name!r} is damaged (checksum of {damaged}); download it again.")
    if any(Path(name).name == TORCH_SCRIPT for name in names):
        raise UnfitWeights(
            f"{path.name!r} is a TorchScript archive, which is code: not opened; where you trust it, save "
            "torch.jit.load(FILE).state_dict() by torch.save, and convert that."
        )
