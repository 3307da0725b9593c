"""Contrast of images with their captions: how CLIP is pretrained (Radford et al., ICML 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Batch, Objective, Paper
from .contrast import check_negatives, pair_loss, same_texts


@dataclass(frozen=True)
class Contrastive(Objective):
    """L = (L_image + L_text) / 2 over N images x_i with captions c_i, both towers and s being trained:

        z_ij    = s * cos(f(x_i), t(c_j))
        L_image = -mean_i log( e^{z_ii} / (e^{z_ii} + sum_{j: c_j != c_i} e^{z_ij}) )
        L_text  = -mean_i log( e^{z_ii} / (e^{z_ii} + sum_{j: c_j != c_i} e^{z_ji}) )

    Images with the same caption are no negatives of one another. N are the images of a forward batch over all
    processes; those of accumulated batches don't meet. There is no attack.

    Source: arXiv 2103.00020, section 2.3; the mask is ours.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"captions"})
    couples_images: ClassVar[bool] = True
    least_images: ClassVar[int] = 2
    attacked: ClassVar[bool] = False
    paper = Paper.cited("Contrastive", "radford2021clip", arxiv="2103.00020")

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        if batch.captions is None:
            raise ValueError("this objective contrasts images with captions, but the batch has none.")
        output = batch.student(batch.images, captions=batch.captions)
        images_ND, texts_ND = batch.gathered(output.image_embeds), batch.gathered(output.class_embeds)
        check_negatives(len(images_ND))
        same_NN = same_texts(*2 * [batch.gathered(batch.captions)])
        by_image, by_text = (
            pair_loss(*sides, output.logit_scale, same_NN) for sides in ((images_ND, texts_ND), (texts_ND, images_ND))
        )
        return {"image": by_image / 2, "text": by_text / 2}
