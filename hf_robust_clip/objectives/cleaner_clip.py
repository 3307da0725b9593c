"""CleanerCLIP (TA-Cleaner): CleanCLIP with sub-captions that are true and untrue (arXiv 2409.17601). Unverified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..checks import check_least
from ..paper import Paper
from .base import Batch
from .clean_clip import CleanCLIP
from .contrast import pair_loss, same_texts


@dataclass(frozen=True)
class CleanerCLIP(CleanCLIP):
    """CleanCLIP's L + w (i2t + t2i) / 2. **A reconstruction, unverified**: no code was released, and the paper's own
    equations were not at hand.

        i2t = CE over [s I Pos^T, s I Neg^T] with an image's own positive text as the target
        t2i = CE(s Pos I^T), targets on the diagonal

    Pos are unit embeddings of sub-captions that keep what is there and drop details, Neg of captions in which one word
    was replaced so that they are untrue. A text of another image that equals an image's own positive one is no
    negative of it, which is ours too; so a caption without a word to replace has no negative. The paper takes K random
    pairs of each epoch, K not found; here it is all.

    Args:
        sub_caption_weight: w, at least 0.
        All others are those of `CleanCLIP`.

    Source: digests of arXiv 2409.17601 (TIFS 2025).
    """

    sub_caption_weight: float = 1.0

    paper = Paper.cited("CleanerCLIP (reconstructed)", "xun2025cleanerclip", arxiv="2409.17601")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(0, sub_caption_weight=self.sub_caption_weight)

    def edited_captions(self, captions: Sequence[str], seed: int) -> tuple[list[str], ...]:
        edits, own = (self.editor.positive, self.editor.negative), self._edit_seed(seed)
        further = ([edit(caption, own) for caption in captions] for edit in edits)
        return (*super().edited_captions(captions, seed), *further)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        images_2ND, texts_KND, ids_KNL, scale = self._embedded(batch)
        images_ND, positive_ND = images_2ND[0], texts_KND[2]
        positive_ids, both_ids = ids_KNL[2], ids_KNL[2:].flatten(0, 1)
        same_NM = same_texts(positive_ids, both_ids)
        i2t = pair_loss(images_ND, texts_KND[2:].flatten(0, 1), scale, same_NM)
        t2i = pair_loss(positive_ND, images_ND, scale, same_NM[:, : len(images_ND)])
        half = self.sub_caption_weight / 2
        return {**self._terms(images_2ND, texts_KND, ids_KNL, scale), "image_sub": half * i2t, "sub_image": half * t2i}
