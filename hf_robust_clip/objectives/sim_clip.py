"""Sim-CLIP: the cosine of a siamese pair, without labels (arXiv 2407.14971)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attacks.losses import embedding_l2
from ..checks import check_choice
from .base import Batch, Objective, Paper

CleanBy = Literal["teacher", "student"]


@dataclass(frozen=True)
class SimCLIP(Objective):
    """L = mean_b -[cos(f(x_adv_b), sg g(x_b)) + cos(g(x_b), sg f(x_adv_b))] / 2, sg the stop of gradients.

    g is the frozen pretrained encoder, as in the authors' code, where the second half has no gradient, so that L is
    -mean cos(f(x_adv), f0(x)) with half its gradient; or f itself, a siamese pair. The attack maximises
    sum_d (f(x_adv)_d - g(x)_d)^2 on un-normalised projected embeddings, and needs a random start: at x itself it has
    no gradient while f = g. Needs neither labels nor texts.

    Args:
        clean_by: who embeds the clean image, `"teacher"` (f0) or `"student"` (f). With the student nothing but the
            stop of gradients keeps all embeddings from becoming one.

    Source: arXiv 2407.14971 and the code released with it. Its attack may begin outside [0, 1], where pixels are near
    the ends, and has a momentum of 0.9 of signs, which changes no L-infinity step (an L2 step it would).
    """

    clean_by: CleanBy = "teacher"

    needs_random_start: ClassVar[bool] = True
    paper = Paper.cited("Sim-CLIP", "hossain2024simclip", arxiv="2407.14971")

    def __post_init__(self) -> None:
        check_choice(CleanBy, clean_by=self.clean_by)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # a constant elsewhere, a choice here
        return frozenset({"teacher"} if self.clean_by == "teacher" else ())

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        if self.clean_by == "teacher":
            clean_BD = batch.teacher_on_clean.image_embeds
        else:
            with torch.no_grad():
                clean_BD = batch.student(batch.images).image_embeds
        return lambda adv_BCHW: embedding_l2(batch.student(adv_BCHW).image_embeds, clean_BD)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        if self.clean_by == "teacher":
            adv, clean = batch.student(adv_BCHW), batch.teacher_on_clean
        else:
            adv, clean = batch.student_on_both(adv_BCHW)
        adv_BD, clean_BD = adv.image_embeds, clean.image_embeds
        there_B = F.cosine_similarity(adv_BD, clean_BD.detach(), dim=1)
        back_B = F.cosine_similarity(clean_BD, adv_BD.detach(), dim=1)
        return {"cosine": -(there_B + back_B).mean() / 2}
