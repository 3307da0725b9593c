"""Known datasets, a row of `datasets.json` each: where they are, what their columns and their classes are called.

PMG-AFT's 16 test sets, TAPT's 11 (CoOp's), RobustVLM's 14, and three small ones. A new dataset is a row there, and its
class names in `class_names.json` unless its own labels read well.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of the Hub.

    Args:
        key: short name.
        hub_id: name on the Hub, or `"digits"`.
        num_classes: how many classes it has.
        splits: `"train"`, `"test"` and, where a paper tests on more than the test split, `"all"`, to the dataset's own
            split names, where they differ; `"train+test"` joins two.
        image_column, label_column: names of the columns; None for a column of pictures that its name or type tells.
        class_names: key in `class_names.json`: a list in label order, or a mapping from the dataset's own labels
            (WordNet ids, say); None takes the names of the label feature.
        templates: key in `templates.json`.
        attack_resolution: side in pixels at which pictures are attacked, before the model scales them up; None is the
            model's input size.
        test_every: where the Hub has a single split: every n-th of its rows is `"test"`, the others are `"train"`.
        where: a column and those of its values whose rows belong to the set; the others are left out.
        frames_of: for videos stored as frames: the column that names the video. Of each video only the middle frame
            by the column `frame` is kept.
        revision: commit or branch on the Hub; None takes the newest, so that a report has to name what it found.
        checked: `"data"` if its files were seen, `"card"` if its columns, splits, counts and labels stand so on its
            card or its page on the Hub, `""` if they are taken from public programs that load it.
        source: who published it.
        note: how the Hub's splits differ from those of the papers.
    """

    key: str
    hub_id: str
    num_classes: int
    splits: Mapping[str, str] = field(default_factory=dict)
    image_column: str | None = "image"
    label_column: str = "label"
    class_names: str | None = None
    templates: str = "pmg_aft"
    attack_resolution: int | None = None
    test_every: int | None = None
    where: tuple[str, Sequence[str]] | None = None
    frames_of: str | None = None
    revision: str | None = None
    checked: Literal["data", "card", ""] = ""
    source: str = ""
    note: str = ""

    def names_in_label_order(self, label_names: Sequence[str] | None) -> list[str] | None:
        """Class names in the order of the dataset's labels; None if they are those of the label feature.

        Args:
            label_names: what the dataset's label feature calls its labels; None if the labels are plain values.

        Raises ValueError if the dataset's labels are not those the names belong to.
        """
        if self.class_names is None:
            return None
        names = class_names(self.class_names)
        if label_names is None:
            return list(names.values()) if isinstance(names, dict) else list(names)
        if isinstance(names, dict):
            return self._translate(label_names, {plain(label): name for label, name in names.items()})
        if len(label_names) != len(names):
            raise ValueError(f"{self.hub_id} has {len(label_names)} labels, expected {len(names)}; give class_names.")
        by_name = {plain(name): name for name in names}
        if {plain(label) for label in label_names} == set(by_name):
            return self._translate(label_names, by_name)
        for label, name in zip(label_names, names, strict=True):
            if by_name.get(plain(label), name) != name:
                raise ValueError(f"{self.hub_id} has the label {label!r}, not {name!r}; give class_names.")
        return list(names)

    def label_keys(self) -> list[str] | None:
        """The dataset's own labels in the order of its class names, where `class_names.json` has a mapping."""
        names = class_names(self.class_names) if self.class_names else None
        return list(names) if isinstance(names, dict) else None

    def _translate(self, label_names: Sequence[str], names: Mapping[str, str]) -> list[str]:
        unknown = [label for label in label_names if plain(label) not in names]
        if unknown:
            raise ValueError(f"{self.hub_id} has a label {unknown[0]!r} that has no class name; give class_names.")
        return [names[plain(label)] for label in label_names]


@cache
def _facts(file: str) -> Any:
    return json.loads((files(__package__) / file).read_text(encoding="utf-8"))


# Files could be seen only for the rows with checked="data"; errors of every other row say so until someone loads it.
SPECS = tuple(DatasetSpec(**row) for row in _facts("datasets.json"))


def find_spec(name: str) -> DatasetSpec | None:
    """The row of a dataset by its key or Hub id, or None if it is not a known one."""
    return next((spec for spec in SPECS if name in (spec.key, spec.hub_id)), None)


def class_names(key: str) -> list[str] | dict[str, str]:
    """An entry of `class_names.json`: names in label order, or a mapping from a dataset's own labels."""
    return _facts("class_names.json")[key]


def class_name_keys() -> list[str]:
    """The keys of `class_names.json`."""
    return [key for key in _facts("class_names.json") if key != "version" and not key.startswith("_")]


def prompt_templates(key: str) -> tuple[str, ...]:
    """An entry of `templates.json`: texts with `{}` where the class name goes. Raises ValueError if there is none."""
    known = {name: texts for name, texts in _facts("templates.json").items() if isinstance(texts, list)}
    if key not in known:
        raise ValueError(f"templates={key!r} is not in templates.json; it has {sorted(known)}.")
    return tuple(known[key])


def known_descriptions(key: str) -> dict[str, list[str]] | None:
    """An entry of `descriptions.json`: texts by class name; None if there is none of that name."""
    found = _facts("descriptions.json").get(key)
    return found if isinstance(found, dict) else None


def plain(label: object) -> str:
    """A label's letters and digits in lower case, by which `"apple_pie"` and `"Apple Pie"` are the same."""
    whole = unicodedata.normalize("NFC", str(label))  # a folder's name may have accents as signs of their own
    return "".join(letter for letter in whole.casefold() if letter.isalnum())


def words_of(text: str) -> set[str]:
    """The words of a name in small letters: `test` and `old` of `test-old2`, `testOld` and `Old_Test`."""
    return {word.casefold() for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", text) if word}
