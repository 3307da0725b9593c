"""Comp-TGA: text-guided attention that the text of what an image doesn't show completes (TPAMI 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..modeling import ZeroShotOutput, check_classes
from .base import Paper
from .tga_zsr import TGAZSR


@dataclass(frozen=True)
class CompTGA(TGAZSR):
    """The loss and attack of `TGAZSR`, on maps A(x) = A_y(x) * (1 - A_not_y(x)), pixel by pixel,

    where A_y is TGA-ZSR's map, that of the text of the true class, and A_not_y the same of the text that denies it;
    each is brought to [0, 1] and enlarged by itself, before the product.

    Args:
        alpha: weight of the attacked image's map, at least 0.
        beta: weight of the clean image's map, at least 0.
        map_norm: as in `TGAZSR`; the authors' code has `"token_axis"` here too.
        negative_template: the text that denies, with `{}` for the class name. It needs a frozen text side.

    Source: arXiv 2603.18598 and the code released with it.
    """

    alpha: float = 0.1
    beta: float = 0.07
    negative_template: str = "This is not a photo of a {}"

    paper: ClassVar[Paper] = Paper.cited("Comp-TGA", "yu2026comptga", arxiv="2603.18598")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_classes(["a class"], self.negative_template)
        except ValueError as error:
            raise ValueError(f"negative_{error}") from None

    @property
    def templates(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant elsewhere, a choice here
        return (self.negative_template,)

    def attention(self, output: ZeroShotOutput, labels_B: Tensor, side: int) -> Tensor:
        """A (B, side, side) of the true classes, in [0, 1]. Raises ValueError unless patches lie in a square."""
        if output.text_embeds is None:
            raise ValueError("this objective compares with texts that deny classes, but the output has none.")
        denied_BHW = self.guided(output, output.text_embeds[0, labels_B], side)
        return super().attention(output, labels_B, side) * (1 - denied_BHW)
