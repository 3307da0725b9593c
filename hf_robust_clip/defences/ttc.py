"""TTC: test-time counter-attacks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_whole
from ..crops import picture_key
from ..modeling import ZeroShotClassifier
from ..paper import Paper
from ..threat_model import ThreatModel, parse_radius
from .base import Defence, GradientPath, Prediction, Traits


@dataclass(frozen=True, kw_only=True)
class TTC(Defence):
    """Moves each test image away from where an attack left it: a counter-attack that maximises ||f(x + d) - f(x)||^2.

    d_0 is uniform noise in the L-inf ball, d_1 .. d_N follow by sign steps, projected to the ball and to [0, 1]. An
    image whose features hardly move under the noise, ||f(x + d_0) - f(x)|| / ||f(x)|| < tau, is taken for attacked and
    classified at x + sum_k w_k d_k, with w_k proportional to exp(beta k); any other at x + d_0.

    Args:
        eps, step_size: radius and step in units of [0, 1], floats or fractions such as `"4/255"`.
        num_steps: N, at least 1.
        tau: threshold of the drift.
        beta: how much later steps count.

    A gradient `"through"` is exact: the sign has none, so it goes by the projection to [0, 1] alone, beside the image.
    Raises ValueError for numbers out of range.
    Source: arXiv 2503.03613 and its released code, which measures the drift of fine-tuned models by the original
    CLIP's image encoder; here it is always the classifier's own.
    """

    eps: float | str = "4/255"
    step_size: float | str = "1/255"
    num_steps: int = 2
    tau: float = 0.2
    beta: float = 2.0

    paper = Paper.cited("ttc", "xing2025ttc", arxiv="2503.03613")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, num_steps=self.num_steps)
        if not parse_radius(self.step_size, "step_size") > 0 or not self._ball().eps > 0:
            raise ValueError(f"eps={self.eps!r} and step_size={self.step_size!r} must be positive.")

        for name in ("tau", "beta"):
            if math.isnan(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number.")

    def _ball(self) -> ThreatModel:
        return ThreatModel(self.eps, "linf")  # type: ignore[arg-type]

    @property
    def traits(self) -> Traits:
        return Traits(randomised=True, optimising=True)

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        ball, step_size = self._ball(), parse_radius(self.step_size, "step_size")
        images = images_BCHW if path == "through" else images_BCHW.detach()
        noise = torch.stack([self._noise(image, seed) for image in images_BCHW.detach()])
        low, high = ball.bounds
        moved = [(images + noise).clamp(low, high)]
        with torch.no_grad():
            still_BD = classifier.encode_images(images_BCHW)
        for step in range(self.num_steps):
            at = moved[-1].detach().requires_grad_()
            embeds_BD = classifier.encode_images(at)
            if step == 0:
                drift_B = (embeds_BD.detach() - still_BD).norm(dim=1) / still_BD.norm(dim=1)
            (grad,) = torch.autograd.grad((embeds_BD - still_BD).square().sum(), at)
            delta = (moved[-1] - images + step_size * grad.sign()).clamp(-ball.eps, ball.eps)
            moved.append((images + delta).clamp(low, high))
        weights = torch.exp(self.beta * torch.arange(len(moved), dtype=images.dtype, device=images.device))
        mixed = sum(w * x for w, x in zip(weights / weights.sum(), moved, strict=True))
        attacked = (drift_B < self.tau).view(-1, 1, 1, 1)
        countered = torch.where(attacked, mixed, moved[0]).clamp(low, high)
        if path == "identity":
            countered = images_BCHW + (countered - images_BCHW).detach()
        finite_B = countered.detach().flatten(1).isfinite().all(dim=1)
        countered = torch.where(finite_B.view(-1, 1, 1, 1), countered, images_BCHW)
        with torch.set_grad_enabled(path != "none"):
            embeds_BD = classifier.encode_images(countered)
            logits_BC = classifier.score(embeds_BD, classifier.class_embeds)[0]
        return Prediction(logits_BC, ~finite_B, {}, images=countered)

    def _noise(self, image_CHW: Tensor, seed: int) -> Tensor:
        """Uniform in the ball, by the seed and the image's own grey levels."""
        generator = torch.Generator().manual_seed(picture_key(image_CHW, seed))
        uniform = torch.rand(image_CHW.shape, generator=generator, dtype=torch.float64)
        return ((2 * uniform - 1) * self._ball().eps).to(image_CHW)
