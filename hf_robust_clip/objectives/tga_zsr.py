"""TGA-ZSR: text-guided attention that attacks don't move (NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attacks.losses import cross_entropy
from ..checks import check_choice, check_least
from ..modeling import ZeroShotOutput
from .base import Batch, Objective, Paper

MapNorm = Literal["token_axis", "cosine", "none"]
PUBLISHED_SIDE = 224  # of the images for which the weights were chosen: distances grow with the side


@dataclass(frozen=True)
class TGAZSR(Objective):
    """L = CE(z(x_adv), y) + alpha * D(A(x_adv), A0(x)) + beta * D(A(x), A0(x)), the attack maximises CE.

    A(x) is the map of what each patch has in common with the text of the true class, F_p . t_y with F_p the projected
    patch embeddings; it is brought to [0, 1] (least to 0, largest to 1), and enlarged to the image's size bilinearly.
    A0 is that of the frozen pretrained model. D is the mean over images of the Euclidean distance over all pixels,
    times 224 / side, so that the weights, chosen at 224 px, mean the same on smaller images.

    Args:
        alpha: weight of the attacked image's map, at least 0.
        beta: weight of the clean image's map, at least 0. 0.05 is the paper's; its AutoAttack figures are of another
            model, trained with 0.009.
        map_norm: how embeddings are normalised first. `"token_axis"`, as in the authors' code: every channel by its
            norm over the tokens, the class token included. `"cosine"`: every token to unit length. `"none"`: not at
            all, which is closest to the printed equation.

    Source: arXiv 2410.21802 and the code released with it.
    """

    alpha: float = 0.08
    beta: float = 0.05
    map_norm: MapNorm = "token_axis"

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "teacher", "patches"})
    paper = Paper.cited("TGA-ZSR", "yu2024tgazsr", arxiv="2410.21802")

    def __post_init__(self) -> None:
        check_least(0, alpha=self.alpha, beta=self.beta)
        check_choice(MapNorm, map_norm=self.map_norm)

    def cross_entropy(self, output: ZeroShotOutput, labels_B: Tensor) -> Tensor:
        """That of each image, (B,)."""
        return cross_entropy(output.logits, labels_B)

    def attention(self, output: ZeroShotOutput, labels_B: Tensor, side: int) -> Tensor:
        """A (B, side, side) of the true classes, in [0, 1]. Raises ValueError unless patches lie in a square."""
        texts = output.class_embeds
        return self.guided(
            output, texts[labels_B] if texts.dim() == 2 else texts[torch.arange(len(labels_B)), labels_B], side
        )

    def guided(self, output: ZeroShotOutput, texts_BD: Tensor, side: int) -> Tensor:
        """The map (B, side, side) of one text for each image, in [0, 1]."""
        if output.patch_embeds is None:
            raise ValueError("this objective compares maps of patch embeddings, but the output has none.")
        patches_BPD = output.patch_embeds
        if self.map_norm == "token_axis":
            tokens_BTD = torch.cat([output.image_embeds[:, None], patches_BPD], dim=1)
            patches_BPD = F.normalize(tokens_BTD, dim=1)[:, 1:]
        elif self.map_norm == "cosine":
            patches_BPD = F.normalize(patches_BPD, dim=2)
        count = patches_BPD.shape[1]
        edge = round(count**0.5)
        if edge**2 != count:
            raise ValueError(f"patch_embeds has {count} patches, which make no square; give square images.")
        map_BP = (patches_BPD @ texts_BD.to(patches_BPD)[:, :, None]).squeeze(2)
        least_B1, largest_B1 = map_BP.amin(dim=1, keepdim=True), map_BP.amax(dim=1, keepdim=True)
        map_BP = (map_BP - least_B1) / (largest_B1 - least_B1).clamp_min(1e-8)  # a map that is the same all over: 0
        map_B1HW = map_BP.unflatten(1, (1, edge, edge))
        return F.interpolate(map_B1HW, (side, side), mode="bilinear", align_corners=False)[:, 0]

    def distance(self, maps_BHW: Tensor, others_BHW: Tensor) -> Tensor:
        """D, without the factor of the side: mean over images."""
        return (maps_BHW - others_BHW).flatten(1).norm(dim=1).mean()

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        adv, clean = batch.student_on_both(adv_BCHW)
        side = adv_BCHW.shape[-1]
        frozen_BHW, adv_BHW, clean_BHW = (
            self.attention(output, batch.labels, side) for output in (batch.teacher_on_clean, adv, clean)
        )
        scale = PUBLISHED_SIDE / side
        return {
            "ce": self.cross_entropy(adv, batch.labels).mean(),
            "attention_adv": self.alpha * scale * self.distance(adv_BHW, frozen_BHW),
            "attention_clean": self.beta * scale * self.distance(clean_BHW, frozen_BHW),
        }
