"""Which files of a folder make a split: all the parts of one set, of one configuration, each in one split."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import datasets
import yaml
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard
from pyarrow.parquet import read_metadata

from .errors import DatasetError, one_line

TABLES = (".parquet", ".arrow", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".tar", ".zip", ".gz", ".tgz", ".h5")
READ = tuple(ImageFolder.EXTENSIONS)
PICTURES = (*READ, ".avif", ".heic", ".heif", ".jxl")
ALIASES = {  # folders that `datasets` reads as a split, where their names hold such a word
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PART_OF_TOTAL = re.compile(r"(.*?)[-_.]?(\d+)[-_]of[-_](\d+)(?:-[0-9a-f]{6,})?((?:\.\w+)+)")
NUMBERED = re.compile(r"(.*?)(\d+)(?:-[0-9a-f]{8,})?((?:\.\w+)+)")


def folder_rows(
    folder: Path, name: str, split: str, config: str | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a split of a folder that `load_dataset` reads.

    Args:
        name: of the dataset, for errors.
        split: names of splits joined by `+`, parts of them like `train[:10]`.
        config: a configuration that README.md declares, or the name of a folder in it that holds one.

    Raises ValueError for a split that isn't there; DatasetError for files of several configurations, a set of numbered
    files that isn't whole, pictures that `datasets` would put into two splits or none, and another number of rows than
    README.md says.
    """
    parts = list(dict.fromkeys(part.partition("[")[0] for part in split.split("+")))
    card = _read_card(folder)
    try:
        folder, builder, declared = _builder(folder, parts, config, card, name)
    except Exception as error:
        if one_line(error) != card.problem:
            raise
        raise DatasetError(f"README.md of dataset {name!r} is damaged ({card.problem}); mend its metadata.") from error
    files = {part: [_relative(path, folder) for path in paths] for part, paths in builder.config.data_files.items()}
    pictures = builder.name == "imagefolder"
    if pictures and not declared:
        _check_pictures(folder, files, name)
    if pictures and builder.config.drop_labels is None:
        _check_class_folders(files, name)
    for part in parts:
        _check_readable(folder, files.get(part, ()), name)
        _check_whole(files.get(part, ()), name)
        if not declared:
            _check_one_configuration(files.get(part, ()), part, pictures, card, name)
            _check_other_splits(files.get(part, ()), part, pictures, name)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare(verification_mode="no_checks")
    _check_counts(builder.info.splits, parts, card.counts(config), name)
    return builder.as_dataset(split=split)


@dataclass(frozen=True)
class _Card:
    """What README.md says of a dataset's files: its configurations, and how many rows each split of which has."""

    configs: tuple[str, ...] = ()
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    problem: str | None = None

    def counts(self, config: str | None) -> Mapping[str, int]:
        if config is None:
            return next(iter(self.rows.values())) if len(self.rows) == 1 else {}
        return self.rows.get(config, {})


def _read_card(folder: Path) -> _Card:
    path = folder / "README.md"
    try:
        data = DatasetCard.load(path).data.to_dict() if path.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:  # somebody's notes
        return _Card(problem=one_line(error))
    try:
        infos = data.get("dataset_info") or []
        rows = {
            info.get("config_name", "default"): {
                part["name"]: int(part["num_examples"]) for part in info.get("splits") or [] if "num_examples" in part
            }
            for info in ([infos] if isinstance(infos, dict) else infos)
        }
        return _Card(tuple(config.get("config_name", "default") for config in data.get("configs") or []), rows)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DatasetError(
            f"README.md in {str(folder)!r} is damaged ({one_line(error)}); mend its metadata."
        ) from error


def _folder_of(config: str, folder: Path, card: _Card, name: str) -> Path:
    """The only folder of a configuration's name, at any depth."""
    found = [Path(root, config) for root, folders, _ in _walk(folder) if config in folders]
    if len(found) == 1:
        return found[0]
    if config == "default" and not found and not card.configs:  # what the Hub calls the only one
        return folder
    known = card.configs or sorted(path.name for path in folder.iterdir() if path.is_dir())
    problem = "is not one of its configurations" if not found else f"is the name of {len(found)} of its folders"
    raise DatasetError(f"config={config!r} of dataset {name!r} {problem}; it has {list(known)}.")


def _builder(
    folder: Path, parts: Sequence[str], config: str | None, card: _Card, name: str
) -> tuple[Path, datasets.DatasetBuilder, bool]:
    """What reads a folder, or one in it: README.md's configuration, parquet files named by their split, pictures in
    <split>/<class>/, or whatever `datasets` finds; and whether README.md says which files these are.
    """
    if config in card.configs:
        try:
            return folder, datasets.load_dataset_builder(str(folder), name=config), True
        except (FileNotFoundError, ValueError):  # not all of its splits are here
            if not any(config in folders for _, folders, _ in _walk(folder)):
                raise
    if config is not None:
        folder = _folder_of(config, folder, card, name)
    parquet = {part: _parquet_files(folder, part, name) for part in parts}
    if all(parquet.values()):
        return folder, datasets.load_dataset_builder("parquet", data_files=parquet), False
    splits = {} if card.configs else _splits_of_pictures(folder)
    if set(parts) <= splits.keys():
        return folder, datasets.load_dataset_builder(str(folder), data_files=splits), False
    return folder, datasets.load_dataset_builder(str(folder)), bool(card.configs) and config is None


