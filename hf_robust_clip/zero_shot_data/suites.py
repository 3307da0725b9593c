"""Suites: the test sets of a paper's table, a row of `suites.json` each, with its splits, templates and resolution.

A suite is a list of tasks under a short name: `tasks: pmg_aft_16`. A new one is a row there; its sets are rows of
`datasets.json`. What a suite lacks here is named, so that nobody takes a mean over fewer sets for the paper's.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

from .specs import class_names, find_spec


@dataclass(frozen=True)
class SuiteTask:
    """One test set of a suite.

    Args:
        dataset: key in `datasets.json`.
        num_images: how many pictures the paper's set has; that of the row may have fewer, or others.
        split: as for `load_image_dataset`.
        templates: key in `templates.json`; None takes the suite's.
        attack_resolution: side in pixels at which the paper attacks, or `"model"` for the model's input size; None is
            what the dataset's own row says.
        attacked_images: how many of them the paper attacks; None takes the suite's.
        without_classes: names of classes that the paper leaves out.
    """

    dataset: str
    num_images: int
    split: str = "test"
    templates: str | None = None
    attack_resolution: int | Literal["model"] | None = None
    attacked_images: int | None = None
    without_classes: Sequence[str] = ()

    def classes(self) -> list[str] | None:
        """The names of the classes that are left; None for all."""
        if not self.without_classes:
            return None
        spec = find_spec(self.dataset)
        names = class_names(spec.class_names) if spec and spec.class_names else []
        return [name for name in (names.values() if isinstance(names, dict) else names)
                if name not in self.without_classes]  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """The test sets of a paper's table.

    Args:
        key: short name.
        tasks: its sets, in the paper's order.
        templates: key in `templates.json`, of sets without one of their own.
        source: paper, table and code.
        crop_pct: side of the centre crop by the shorter side of the resized picture, as in timm: 0.875 is Resize(256)
            and CenterCrop(224). None is the checkpoint's own preparation. It counts where pictures are attacked at
            the model's input size and the task says nothing else.
        attacked_images: of each set so many, drawn at random, are attacked in the paper; None for all.
        lacks: sets of the paper that aren't here, and why.
        note: where this departs from the paper or from what its code does.
    """

    key: str
    tasks: tuple[SuiteTask, ...]
    templates: str
    source: str
    crop_pct: float | None = None
    attacked_images: int | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def names(self) -> list[str]:
        """The keys of all sets of the paper, those that aren't here at the end."""
        return [*(task.dataset for task in self.tasks), *self.lacks]

    def settings(self, without: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The tasks as settings, as somebody would write them out: what is the default isn't said.

        Args:
            without: keys of sets that are left out.

        Raises ValueError for a key that isn't in the suite or stands there twice, where nothing is left, and for a
        suite with a set that isn't here, unless `without` names that.
        """
        twice = [name for name in without if list(without).count(name) > 1]
        if unknown := [name for name in without if name not in self.names] or twice:
            why = "twice" if twice else f"and the suite has {self.names}"
            raise ValueError(f"without={list(without)!r} of suite {self.key!r} names {unknown[0]!r} {why}.")
        for name, why in self.lacks.items():
            if name not in without:
                raise ValueError(
                    f"suite {self.key!r} has a set {name!r} that isn't here ({why}); evaluate the others by "
                    f"{{suite: {self.key}, without: [{name}]}}."
                )
        left = [self._settings_of(task) for task in self.tasks if task.dataset not in without]
        if not left:
            raise ValueError(f"without={list(without)!r} leaves nothing of suite {self.key!r}.")
        return left

    def _settings_of(self, task: SuiteTask) -> dict[str, Any]:
        spec = find_spec(task.dataset)
        at_own_size = task.attack_resolution is None and spec is not None and spec.attack_resolution is None
        said = {
            "name": task.dataset,
            "dataset": task.dataset,
            "split": task.split,
            "classes": task.classes(),
            "template": task.templates or self.templates,
            "attack_resolution": task.attack_resolution,
            "crop_pct": self.crop_pct if at_own_size else None,
            "suite": self.key,
        }
        return {name: value for name, value in said.items() if value is not None}


def _read() -> tuple[Suite, ...]:
    rows = json.loads((files(__package__) / "suites.json").read_text(encoding="utf-8"))
    return tuple(Suite(**{**row, "tasks": tuple(SuiteTask(**task) for task in row["tasks"])}) for row in rows)


SUITES = _read()


def find_suite(name: str) -> Suite:
    """The row of a suite. Raises ValueError, with the nearest names, if there is none."""
    found = next((suite for suite in SUITES if suite.key == name), None)
    if found is None:
        known = [suite.key for suite in SUITES]
        if find_spec(name) is not None:
            raise ValueError(f"tasks={name!r} is a dataset and no suite of several; give {{dataset: {name}}}.")
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}."
        raise ValueError(f"tasks={name!r} is no suite of datasets; {hint}")
    return found


def numbers_of_images(key: str) -> list[int]:
    """Of how many images the test set of a known dataset is, in the suites that have it."""
    return sorted({task.num_images for suite in SUITES for task in suite.tasks if task.dataset == key})


def other_pictures(name: str, found: Mapping[str, int]) -> str | None:
    """A remark on the sets of a suite of which there were other pictures than in the paper; None if there were none.

    Args:
        name: of the suite.
        found: how many pictures of each set were evaluated, by the set's key.
    """
    suite = find_suite(name)
    whole = {task.dataset: task.num_images for task in suite.tasks}
    others = [f"{key} {count} of {whole[key]}" for key, count in found.items() if count != whole.get(key, count)]
    left_out = [key for key in suite.names if key not in found]
    parts = [
        f"other pictures than in the paper ({', '.join(others)})" if others else "",
        f"without {', '.join(left_out)}" if left_out else "",
    ]
    said = "; ".join(part for part in parts if part)
    return f"NOTE: suite {name}: {said}: its figures and means aren't the paper's." if said else None
