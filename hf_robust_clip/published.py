"""Published figures, as `published.json` has them: facts with their source and their setting."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Metric = Literal[
    "clean", "robust", "gain_clean", "gain_robust", "seconds_per_image", "seconds_per_epoch", "memory_mib", "unsaid"
]


@dataclass(frozen=True, kw_only=True)
class PublishedColumn:
    """The figures of one method under one setting. What a source doesn't say is None.

    Args:
        table: key of the table that it stands in.
        source: paper and tables, or page, where the figures were read.
        architecture: of the model, such as `"ViT-B/32"`.
        method: what the source calls the method.
        family: the method's name here, without its variants: `"TAPT"` for `"TAPT-VLI"`, `"none"` for an undefended
            model.
        metric: `"clean"` or `"robust"` accuracy; all others are costs and gains.
        figures: by key of a dataset, in percent.
        means: by what they are means of, in percent; costs in the unit that `metric` names.
        attack: its short name, such as `"pgd-100"`.
        eps: radius in units of [0, 1], as a fraction.
        norm: `"linf"` or `"l2"`.
        view: what the attack saw, by its name.
        defence: whether a test-time defence predicts.
        design: of prompts.
        trained_on: key of the dataset that it was fine-tuned on.
        training_attack, training_eps: of the fine-tuning.
        templates: key in `templates.json`.
        second_hand: whether the source repeats what others published.
        note: what a reader must know.
    """

    table: str
    source: str
    architecture: str
    method: str
    family: str
    metric: Metric
    figures: Mapping[str, float]
    means: Mapping[str, float]
    attack: str | None = None
    eps: str | None = None
    norm: str | None = None
    view: str | None = None
    defence: bool = False
    design: str | None = None
    trained_on: str | None = None
    training_attack: str | None = None
    training_eps: str | None = None
    templates: str | None = None
    second_hand: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """By which it is asked for: `tga_zsr/pmg_aft`."""
        return f"{self.table}/{_words(self.method)}"

    @property
    def is_compared(self) -> bool:
        """Whether it holds accuracies of datasets, beside which measured ones can stand."""
        return self.metric in ("clean", "robust") and bool(self.figures)


@cache
def published_columns() -> tuple[PublishedColumn, ...]:
    """All published figures."""
    tables = json.loads((files(__package__) / "published.json").read_text(encoding="utf-8"))
    return tuple(_column(key, table, own) for key, table in tables.items() for own in table["columns"])


def _column(key: str, table: Mapping[str, Any], own: Mapping[str, Any]) -> PublishedColumn:
    shared = {name: value for name, value in table.items() if name not in ("columns", "note")}
    notes = " ".join(filter(None, (table.get("note"), own.get("note"))))
    return PublishedColumn(**{"figures": {}, "means": {}, **shared, **own, "table": key, "note": notes})


def find_published(name: str) -> tuple[PublishedColumn, ...]:
    """The columns of a method in a table, such as `tga_zsr/pmg_aft`; of a method alone, such as `pmg_aft`, where one
    table alone has figures of datasets for it.

    Raises ValueError for an unknown name, for a method that several tables have, and for means alone.
    """
    columns = published_columns()
    table, _, method = name.rpartition("/")
    found = [own for own in columns if _words(own.method) == _words(method) and table in ("", own.table)]
    compared = [own for own in found if own.is_compared]
    if not compared:
        known = ", ".join(dict.fromkeys(own.name for own in columns if own.is_compared))
        about = "has no figure of a single dataset" if found else "is unknown"
        raise ValueError(f"published={name!r} {about}; choose one of {known}.")
    tables = list(dict.fromkeys(own.name for own in compared))
    if len(tables) > 1:
        raise ValueError(f"published={name!r} stands in several tables; choose one of {', '.join(tables)}.")
    return tuple(compared)


def same_method(first: str, second: str) -> bool:
    """Whether two names are of one method: `PMG-AFT`, `pmg_aft` and `PMGAFT` are."""
    return _words(first).replace("_", "") == _words(second).replace("_", "")


def _words(method: str) -> str:
    """A method's name in small letters and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", method.lower()).strip("_")
