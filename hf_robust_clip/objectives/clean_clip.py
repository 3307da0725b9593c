"""CleanCLIP: fine-tuning that takes a backdoor's image and text apart (Bansal et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_least
from ..crops import RandomResizedCrop
from ..distortions import Augmentation, ColourDistortion
from ..modeling import ZeroShotOutput
from ..poisoning.captions import CaptionEditor, WordEditor
from .base import Batch, Objective, Paper
from .contrast import check_negatives, gathered_views, pair_loss, same_texts
from .contrastive import Contrastive


@dataclass(frozen=True)
class CleanCLIP(Objective):
    """L = l1 (CE(s I T^T) + CE(s T I^T)) / 2 + l2 (CE(s I I~^T) + CE(s T T~^T)) / 2, targets on the diagonal.

    I are the unit embeddings of N images, T of their captions; I~ of the images augmented, T~ of the captions in other
    words; both towers and s are trained. The self-supervised half has one direction only, as released; `symmetric`
    adds the other, (CE(s I I~^T) + CE(s I~ I^T)) / 2 in the place of the first, likewise of texts.

    Between images and captions, equal captions are no negatives of one another; between captions and edited ones,
    neither are pairs where any of the two captions equals any of the other pair's: they may mean the same. The mask is
    ours. N are the images of a forward batch over all processes. There is no attack.

    Args:
        clip_weight, self_supervised_weight: l1 and l2, at least 0, not both 0. With l1 = 1 the paper found ASR to
            fall, and accuracy nearly to stay, as l2 grows from 0.5 to 8.
        symmetric: see above.
        augmentation: of images. Released code has AutoAugment; here random crops in other colours.
        editor: of captions.
        edited_once: each caption is edited in one way throughout the training, as released; else anew in every step.

    Raises ValueError for weights out of range.

    Source: arXiv 2303.03323 and the code released with it.
    """

    clip_weight: float = 1.0
    self_supervised_weight: float = 1.0
    symmetric: bool = False
    augmentation: Augmentation = Augmentation(  # noqa: RUF009  # frozen
        RandomResizedCrop((0.2, 1.0)), ColourDistortion(jitter=0.8, greyscale=0.2)
    )
    editor: CaptionEditor = WordEditor()  # noqa: RUF009
    edited_once: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"captions"})
    couples_images: ClassVar[bool] = True
    least_images: ClassVar[int] = 2
    attacked: ClassVar[bool] = False
    paper = Paper.cited("CleanCLIP", "bansal2023cleanclip", arxiv="2303.03323")

    def __post_init__(self) -> None:
        check_least(0, clip_weight=self.clip_weight, self_supervised_weight=self.self_supervised_weight)
        if not self.clip_weight + self.self_supervised_weight > 0:
            raise ValueError("clip_weight=0 and self_supervised_weight=0 leave no loss; raise one.")

    def control(self) -> Objective:
        """CLIP's own contrast: what fine-tuning on the same pairs does alone."""
        return Contrastive()

    def further_views(self, images_BCHW: Tensor, seed: int) -> tuple[Tensor, ...]:
        return (self.augmentation(list(images_BCHW), images_BCHW.shape[-1], seed),)

    def edited_captions(self, captions: Sequence[str], seed: int) -> tuple[list[str], ...]:
        return ([self.editor.varied(caption, self._edit_seed(seed)) for caption in captions],)

    def _edit_seed(self, seed: int) -> int:
        return 0 if self.edited_once else seed

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        return self._terms(*self._embedded(batch))

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all processes' images: image embeddings (2, N, D), text embeddings (1 + K, N, D) of captions and K
        others, their token ids (1 + K, N, L), and s. One forward for all.
        """
        if batch.captions is None or not batch.further_captions:
            raise ValueError("this objective contrasts images with captions, but the batch has none.")
        texts = batch.captions, *batch.further_captions
        output: ZeroShotOutput = batch.student(batch.stacked, captions=torch.cat(texts))
        images_2BD = output.image_embeds.unflatten(0, (len(batch.views), -1))
        texts_KBD = output.class_embeds.unflatten(0, (len(texts), -1))
        images_2ND, texts_KND = gathered_views(batch, images_2BD), gathered_views(batch, texts_KBD)
        check_negatives(images_2ND.shape[1])
        return images_2ND, texts_KND, gathered_views(batch, torch.stack(texts)), output.logit_scale

    def _terms(self, images_2ND: Tensor, texts_KND: Tensor, ids_KNL: Tensor, scale: Tensor) -> dict[str, Tensor]:
        images, other_images, texts, other_texts = *images_2ND, *texts_KND[:2]
        same_NN = same_texts(ids_KNL[0], ids_KNL[0])
        none_NN, alike_NN = torch.zeros_like(same_NN), _alike(*ids_KNL[:2])
        clip, own = self.clip_weight / 2, self.self_supervised_weight / 2
        return {
            "image": clip * pair_loss(images, texts, scale, same_NN),
            "text": clip * pair_loss(texts, images, scale, same_NN),
            "image_self": own * self._self_loss(images, other_images, scale, none_NN),
            "text_self": own * self._self_loss(texts, other_texts, scale, alike_NN),
        }

    def _self_loss(self, rows_ND: Tensor, others_ND: Tensor, scale: Tensor, same_NN: Tensor) -> Tensor:
        there = pair_loss(rows_ND, others_ND, scale, same_NN)
        return (there + pair_loss(others_ND, rows_ND, scale, same_NN)) / 2 if self.symmetric else there


def _alike(ids_NL: Tensor, edited_NL: Tensor) -> Tensor:
    """Which pairs of captions have a text in common, (N, N)."""
    texts = ids_NL, edited_NL
    return torch.stack([same_texts(a, b) for a in texts for b in texts]).any(dim=0)
