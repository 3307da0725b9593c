"""AGFT: the frozen model's soft predictions as targets of adversarial fine-tuning (CVPR 2026)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..checks import check_above
from ..modeling import ZeroShotOutput
from .base import Batch, Objective, Paper


@dataclass(frozen=True)
class AGFT(Objective):
    """L = mean_b -sum_c q_bc log softmax(temperature * cos(f(x_adv_b), t))_c, which the attack maximises too, with

        q_b = softmax(sharpness * temperature * cos(f0(x_b), t))

    of the frozen pretrained encoder f0 on the clean image. Needs classes, but no labels. Its least value is the
    entropy of q. Predictions are made, and evaluated, at the model's own temperature.

    Args:
        temperature: factor on the cosines, above 0.
        sharpness: factor on the temperature of the targets, above 0; below 1 they are softer than predictions.

    Source: arXiv 2603.29410 and the code released with it, whose command line sets 180 and 0.4 (its parser's own
    defaults are 100 and 1).
    """

    temperature: float = 180.0
    sharpness: float = 0.4

    needs: ClassVar[frozenset[str]] = frozenset({"classes", "teacher"})
    paper = Paper.cited("AGFT", "cui2026agft", arxiv="2603.29410")

    def __post_init__(self) -> None:
        check_above(0, temperature=self.temperature, sharpness=self.sharpness)

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda adv_BCHW: self.soft_cross_entropy(batch.student(adv_BCHW), batch.teacher_on_clean)

    def soft_cross_entropy(self, adv: ZeroShotOutput, frozen: ZeroShotOutput) -> Tensor:
        """The loss of each image (B,), from the outputs of student and frozen model."""
        targets_BC = (self.sharpness * self.temperature * frozen.cosine).softmax(dim=1)
        return F.cross_entropy(self.temperature * adv.cosine, targets_BC, reduction="none")

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        return {"soft_ce": self.attack_loss(batch)(adv_BCHW).mean()}