def _parquet_files(folder: Path, part: str, name: str) -> list[str]:
    named = (Path(root, file) for root, _, files in _walk(folder) for file in files if file.startswith(f"{part}-"))
    found = sorted(path for path in named if path.suffix == ".parquet")
    prefixes = sorted({_prefix(path.name) for path in found})
    if len(prefixes) > 1 and any(prefix.startswith(f"{part}-") for prefix in prefixes):
        raise DatasetError(
            f"files of split {part!r} of dataset {name!r} go by several names: {prefixes}; keep one kind."
        )
    return [str(path) for path in found]


def _prefix(file: str) -> str:
    match = PART_OF_TOTAL.fullmatch(file) or NUMBERED.fullmatch(file)
    return (match[1] if match else PurePath(file).stem).rstrip("-_.")


def _splits_of_pictures(folder: Path) -> dict[str, str]:
    """Patterns of the splits of a folder of <split>/<class>/<picture>; none if it holds anything else.

    `datasets` would take class folders such as train_station for a split of that name.
    """
    depths: dict[str, set[int]] = {}
    for root, _, files in _walk(folder):
        place = Path(root).relative_to(folder).parts
        if any(file.startswith("metadata.") or (place and file.lower().endswith(TABLES)) for file in files):
            return {}
        if place and any(file.lower().endswith(PICTURES) for file in files):
            depths.setdefault(place[0], set()).add(len(place))
    return {top: f"{top}/**" for top, levels in depths.items() if min(levels) > 1 and re.fullmatch(r"\w+", top)}


def _walk(folder: Path) -> Iterable[tuple[str, list[str], list[str]]]:
    """`os.walk` through links, without what is hidden, and not in circles."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__"))
            and not (
                os.path.islink(Path(root, name)) and Path(root).resolve().is_relative_to(Path(root, name).resolve())
            )
        )
        yield root, folders, [name for name in files if not name.startswith(".")]


def _relative(path: str, folder: Path) -> PurePath:
    """A file's path in the folder, as parts; of an address the whole."""
    roots = (folder.expanduser().resolve(), folder.absolute(), folder)
    root = next((root for root in roots if PurePath(path).is_relative_to(root)), None)
    return PurePath(path) if root is None else PurePath(path).relative_to(root)


def _check_whole(files: Iterable[PurePath], name: str) -> None:
    """Raise DatasetError if a file of `3 of 3` or in a row of numbered ones is missing, or stands there twice, and
    for a folder that the Hub calls `partial-train`.
    """
    sets: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    rows: dict[tuple[str, ...], list[str]] = {}
    for file in files:
        partial = next((folder for folder in file.parts[:-1] if folder.startswith("partial-")), None)
        if partial is not None:
            raise DatasetError(f"folder {partial!r} of dataset {name!r} is only a part of its rows; get the whole.")
        if not file.name.lower().endswith(TABLES):
            continue
        if match := PART_OF_TOTAL.fullmatch(file.name):
            sets.setdefault((str(file.parent), match[1], match[4]), []).append((int(match[2]), int(match[3])))
        elif (match := NUMBERED.fullmatch(file.name)) and not re.search(r"\d[-_.]$", match[1]):  # no dates
            rows.setdefault((str(file.parent), match[1], match[3]), []).append(match[2])
    for (parent, prefix, ending), numbers in sets.items():
        what = f"files {PurePath(parent, prefix)}-*{ending} of dataset {name!r}"
        totals = sorted({total for _, total in numbers})
        if len(totals) > 1:
            raise DatasetError(f"{what} are of several sets, of {totals} files; remove what is left of the others.")
        present = Counter(number for number, _ in numbers)
        missing = sorted(set(range(totals[0])) - present.keys())
        if missing:
            raise DatasetError(f"{what} lack number {missing[0]} of {totals[0]} ({len(missing)} missing); add them.")
        if len(numbers) > totals[0]:
            twice = next(number for number, count in present.items() if count > 1)
            raise DatasetError(f"{what} have number {twice} twice; remove what is left of an older set.")
    for (parent, prefix, ending), texts in rows.items():
        present_rows = {int(text) for text in texts}
        counted = min(present_rows) <= 1 or any(text[0] == "0" for text in texts)  # no years
        missing = sorted(set(range(0 if 0 in present_rows else 1, max(present_rows))) - present_rows)
        if missing and counted and (len(texts) > 1 or not prefix):  # a single v02 is a version
            raise DatasetError(
                f"files {PurePath(parent, prefix)}*{ending} of dataset {name!r} lack number {missing[0]} "
                f"({len(missing)} missing); add them, or rename the others."
            )


