"""What a fine-tuning method is: the loss its attack maximises and the loss its model minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..attacks.losses import cross_entropy
from ..modeling import ZeroShotOutput
from ..paper import Paper

Classifier = Callable[[Tensor], ZeroShotOutput]


@dataclass
class Batch:
    """What an objective may look at.

    Args:
        images: (B, C, H, W), clean, in [0, 1]. For `attack_loss` those of `attacked_rows` alone.
        labels: (B,), class indices; may be None for objectives with `needs_labels = False`.
        student: the model being trained, pixels to `ZeroShotOutput`.
        teacher: the frozen pretrained model, if the objective has `needs_teacher = True`.
        images_per_update: images that one optimiser step sees over all processes and accumulated batches, those of a
            short last one included; 0 where these are all.
    """

    images: Tensor
    labels: Tensor
    student: Classifier
    teacher: Classifier | None = None
    images_per_update: int = 0

    @cached_property
    def teacher_on_clean(self) -> ZeroShotOutput:
        """The frozen model's output for the clean images, computed once, without a graph."""
        return self.ask_teacher(self.images)

    @torch.no_grad()
    def ask_teacher(self, images_BCHW: Tensor) -> ZeroShotOutput:
        """The frozen model's output, without a graph. Raises ValueError if there is no teacher."""
        if self.teacher is None:
            raise ValueError("this objective compares with a frozen teacher, but the batch has none.")
        return self.teacher(images_BCHW)

    def student_on_both(self, adv_BCHW: Tensor) -> tuple[ZeroShotOutput, ZeroShotOutput]:
        """The student's outputs for adversarial and clean images, in one forward of 2B images."""
        both = self.student(torch.cat([adv_BCHW, self.images]))
        half = len(adv_BCHW)
        return tuple(  # type: ignore[return-value]
            ZeroShotOutput(logits=both.logits[rows], cosine=both.cosine[rows], image_embeds=both.image_embeds[rows])
            for rows in (slice(half), slice(half, None))
        )


@dataclass(frozen=True)
class Objective(ABC):
    """A fine-tuning method: a frozen dataclass of its hyperparameters with two functions of a batch.

    A new method is one file with one subclass. `attack_loss` defaults to the cross-entropy of the student.
    Terms are means over the images of the batch (or such means times `batch.images_per_update`): batches are weighed
    by their images.

    `couples_images`: whether the loss, or the choice of attacked images, depends on which images share a forward
    batch; then it matters how an update is divided over accumulated batches and processes.
    `needs_random_start`: whether the attack's loss has no gradient at the image itself, so that without a random start
    the attack would go nowhere.
    """

    paper: ClassVar[Paper]
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    attacked: ClassVar[bool] = True
    couples_images: ClassVar[bool] = False
    needs_random_start: ClassVar[bool] = False

    def title(self, design: str | None = None) -> str:
        """What tables call it. `design` is that of the prompts, where some are trained."""
        return self.paper.method

    def attacked_rows(self, count: int) -> slice:
        """Which images of a batch of `count` are attacked; the others reach `__call__` as they are."""
        return slice(None)

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """(mean, std) if the method prescribes its own; None keeps those of the checkpoint's image processor."""
        return None

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The loss that the attack maximises: adversarial images (B, C, H, W) to one value per image (B,)."""
        return lambda adv_BCHW: cross_entropy(batch.student(adv_BCHW).logits, batch.labels)

    @abstractmethod
    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        """The scalar terms, by name, whose sum is minimised."""
