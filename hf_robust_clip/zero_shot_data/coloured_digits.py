"""Coloured handwritten digits with captions from a small grammar: image-text pairs that need no download.

Each of scikit-learn's digits (`digits.py`, in the same split) is there several times, each time in other colours. A
picture is ground + g (ink - ground), with g its grey in [0, 1]. A caption is

    [a picture of] a [INK] DIGIT [on a GROUND ground]

whose parts in brackets are there or not. Colours and captions follow from the split and the row alone.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import product
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets

from .digits import DIGIT_NAMES, digits_split, parts_of

INKS = {
    "red": (255, 60, 50),
    "green": (60, 220, 80),
    "blue": (80, 130, 255),
    "yellow": (250, 220, 60),
    "pink": (255, 130, 200),
    "white": (250, 250, 250),
}
GROUNDS = {"black": (5, 5, 5), "grey": (70, 70, 70), "brown": (80, 45, 15)}
COLOURINGS = {"train": 4, "test": 1}  # of each digit


def coloured_digits_split(split: str) -> Dataset:
    """The `"train"` (5,188 pictures of 1,297 digits) or `"test"` (500) part, which never changes, or a part of these,
    with columns `image`, `caption`, `label`, `ink` and `ground`. Raises ValueError for any other split.
    """
    told = parts_of(split, {name: len(_whole(name)) for name in COLOURINGS})
    return concatenate_datasets([_whole(name).select(part) for name, part in told])


@cache
def _whole(split: str) -> Dataset:
    import numpy as np
    from PIL import Image as PILImage

    digits = digits_split(split)
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(digits):
        grey_HW1 = np.asarray(row["image"], dtype=float)[:, :, :1] / 255
        draw = random.Random(f"coloured digits {split} {number}")
        for ink, ground in draw.sample(list(product(INKS, GROUNDS)), COLOURINGS[split]):
            below, above = (np.array(colour, dtype=float) for colour in (GROUNDS[ground], INKS[ink]))
            picture = np.rint(below + grey_HW1 * (above - below)).astype(np.uint8)
            caption = caption_of(DIGIT_NAMES[row["label"]], ink, ground, draw)
            rows.append({"image": PILImage.fromarray(picture), "caption": caption, "label": row["label"],
                         "ink": ink, "ground": ground})  # fmt: skip
    features = {"image": Image(), "caption": Value("string"), "label": ClassLabel(names=list(DIGIT_NAMES)),
                "ink": Value("string"), "ground": Value("string")}  # fmt: skip
    return Dataset.from_list(rows, features=Features(features))


def caption_of(digit: str, ink: str, ground: str, draw: random.Random) -> str:
    """A sentence of the grammar."""
    start = draw.choice(["a picture of ", ""])
    colour = f"{ink} " if draw.random() < 0.7 else ""
    place = f" on a {ground} ground" if draw.random() < 0.6 else ""
    return f"{start}a {colour}{digit}{place}"
