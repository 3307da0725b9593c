"""scikit-learn's handwritten digits as a `datasets.Dataset` with `image` and `label` columns, in a fixed split.

Source: the test part of the UCI ML hand-written digits (Alpaydin and Kaynak, 1998), 1,797 pictures of 8 x 8 pixels
with 17 grey levels, as shipped by `sklearn.datasets.load_digits`. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping

from datasets import ClassLabel, Dataset, Features, Image, ReadInstruction

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GREY_LEVELS = 16  # scikit-learn stores 0 (background) .. 16 (ink)


def parts_of(split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """Which rows of which whole splits a text such as `"train[:80%]"` or `"train+test"` takes, as `datasets` reads it.

    Raises ValueError for what is no part of these.
    """
    try:
        told = ReadInstruction.from_spec(split).to_absolute(dict(sizes))
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"split={split!r} does not exist for the digits; choose 'train', 'test' or a part."
        ) from error
    return [(part.splitname, range(part.from_, part.to)) for part in told]


def digits_split(split: str) -> Dataset:
    """The `"train"` (1,297 pictures) or `"test"` (500) part, stratified by class, which never changes, or a part of
    these as `datasets` writes it: `"train[:1000]"`, `"train[80%:]"`.

    Pictures are 8 x 8 RGB with value 255/16 per scikit-learn grey level; labels are the digits themselves.
    Raises ValueError for any other split.
    """
    import numpy as np
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(np.arange(len(digits.target)), test_size=500, random_state=0, stratify=digits.target)
    rows = {name: np.sort(part) for name, part in zip(("train", "test"), parts, strict=True)}
    told = parts_of(split, {name: len(part) for name, part in rows.items()})
    chosen = np.concatenate([rows[name][part.start : part.stop] for name, part in told])
    grey = np.rint(digits.images[chosen] * (255 / GREY_LEVELS)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=list(DIGIT_NAMES))})
    images = [PILImage.fromarray(picture).convert("RGB") for picture in grey]
    return Dataset.from_dict({"image": images, "label": digits.target[chosen].tolist()}, features=features)
