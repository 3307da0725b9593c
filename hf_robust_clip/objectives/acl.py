"""ACL: adversarial contrast of two views of each image (Jiang et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..attacks.losses import cross_entropy
from ..checks import check_above, check_choice, check_least
from ..modeling import ZeroShotOutput
from .agft import AGFT
from .base import Batch, Objective, Paper
from .contrast import contrast_of_views, gathered_views

Mode = Literal["DS", "A2A", "A2S"]
Anchor = Literal["tecoa", "agft", "none"]
_NEEDS = {"tecoa": {"labels"}, "agft": AGFT.needs, "none": ()}


@dataclass(frozen=True)
class ACL(Objective):
    """L = L_contrast + anchor_weight * L_anchor, with NT(a, b) the NT-Xent of two views of N images, unit embeddings
    u_i, of which i+ is the other view of i:

        NT = mean_i -log( e^{u_i . u_i+ / t} / sum_{a != i} e^{u_i . u_a / t} ), over 2N embeddings

    | mode | L_contrast | attacked |
    |---|---|---|
    | DS | (NT(x1, x2) + NT(x1_adv, x2_adv)) / 2 | both views |
    | A2A | NT(x1_adv, x2_adv) | both views |
    | A2S | NT(x1_adv, x2) | the first view |

    The attack maximises the NT-Xent that has attacked views in it, all of them jointly: each image's value is that of
    the whole batch. Images are contrasted within a forward batch, over all processes; those of accumulated batches
    don't meet. Takes a dataset of whole pictures, of which two random crops are made.

    L_anchor is a mean over attacked views: `"tecoa"` the cross-entropy, which needs labels, or `"agft"` that with the
    soft predictions of the frozen model (see `AGFT`), which needs classes. Without one (`"none"`) nothing keeps the
    images near their class texts.

    Args:
        mode: see above.
        anchor: see above.
        temperature: t, above 0.
        anchor_weight: at least 0.

    Raises ValueError for settings out of range, and for a batch of one image.
    Source: arXiv 2010.13337 and the code released with it, which has a linear head, batch statistics of clean and
    attacked images apart, and takes each feature's similarity with itself away as e^{1/t}, which fails in half
    precision: it is left out here. On CLIP's own embeddings, and with an anchor: ours.
    """

    mode: Mode = "DS"
    anchor: Anchor = "tecoa"
    temperature: float = 0.5
    anchor_weight: float = 1.0

    num_views: ClassVar[int] = 2
    couples_images: ClassVar[bool] = True
    least_images: ClassVar[int] = 2
    paper = Paper.cited("ACL", "jiang2020acl", arxiv="2010.13337")

    def __post_init__(self) -> None:
        check_choice(Mode, mode=self.mode)
        check_choice(Anchor, anchor=self.anchor)
        check_above(0, temperature=self.temperature)
        check_least(0, anchor_weight=self.anchor_weight)
        if self.anchor == "none" and self.anchor_weight != ACL.anchor_weight:
            raise ValueError(f"anchor_weight={self.anchor_weight!r} does nothing with anchor='none'.")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # a constant elsewhere, a choice here
        return frozenset(_NEEDS[self.anchor])

    def attacked_rows(self, count: int) -> slice:
        return slice(count // 2) if self.mode == "A2S" else slice(None)

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        clean_KD = None
        if self.mode == "A2S":
            with torch.no_grad():
                clean_KD = batch.student(batch.whole.views[1]).image_embeds

        def joint_contrast(adv_KCHW: Tensor) -> Tensor:
            embeds_KD = batch.student(adv_KCHW).image_embeds
            pair = embeds_KD if clean_KD is None else torch.cat([embeds_KD, clean_KD])
            return self._contrast(batch, pair).expand(len(adv_KCHW))

        return joint_contrast

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.mode == "DS":
            adv, clean = batch.student_on_both(adv_BCHW)
            terms["nt_clean"] = self._contrast(batch, clean.image_embeds) / 2
            terms["nt_adv"] = self._contrast(batch, adv.image_embeds) / 2
        else:
            adv = batch.student(adv_BCHW)
            terms["nt_adv"] = self._contrast(batch, adv.image_embeds)
        if self.anchor != "none":
            terms["anchor"] = self.anchor_weight * self._anchor(batch, adv)
        return terms

    def _contrast(self, batch: Batch, embeds_MD: Tensor) -> Tensor:
        """NT of the embeddings of all first views, then all second ones."""
        features_VND = gathered_views(batch, embeds_MD.unflatten(0, (2, -1)))
        return contrast_of_views(features_VND, self.temperature).mean()

    def _anchor(self, batch: Batch, output: ZeroShotOutput) -> Tensor:
        rows = self.attacked_rows(len(batch.stacked))
        attacked = output.rows(rows)
        if self.anchor == "tecoa":
            return cross_entropy(attacked.logits, batch.rows(rows).labels).mean()
        frozen = batch.teacher_on_first if self.mode == "A2S" else batch.teacher_on_clean
        return AGFT().soft_cross_entropy(attacked, frozen).mean()
