"""Adversarial pictures that an evaluation saved: their columns, and how they are read again, pixel for pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from torch import Tensor

from ..pictures import model_side
from .dataset import ImageDataset
from .errors import DatasetError

PixelFormat = Literal["uint8", "float16", "float32"]
IMAGE, PIXELS = "image", "pixels"  # the column of PNGs, or of arrays
TOLD = ("clean_label", "attacked_label", "withstood", "withstood_as_saved", "view", "attack", "radius", "row", "seed")


def columns(pixels: PixelFormat, class_names: Sequence[str], side: int, *, detects: bool) -> datasets.Features:
    """The columns of saved pictures of side x side pixels.

    `image`, a PNG in RGB, or `pixels`, a float array (3, H, W) in [0, 1]; `label`, the true class; `clean_label` and
    `attacked_label`, the classes that were predicted of the clean picture and of the one that is saved here;
    `withstood`, whether the prediction was right when clean and under every attack up to the radius of the split, and
    `withstood_as_saved`, whether it is right on the picture as it is saved; `view`, `attack` and `radius` (in units of
    [0, 1]) of what made it, "none" and 0 of a picture that was wrong as it was; `row` of the clean picture in its
    split; `seed`; and of detectors `flagged`, whether it raises an alarm as it is saved.
    """
    label = datasets.ClassLabel(names=list(class_names))
    picture = datasets.Image() if pixels == "uint8" else datasets.Array3D(shape=(3, side, side), dtype=pixels)
    flag, text, whole = datasets.Value("bool"), datasets.Value("string"), datasets.Value("int64")
    kinds = (label, label, flag, flag, text, text, datasets.Value("float64"), whole, whole)
    found = {IMAGE if pixels == "uint8" else PIXELS: picture, "label": label, **dict(zip(TOLD, kinds, strict=True))}
    return datasets.Features({**found, **({"flagged": flag} if detects else {})})


def is_adversarial(features: datasets.Features) -> bool:
    """Whether rows have the columns of saved adversarial pictures."""
    return set(TOLD) <= set(features) and "label" in features and (IMAGE in features or PIXELS in features)


class AdversarialImages(ImageDataset):
    """Saved adversarial pictures, each of which goes to the model as it is: neither resized nor cropped by the
    processor, and enlarged inside the model where the attack was made on smaller ones.

    Raises ValueError for pictures of several sizes, larger ones than the model takes, another resolution than theirs,
    crops of arrays, and other labels than the true ones: that of what was predicted would be right by definition.
    """

    attacked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._keep_undecoded()
        most = model_side(self.processor)
        side = self._side_of(0) if len(self.rows) else (self.attack_resolution or most)
        if side > most:
            raise ValueError(f"dataset {self.dataset_id!r} has pictures of {side} px, and the model takes {most}.")
        for name, given in (("attack_resolution", self.attack_resolution), ("resize", self.resize)):
            if given not in (None, side):
                raise ValueError(f"{name}={given!r}: {self.dataset_id!r} was attacked at {side} px, and stays so.")
        if self.augment and self.image_column == PIXELS:
            raise ValueError(f"augment=True crops pictures, and {self.dataset_id!r} holds arrays of pixels.")
        if self.label_column != "label":
            raise ValueError(f"label_column={self.label_column!r} of {self.dataset_id!r} is no truth; leave it out.")
        self.attack_resolution, self.resize = side, side if side == most else None
        super().__post_init__()

    def _keep_undecoded(self) -> None:
        if self.image_column == PIXELS:
            self.rows = self.rows.with_format("numpy", columns=[PIXELS], output_all_columns=True)
        else:
            super()._keep_undecoded()

    def _side_of(self, index: int) -> int:
        if self.image_column == PIXELS:
            return int(self.rows.features[PIXELS].shape[-1])
        try:
            return int(self._opened(self.rows[index][self.image_column]).width)
        except (OSError, ValueError) as error:
            raise DatasetError(self._fault([index], error)) from error

    def _opened(self, stored: Any) -> Any:
        if self.image_column != PIXELS:
            return super()._opened(stored)
        pixels_CHW = torch.from_numpy(np.array(stored, dtype=np.float32))
        if not bool(((pixels_CHW >= 0) & (pixels_CHW <= 1)).all()):
            raise ValueError("its pixels are not in [0, 1]")
        return pixels_CHW

    def _look_at(self, stored: Any) -> None:
        if self.image_column == PIXELS:
            self._opened(stored)
        else:
            super()._look_at(stored)

    def _prepared(self, stored: Sequence[Any]) -> Sequence[Tensor] | Tensor:
        if self.image_column == PIXELS:
            return torch.stack([self._opened(array) for array in stored])
        side = self.attack_resolution
        for picture in () if self.augment else map(self._opened, stored):
            if picture.size != (side, side):
                width, height = picture.size
                raise ValueError(f"it has {height} x {width} pixels, where the others have {side} x {side}")
        return super()._prepared(stored)
