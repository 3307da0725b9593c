"""What models, datasets and folders are called where others read it: never by a path on somebody's disk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from .digits_clip import EMBEDDED_MODEL, digits_clip_path

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})/?$")
PATH_IN_TEXT = re.compile(r"(?:(?<=file:)|(?<=file://)|(?<![\w:/.~-]))~?(?:/[\w.+@-]+){2,}")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
LISTS_OF_NAMES = ("classes", "class_names")  # what stands there is the name of a class, whatever it looks like


def check_shown(text: Any, what: str) -> None:
    """Raise ValueError for a text that tables can't show as it is: an empty one, or one with a line break, say."""
    if not isinstance(text, str) or not text.strip() or CONTROL.search(text):
        raise ValueError(f"{what}={text!r} is no text, empty, or holds characters that no terminal prints.")


def is_repo_id(name: str) -> bool:
    """Whether a name reads `owner/name`, as a repository of the Hub does. A relative folder may read so too."""
    return REPO_ID.fullmatch(name) is not None


def is_path(name: str) -> bool:
    """Whether a name is a place on this disk: there is such a file or folder, or it can be nothing else."""
    return is_absolute(name) or name.startswith(".") or Path(name).exists()


def is_absolute(name: str) -> bool:
    """Whether a text is an absolute path, of any system, or one that begins at the home folder."""
    return name.startswith(("/", "~", "file:")) or PureWindowsPath(name).is_absolute()


def hub_name(name: str) -> str | None:
    """The name by which others find a checkpoint: a Hub id (that of a folder in the Hub's cache too) or the name of
    the embedded model; None for any other path.
    """
    if name in (EMBEDDED_MODEL, digits_clip_path()):
        return EMBEDDED_MODEL
    cached = CACHED.search(PurePath(name).as_posix())
    if cached:
        return f"{cached['owner']}/{cached['name']}"
    return None if not name or is_path(name) else name


def check_embedded(name: str) -> None:
    """Raise ValueError where a folder has the name of the embedded model: which of the two is meant, nobody knows."""
    if name == EMBEDDED_MODEL and Path(name).is_dir() and any(Path(name).iterdir()):
        raise ValueError(f"{name!r} ships with the package, and is a folder here; write './{name}' for the folder.")


def cached_revision(name: str) -> str | None:
    """The commit of a folder in the Hub's cache; None for any other name."""
    cached = CACHED.search(PurePath(name).as_posix())
    return cached["revision"] if cached else None


def last_part(path: str) -> str:
    """The last part of a path, `.` and `..` resolved: `pictures` for `/home/me/data/pictures/`."""
    if PureWindowsPath(path).is_absolute() and not path.startswith("/"):
        return PureWindowsPath(path).name
    resolved = Path(path.removeprefix("file:")).expanduser().resolve()
    return resolved.name or "root"


def shown_name(name: str) -> str:
    """What reports and cards call a model or dataset: the Hub's name, or the last part of a path."""
    return hub_name(name) or last_part(name)


def shown_folder(folder: str) -> str:
    """What a card calls the folder that it lies in: as it was given, or from where the run was started; of a folder
    elsewhere the last part.
    """
    if not is_absolute(folder):
        return folder
    resolved, here = Path(folder).expanduser().resolve(), Path.cwd().resolve()
    inside = resolved.is_relative_to(here) and resolved != here
    return resolved.relative_to(here).as_posix() if inside else last_part(folder)


def titles(names: Sequence[str]) -> dict[str, str]:
    """For each name of a model or dataset the shortest end of it that tells it from the others: `pmgaft` for
    `out/pmgaft`, but `a/pmgaft` beside `b/pmgaft`.

    Raises ValueError for two names of one thing.
    """
    parts = {name: _parts(name) for name in names}
    seen: dict[tuple[str, ...], str] = {}
    for name, own in parts.items():
        if own in seen:
            raise ValueError(f"{seen[own]!r} and {name!r} are the same; name it once.")
        seen[own] = name
    found = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        length = next(n for n in range(1, len(own) + 1) if n == len(own) or all(own[-n:] != o[-n:] for o in others))
        found[name] = "/".join(part.strip("/") for part in own[-length:] if part.strip("/")) or "root"
    return found


def task_titles(tasks: Sequence[tuple[str | None, str]]) -> list[str]:
    """What tables call tasks, given as (name, dataset): the name, else the dataset, of a path the end that tells it.

    Raises ValueError for two tasks of one title.
    """
    short = titles([dataset for name, dataset in tasks if not name and is_path(dataset)])
    found = [name or short.get(dataset, dataset) for name, dataset in tasks]
    for title in found:
        check_shown(title, "the name of a task")
        if found.count(title) > 1:
            raise ValueError(f"two tasks have the name {title!r}; give each its own by `name`.")
    return found


def _parts(name: str) -> tuple[str, ...]:
    """A Hub name as it is divided by slashes, a path resolved."""
    if name == EMBEDDED_MODEL or not is_path(name):
        return tuple(name.split("/"))
    return Path(name).expanduser().resolve().parts


def same_place(first: str, second: str) -> bool:
    """Whether two names are of one Hub repository or one folder."""
    return _parts(first) == _parts(second)


def without_paths(settings: Any) -> Any:
    """Nested settings for others to read: of every absolute path the last part."""
    if isinstance(settings, Mapping):
        return {
            key: value if key in LISTS_OF_NAMES and isinstance(value, list | tuple) else without_paths(value)
            for key, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [without_paths(value) for value in settings]
    return last_part(settings) if isinstance(settings, str) and is_absolute(settings) else settings


def paths_in(text: str) -> list[str]:
    """The absolute paths in a text that lie on this disk, or whose folder does."""
    found = []
    for match in PATH_IN_TEXT.findall(text):
        path = Path(match).expanduser()
        if path.exists() or (len(path.parts) > 3 and path.parent.exists()):
            found.append(match)
    return list(dict.fromkeys(found))
