"""The mean prediction over random views: the control that test-time tuning has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..crops import RandomResizedCrop
from ..modeling import ZeroShotClassifier
from ..paper import Paper
from .base import Defence, GradientPath, Prediction, Traits
from .memory import activation_bytes
from .prompted import embed_views
from .tuning import check_views, log_mean_softmax
from .views import draw_boxes


@dataclass(frozen=True, kw_only=True)
class Ensemble(Defence):
    """z = log(mean_v softmax z_v) over the image itself and num_views - 1 random crops of it. Nothing is tuned.

    Args:
        num_views, crop, chunk_size: as in `PromptTuning`.

    Raises ValueError for fewer than 2 views.
    """

    num_views: int = 64
    crop: RandomResizedCrop = field(default_factory=RandomResizedCrop)
    chunk_size: int | None = None

    paper = Paper("ensemble", "Test-time augmentation: the mean prediction over random views", "no publication")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_views(self.num_views, self.chunk_size)

    @property
    def traits(self) -> Traits:
        return Traits(randomised=True, optimising=False)

    @property
    def name(self) -> str:
        return f"ensemble-{self.num_views}"

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        views = draw_boxes(images_BCHW, self.num_views, self.crop, seed)
        with torch.set_grad_enabled(path != "none"):
            embeds_BVD = embed_views(classifier, images_BCHW, views, {}, self.chunk_size)
            logits = classifier.score(embeds_BVD.flatten(0, 1), classifier.class_embeds)[0]
            logits_BC = log_mean_softmax(logits.unflatten(0, embeds_BVD.shape[:2]))
        return Prediction(logits_BC, torch.zeros(len(logits_BC), dtype=torch.bool, device=logits_BC.device), {})

    def _bytes_per_image(self, classifier: ZeroShotClassifier) -> float:
        at_once = self.num_views if self.chunk_size is None else min(self.num_views, self.chunk_size)
        return at_once * activation_bytes(classifier, graph=False)
