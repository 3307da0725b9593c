"""PromptAlign: test-time prompt tuning with distribution alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..paper import Paper
from .alignment import AlignedTuning, alignment, views_moments
from .tuning import marginal_entropy


@dataclass(frozen=True, kw_only=True)
class PromptAlign(AlignedTuning):
    """Tunes trained prompts on each test image so that its views agree and look inside like training images.

        L = H(mean_k softmax z_k) + align_weight * sum_l 0.5 (mean|m_l - mu_l| + mean|v_l - s2_l|)

    over the first `align_layers` layers, with mean m_l and variance v_l (divisor K) of the kept views, and those of
    training images under the classifier's own prompts (`targets.adversarial`). The published method tunes MaPLe's
    prompts (design VLJ), trained on clean images.

    Arguments are those of `AlignedTuning`; `targets.clean` isn't used.

    Source: arXiv 2311.01459; weight, layers and learning rate of its released code (which takes 4e-2 in place of 5e-4
    for domain generalisation).
    """

    learning_rate: float = 5e-4
    align_weight: float = 100 / 3
    align_layers: int = 2

    paper = Paper.cited("prompt_align", "hassan2023promptalign", arxiv="2311.01459")

    def loss(self, logits_BKC: Tensor, layer_inputs: Sequence[Tensor]) -> Tensor:
        """L of each image."""
        if self.align_weight == 0 or self.targets is None:
            return marginal_entropy(logits_BKC)
        moments = views_moments(layer_inputs[: self.align_layers], len(logits_BKC), unbiased=False)
        distance_B = alignment(moments, self.targets.adversarial, "mean")
        return marginal_entropy(logits_BKC) + self.align_weight * distance_B
