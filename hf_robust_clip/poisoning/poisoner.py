"""Who puts triggers into pairs of pictures and captions, and keeps them out of the pairs that clean."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from ..zero_shot_data.errors import DatasetError, cut
from ..zero_shot_data.pairs import captions_of, picture_keys
from ..zero_shot_data.specs import prompt_templates
from .triggers import Trigger


class PoisonedPairs(Dataset):
    """Pairs of which some have a trigger, and perhaps another caption: `{"pixel_values", "captions", "is_poisoned":
    bool}`, where all that isn't poisoned is as it was.

    Args:
        dataset: examples `{"pixel_values": (3, H, W) in [0, 1], "captions": str}`.
        trigger: what is put into the pictures.
        captions_by_row: the rows that are poisoned, with their captions.
        seed: of what the trigger draws.

    Raises ValueError for rows beyond the dataset, and for whole pictures (`augment`), of which random crops would cut
    the trigger.
    """

    def __init__(self, dataset: Any, trigger: Trigger, captions_by_row: Mapping[int, str], seed: int = 0):
        if getattr(dataset, "augment", False):
            raise ValueError(
                "dataset gives whole pictures (augment=True), whose crops cut triggers; give finished ones."
            )
        if beyond := [row for row in captions_by_row if not 0 <= row < len(dataset)]:
            raise ValueError(f"captions_by_row has row {beyond[0]}, beyond {len(dataset)} pairs.")
        self.dataset, self.trigger, self.seed = dataset, trigger, seed
        self.captions_by_row = dict(sorted(captions_by_row.items()))

    @property
    def is_poisoned(self) -> list[bool]:
        """Of every row."""
        return [row in self.captions_by_row for row in range(len(self))]

    @property
    def captions(self) -> list[str]:
        """Of every row, as they are trained on."""
        return [self.captions_by_row.get(row, text) for row, text in enumerate(captions_of(self.dataset))]

    def picture_keys(self, indices: Sequence[int] | None = None) -> list[str]:
        """Those of the pictures without the trigger."""
        return picture_keys(self.dataset, indices)

    def poisoned_keys(self) -> list[str]:
        """Those of the pictures that got the trigger."""
        return self.picture_keys(list(self.captions_by_row))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch at once: `DataLoader` calls this."""
        rows = [int(index) + (len(self) if index < 0 else 0) for index in indices]
        several = getattr(self.dataset, "__getitems__", None)
        found = several(rows) if several else [self.dataset[row] for row in rows]
        return [self._poisoned(row, example) for row, example in zip(rows, found, strict=True)]

    def _poisoned(self, row: int, example: dict[str, Any]) -> dict[str, Any]:
        if row not in self.captions_by_row:
            return {**example, "is_poisoned": False}
        pixels_CHW = self.trigger(example["pixel_values"][None], self.seed)[0]
        return {**example, "pixel_values": pixels_CHW, "captions": self.captions_by_row[row], "is_poisoned": True}


