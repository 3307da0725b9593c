"""TAPT: test-time adversarial prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..modeling import CLIPForZeroShotClassification
from ..paper import Paper
from .base import GradientPath, Prediction, Traits
from .statistics import AlignmentTargets, VisionStatistics
from .tuning import Prompts, PromptTuning, Run, marginal_entropy
from .views import Views

if TYPE_CHECKING:
    from pathlib import Path

    from .defended import DefendedClassifier

Reduction = Literal["norm", "mean"]
Reset = Literal["trained", "random"]


@dataclass(frozen=True, kw_only=True)
class TAPT(PromptTuning):
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
        targets: statistics to align with; made by `TAPTTrainer.collect_statistics` or `collect_statistics`.
        gamma: weight in [0, 1] of the adversarial against the clean statistics. 1 needs no clean ones.
        align_weight: of the alignment, against the entropy. 0 leaves it out.
        align_layers: the first so many layers of the encoder; all of a tower that has fewer.
        unbiased: divide the views' variance by K - 1 in place of K.
        reset_to: where tuning begins: `"trained"`, the prompts in the classifier; `"random"`, vision prompts and deep
            text prompts ~ N(0, 0.02^2) while the first text context stays trained. The released code does the latter
            for designs V and VLI, by a slip: it notes the initial values before it loads the checkpoint.
        reset_every: 1 begins anew for every image. k > 1 lets the prompts of an image be where the next one begins,
            for k images, counted in each batch; then batches and the order of images matter. (The released code's
            first group has k - 1 images.)
        random_seed: of the random prompts, which are drawn once for all images.

    Raises ValueError for numbers out of range, and for targets that are missing where the loss needs them, or belong
    to another model or other prompts.
    Source: arXiv 2411.13136 and its released code.
    """

    targets: AlignmentTargets | None = field(default=None, repr=False)
    learning_rate: float = 5e-4
    gamma: float = 0.5
    align_weight: float = 1.0
    align_layers: int = 9
    align_reduction: Reduction = "norm"
    unbiased: bool = True
    reset_to: Reset = "trained"
    reset_every: int = 1
    random_seed: int = 0

    aligns: ClassVar[bool] = True
    needs_prompts: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        method="tapt",
        title="TAPT: Test-Time Adversarial Prompt Tuning for Robust Inference in Vision-Language Models",
        venue="CVPR 2025",
        arxiv="2411.13136",
        bibtex="""@inproceedings{wang2025tapt,
  title = {{TAPT}: Test-Time Adversarial Prompt Tuning for Robust Inference in Vision-Language Models},
  author = {Wang, Xin and Chen, Kai and Zhang, Jiaming and Chen, Jingjing and Ma, Xingjun},
  booktitle = {CVPR},
  year = {2025}
}""",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r} must be in [0, 1].")
        if not 0 <= self.align_weight < math.inf:
            raise ValueError(f"align_weight={self.align_weight!r} must be at least 0.")
        for name in ("align_layers", "reset_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        for name, choices in (("align_reduction", get_args(Reduction)), ("reset_to", get_args(Reset))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose {' or '.join(choices)}.")
        if self.unbiased and self.num_kept < 2 and self.align_weight > 0:
            raise ValueError(
                f"selected={self.selected!r} of num_views={self.num_views!r} keeps one view, which has no unbiased "
                "variance; keep more, or set unbiased=False."
            )

    @classmethod
    def paper_preset(cls, targets: AlignmentTargets | None = None) -> TAPT:
        """As the paper writes it: the defaults."""
        return cls(targets=targets)

    @classmethod
    def released_preset(cls, targets: AlignmentTargets | None = None, design: str = "VLI") -> TAPT:
        """As the authors' code computes it for prompts of this design, the slip for V and VLI included."""
        return cls(
            targets=targets,
            align_weight=100 / 9,
            align_layers=8,
            align_reduction="mean",
            unbiased=False,
            reset_to="trained" if design == "VLJ" else "random",
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

    def parameters(self) -> dict[str, Any]:
        """All settings, without the statistics; of these their record."""
        record = None if self.targets is None else self.targets.adversarial.record
        return {**super().parameters(), "statistics": record}

    @property
    def _group(self) -> int:
        return self.reset_every

    def check(self, classifier: CLIPForZeroShotClassification) -> None:
        super().check(classifier)
        if self.align_weight == 0:
            return
        if self.targets is None:
            raise ValueError(
                "targets is missing: tapt aligns views with the statistics of training images; make them with "
                "collect_statistics, or set align_weight=0."
            )
        if self.gamma < 1 and self.targets.clean is None:
            raise ValueError(
                f"gamma={self.gamma!r} needs the statistics of clean-trained prompts, and targets.clean is missing; "
                "collect them, or set gamma=1."
            )
        self.targets.check(classifier)

    def initial(self, classifier: CLIPForZeroShotClassification, own: Prompts) -> Prompts:
        """The trained prompts, or the released code's random ones."""
        if self.reset_to == "trained":
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

    def _predict(
        self,
        classifier: CLIPForZeroShotClassification,
        images_BCHW: Tensor,
        state: Any,
        seed: int,
        path: GradientPath,
    ) -> Prediction:
        if self.reset_every == 1:
            return super()._predict(classifier, images_BCHW, state, seed, path)
        whole = self.run(classifier, images_BCHW, seed, path)
        start, count = self.initial(classifier, whole.own), len(images_BCHW)
        steps: list[tuple[Tensor, Prediction]] = []
        for place in range(min(self.reset_every, count)):  # the images at this place of their group, all at once
            rows = torch.arange(place, count, self.reset_every, device=images_BCHW.device)
            views = Views(whole.views.boxes[rows], whole.views.mirrored[rows])
            run = Run(classifier, images_BCHW[rows], views, whole.own, path, self.chunk_size)
            start = {name: p if p.dim() == whole.own[name].dim() else p[: len(rows)] for name, p in start.items()}
            found = self.tune(run, start)
            steps.append((rows, found))
            start = found.prompts
        order = torch.cat([rows for rows, _ in steps]).argsort()
        parts = [found for _, found in steps]
        return Prediction(
            logits=torch.cat([part.logits for part in parts])[order],
            fell_back=torch.cat([part.fell_back for part in parts])[order],  # type: ignore[misc]
            prompts={name: torch.cat([part.prompts[name] for part in parts])[order] for name in start},
            loss=torch.cat([part.loss for part in parts])[order],  # type: ignore[misc]
            kept=torch.cat([part.kept for part in parts])[order],  # type: ignore[misc]
        )


def views_moments(layer_inputs: Sequence[Tensor], num_images: int, unbiased: bool) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance (B, tokens, width) over each image's views, for every layer."""
    rows = [hidden.unflatten(0, (num_images, -1)) for hidden in layer_inputs]
    return [(hidden.mean(dim=1), hidden.var(dim=1, correction=int(unbiased))) for hidden in rows]


def alignment(moments: Sequence[tuple[Tensor, Tensor]], statistics: VisionStatistics, reduction: Reduction) -> Tensor:
    """The distance of moments from statistics, (B,): see `TAPT`."""
    distance_B = 0.0
    for (mean, variance), mu, s2 in zip(moments, statistics.mean, statistics.variance, strict=False):
        parts = (mean - mu.to(mean)).abs(), (variance - s2.to(variance)).abs()
        if reduction == "norm":
            distance_B = distance_B + sum(part.flatten(1).sum(dim=1) for part in parts) / len(moments)
        else:
            distance_B = distance_B + sum(0.5 * part.flatten(1).mean(dim=1) for part in parts)
    return distance_B  # type: ignore[return-value]  # there is a layer
