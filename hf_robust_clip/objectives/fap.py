"""FAP: few-shot adversarial prompt learning (Zhou et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..attacks.losses import cross_entropy, kl_divergence
from ..checks import check_least
from ..prompts import ClipPromptConfig
from .base import Batch, Objective, Paper
from .trades import TRADES


@dataclass(frozen=True)
class FAP(Objective):
    """L = mean_b CE(z(x_b), y_b) + weight * mean_b KL(P(x_b) || P(x_adv_b)) * (cos(f(x_adv_b), f(x_b)) + 1).

    The attack maximises the KL.

    P is the softmax of the logits, f the image embedding. The factor asks adversarial and clean embeddings to differ
    while their predictions agree. Gradients flow through both images and through the factor, as in the authors' code,
    whose direction of the KL this is.

    Made for prompts that image and text share: `ClipPromptConfig(design="VLJ", coupling="vision_to_text")`.

    Args:
        weight: of the adversarial term, at least 0; the authors' scripts use 1.5.

    Relations: without the factor this is `TRADES`.
    Source: arXiv 2403.14774, and the code released with it.
    """

    weight: float = 1.5
    needs_random_start: ClassVar[bool] = True
    peft_config: ClassVar[ClipPromptConfig] = ClipPromptConfig(design="VLJ", coupling="vision_to_text")
    paper = Paper.cited("FAP", "zhou2024fap", arxiv="2403.14774")

    def __post_init__(self) -> None:
        check_least(0, weight=self.weight)

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return TRADES().attack_loss(batch)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        adv, clean = batch.student_on_both(adv_BCHW)
        alike_B = F.cosine_similarity(adv.image_embeds, clean.image_embeds, dim=1) + 1
        return {
            "ce": cross_entropy(clean.logits, batch.labels).mean(),
            "kl_cos": self.weight * (kl_divergence(clean.logits, adv.logits) * alike_B).mean(),
        }
