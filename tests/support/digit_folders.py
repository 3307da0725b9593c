"""The digits as somebody's own pictures: PNG files in a folder for each class."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from hf_robust_clip.zero_shot_data.digits import DIGIT_NAMES


def write_digits(folder: Path, of_each: int) -> None:
    """`train/zero/0.png`, ... and `test/zero/0.png`, ..., so many of each class."""
    digits = load_digits()
    for label, name in enumerate(DIGIT_NAMES):
        rows = np.flatnonzero(digits.target == label)
        for split, own in (("train", rows[:of_each]), ("test", rows[-of_each:])):
            place = folder / split / name
            place.mkdir(parents=True)
            for number, row in enumerate(own):
                Image.fromarray((digits.images[row] * (255 / 16)).round().astype(np.uint8)).save(
                    place / f"{number}.png"
                )
