"""Which files of a folder make a split: all the parts of one set, of one configuration, each in one split."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, takewhile
from pathlib import Path, PurePath
from typing import Any

import datasets
import yaml
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard
from pyarrow.parquet import read_metadata

from .errors import DatasetError, one_line
from .specs import words_of

TABLES = (".parquet", ".arrow", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".tar", ".zip", ".gz", ".tgz", ".h5")
READ = tuple(ImageFolder.EXTENSIONS)
PICTURES = (*READ, ".avif", ".heic", ".heif", ".jxl")
DOCUMENTS = re.compile(  # that may lie among pictures without being any
    r"(readme|licen[cs]e|copying|notice|\.ds_store|thumbs\.db|\._.*)"
    r"|.*\.(md|txt|rst|html?|pdf|json|jsonl|csv|tsv|xml|ya?ml|ini|log|py|sh|ipynb)",
    re.IGNORECASE,
)
SYSTEM_FOLDERS = (".git", ".cache", ".huggingface", ".ipynb_checkpoints", "__pycache__", "__MACOSX")
ENDS = 2**16  # bytes at the beginning and end of a file by which a changed one is known
ALIASES = {  # folders that `datasets` reads as a split, where their names hold such a word
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PART_OF_TOTAL = re.compile(r"(.*?)[-_. (]*(\d+)[-_. ]*of[-_. ]*(\d+)\)?(?:-[0-9a-f]{6,})?((?:\.\w+)+)", re.IGNORECASE)
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:-c\d{3})?"
NUMBERED = re.compile(rf"(.*?)(\d+)(?:-(?:{UUID}|[0-9a-f]{{8,}}))?((?:\.\w+)+)")
PARTS = {"part", "shard", "chunk", "batch", "file", "data", "dataset"}


def folder_rows(
    folder: Path, name: str, split: str, config: str | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a split of a folder that `load_dataset` reads.

    Args:
        name: of the dataset, for errors.
        split: names of splits joined by `+`, parts of them like `train[:10]`.
        config: a configuration that README.md declares, or the name of a folder in it that holds one.

    Raises ValueError for a split that isn't there; DatasetError for files of several configurations or names, a set of
    numbered files that isn't whole, pictures that `datasets` would put into two splits or none, files among them that
    nobody reads, and another number of rows than README.md says.
    """
    parts = list(dict.fromkeys(part.partition("[")[0] for part in split.split("+")))
    card = _read_card(folder)
    try:
        folder, builder, declared = _builder(folder, parts, config, card, name)
    except Exception as error:
        if one_line(error) != card.problem:
            raise
        raise DatasetError(f"README.md of dataset {name!r} is damaged ({card.problem}); mend its metadata.") from error
    listed = builder.config.data_files.items()
    files = {str(part): [_relative(path, folder) for path in paths] for part, paths in listed}
    pictures = builder.name == "imagefolder"
    if pictures and not declared:
        _check_pictures(folder, files, name)
    for part in parts:
        _check_readable(folder, files.get(part, ()), name)
        _check_whole(files.get(part, ()), name)
        if not declared:
            _check_one_configuration(files.get(part, ()), part, pictures, card, name)
            _check_other_splits(files.get(part, ()), part, pictures, name)
        _check_named_alike(files.get(part, ()), part, folder, declared, card, name)
    if pictures and builder.config.drop_labels is not True:
        _check_class_folders(files, card.folders.get(builder.config.name, ()) if declared else (), name)
    described = pictures and any(path.name in ImageFolder.METADATA_FILENAMES for path in chain(*files.values()))
    if not streaming:
        changes = _digest(chain(*builder.config.data_files.values()))
        builder.download_and_prepare(output_dir=f"{builder.cache_dir}-{changes}", verification_mode="no_checks")
        _check_counts(builder.info.splits, parts, card.counts(config), name)
    read = builder.as_streaming_dataset if streaming else builder.as_dataset
    for part in parts if described else ():
        _check_all_named(read(split=part), files.get(part, ()), folder, name)
    return read(split=split)


def _digest(paths: Iterable[str]) -> str:
    """Changes with the size and both ends of every table here; the rows that `datasets` keeps know its date alone."""
    found = blake2b(digest_size=8)
    for path in map(Path, paths):
        if path.name.lower().endswith(TABLES) and path.is_file():
            with path.open("rb") as file:
                size, head = path.stat().st_size, file.read(ENDS)
                file.seek(max(0, size - ENDS))
                found.update(repr((size, head, file.read())).encode())
    return found.hexdigest()


