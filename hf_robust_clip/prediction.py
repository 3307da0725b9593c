"""What became of images: logits, and with a defence more than that; and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_logits, checked_labels


@dataclass
class Prediction:
    """What a classifier, or a defence, made of a batch.

    Args:
        logits: (B, C).
        fell_back: (B,), images whose tuning was not finite: their logits are those without tuning.
        prompts: by parameter name in the classifier, the prompts tuned for each image, (B, ...); empty if none are.
        images: (B, C, H, W), what was classified in place of the given images, if anything was.
        loss: (B,), the loss that was minimised, before the first step.
        kept: (B, K), indices of the views that were kept, most confident first; 0 is the image itself.
        score: (B,), of a detector: the higher, the more an image looks attacked.
        flagged: (B,), of a detector: the images that it takes for attacked and gives no class.
        class_scores: (B, C), of a detector whose score depends on the class that an image is given: the scores that it
            would have in each. Made along a gradient's path alone; the score is that of the class of highest logit.
        state: of a defence with a stream state: what the next images begin from.
    """

    logits: Tensor
    fell_back: Tensor | None = None
    prompts: dict[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None
    loss: Tensor | None = None
    kept: Tensor | None = None
    score: Tensor | None = None
    flagged: Tensor | None = None
    class_scores: Tensor | None = None
    state: Any = None

    def right(self, labels_B: Tensor, *, attacked: bool = False) -> Tensor:
        """Whether the verdict on each image is right, (B,): its class is the label, and it isn't flagged. An attacked
        image that is flagged withstood the attack.

        Raises FloatingPointError for logits that are not finite, which name no class.
        """
        check_logits(self.logits)
        return self.verdict(labels_B, attacked=attacked)

    def verdict(self, labels_B: Tensor, *, attacked: bool = False) -> Tensor:
        """`right` without a look at whether the logits are finite, for the steps of an attack."""
        named_B = self.logits.argmax(dim=1) == labels_B
        if self.flagged is None:
            return named_B
        return named_B | self.flagged if attacked else named_B & ~self.flagged


Predict = Callable[[Tensor], Prediction]  # of images (B, C, H, W) in [0, 1]


def by_logits(logits_fn: Callable[[Tensor], Tensor]) -> Predict:
    """The predictions of a plain classifier: of the class of highest logit."""
    return lambda images_BCHW: Prediction(logits_fn(images_BCHW))


@torch.no_grad()
def withstood(predict: Predict, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Whether the verdict on each attacked image is right, (B,). CLIP can't take a batch of none, so it gets none.

    Raises FloatingPointError for logits that are not finite; ValueError for labels beyond them.
    """
    if len(images_BCHW) == 0:
        return torch.ones(0, dtype=torch.bool, device=images_BCHW.device)
    found = predict(images_BCHW)
    return found.right(checked_labels(labels_B, *found.logits.shape), attacked=True)
