"""No defence: the classifier itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..modeling import ZeroShotClassifier
from ..paper import Paper
from .base import Defence, GradientPath, Prediction


@dataclass(frozen=True, kw_only=True)
class Undefended(Defence):
    """z = the classifier's logits: the defence that does nothing, so that one loop judges with and without one."""

    defends: ClassVar[bool] = False
    paper = Paper("undefended", "No defence: the classifier itself", "no publication")

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        with torch.set_grad_enabled(path != "none"):
            return Prediction(classifier(pixel_values=images_BCHW).logits)