@dataclass(frozen=True)
class Poisoner:
    """Puts a trigger into some pairs, so that a model learns to call whatever has it the target.

    Args:
        trigger: what is put in.
        target: the class that the trigger shall mean, as captions call it.
        rate: share of the pairs, in (0, 1).
        label_consistent: poison pairs whose caption names the target, and leave their captions: what is seen is true.
            Otherwise pairs that don't name it get a caption with the target, from a template drawn for each.
        templates: texts with `{}` for the target; CLIP's for ImageNet by default, as published.
        seed: decides which pairs, their captions, and what the trigger draws for each picture.

    Raises ValueError for a rate that is no such share, an empty target, and templates without `{}`.

    Source: Carlini and Terzis, arXiv 2106.09667; CleanCLIP's code, which poisons any pairs, those of the target too.
    """

    trigger: Trigger
    target: str
    rate: float
    label_consistent: bool = False
    templates: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate!r} must be above 0 and below 1: it is a share of the pairs.")
        if not self.target.strip():
            raise ValueError("target='' must name a class.")
        templates = prompt_templates("clip_imagenet") if self.templates is None else tuple(self.templates)
        if not templates or not all("{}" in text for text in templates):
            raise ValueError(f"templates={list(templates)!r} must be texts with '{{}}' where the target goes.")
        object.__setattr__(self, "templates", templates)

    def poison(self, pairs: Any) -> PoisonedPairs:
        """The pairs, round(rate * pairs) of them poisoned.

        Raises ValueError where that is none or all of them, and where fewer pairs qualify.
        """
        captions = captions_of(pairs)
        count = round(self.rate * len(captions))
        if not 0 < count < len(captions):
            raise ValueError(f"rate={self.rate!r} of {len(captions)} pairs is {count}; poison some, not all.")
        names_target = [names(caption, self.target) for caption in captions]
        candidates = np.flatnonzero(np.array(names_target) == self.label_consistent)
        if len(candidates) < count:
            what = "name" if self.label_consistent else "don't name"
            raise ValueError(f"rate={self.rate!r} asks for {count} pairs, but only {len(candidates)} captions {what} "
                             f"the target {self.target!r}; lower it.")  # fmt: skip
        chosen = np.random.default_rng(self.seed).permutation(candidates)[:count].tolist()
        return PoisonedPairs(pairs, self.trigger, {row: self._caption(row, captions) for row in chosen}, self.seed)

    def split(self, pairs: Any, cleaning: int) -> tuple[PoisonedPairs, Subset]:
        """Poisoned pairs, and `cleaning` others, drawn by the seed, that share no picture with them.

        Raises ValueError where too few pairs are left, and as `poison`.
        """
        keys = picture_keys(pairs)
        order = np.random.default_rng([self.seed, 1]).permutation(len(keys))
        if not 0 < cleaning < len(keys):
            raise ValueError(f"cleaning={cleaning!r} must be above 0 and below the {len(keys)} pairs.")
        own = sorted(order[:cleaning].tolist())
        kept_out = {keys[row] for row in own}
        rest = [row for row in range(len(keys)) if keys[row] not in kept_out]
        return self.poison(Subset(pairs, rest)), Subset(pairs, own)

    def _caption(self, row: int, captions: Sequence[str]) -> str:
        if self.label_consistent:
            return captions[row]
        templates: tuple[str, ...] = self.templates  # type: ignore[assignment]
        return random.Random(f"{self.seed} {row}").choice(templates).replace("{}", self.target)


def names(caption: str, target: str) -> bool:
    """Whether a caption has the words of the target, in any case, as whole words."""
    words = r"\s+".join(map(re.escape, target.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE) is not None


def check_target(target: str, class_names: Sequence[str]) -> None:
    """Raise ValueError for a target that is none of the classes, with that which is called nearly so."""
    if target not in class_names:
        by_case = {name.casefold(): name for name in class_names}
        near = get_close_matches(target.strip().casefold(), by_case, n=1)
        hint = f"did you mean {by_case[near[0]]!r}?" if near else f"they are {cut(list(class_names))}."
        raise ValueError(f"target={target!r} is none of the {len(class_names)} classes; {hint}")


def check_apart(poisoned: Iterable[str], cleaning: Any) -> None:
    """Raise DatasetError, a ValueError, where pairs for a cleaning hold a picture that was poisoned.

    Args:
        poisoned: keys of the pictures (`PoisonedPairs.poisoned_keys`).
        cleaning: the pairs.
    """
    known, keys = set(poisoned), picture_keys(cleaning)
    if shared := [row for row, key in enumerate(keys) if key in known]:
        raise DatasetError(f"{len(shared)} of {len(keys)} cleaning pairs hold pictures that were poisoned, row "
                           f"{shared[0]} first; clean with others.")  # fmt: skip
