"""CoOp: context optimisation (Zhou et al., IJCV 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..prompts import ClipPromptConfig
from .base import Paper
from .clean import Clean


@dataclass(frozen=True)
class CoOp(Clean):
    """L = mean_b CE(z(x_b), y_b), without an attack; what is trained are text prompts alone.

    A control: learned words on clean images. Made for `ClipPromptConfig(design="T", num_text_tokens=4, text_depth=1)`,
    the context that all classes share.

    Relations: `Clean` on other parameters; adversarially, `APT(batch_mix="adv_full")` with the same prompts.
    Source: arXiv 2109.01134.
    """

    peft_config: ClassVar[ClipPromptConfig] = ClipPromptConfig(design="T", num_text_tokens=4, text_depth=1)
    paper = Paper.cited("CoOp", "zhou2022coop", arxiv="2109.01134")
