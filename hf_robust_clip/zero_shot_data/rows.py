"""The rows of a dataset: from a folder first, the Hub second; and which of their columns hold pictures and labels."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets.utils.file_utils import xopen
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from ..names import is_absolute
from ..pictures import opened
from .coloured_digits import coloured_digits_split
from .digits import digits_split
from .errors import DatasetError, cut, one_line
from .files import folder_rows
from .specs import SPECS, DatasetSpec, plain, words_of

EMBEDDED: dict[str, Callable[[str], datasets.Dataset]] = {
    "digits": digits_split,
    "coloured-digits": coloured_digits_split,
}
DATA_ROOT_VARIABLE = "HF_ROBUST_CLIP_DATA_ROOT"
STREAM_BUFFER = 1000  # rows among which a streamed set is shuffled; its shards are shuffled too
PICTURE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "images", "pictures", "photos")
LABEL_COLUMNS = ("label", "labels", "cls")
UNSEEN = {
    "": "this row of datasets.json was not checked against the Hub",
    "card": "this row of datasets.json was checked against its card alone",
}
TEXTS, BYTES = ("string", "large_string"), ("binary", "large_binary")
LABEL_WORDS = {*LABEL_COLUMNS, "class", "classes", "category", "categories", "target", "targets"}


def find_rows(
    name: str,
    spec: DatasetSpec | None,
    split: str,
    data_root: str | Path | None = None,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> tuple[datasets.Dataset | datasets.IterableDataset, str, list[str]]:
    """The rows of a dataset's own split, the revision for reports, and where their pictures may lie that are files
    (see `check_files_of`).

    Raises OSError if it can't be found, saying what to put where; ValueError for a missing split, a configuration that
    is missing or unknown, a `revision` or `config` of rows that have none, and a folder of a known dataset's name.
    """
    root = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    if spec is not None:
        _check_clash(name, spec, root)
    key = spec.hub_id if spec else name
    if key in EMBEDDED:
        _check_unused("scikit-learn", revision=revision, config=config)
        return EMBEDDED[key](split), "scikit-learn", []
    places = [*([Path(root, key)] if root else []), Path(key)]
    folder = next((place for place in places if _holds_files(place)), None)
    if folder is not None:
        _check_unused(f"the folder {str(folder)!r}", revision=revision)
    is_place = is_absolute(key) or key.startswith(".") or key.count("/") > 1 or "\\" in key or Path(key).exists()
    if folder is None and is_place:
        told = _meant(key) or "check the path."
        raise OSError(f"dataset {key!r} is no folder that holds files, nor the name of a dataset; {told}")
    if folder is not None and (sign := re.search(r"[*?\[]|::", str(folder.resolve()))):
        raise OSError(f"the path of dataset {str(folder)!r} has {sign[0]!r}, a sign of patterns; rename its folder.")
    revision = revision or (spec.revision if spec else None)
    unseen = f" ({UNSEEN[spec.checked]})" if spec and spec.checked in UNSEEN else ""
    try:
        if folder is not None:
            return folder_rows(folder, key, split, config, streaming), "local", [f"{folder.resolve()}/"]
        named = [key] if config is None else [key, config]
        rows = datasets.load_dataset(*named, split=split, revision=revision, streaming=streaming)
        cache = datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE
        return rows, revision or "main", [*(f"{Path(place).resolve()}/" for place in cache), f"hf://datasets/{key}@"]
    except DatasetError:
        raise
    except ValueError as error:
        raise ValueError(_explained(error, key, split, unseen, config)) from error
    except Exception as error:  # the Hub client raises many kinds of errors for "not there"
        if folder is not None:
            reason, mend = one_line(error.__cause__ or error), "check its files"
            link = min((path for path in folder.glob("*/**") if path.is_symlink()), default=None)
            if link is not None and isinstance(error, FileNotFoundError):
                mend = (
                    f"folder {str(link.relative_to(folder))!r} is a link, which isn't followed: copy what it leads to"
                )
            raise OSError(f"can't read dataset {key!r} in {str(folder)!r} ({reason}); {mend}.") from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if spec is None and (meant := _meant(key)):
            raise OSError(f"dataset {key!r} is no folder here, and can't be loaded ({reason}); {meant}") from error
        raise OSError(
            f"can't load dataset {key!r}{unseen} ({reason}). Put its parquet files in <data root>/{key}/ (hf download "
            f"--repo-type dataset {key} --local-dir <data root>/{key}) and name the root by data_root or "
            f"{DATA_ROOT_VARIABLE}, or let the Hub be reached (gated sets: accept their terms and log in)."
        ) from error


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _meant(name: str) -> str | None:
    """What a name may be meant for that is neither a folder with files nor a dataset: the nearest known one, or folder
    beside it; None where nothing is near, and no such folder is to be expected.
    """
    place = Path(name).expanduser()
    if place.exists():
        return "it is a file; give its folder." if place.is_file() else "that folder is empty."
    beside = [str(place.parent / path.name) for path in place.parent.iterdir()] if place.parent.is_dir() else []
    near = get_close_matches(name.removeprefix("./"), [*(spec.key for spec in SPECS), *beside], n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"check the path: {str(place.parent)!r} holds no {place.name!r}." if beside and "/" in name else None


def _check_clash(name: str, spec: DatasetSpec, root: str | Path | None) -> None:
    """Raise ValueError if a known dataset's short name is a folder too."""
    folders = [Path(name), *([Path(root, name)] if root else [])] if name == spec.key else []
    folder = next((folder for folder in folders if _holds_files(folder)), None)
    if folder is not None:
        here = folder == Path(name)
        path = f"./{folder}" if here else str(folder)
        elsewhere = "another working folder" if here else "another data_root"
        known = elsewhere if spec.hub_id == name else repr(spec.hub_id)
        raise ValueError(f"dataset {name!r} is a known one and a folder; give {path!r} or {known}.")