@dataclass(frozen=True)
class _Card:
    """What README.md says of a dataset's files: its configurations, and how many rows each split of which has."""

    configs: tuple[str, ...] = ()
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    folders: Mapping[str, Sequence[PurePath]] = field(default_factory=dict)  # that its patterns of files begin with
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
        configs = {config.get("config_name", "default"): config for config in data.get("configs") or []}
        return _Card(tuple(configs), rows, {key: _declared_folders(config) for key, config in configs.items()})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DatasetError(
            f"README.md in {str(folder)!r} is damaged ({one_line(error)}); mend its metadata."
        ) from error


def _declared_folders(config: Mapping[str, Any]) -> list[PurePath]:
    """The folders before the first sign of a pattern in the files of a configuration. Raises ValueError for files
    outside the dataset's own folder.
    """
    given = config.get("data_files") or "**"
    parts = given if isinstance(given, list) else [given]
    of_parts = (part["path"] if isinstance(part, dict) else part for part in parts)
    paths = list(chain.from_iterable([path] if isinstance(path, str) else path for path in of_parts))
    for path in filter(None, (*paths, config.get("data_dir"))):
        if ".." in PurePath(path).parts or PurePath(path).is_absolute() or "::" in path or "://" in path:
            raise ValueError(f"{path!r} lies outside the dataset's folder")
    plain = (takewhile(lambda folder: not glob.has_magic(folder), PurePath(path).parts[:-1]) for path in paths)
    return [PurePath(config.get("data_dir") or ".", *folders) for folders in plain]


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
    <split>/<class>/, or whatever `datasets` finds; and whether README.md or state.json says which files these are.
    """
    if config in card.configs:
        try:
            return folder, datasets.load_dataset_builder(str(folder), name=config), True
        except (FileNotFoundError, ValueError):  # not all of its splits are here
            if not any(config in folders for _, folders, _ in _walk(folder)):
                raise
    if config is not None:
        folder = _folder_of(config, folder, card, name)
    if saved := _as_asked(parts, _saved_files(folder)):
        return folder, datasets.load_dataset_builder("arrow", data_files=saved), True
    parquet = _as_asked(parts, _parquet_files(folder))
    if set(parts) <= parquet.keys():
        parquet = {part: parquet[part] for part in parts}
        _check_no_pictures(folder, parquet, name)
        return folder, datasets.load_dataset_builder("parquet", data_files=parquet), False
    splits = {} if card.configs else _as_asked(parts, _splits_of_pictures(folder))
    if set(parts) <= splits.keys():
        try:
            return folder, datasets.load_dataset_builder(str(folder), data_files=splits), False
        except FileNotFoundError:  # it infers no kind from endings such as .Png
            return folder, datasets.load_dataset_builder("imagefolder", data_dir=str(folder), data_files=splits), False
    return folder, datasets.load_dataset_builder(str(folder)), bool(card.configs) and config is None


def _saved_files(folder: Path) -> dict[str, list[str]]:
    """By split, the files of a dataset that `save_to_disk` wrote: `map` and `filter` leave others beside them."""
    found = {}
    for file in (*folder.glob("state.json"), *folder.glob("*/state.json")):
        state = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(state, dict) and "_data_files" in state:
            split = (state.get("_split") or "train").partition("[")[0] if file.parent == folder else file.parent.name
            found[split] = [str(file.parent / PurePath(part["filename"]).name) for part in state["_data_files"]]
    return found


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """Parquet files by the split that their names say."""
    every = (Path(root, file) for root, _, files in _walk(folder) for file in files)
    found: dict[str, list[str]] = {}
    for path in sorted(path for path in every if path.suffix.lower() == ".parquet"):
        found.setdefault(_prefix(path), []).append(str(path))
    return found


def _as_asked(parts: Iterable[str], found: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Files by split, where one that isn't there by its name is the only one that is called by another word for it."""
    named = dict(found)
    for part in parts:
        words = next((words for words in ALIASES.values() if part in words), (part,))
        others = [split for split in found if split.casefold() in words]
        if part not in found and len(others) == 1 and others[0] in named:
            named[part] = named.pop(others[0])
    return named


