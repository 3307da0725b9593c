"""What is converted: files of weights, in a folder or a repository of the Hub, and what lies beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils.hub import extract_commit_hash

from ..hub import reason_of
from ..modeling.checkpoints import read_config
from ..modeling.layouts import read_weights_file
from ..modeling.untrusted import INDEX, WHOLE, present
from ..names import is_path, shown_name
from ..storage import read_json

SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".bin", ".ckpt")
OF_A_TRAINER = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
PICKLED = "pytorch_model.bin"  # of transformers
CHUNK = 2**22  # bytes that are read at once


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Args:
        place: a folder or a Hub id.
        title: what others call it.
        files: those of the weights.
        where: `revision`, of a Hub id.
    """

    place: str
    title: str
    files: tuple[Path, ...]
    where: dict[str, Any] = field(default_factory=dict)

    @property
    def commit(self) -> str | None:
        """Of the Hub, from which the weights were read."""
        return extract_commit_hash(str(self.files[0]), None) if self.where else None

    def beside(self, name: str) -> Path | None:
        """Another file of the same place; None if there is none."""
        return present(self.place, name, self.where)

    def clip_config(self) -> dict[str, Any] | None:
        """What a config.json of transformers beside the weights says; None if there is none."""
        if self.beside("config.json") is None:
            return None
        return read_config(self.place, self.where)

    def content(self) -> dict[str, Any]:
        """What the files hold, as `read_weights_file`. Raises ValueError for a name that stands in two of them."""
        found: dict[str, Any] = {}
        for file in self.files:
            own = read_weights_file(file)
            if twice := sorted(found.keys() & own.keys()):
                raise ValueError(f"{twice[0]} stands in two files of source={self.title!r}; give source_file.")
            found |= own
        return found

    def digests(self) -> list[dict[str, Any]]:
        """Name, SHA-256 and bytes of each file."""
        return [{"file": file.name, "sha256": _sha256(file), "bytes": file.stat().st_size} for file in self.files]


def find_source(source: str, file: str | None, revision: str | None) -> Source:
    """Where the weights are that somebody names.

    Args:
        source: a file, a folder, or a Hub id.
        file: the name of the weights in a folder or repository; None where it can be told.
        revision: of a Hub id.

    Raises ValueError for a `file` or `revision` that does nothing, and where several files might be meant; OSError if
    there is no such thing.
    """
    path = Path(source)
    if is_path(source) and revision is not None:
        raise ValueError(f"source_revision={revision!r} does nothing for {source!r}, which is not read from the Hub.")
    if path.is_file():
        if file is not None:
            raise ValueError(f"source_file={file!r} does nothing for source={source!r}, which is a file.")
        return Source(str(path.parent), path.name, (path,))
    if path.is_dir():
        names = [own.name for own in sorted(path.iterdir()) if own.is_file()]
        chosen = weights_among(names, file, source, _shards(path / INDEX))
        return Source(source, shown_name(source), tuple(path / name for name in chosen))
    if is_path(source):
        raise OSError(f"source={source!r} is no file, folder or Hub id.")
    return _on_the_hub(source, file, {"revision": revision or "main"})


def _on_the_hub(source: str, file: str | None, where: dict[str, Any]) -> Source:
    from huggingface_hub import HfApi, hf_hub_download

    def fetched(name: str) -> Path:
        return Path(hf_hub_download(source, name, revision=where["revision"]))

    try:
        names = [file] if file else HfApi().list_repo_files(source, revision=where["revision"])
        shards = _shards(fetched(INDEX)) if INDEX in names else []
    except Exception as error:  # the Hub's client raises many kinds
        raise _unreadable(source, error) from error
    chosen = weights_among([own for own in names if "/" not in own or own == file], file, source, shards)
    try:
        return Source(source, source, tuple(map(fetched, chosen)), where)
    except Exception as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> OSError:
    mend = "name a file, a folder or a Hub id; offline, give source_file too"
    return OSError(f"source={source!r} can't be read from the Hub ({reason_of(error):.200}); {mend}.")


def weights_among(names: Sequence[str], file: str | None, source: str, shards: Sequence[str]) -> list[str]:
    """The files of weights among names: that which is asked for, those of transformers, or the only one.

    Raises ValueError if none, or several, might be meant.
    """
    if file is not None:
        if file not in names:
            raise ValueError(f"source_file={file!r} isn't in source={source!r}.")
        return [file]
    if "config.json" in names:
        for whole in ([WHOLE], list(shards), [PICKLED]):
            if whole and set(whole) <= set(names):
                return whole
    weights = [name for name in names if name.endswith(SUFFIXES) and name not in OF_A_TRAINER]
    safe = {PurePosixPath(name).stem for name in weights if name.endswith(".safetensors")}
    # open_clip publishes the same weights twice
    weights = [name for name in weights if not _is_copy(name, safe)]
    if len(weights) != 1:
        told = ", ".join(weights[:5]) or "none"
        raise ValueError(f"source={source!r} has {len(weights)} files of weights ({told}); give source_file.")
    return weights


def _is_copy(name: str, safe: set[str]) -> bool:
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
    return suffix == ".bin" and "pytorch_" in stem and stem.replace("pytorch_", "") in safe


def _shards(index: Path) -> list[str]:
    """The files that an index of transformers names, in their order; none without one, or one that can't be read."""
    if not index.is_file():
        return []
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    return sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []


def _sha256(path: Path) -> str:
    found = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
