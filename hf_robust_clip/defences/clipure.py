"""CLIPure-Cos: image embeddings are moved towards the text that names no class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_choice, check_whole
from ..modeling import ZeroShotClassifier
from ..paper import Paper
from .base import Defence, GradientPath, Prediction, Traits

Scale = Literal["image", "batch"]


@dataclass(frozen=True, kw_only=True)
class CLIPure(Defence):
    """CLIPure-Cos: the direction of each image embedding climbs its cosine with a text that names no class.

        u_0 = f(x)/||f(x)||      g_n = t - (u_n . t) u_n      u_{n+1} = norm(u_n + step_size g_n / ||g_n||)
        z_c = s * u_N . t_c

    t is the normed mean of the unit embeddings of the templates with nothing in the class name's place ("a photo of
    a ."), and g the gradient of cos(u, t) by u. Nothing is drawn; the gradient is written out, so none is taken.

    Each step turns u by arctan(step_size) in the plane of u and t, towards t and, beyond it, back. At the authors'
    numbers, 10 steps of 30 (88.1 degrees), every image that is nearer to t than that comes back to where it was: the
    defence is the classifier itself, whatever attacks say. How many of a few images do is part of a report.

    The default normalises the gradient of each image by itself. `released_preset` does as the authors' code: ||g|| is
    the norm over the whole batch, so that steps depend on the other images and shrink with their number (two alike
    images still come back, nearly).

    Gradients: `"through"` is exact. `"identity"` takes every step's direction for a constant, as attacks on the
    authors' code do, and each step divides the gradient by about step_size, by 30^10 in all. Here its signs are still
    nearly those of the exact one. There a part along u, which cancels, drowns it in float32's rounding, and what comes
    to the encoder, in half precision, is 0: attacks on that code see no gradient.

    Args:
        num_steps: N, at least 1.
        step_size: positive.
        normalised_over: `"image"`, or `"batch"`.
        templates: texts with `{}`; none take those of the classes. The authors have CLIP's 80 of ImageNet for both.

    Raises ValueError for settings out of range, and templates without words of their own.
    Source: arXiv 2502.18176 (ICLR 2025), from its released code; its other variant, CLIPure-Diff, isn't here.
    """

    num_steps: int = 10
    step_size: float = 30.0
    normalised_over: Scale = "image"
    templates: Sequence[str] = ()

    paper = Paper.cited("clipure", "zhang2025clipure", arxiv="2502.18176")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, num_steps=self.num_steps)
        check_choice(Scale, normalised_over=self.normalised_over)
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size={self.step_size!r} must be positive.")
        if isinstance(self.templates, str):
            raise ValueError(f"templates={self.templates!r} is one text; give a list.")
        object.__setattr__(self, "templates", tuple(self.templates))

    @classmethod
    def released_preset(cls) -> CLIPure:
        """As the authors' code computes it."""
        return cls(normalised_over="batch")

    @property
    def traits(self) -> Traits:
        return Traits(couples_images=self.normalised_over == "batch")

    def purified(self, embeds_BD: Tensor, text_D: Tensor, path: GradientPath = "none") -> Tensor:
        """u_N (B, D) of image embeddings of any length, for a text of unit length. Of u_n = +-t the gradient is 0, and
        it stays.
        """
        unit_BD = F.normalize(embeds_BD, dim=-1)
        rounding = 8 * torch.finfo(unit_BD.dtype).eps
        for _ in range(self.num_steps):
            pull_BD = text_D - (unit_BD @ text_D)[:, None] * unit_BD
            whole = self.normalised_over == "batch"
            length = pull_BD.norm() if whole else pull_BD.norm(dim=1, keepdim=True)
            step_BD = self.step_size * pull_BD * (length > rounding) / length.clamp_min(rounding)
            unit_BD = F.normalize(unit_BD + (step_BD.detach() if path == "identity" else step_BD), dim=-1)
        return unit_BD

    def _text(self, classifier: ZeroShotClassifier, like: Tensor) -> Tensor:
        """t (D,)."""
        return F.normalize(classifier.blank_embeds(tuple(self.templates)).to(like).mean(dim=0), dim=-1)

    def remarks(self, classifier: ZeroShotClassifier, images_BCHW: Tensor) -> tuple[str, ...]:
        """How many of the images end where they began."""
        if self.normalised_over == "batch":
            return ()
        with torch.no_grad():
            embeds_BD = classifier.encode_images(images_BCHW).double()
            apart_B = 1 - F.cosine_similarity(self.purified(embeds_BD, self._text(classifier, embeds_BD)), embeds_BD)
        same, count = int((apart_B < 1e-6).sum()), len(apart_B)
        return (f"the embeddings of {same} of the first {count} images come back to where they began",) if same else ()

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        with torch.set_grad_enabled(path != "none"):
            embeds_BD = classifier.encode_images(images_BCHW)
            with torch.autocast(embeds_BD.device.type, enabled=False):
                embeds_BD = embeds_BD.to(torch.promote_types(embeds_BD.dtype, torch.float32))
                unit_BD = self.purified(embeds_BD, self._text(classifier, embeds_BD), path)
            logits_BC = classifier.score(unit_BD, classifier.class_embeds)[0]
        return Prediction(logits_BC, torch.zeros(len(logits_BC), dtype=torch.bool, device=logits_BC.device))
