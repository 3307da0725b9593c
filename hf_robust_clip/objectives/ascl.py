"""ASCL: supervised contrast of adversarial and clean images with chosen positives and negatives (arXiv 2101.10027)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attacks.losses import cross_entropy, kl_divergence
from ..checks import check_above, check_choice, check_least
from .base import Batch, Objective, Paper
from .contrast import check_negatives

Mode = Literal["all", "hard", "soft", "leaked", "merge"]
Distance = Literal["cosine", "linf"]


@dataclass(frozen=True)
class ASCL(Objective):
    """L = CE(z(x_adv), y) + weight * L_ascl + kl * mean_b KL(P(x) || P(x_adv)), with P = softmax(z).

    Gradients of KL flow through both. L_ascl is a mean over all 2B unit embeddings u_i, of clean and adversarial
    images, with labels y_i and predictions p_i = argmax z; s_ij is u_i . u_j / tau, or -max_d |u_id - u_jd| / tau:

        L_i = -1 / max(1, |P_i|) * sum_{j in P_i} log( e^{s_ij} / sum_{a in P_i or N_i} e^{s_ia} )

    | mode | positives P_i (without i) | negatives N_i |
    |---|---|---|
    | all | y_j = y_i | y_j != y_i |
    | hard | y_j = y_i | y_j != y_i, p_j = y_i |
    | soft | y_j = y_i | y_j != y_i, p_j = p_i |
    | leaked | y_j = y_i, p_j = p_i | as soft |
    | merge | y_j = y_i | hard or soft |

    Embeddings without positives give 0 and count in the mean. Images are contrasted within a forward batch, over all
    processes; those of accumulated batches don't meet. The attack maximises the cross-entropy.

    Args:
        mode: see above.
        distance: `"cosine"` or `"linf"`, which s is.
        tau: temperature of the contrast, above 0.
        weight: of L_ascl, at least 0.
        kl: weight of the KL term, at least 0. The authors' code takes 2 over a mean of images and classes: of C
            classes that is `kl=2 / C` here.
        text_anchors: every class text is contrasted with too: of the image's class a positive, of all others
            negatives. Of batches in which few images share a class these are nearly all that there is.

    Source: arXiv 2101.10027 and the code released with it (whose features are those of a linear head on two crops, tau
    0.2, `distance="linf"`, `mode="leaked"`). On CLIP's embeddings, and with texts: ours.
    """

    mode: Mode = "leaked"
    distance: Distance = "cosine"
    tau: float = 0.2
    weight: float = 1.0
    kl: float = 2.0
    text_anchors: bool = False

    couples_images: ClassVar[bool] = True
    paper = Paper.cited("ASCL", "bui2021ascl", arxiv="2101.10027")

    def __post_init__(self) -> None:
        check_choice(Mode, mode=self.mode)
        check_choice(Distance, distance=self.distance)
        check_above(0, tau=self.tau)
        check_least(0, weight=self.weight, kl=self.kl)

    @property
    def least_images(self) -> int:  # type: ignore[override]  # a constant elsewhere, a choice here
        return 1 if self.text_anchors else 2

    @classmethod
    def released_preset(cls, num_classes: int) -> ASCL:
        """As the authors' code weighs and measures, for so many classes."""
        return cls(distance="linf", kl=2 / num_classes)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        adv, clean = batch.student_on_both(adv_BCHW)
        features_MD, labels_M, predicted_M = (
            torch.cat([batch.gathered(value) for value in values])
            for values in (
                (clean.image_embeds, adv.image_embeds),
                (batch.labels, batch.labels),
                (clean.logits.argmax(dim=1), adv.logits.argmax(dim=1)),
            )
        )
        if not self.text_anchors:
            check_negatives(len(features_MD) // 2)
        texts_CD = adv.class_embeds if self.text_anchors else None
        return {
            "ce": cross_entropy(adv.logits, batch.labels).mean(),
            "ascl": self.weight * self.contrast(features_MD, labels_M, predicted_M, texts_CD),
            "kl": self.kl * kl_divergence(clean.logits, adv.logits).mean(),
        }

    def contrast(
        self, features_MD: Tensor, labels_M: Tensor, predicted_M: Tensor, texts_CD: Tensor | None = None
    ) -> Tensor:
        """L_ascl of M = 2B embeddings, which need not be of unit length."""
        with torch.autocast(features_MD.device.type, enabled=False):
            units_MD = F.normalize(features_MD.float() if features_MD.dtype.itemsize < 4 else features_MD, dim=1)
            similar_MN = self._similarities(units_MD, units_MD).fill_diagonal_(-torch.inf)
            positive_MN, negative_MN = self._pairs(labels_M, predicted_M)
            if texts_CD is not None:
                similar_MN = torch.cat([similar_MN, self._similarities(units_MD, texts_CD.to(units_MD))], dim=1)
                own_MC = F.one_hot(labels_M, len(texts_CD)).bool()
                positive_MN = torch.cat([positive_MN, own_MC], dim=1)
                negative_MN = torch.cat([negative_MN, ~own_MC], dim=1)
            compared_MN = positive_MN | negative_MN
            compared_MN |= ~compared_MN.any(dim=1, keepdim=True)  # without any pair: no terms, and a gradient of 0
            kept_MN = similar_MN.masked_fill(~compared_MN, -torch.inf)
            log_shares_MN = similar_MN - kept_MN.logsumexp(dim=1, keepdim=True)
            sums_M = log_shares_MN.masked_fill(~positive_MN, 0).sum(dim=1)
            return -(sums_M / positive_MN.sum(dim=1).clamp_min(1)).mean()

    def _similarities(self, units_MD: Tensor, others_ND: Tensor) -> Tensor:
        if self.distance == "cosine":
            return units_MD @ others_ND.T / self.tau
        return -torch.cdist(units_MD, others_ND, p=torch.inf) / self.tau

    def _pairs(self, labels_M: Tensor, predicted_M: Tensor) -> tuple[Tensor, Tensor]:
        """Positives and negatives (M, M) of each embedding."""
        same_MM = labels_M[:, None] == labels_M
        hard_MM = ~same_MM & (predicted_M == labels_M[:, None])
        soft_MM = ~same_MM & (predicted_M[:, None] == predicted_M)
        others_MM = ~torch.eye(len(labels_M), dtype=torch.bool, device=labels_M.device)
        leaked_MM = same_MM & (predicted_M[:, None] == predicted_M)
        negatives = {"all": ~same_MM, "hard": hard_MM, "soft": soft_MM, "leaked": soft_MM, "merge": hard_MM | soft_MM}
        return (leaked_MM if self.mode == "leaked" else same_MM) & others_MM, negatives[self.mode]
