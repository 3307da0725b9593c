"""R-TPT: test-time prompt tuning for adversarial robustness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_whole
from ..paper import Paper
from .prompted import Prompts, Run
from .tuning import WordTuning, entropy


@dataclass(frozen=True, kw_only=True)
class RTPT(WordTuning):
    """Tunes the template's words on each test image so that each of its views is sure by itself, and lets the views
    vote by how much they resemble one another.

        L = mean_k H(softmax z_k)
        z = sum_v w_v z_v,  w = softmax_v(mean of the largest `num_neighbours` cos(f_v, f_u), u != v, / temperature)

    The loss is over the kept views, the prediction over all of them, with the untuned image features f; only text is
    tuned, so the image encoder sees every view once.

    Args:
        num_neighbours: most similar other views that count; all others where there are fewer.
        temperature: of the weights.

    Raises ValueError for numbers that aren't positive.
    Source: arXiv 2504.11195. The released code means to leave out the view itself by dropping cosines from 1.0 on;
    rounding puts about half of the views' own cosines just below, so that its weights depend on rounding. It also
    rounds attacked images to 8 bits and mixes augmentations (AugMix), which is not done here.
    """

    num_neighbours: int = 20
    temperature: float = 0.01

    paper = Paper.cited("r_tpt", "sheng2025rtpt", arxiv="2504.11195")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, num_neighbours=self.num_neighbours)
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be positive.")

    def loss(self, logits_BKC: Tensor, layer_inputs: Sequence[Tensor]) -> Tensor:
        """The mean of the views' entropies."""
        return entropy(logits_BKC).mean(dim=1)

    def predict_tuned(self, run: Run, prompts: Prompts) -> Tensor:
        """The weighted sum of all views' logits."""
        embeds_BVD = run.embed_views(prompts)
        logits_BVC = run.logits(embeds_BVD, run.class_embeds(prompts))
        return (self.weights(embeds_BVD)[..., None] * logits_BVC).sum(dim=1)

    def weights(self, embeds_BVD: Tensor) -> Tensor:
        """How much each view counts, (B, V), of sum 1."""
        unit = F.normalize(embeds_BVD.to(torch.promote_types(embeds_BVD.dtype, torch.float32)), dim=-1)
        count = unit.shape[1]
        itself = torch.eye(count, dtype=torch.bool, device=unit.device)
        near = (unit @ unit.mT).masked_fill(itself, -torch.inf).topk(min(self.num_neighbours, count - 1), dim=-1)
        return (near.values.mean(dim=-1) / self.temperature).softmax(dim=-1)