def _check_unused(where: str, **given: str | None) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} goes with the Hub, but the rows come from {where}; leave it out.")


def _explained(error: ValueError, name: str, split: str, unseen: str, config: str | None) -> str:
    """One line for what `datasets` or a check of the files says."""
    text = str(error)
    if "Config name is missing" in text:
        known = text.partition("available configs:")[2].splitlines()[0].strip()
        return f"dataset {name!r} has several configurations; choose one by config, of {known}."
    if "BuilderConfig" in text and "not found" in text:
        return f"config={config!r} is not one of dataset {name!r}'s: {text.partition('Available:')[2].strip()}."
    if "corresponds to no data" in text:
        return f"dataset {name!r} has no rows in split {split!r}; check its files."
    what = (
        f"has no split {split!r}" if "Unknown split" in text or "Bad split" in text else f"can't be read ({split!r})"
    )
    return f"dataset {name!r} {what}{unseen}: {cut(one_line(error))}"


def image_column_of(features: datasets.Features, asked: str | None, name: str) -> str:
    """The column of pictures: the one asked for, or the only one whose name says so, or else the only one that holds
    pictures, unless the name of a text, list or bytes speaks of pictures too.

    Raises ValueError if it is missing or holds no pictures, or several fit.
    """
    found = [column for column in features if plain(column) in PICTURE_COLUMNS] or [
        column
        for column, feature in features.items()
        if _holds_pictures(feature)
        or (words_of(column) & set(PICTURE_COLUMNS) and getattr(feature, "dtype", "") in ("", *TEXTS, *BYTES))
    ]
    if asked is None and len(found) > 1:
        raise ValueError(f"dataset {name!r} has several columns of pictures, {cut(found)}; choose by image_column.")
    column = asked or next(iter(found), "image")
    if column not in features:
        raise ValueError(f"dataset {name!r} has no column {column!r}; its columns: {cut(list(features))}.")
    if not _holds_pictures(features[column]) and getattr(features[column], "dtype", "") not in BYTES:
        raise ValueError(
            f"column {column!r} of dataset {name!r} holds no pictures but {cut(features[column])}; name image_column."
        )
    return column


def check_files_of(rows: datasets.Dataset, column: str, name: str, places: Sequence[str] | None) -> None:
    """Raise DatasetError for a row whose picture is no bytes but the path of a file elsewhere, or an address: reading
    it would open whatever a dataset of somebody else names.

    Args:
        places: beginnings of the paths that are the dataset's own; None takes every file on this disk.
    """
    if isinstance(rows.features[column], datasets.Array3D):
        return
    seen = 0
    stored = rows.cast_column(column, datasets.Image(decode=False)).select_columns([column])
    for batch in stored.with_format("arrow").iter(10_000):
        pictures = batch[column].combine_chunks()
        empty = pc.is_null(pc.struct_field(pictures, "bytes"))
        for i in pc.indices_nonzero(empty).to_pylist():
            path = pictures[i].as_py()["path"] if pictures[i].is_valid else None
            if path is not None and not _is_own(path, places):
                raise DatasetError(f"row {seen + i} of dataset {name!r} holds a foreign path, {path!r}; store bytes.")
        seen += len(pictures)


