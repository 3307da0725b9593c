"""TAPT: test-time adversarial prompt tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_whole
from ..modeling import ZeroShotClassifier
from ..paper import Paper
from .alignment import AlignedTuning, AlignmentTargets, Reduction, alignment, views_moments
from .base import GradientPath, Prediction, Traits, joined
from .prompted import Prompts
from .tuning import marginal_entropy

if TYPE_CHECKING:
    from pathlib import Path

    from .defended import DefendedClassifier

Reset = Literal["trained", "random", "released"]
TaptState = tuple[int, Prompts]  # how many images were tuned one from the other, and the prompts of the last


@dataclass(frozen=True, kw_only=True)
class TAPT(AlignedTuning):
    """Tunes adversarially trained prompts on each test image, so that its views agree, and look inside like the views
    of clean training images.

        L = H(mean_k softmax z_k) + align_weight * (gamma * L_adv + (1 - gamma) * L_clean)

    over the kept views, with L_x the distance of mean m_l and variance v_l of the views, at the input of layer l of
    the image encoder, from the statistics of clean training images under adversarially (x = adv) and clean (x = clean)
    trained prompts: `align_reduction="norm"` takes (1 / layers) sum_l (||m_l - mu_l||_1 + ||v_l - s2_l||_1), sums over
    tokens and channels, as the paper writes; `"mean"` takes sum_l 0.5 (mean|m_l - mu_l| + mean|v_l - s2_l|), as the
    released code does. All active prompts are tuned; the linear maps of design VLJ too.

    The defaults are `paper_preset`; `released_preset` is what the authors' code computes.

    Args:
        gamma: weight in [0, 1] of the adversarial against the clean statistics. 1 needs no clean ones.
        align_reduction: see above.
        unbiased: divide the views' variance by K - 1 in place of K.
        reset_to: where tuning begins: `"trained"`, the prompts in the classifier; `"random"`, vision prompts and deep
            text prompts ~ N(0, 0.02^2) while the first text context stays trained. `"released"` is what the released
            code does: random for designs V and VLI, by a slip (it notes the initial values before it loads the
            checkpoint), trained for VLJ.
        reset_every: 1 begins anew for every image. k > 1 lets the prompts of an image be where the next one begins,
            for k images; the method then isn't episodic and takes images one after the other. (The released code's
            first group has k - 1 images.)
        random_seed: of the random prompts, which are drawn once for all images.

    All others are those of `AlignedTuning`. Source: arXiv 2411.13136 and its released code.
    """

    learning_rate: float = 5e-4
    gamma: float = 0.5
    align_reduction: Reduction = "norm"
    unbiased: bool = True
    reset_to: Reset = "trained"
    reset_every: int = 1
    random_seed: int = 0

    paper = Paper.cited("tapt", "wang2025tapt", arxiv="2411.13136")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r} must be in [0, 1].")
        check_whole(1, reset_every=self.reset_every)
        check_choice(Reduction, align_reduction=self.align_reduction)
        check_choice(Reset, reset_to=self.reset_to)
        if self.unbiased and self.num_kept < 2 and self.align_weight > 0:
            raise ValueError(f"selected={self.selected!r} keeps one view, too few; keep more, or unbiased=False.")

    @classmethod
    def paper_preset(cls, targets: AlignmentTargets | None = None) -> TAPT:
        """As the paper writes it: the defaults."""
        return cls(targets=targets)

    @classmethod
    def released_preset(cls, targets: AlignmentTargets | None = None) -> TAPT:
        """As the authors' code computes it, the slip for designs V and VLI included."""
        return cls(
            targets=targets,
            align_weight=100 / 9,
            align_layers=8,
            align_reduction="mean",
            unbiased=False,
            reset_to="released",
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, token: str | None = None
    ) -> DefendedClassifier:  # fmt: skip
        """The classifier with its prompts and this defence, from a folder or the Hub: see `DefendedClassifier`.

        Raises ValueError if another method was saved there.
        """
        from .defended import DefendedClassifier

        return DefendedClassifier.from_pretrained(source, method=cls, revision=revision, token=token)

    @property
    def traits(self) -> Traits:
        return Traits(randomised=True, optimising=True, episodic=self.reset_every == 1)

    def idle_settings(self) -> dict[str, str]:
        alignment = ("gamma", "align_layers", "align_reduction", "unbiased") if self.align_weight == 0 else ()
        drawn = {} if self.reset_to == "random" else {"random_seed": "without reset_to=random"}
        return {**dict.fromkeys(alignment, "with align_weight=0"), **drawn}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"clean_classifier"} if self.gamma < 1 and self.align_weight > 0 else ())

    def initial(self, classifier: ZeroShotClassifier, own: Prompts) -> Prompts:
        """The trained prompts, or the released code's random ones."""
        coupled = any(".clip_prompt_projection." in name for name in own)
        if self.reset_to == "trained" or (self.reset_to == "released" and coupled):
            return own
        first = "text_model.embeddings.token_embedding.clip_prompt_tokens."
        generator = torch.Generator().manual_seed(self.random_seed)
        return {
            name: value if name.startswith(first) or ".clip_prompt_tokens." not in name
            else (torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.02).to(value)
            for name, value in own.items()
        }  # fmt: skip

    def loss(self, logits_BKC: Tensor, layer_inputs: Sequence[Tensor]) -> Tensor:
        """L of each image."""
        loss_B = marginal_entropy(logits_BKC)
        if self.align_weight == 0 or self.targets is None:
            return loss_B
        moments = views_moments(layer_inputs[: self.align_layers], len(logits_BKC), self.unbiased)
        for weight, statistics in ((self.gamma, self.targets.adversarial), (1 - self.gamma, self.targets.clean)):
            if weight > 0 and statistics is not None:
                distance_B = alignment(moments, statistics, self.align_reduction)
                loss_B = loss_B + self.align_weight * weight * distance_B
        return loss_B

    def start(self, classifier: ZeroShotClassifier) -> TaptState | None:
        """No image yet."""
        return None if self.reset_every == 1 else (0, {})

    def _predict(
        self,
        classifier: ZeroShotClassifier,
        images_BCHW: Tensor,
        state: TaptState | None,
        seed: int,
        path: GradientPath,
    ) -> Prediction:
        if state is None:
            return super()._predict(classifier, images_BCHW, state, seed, path)
        found = []
        for image_1CHW in images_BCHW.split(1):
            run = self.run(classifier, image_1CHW, seed, path)
            count, before = state
            found.append(self.tune(run, before if count % self.reset_every else self.initial(classifier, run.own)))
            state = count + 1, {name: value.detach() for name, value in found[-1].prompts.items()}
        whole = joined(found)
        whole.state = state
        return whole