def _check_no_pictures(folder: Path, parquet: Mapping[str, Sequence[str]], name: str) -> None:
    """Raise DatasetError where parquet files and a folder of pictures both are called as a split."""
    for part, files in parquet.items():
        if any(file.lower().endswith(READ) for _, _, names in _walk(folder / part) for file in names):
            raise DatasetError(
                f"file {str(_relative(files[0], folder))!r} and the pictures in folder {part!r} of dataset {name!r} "
                f"could both be split {part!r}; move one elsewhere."
            )


def _prefix(file: PurePath) -> str:
    return _kind(file)[0].rstrip("-_. ")


def _kind(file: PurePath) -> tuple[str, str]:
    """What the files of one set share: the name before their numbers, and how they are numbered. A version (`v2`) and
    the number of a copy (`(2)`) are of the name.
    """
    if match := PART_OF_TOTAL.fullmatch(file.name):
        return match[1], "of"
    match = _numbered(file)
    return (match[1], "number") if match else (file.stem, "")


def _numbered(file: PurePath) -> re.Match[str] | None:
    """The name and the number of a part of a set: four digits, those of a date, or any after no word, one for parts,
    or one for a split and a sign. Others, as of `fold1`, `test2`, `test2007` and `test_r3`, are of the name.
    """
    match = NUMBERED.fullmatch(file.name)
    if match is None:
        return None
    words, glued = re.findall(r"[^\W\d_]+", match[1].casefold()), match[1][-1:].isalpha()
    year, date = re.fullmatch(r"(19|20)\d\d", match[2]), re.search(r"\d{4}[-_.]?\d\d[-_.]?$", match[1])
    split = words and words[-1] in chain.from_iterable(ALIASES.values())
    counts = date or (len(match[2]) >= 4 and not (year and glued)) or (split and not glued)
    return match if counts or not words or words[-1] in PARTS else None


def _splits_of_pictures(folder: Path) -> dict[str, list[str]]:
    """Patterns of the splits of a folder of <split>/<class>/<picture>; none if it holds anything else.

    `datasets` would take class folders such as train_station for a split of that name, and leave out what links to
    another folder of the dataset.
    """
    links: list[PurePath] = []
    depths: dict[str, set[int]] = {}
    for root, _, files in _walk(folder):
        place = Path(root).relative_to(folder).parts
        if place and os.path.islink(root) and Path(root).resolve().is_relative_to(folder.resolve()):
            links.append(PurePath(*place))
        if any(file.startswith("metadata.") or (place and file.lower().endswith(TABLES)) for file in files):
            return {}
        if place and any(file.lower().endswith(PICTURES) for file in files):
            depths.setdefault(place[0], set()).add(len(place))
    return {
        top: [f"{top}/**", *(f"{glob.escape(str(link))}/**" for link in links if link.parts[0] == top != str(link))]
        for top, levels in depths.items()
        if min(levels) > 1 and re.fullmatch(r"\w+", top)
    }