def _is_own(path: str, places: Sequence[str] | None) -> bool:
    """Whether a path, its links and dots followed, or an address begins as one of the places."""
    if places is None:
        return "://" not in path and "::" not in path
    chain = path.split("::")  # zip://cat.png::hf://datasets/...
    if len(chain) > 2 or (len(chain) == 2 and not chain[0].startswith(("zip://", "tar://"))):
        return False  # what is opened is the first that isn't inside an archive
    return (chain[-1] if "://" in chain[-1] else str(Path(chain[-1]).resolve())).startswith(tuple(places))


def _holds_pictures(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def label_column_of(features: datasets.Features, asked: str | None, name: str) -> str:
    """The column of labels: the one asked for, `label`, `labels` or `cls` in any case, or the only one of class labels
    unless the name of another speaks of labels too.

    Raises ValueError if it is missing, or several fit.
    """
    usual = [asked] if asked else list(LABEL_COLUMNS)
    found = [column for column in features if (column == asked if asked else column.casefold() in LABEL_COLUMNS)]
    if not found and not asked:
        classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        named = [
            column
            for column, feature in features.items()
            if words_of(column) & LABEL_WORDS
            and getattr(feature, "dtype", "").startswith(("int", "uint", "bool", *TEXTS))
        ]
        found = list(dict.fromkeys([*classes, *named])) if classes else []
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"dataset {name!r} has several columns of labels, {cut(found)}; choose by label_column.")
    raise ValueError(
        f"dataset {name!r} has no label column {' or '.join(map(repr, usual))}; its columns: {cut(list(features))}. "
        "Name it by label_column."
    )


def open_stored(stored: Mapping[str, Any] | None) -> Image.Image:
    """A picture as its bytes are, since `to_rgb` converts with more care than `datasets`, which keeps no tags.

    Args:
        stored: `{"bytes": bytes or None, "path": str or None}`, as `datasets` stores a picture.

    Raises ValueError for a missing picture, OSError for what is none.
    """
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise ValueError("there is none")
    content = stored["bytes"]
    if content is None:
        with xopen(stored["path"], "rb") as file:
            content = file.read()
    return opened(content)


def every(
    rows: datasets.Dataset | datasets.IterableDataset, step: int, test: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """Every `step`-th row, or all the others."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(lambda _, i: (i % step == 0) == test, with_indices=True)
    return rows.select([i for i in range(len(rows)) if (i % step == 0) == test])


def rows_where(
    rows: datasets.Dataset | datasets.IterableDataset, column: str, values: Sequence[str]
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows in which a column has one of these values; those of class labels go by name.

    Raises ValueError for a column or value that the rows don't have.
    """
    feature = (rows.features or {}).get(column)
    if not isinstance(feature, datasets.ClassLabel) or not set(values) <= set(feature.names):
        raise ValueError(f"column {column!r} has no class labels {sorted(values)}; it is another dataset.")
    wanted = {feature.str2int(value) for value in values}
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(lambda value: value in wanted, input_columns=column)
    return rows.select([i for i, value in enumerate(rows[column]) if value in wanted])


def read_stream(stream: datasets.IterableDataset, image_column: str, count: int | None, seed: int) -> datasets.Dataset:
    """The first `count` rows of a shuffled stream, with their pictures' bytes as they are, in memory."""
    features = stream.features
    if isinstance(features[image_column], datasets.Image):
        stream = stream.cast_column(image_column, datasets.Image(decode=False))
    rows = list(stream.shuffle(seed=seed, buffer_size=STREAM_BUFFER).take(count))
    return datasets.Dataset.from_list(rows, features=features) if rows else datasets.Dataset.from_dict({})


def middle_frames(rows: datasets.Dataset, video_column: str) -> datasets.Dataset:
    """Of each video the middle one of its frames, in the order of their rows."""
    videos: dict[Any, list[tuple[int, int]]] = {}
    for i, (video, frame) in enumerate(zip(rows[video_column], rows["frame"], strict=True)):
        videos.setdefault(video, []).append((frame, i))
    return rows.select(sorted(sorted(frames)[len(frames) // 2][1] for frames in videos.values()))
