"""Files that are written whole or not at all: beside their place, then moved there, never through a link."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import Any

DRAFT = ".writing-"  # folders of this name hold what isn't whole yet; nothing of them is ever pushed
PROBE = 2**20  # bytes that must fit before work begins: more than report, card and plot take
LARGEST_JSON = 2**26  # bytes
OF_TORCH_SAVE = ("inline_container", "iostream error")  # how its errors begin where a disk is full


class NotWritten(OSError):
    """Something could not be saved."""


@contextmanager
def written_whole(folder: str | Path, last: str | None = None) -> Iterator[Path]:
    """An empty folder to write into, whose files are moved to `folder` at the end, in the place of links too.

    `last` is taken away first and comes last, so that a folder with it is whole. After an error `folder` is as it was.
    What a process that was killed left of such a folder is taken away.

    Raises NotWritten as `disk_errors` does.
    """
    folder = Path(folder).absolute()
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder)
        try:
            with _draft_in(folder) as draft:
                yield draft
                files = [path.relative_to(draft) for path in draft.rglob("*") if not path.is_dir()]
                if last is not None:
                    (folder / last).unlink(missing_ok=True)
                for file in sorted(files, key=lambda file: str(file) == last):
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(draft / file, folder / file)
        except BaseException:
            for place in missing:
                with suppress(OSError):
                    place.rmdir()
            raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write a file, which is moved to `path` at the end: `written_whole` for one file."""
    path = Path(path)
    with written_whole(path.parent) as draft:
        yield draft / path.name


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole. Raises ValueError, with nothing written, for what UTF-8 can't hold."""
    check_text(text, Path(path).name)
    with whole_file(path) as draft:
        draft.write_bytes(text.encode())


def check_text(value: Any, name: str) -> None:
    """Raise ValueError if a text anywhere in nested settings can't be written: half a character (a lone surrogate), as
    file names in another encoding than UTF-8 become.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_text(key, f"a key of {name}")
            check_text(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            check_text(inner, f"{name}[{number}]")
    elif isinstance(value, str) and (odd := re.search("[\ud800-\udfff]", value)):
        raise ValueError(f"{name} holds half a character, {odd[0]!a}, which no text file can hold; write it in UTF-8.")


def read_json(path: str | Path, *, once: bool = False) -> Any:
    """What a JSON file says. Raises ValueError, with its name, for what is cut short, no JSON, or above 64 MB; with
    `once` for a key that is there twice, of which the last would count.
    """
    try:
        if os.path.getsize(path) > LARGEST_JSON:
            raise ValueError("more than 64 MB")
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_each_once if once else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, cut short or no JSON ({error}); mend it or write it again.") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def check_writable(folder: str | Path, name: str = "output_dir", room: int = 0) -> None:
    """Raise NotWritten unless a folder is there, or can be made, and takes a megabyte. It is left as it was.

    Args:
        room: bytes that will be written into it, for which there must be room.
    """
    place = Path(folder).absolute()
    there = next(parent for parent in (place, *place.parents) if os.path.lexists(parent))
    if there.is_dir() and (free := shutil.disk_usage(there).free) < room:
        raise NotWritten(f"{name}={str(folder)!r} has {free / 1e6:.1f} MB of {room / 1e6:.1f}; free space.")
    with disk_errors(folder, name), _draft_in(there) as draft:
        inside = draft / place.relative_to(there)
        inside.mkdir(parents=True, exist_ok=True)
        (inside / "probe").write_bytes(bytes(PROBE))


@contextmanager
def disk_errors(folder: str | Path, name: str = "folder") -> Iterator[None]:
    """Let what writers raise where a disk is full or closed to them be a NotWritten of one line, with the folder."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError):
            reason = error.strerror
        else:
            reason = str(error) if isinstance(error, SafetensorError) else "the disk is full, or fails"
        if not reason or (type(error) is RuntimeError and not any(text in str(error) for text in OF_TORCH_SAVE)):
            raise
        raise NotWritten(f"can't write into {name}={str(folder)!r}: {reason}; mend it, or name another.") from error


def delete(folder: Path, ours: Callable[[str], object]) -> None:
    """Delete the files of a folder whose path in it is `ours`, and what this leaves empty; nothing behind links. A
    folder that is not named by its real path is left alone.
    """
    if folder != folder.resolve():
        return
    for place, _, files in os.walk(folder, topdown=False):
        found = [name for name in files if ours(Path(place, name).relative_to(folder).as_posix())]
        for name in found:
            Path(place, name).unlink(missing_ok=True)  # another machine may delete the same
        with suppress(OSError):
            Path(place).rmdir()  # unless something is left


@contextmanager
def _draft_in(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"{DRAFT}{gethostname()}-{os.getpid()}-", dir=folder) as draft:
        yield Path(draft)


def _clear_leftovers(folder: Path) -> None:
    """Delete the drafts of processes of this machine that are no more."""
    for draft in folder.glob(f"{DRAFT}{gethostname()}-*"):
        process = draft.name.split("-")[-2]
        if os.name == "posix" and process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(draft, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