def _walk(folder: Path, hidden: bool = False) -> Iterable[tuple[str, list[str], list[str]]]:
    """`os.walk` through links, without what is hidden (but for that of systems if `hidden`), and not in circles."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(SYSTEM_FOLDERS if hidden else (".", "__"))
            and not (
                os.path.islink(Path(root, name)) and Path(root).resolve().is_relative_to(Path(root, name).resolve())
            )
        )
        yield root, folders, [name for name in files if hidden or not name.startswith(".")]


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
        elif (match := _numbered(file)) and not re.search(r"\d[-_.]$", match[1]):  # no dates
            rows.setdefault((str(file.parent), match[1], match[3]), []).append(match[2])
    for (parent, prefix, ending), numbers in sets.items():
        what = f"files {PurePath(parent, prefix)}-*{ending} of dataset {name!r}"
        totals = sorted({total for _, total in numbers})
        if len(totals) > 1:
            raise DatasetError(f"{what} are of several sets, of {totals} files; remove what is left of the others.")
        present = Counter(number for number, _ in numbers)
        first = int(totals[0] in present and 0 not in present)
        missing = sorted(set(range(first, first + totals[0])) - present.keys())
        if missing:
            raise DatasetError(f"{what} lack number {missing[0]} of {totals[0]} ({len(missing)} missing); add them.")
        if len(numbers) > totals[0]:
            twice = [number for number, count in present.items() if count > 1]
            number = f"number {twice[0]} twice" if twice else f"{len(numbers)} numbers"
            raise DatasetError(f"{what} have {number} for {totals[0]} files; remove what is left of an older set.")
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


def _check_named_alike(
    files: Iterable[PurePath], part: str, folder: Path, declared: bool, card: _Card, name: str
) -> None:
    """Raise DatasetError unless the tables of a split lie in one folder, called alike but for their numbers, and no
    other of this ending says that it is of the split, nor any parquet or arrow beside them. What README.md declares
    may have any name, but where one is called as the split all are.
    """
    tables = (file for file in files if file.name.lower().endswith(TABLES))
    read = [file for file in tables if file.name not in ImageFolder.METADATA_FILENAMES]
    if not read or (declared and all(_prefix(file) != part for file in read)):
        return
    found = list({(file.parent, _kind(file)): file for file in read}.values())
    endings, folders = {file.suffix for file in read}, {file.parent for file in read}
    others = {split for rows in card.rows.values() for split in rows} - {part}
    for root, _, names in _walk(folder) if not declared else ():
        left = (PurePath(root, file).relative_to(folder) for file in names)
        found += [
            file
            for file in left
            if (file.suffix in endings or (file.parent in folders and file.suffix in (".parquet", ".arrow")))
            and file not in read
            and _says(file, part)
            and _prefix(file) not in others
        ]
    if len(found) > 1:
        raise DatasetError(
            f"files {str(found[0])!r} and {str(found[1])!r} of dataset {name!r} could both be split {part!r}; move "
            "one elsewhere, or name them as parts of one set, by numbers."
        )


def _says(file: PurePath, part: str) -> bool:
    """Whether the name of a file, or where it tells no split those of its folders, says that it is of a split."""
    if re.search(r"\d", part):  # fold1 and fold2 are two
        return part.casefold() in file.stem.casefold()
    own, above = words_of(file.stem), {word for folder in file.parts[:-1] for word in words_of(folder)}
    known = {word for words in ALIASES.values() for word in words}
    return words_of(part) <= (own if own & known else own | above)


def _check_all_named(
    rows: datasets.Dataset | datasets.IterableDataset, files: Iterable[PurePath], folder: Path, name: str
) -> None:
    """Raise DatasetError for pictures that the metadata file beside them doesn't name, which `datasets` leaves out, or
    names twice.
    """
    columns = [column for column, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)]
    for column in columns:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    paths = [[row[column] and row[column]["path"] for column in columns] for row in rows.select_columns(columns)]
    twice = next((row for row, count in Counter(map(tuple, paths)).items() if count > 1), None)
    if twice:
        raise DatasetError(f"picture {twice[0]!r} of dataset {name!r} is named twice in its metadata file.")
    named = {_relative(path, folder) for row in paths for path in row if path}
    left = sorted({file for file in files if file.name.lower().endswith(READ)} - named)
    if left:
        raise DatasetError(f"{len(left)} pictures of dataset {name!r} lack metadata, {str(left[0])!r} first.")


def _check_other_splits(files: Iterable[PurePath], part: str, pictures: bool, name: str) -> None:
    """Raise DatasetError for files of a split whose names say another: `datasets` doesn't know Test from train."""
    others = {word for split, words in ALIASES.items() if part not in words for word in words}
    others -= set(re.split(r"[\W\d_]+", part.casefold()))
    for file in files:
        words = {folder.casefold() for folder in file.parts[: -2 if pictures else -1]}
        if not pictures:
            words |= set(re.split(r"[\W\d_]+", file.name.partition(".")[0].casefold()))
        if words & others:
            word = sorted(words & others)[0]
            mend = "name it after one split" if word in str(file) else f"write {word!r} in small letters"
            raise DatasetError(f"file {str(file)!r} of dataset {name!r} would be read as split {part!r}; {mend}.")


def _owner(folders: Sequence[str], part: str, pictures: bool) -> str:
    """The folders above that of the split; where none is the split's, of tables all, of pictures (in classes) none."""
    words = ALIASES.get(part, (part,))
    for i, folder in enumerate(folders):
        if set(words) & set(re.split(r"[-._ 0-9]+", folder)):
            return "/".join(folders[:i] if folder in words else folders[: i + 1])
    return "" if pictures else "/".join(folders)


