"""SimpleAT: adversarial training with the rescaled square loss (arXiv 2306.07613)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..attacks.losses import cross_entropy
from ..checks import check_above, check_choice
from .base import Batch, Objective, Paper

AttackBy = Literal["same", "ce"]


@dataclass(frozen=True)
class SimpleAT(Objective):
    """L = mean_b l(z(x_adv_b), y_b), l(z, y) = (k * (z_y - M)^2 + sum_{c != y} z_c^2) / C, without a softmax.

    CLIP's logits share an offset of 15 to 25, and to pull them all to 0 would undo the alignment of images and texts:
    here z are the logits less their mean over the classes, unless `centred` is false. 1 / C makes gradients small
    where classes are many: of 1000 about 0.03 where the cross-entropy has up to 1; the learning rate must be larger.

    Args:
        k: weight of the true class, above 0.
        target: M, the logit that it shall reach, above 0. Of few classes 1 and 1 were published for the loss itself,
            of 42 to 1000 classes 1 and 15, of 1000 15 and 30.
        centred: see above.
        attack: what the attack maximises: `"same"`, l itself, or `"ce"`, the cross-entropy.

    The published recipe has a single cycle of the learning rate and random erasing beside it. In a training's settings
    that is `lr_scheduler_type="linear"` with a `warmup_steps` below 1, the share of the steps in which it rises, and
    `erasing`, on crops of whole pictures; `ema_decay` keeps a moving average of the weights.
    Source: arXiv 2306.07613 (its abstract) and arXiv 2006.07322 for the loss; centring is ours.
    """

    k: float = 1.0
    target: float = 15.0
    centred: bool = True
    attack: AttackBy = "same"

    paper = Paper.cited("SimpleAT", "liu2023simpleat", arxiv="2306.07613")

    def __post_init__(self) -> None:
        check_above(0, k=self.k, target=self.target)
        check_choice(AttackBy, attack=self.attack)

    def square(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """l of each image, (B,)."""
        if self.centred:
            logits_BC = logits_BC - logits_BC.mean(dim=1, keepdim=True)
        own_B = logits_BC.gather(1, labels_B[:, None]).squeeze(1)
        true_B = self.k * (own_B - self.target).square() - own_B.square()
        return (true_B + logits_BC.square().sum(dim=1)) / logits_BC.shape[1]

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        loss = self.square if self.attack == "same" else cross_entropy
        return lambda adv_BCHW: loss(batch.student(adv_BCHW).logits, batch.labels)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        return {"square": self.square(batch.student(adv_BCHW).logits, batch.labels).mean()}