def _check_one_configuration(files: Iterable[PurePath], part: str, pictures: bool, card: _Card, name: str) -> None:
    """Raise DatasetError if the files of a split lie in folders that look like several configurations."""
    owners = sorted({_owner(file.parts[:-1], part, pictures) for file in files})
    if len(owners) > 1:
        choices = list(card.configs) or [PurePath(owner).name or "." for owner in owners]
        raise DatasetError(
            f"split {part!r} of dataset {name!r} lies in {len(owners)} folders, {owners[0] or '.'!r} and "
            f"{owners[1]!r} among them; choose one configuration by config, of {choices}."
        )


def _check_other_splits(files: Iterable[PurePath], part: str, pictures: bool, name: str) -> None:
    """Raise DatasetError for files of a split whose names say another: `datasets` doesn't know Test from train."""
    others = {word for split, words in ALIASES.items() if part not in words for word in words}
    others -= set(re.split(r"[\W\d_]+", part.casefold()))
    for file in files:
        words = {folder.casefold() for folder in file.parts[: -2 if pictures else -1]}
        if not pictures:
            words |= set(re.split(r"[\W\d_]+", file.name.partition(".")[0].casefold()))
        if words & others:
            raise DatasetError(
                f"file {str(file)!r} of dataset {name!r} would be read as a part of split {part!r}; write "
                f"{sorted(words & others)[0]!r} in small letters, or name it otherwise."
            )


def _owner(folders: Sequence[str], part: str, pictures: bool) -> str:
    """The folders above that of the split; where none is the split's, of tables all, of pictures (in classes) none."""
    words = ALIASES.get(part, (part,))
    for i, folder in enumerate(folders):
        if set(words) & set(re.split(r"[-._ 0-9]+", folder)):
            return "/".join(folders[:i] if folder in words else folders[: i + 1])
    return "" if pictures else "/".join(folders)


def _check_pictures(folder: Path, files: Mapping[str, Iterable[PurePath]], name: str) -> None:
    """Raise DatasetError for pictures in two splits, and for those in folders of classes that are in none."""
    places = Counter(path for paths in files.values() for path in paths if path.name.lower().endswith(READ))
    twice = [path for path, count in places.items() if count > 1]
    if twice:
        raise DatasetError(
            f"picture {str(twice[0])!r} of dataset {name!r} would be in two splits, for train or test stands in the "
            "names of its folders; put the pictures into <split>/<class>/."
        )
    tops = {path.parts[0] for path in places if len(path.parts) > 1} if _is_split_in_folders(folder, files) else None
    for root, _, names in _walk(folder):
        place = PurePath(Path(root).relative_to(folder))
        if not place.parts or (tops is not None and place.parts[0] not in tops):
            continue
        left = [n for n in names if n.lower().endswith(PICTURES) and place / n not in places]
        if left:
            raise DatasetError(
                f"picture {str(place / left[0])!r} of dataset {name!r} is in none of its splits {sorted(files)}; put "
                "the pictures into <split>/<class>/, in a kind that 'datasets' reads, without links."
            )


def _check_class_folders(files: Mapping[str, Iterable[PurePath]], name: str) -> None:
    """Raise DatasetError for pictures that don't all lie in folders of classes, of which `datasets` labels none."""
    every = [path for paths in files.values() for path in paths]
    if any(path.name.startswith("metadata.") for path in every):
        return
    pictures = sorted(path for path in every if path.suffix.lower() in READ)
    depths = Counter(len(path.parts) for path in pictures)
    if len(depths) > 1:
        usual = depths.most_common(1)[0][0]
        odd, other = (next(p for p in pictures if (len(p.parts) == usual) == same) for same in (False, True))
        raise DatasetError(
            f"picture {str(odd)!r} of dataset {name!r} lies at another depth than {str(other)!r}; put every picture "
            "into the folder of its class, and none beside or below."
        )
    if len({path.parent.name for path in pictures}) == 1:
        raise DatasetError(
            f"all pictures of dataset {name!r} lie in folders of one name, {pictures[0].parent.name!r}, so there are "
            "no classes; put them into <split>/<class>/."
        )


def _check_readable(folder: Path, files: Iterable[PurePath], name: str) -> None:
    """Raise DatasetError for a parquet file that is cut short or damaged; `datasets` doesn't say which."""
    for file in files:
        try:
            if file.suffix == ".parquet":
                read_metadata(folder / file)
        except (OSError, ValueError) as error:
            raise DatasetError(f"file {str(file)!r} of dataset {name!r} is cut short or damaged ({error}); get it "
                               "again.") from error  # fmt: skip


def _is_split_in_folders(folder: Path, files: Mapping[str, Iterable[PurePath]]) -> bool:
    """Whether the top folders are the splits, so that other folders beside them don't belong to the dataset."""
    return all(
        path.parts[0] in (*ALIASES.get(part, ()), part) and len(path.parts) > 2
        for part, paths in files.items()
        for path in paths
    )


def _check_counts(splits: Any, parts: Iterable[str], expected: Mapping[str, int], name: str) -> None:
    for part in parts:
        if part in expected and part in splits and splits[part].num_examples != expected[part]:
            raise DatasetError(
                f"split {part!r} of dataset {name!r} has {splits[part].num_examples} rows, {expected[part]} by its "
                "README.md; add the missing files, or correct it."
            )