def _check_pictures(folder: Path, files: Mapping[str, Iterable[PurePath]], name: str) -> None:
    """Raise DatasetError for pictures in two splits, and for files in folders of classes that are in none."""
    places = Counter(path for paths in files.values() for path in paths if path.name.lower().endswith(READ))
    twice = [path for path, count in places.items() if count > 1]
    if twice:
        raise DatasetError(f"picture {str(twice[0])!r} of dataset {name!r} is in two splits; use <split>/<class>/.")
    in_splits = places and _is_split_in_folders(folder, files)
    tops = {path.parts[0] for path in places if len(path.parts) > 1} if in_splits else None
    read = {path for paths in files.values() for path in paths if path.name.lower().endswith((*READ, *TABLES))}
    classes = {path.parent.name for path in read}
    for root, folders, names in _walk(folder, hidden=True):
        place = PurePath(Path(root).relative_to(folder))
        if not place.parts or (tops is not None and place.parts[0] not in tops):
            continue
        hidden = any(part.startswith((".", "__")) for part in place.parts)
        left = [
            n
            for n in sorted(names)
            if place / n not in read
            and not DOCUMENTS.fullmatch(n)
            and (n.lower().endswith(PICTURES) or not (hidden or n.startswith(".")))
        ]
        if not folders and not names and place.name not in classes and not hidden:
            raise DatasetError(f"folder {str(place)!r} of dataset {name!r} is empty; fill or remove it.")
        if left:
            raise DatasetError(
                f"file {str(place / left[0])!r} of dataset {name!r} is in none of its splits {[*map(str, files)]}; "
                "put pictures into <split>/<class>/, in a kind that 'datasets' reads, without links and hidden names; "
                "move other files elsewhere."
            )


def _check_class_folders(files: Mapping[str, Iterable[PurePath]], declared: Iterable[PurePath], name: str) -> None:
    """Raise DatasetError for pictures that don't all lie in folders of classes, of which `datasets` labels none, and
    for folders between those of a split, or those `declared`, and the classes: `datasets` joins what they tell apart.
    """
    every = [path for paths in files.values() for path in paths]
    if any(path.name.startswith("metadata.") for path in every):
        return
    pictures = sorted(path for path in every if path.suffix.lower() in READ)
    depths = Counter(len(path.parts) for path in pictures)
    if len(depths) > 1:
        usual = depths.most_common(1)[0][0]
        odd, other = (next(p for p in pictures if (len(p.parts) == usual) == same) for same in (False, True))
        raise DatasetError(f"picture {str(odd)!r} of dataset {name!r} lies at another depth than {str(other)!r}.")
    if len({path.parent.name for path in pictures}) == 1:
        raise DatasetError(f"dataset {name!r} has folders {pictures[0].parent.name!r} alone: no classes.")
    tops = sorted(declared, key=lambda top: len(top.parts), reverse=True)
    seen: dict[tuple[str, PurePath | None], PurePath] = {}
    for split, paths in files.items():
        for path in sorted({path.parent for path in paths if path.suffix.lower() in READ}):
            top = next((top for top in tops if path.is_relative_to(top)), None)
            other = seen.setdefault((split, top), path)
            if other.parent != path.parent:
                raise DatasetError(
                    f"folders {str(other)!r} and {str(path)!r} of dataset {name!r} lie deeper than <split>/<class>/, "
                    "and only the innermost would be classes; move the pictures up into folders of their classes, or "
                    f"if those are the folders in {str(other.parent)!r}, give it as the dataset."
                )


def _check_readable(folder: Path, files: Iterable[PurePath], name: str) -> None:
    """Raise DatasetError for a parquet file that is cut short or damaged; `datasets` doesn't say which."""
    for file in files:
        try:
            if file.suffix.lower() == ".parquet":
                read_metadata(folder / file)
        except (OSError, ValueError) as error:
            raise DatasetError(f"file {str(file)!r} of dataset {name!r} is cut short or damaged ({error}); get it "
                               "again.") from error  # fmt: skip


def _is_split_in_folders(folder: Path, files: Mapping[str, Iterable[PurePath]]) -> bool:
    """Whether the top folders are the splits, so that other folders beside them don't belong to the dataset."""
    return all(
        path.parts[0].casefold() in (*ALIASES.get(part, ()), part.casefold()) and len(path.parts) > 2
        for part, paths in files.items()
        for path in paths
    )


def _check_counts(splits: Any, parts: Iterable[str], expected: Mapping[str, int], name: str) -> None:
    for part in parts:
        if part in expected and part in splits and splits[part].num_examples != expected[part]:
            raise DatasetError(
                f"split {part!r} of {name!r} has {splits[part].num_examples} rows, {expected[part]} by its README.md."
            )
