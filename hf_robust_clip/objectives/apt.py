"""APT: adversarial training of prompts, the stage before test-time tuning in TAPT (Wang et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..attacks.losses import cross_entropy
from ..checks import check_choice, check_least
from ..prompts import ClipPromptConfig
from .base import Batch, Objective, Paper
from .trades import TRADES

BatchMix = Literal["adv_half", "adv_full", "clean", "trades"]


@dataclass(frozen=True)
class APT(Objective):
    """Cross-entropy on a batch of clean and adversarial images; what is trained are prompts, CLIP itself is frozen.

    - `batch_mix="adv_half"`: L = mean_b CE(z(x'_b), y_b), where x' is x in the first half of the batch and x_adv in
      the second; only that half is attacked. The authors' code.
    - `"adv_full"`: L = mean_b CE(z(x_adv_b), y_b). The paper's min-max.
    - `"clean"`: L = mean_b CE(z(x_b), y_b), without an attack: the control.
    - `"trades"`: the loss and attack of `TRADES`, L = mean_b CE(z(x_b), y_b) + beta * mean_b KL(z(x_b) || z(x_adv_b)).

    The attack maximises the cross-entropy (for `"trades"` the KL). Halves are those of each forward batch: of an odd
    number the larger one is attacked, so a single image is. So `"adv_half"` couples images: one batch of 32 attacks
    others than four of 8 do, and 32 of 1 attack all.

    Args:
        batch_mix: see above.
        beta: weight of the KL term of `"trades"`, at least 0; no other mix has it.

    Relations: on weights in place of prompts, `"adv_full"` is `TeCoA`, `"clean"` is `Clean`.
    Source: arXiv 2411.13136, section 3.1, and the code released with it.
    """

    batch_mix: BatchMix = "adv_half"
    beta: float = 6.0
    peft_config: ClassVar[ClipPromptConfig] = ClipPromptConfig(design="VLI")  # two in nine layers of each tower
    paper = Paper.cited("APT", "wang2025tapt", arxiv="2411.13136")

    def __post_init__(self) -> None:
        check_choice(BatchMix, batch_mix=self.batch_mix)
        check_least(0, beta=self.beta)
        if self.beta != APT.beta and self.batch_mix != "trades":
            raise ValueError(f"beta={self.beta!r} does nothing with batch_mix={self.batch_mix!r}, only with 'trades'.")

    @property
    def couples_images(self) -> bool:  # type: ignore[override]  # a constant elsewhere, a choice here
        return self.batch_mix == "adv_half"

    @property
    def needs_random_start(self) -> bool:  # type: ignore[override]
        return self.batch_mix == "trades"

    @property
    def attacked(self) -> bool:  # type: ignore[override]  # a constant elsewhere, a choice here
        return self.batch_mix != "clean"

    def title(self, design: str | None = None) -> str:
        return f"{self.paper.method}-{design}" if design else self.paper.method

    def attacked_rows(self, count: int) -> slice:
        return slice(count // 2, None) if self.batch_mix == "adv_half" else slice(None)

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return TRADES(self.beta).attack_loss(batch) if self.batch_mix == "trades" else super().attack_loss(batch)

    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        if self.batch_mix == "trades":
            return TRADES(self.beta)(batch, adv_BCHW)
        return {"ce": cross_entropy(batch.student(adv_BCHW).logits, batch.labels).mean()}
