"""Defences that raise an alarm: a score for each image, and a threshold above which it counts as attacked."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_whole
from ..modeling import ZeroShotClassifier
from .base import Defence, GradientPath, Prediction

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Detector(Defence):
    """Flags the images whose score is above a threshold, and gives the others the classifier's class.

    A new detector is one subclass with `scored`, and with `class_scores` in what that gives where the score depends on
    the class that an image is given: attacks through the defence lower those of the class that they steer to.

    Args:
        fpr: the share of clean images, in (0, 1), that `calibrate` lets the detector flag at most.
        threshold: flagged is what scores above; None until `calibrate` or `fit` has set it.

    Raises ValueError for numbers out of range, and for a prediction without a threshold.
    """

    fpr: float = 0.05
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fpr < 1:
            raise ValueError(f"fpr={self.fpr!r} must be in (0, 1).")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError(f"threshold={self.threshold!r} must be a number, or None until calibrated.")

    @abstractmethod
    def scored(self, classifier: ZeroShotClassifier, images_BCHW: Tensor, seed: int, path: GradientPath) -> Prediction:
        """Logits and `score`, (B,): the higher, the more an image looks attacked. As `Defence._predict` otherwise."""

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        found = self.scored(classifier, images_BCHW, seed, path)
        if found.score is None:
            raise ValueError(f"{type(self).__name__}.scored gives no score; give one for each image.")
        assert self.threshold is not None  # `check` saw to it
        return replace(found, flagged=~(found.score.detach() <= self.threshold))  # so that no number is flagged too

    def check(self, classifier: ZeroShotClassifier) -> None:
        super().check(classifier)
        if self.threshold is None:
            raise ValueError(f"threshold is missing: calibrate {self.name} on clean images, or fit it.")

    def score(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, *, seed: int = 0, batch_size: int = 64
    ) -> Tensor:
        """The scores (B,), with or without a threshold. Images and errors are those of `predict`."""
        check_whole(1, batch_size=batch_size)
        heard = replace(self, threshold=math.inf)
        with self.prepared(classifier):
            parts = [heard.predict(classifier, part, seed=seed).score for part in images_BCHW.split(batch_size)]
        return torch.cat([part for part in parts if part is not None])

    def allowed(self, count: int) -> int:
        """How many of so many clean images may be flagged. Raises ValueError for too few to tell that share."""
        allowed = int(self.fpr * count + 1e-9)
        if allowed < 1:
            least = math.ceil(1 / self.fpr - 1e-9)
            raise ValueError(f"fpr={self.fpr!r} needs at least {least} clean images, got {count}.")
        return allowed

    def calibrate(
        self,
        classifier: ZeroShotClassifier,
        images_BCHW: Tensor,
        *,
        fpr: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> Self:
        """The detector with the lowest threshold, among the scores of these clean images, that flags at most a share
        of `fpr` of them. Nothing attacked is looked at.

        Args:
            images_BCHW: clean images in [0, 1] that the detector is not judged on.
            fpr: None takes the detector's own.
            seed: of what is drawn for the scores.

        Raises ValueError for fewer images than 1 / fpr, of which that share could not be told, and for scores that
        aren't finite.
        """
        aimed = replace(self, fpr=self.fpr if fpr is None else fpr)
        allowed = aimed.allowed(len(images_BCHW))
        scores = self.score(classifier, images_BCHW, seed=seed, batch_size=batch_size).double().sort().values
        if not scores.isfinite().all():
            raise ValueError(f"{self.name} gives clean images scores that aren't finite; there is no threshold.")
        return replace(aimed, threshold=float(scores[len(scores) - 1 - allowed]))
