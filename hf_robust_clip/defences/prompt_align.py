"""PromptAlign: test-time prompt tuning with distribution alignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..modeling import CLIPForZeroShotClassification
from ..paper import Paper
from .statistics import AlignmentTargets
from .tapt import alignment, views_moments
from .tuning import PromptTuning, marginal_entropy


@dataclass(frozen=True, kw_only=True)
class PromptAlign(PromptTuning):
    """Tunes trained prompts on each test image so that its views agree and look inside like training images.

        L = H(mean_k softmax z_k) + align_weight * sum_l 0.5 (mean|m_l - mu_l| + mean|v_l - s2_l|)

    over the first `align_layers` layers, with mean m_l and variance v_l (divisor K) of the kept views, and those of
    training images under the classifier's own prompts (`targets.adversarial`). The published method tunes MaPLe's
    prompts (design VLJ), trained on clean images.

    Args:
        targets: statistics of training images; `targets.clean` isn't used.
        align_weight: of the alignment.
        align_layers: so many layers.

    Raises ValueError as `TAPT` does.
    Source: arXiv 2311.01459; weight, layers and learning rate of its released code (which takes 4e-2 in place of 5e-4
    for domain generalisation).
    """

    targets: AlignmentTargets | None = field(default=None, repr=False)
    learning_rate: float = 5e-4
    align_weight: float = 100 / 3
    align_layers: int = 2

    aligns: ClassVar[bool] = True
    needs_prompts: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        method="prompt_align",
        title="Align Your Prompts: Test-Time Prompting with Distribution Alignment for Zero-Shot Generalization",
        venue="NeurIPS 2023",
        arxiv="2311.01459",
        bibtex="""@inproceedings{hassan2023promptalign,
  title = {Align Your Prompts: Test-Time Prompting with Distribution Alignment for Zero-Shot Generalization},
  author = {Abdul Samadh, Jameel and Gani, Hanan and Hussein, Noor and Khattak, Muhammad Uzair and Naseer, Muhammad
            Muzammal and Khan, Fahad Shahbaz and Khan, Salman},
  booktitle = {NeurIPS},
  year = {2023}
}""",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.align_weight < math.inf:
            raise ValueError(f"align_weight={self.align_weight!r} must be at least 0.")
        if not isinstance(self.align_layers, int) or self.align_layers < 1:
            raise ValueError(f"align_layers={self.align_layers!r} must be an integer of at least 1.")

    def parameters(self) -> dict[str, Any]:
        """All settings, without the statistics; of these their record."""
        record = None if self.targets is None else self.targets.adversarial.record
        return {**super().parameters(), "statistics": record}

    def check(self, classifier: CLIPForZeroShotClassification) -> None:
        super().check(classifier)
        if self.targets is None:
            raise ValueError(
                "targets is missing: prompt_align aligns views with the statistics of training images; make them with "
                "collect_statistics."
            )
        self.targets.check(classifier)

    def loss(self, logits_BKC: Tensor, layer_inputs: Sequence[Tensor]) -> Tensor:
        """L of each image."""
        assert self.targets is not None  # checked
        moments = views_moments(layer_inputs[: self.align_layers], len(logits_BKC), unbiased=False)
        distance_B = alignment(moments, self.targets.adversarial, "mean")
        return marginal_entropy(logits_BKC) + self.align_weight * distance_B
