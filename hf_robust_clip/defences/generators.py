"""Texts to pictures.

Shapes: T texts, C classes, K components, S side of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import check_whole


class Generator(Protocol):
    """Texts to pictures. Those that are saved with a defence are frozen dataclasses of plain settings."""

    def __call__(self, texts: Sequence[str], seed: int) -> Tensor:
        """One picture for each text, (T, 3, S, S) in [0, 1]; that of a text follows from it and `seed` alone."""


def text_seed(text: str, seed: int) -> int:
    """63 bits that follow from both."""
    return int.from_bytes(blake2b(f"{seed} {text}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, eq=False)
class ClasswiseSampler(Generator):
    """Draws x = mean_c + sum_k n_k b_ck, n ~ N(0, I), clipped to [0, 1]: b_ck are the principal components of the
    images of class c, of the length of their standard deviation.

    Args:
        texts: one for each class; others are refused.
        mean: (C, 3, S, S).
        basis: (C, K, 3, S, S).

    Raises ValueError for shapes that don't go together, two classes of one text, and a text that it doesn't know.
    """

    texts: tuple[str, ...]
    mean: Tensor
    basis: Tensor

    def __post_init__(self) -> None:
        shape = (len(self.texts), *self.mean.shape[1:])
        if self.basis.dim() != 5 or tuple(self.mean.shape) != shape or self.basis[:, 0].shape != self.mean.shape:
            raise ValueError(
                f"{len(self.texts)} texts, mean {tuple(self.mean.shape)} and basis {tuple(self.basis.shape)} don't go "
                "together; give (C, 3, S, S) and (C, K, 3, S, S)."
            )
        if len(set(self.texts)) < len(self.texts):
            raise ValueError("two classes have one text; give each its own.")

    @classmethod
    def fit(
        cls, images_BCHW: Tensor, labels_B: Tensor, texts: Sequence[str], *, num_components: int = 8
    ) -> ClasswiseSampler:
        """That of training images in [0, 1]. A class of few images has fewer components, and the rest are zero.

        Raises ValueError for a class with fewer than two images.
        """
        check_whole(1, num_components=num_components)
        means, bases = [], []
        for label, text in enumerate(texts):
            own_NP = images_BCHW[labels_B == label].flatten(1).double()
            if len(own_NP) < 2:
                raise ValueError(
                    f"{text!r} has {len(own_NP)} images; at least 2 of each class are needed to draw more."
                )
            mean_P = own_NP.mean(dim=0)
            _, lengths_R, rows_RP = torch.linalg.svd(own_NP - mean_P, full_matrices=False)
            basis_KP = own_NP.new_zeros(num_components, len(mean_P))
            count = min(num_components, len(lengths_R))
            signs_R1 = torch.where(rows_RP.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)  # a solver may give either
            scaled_RP = signs_R1 * rows_RP * (lengths_R[:, None] / (len(own_NP) - 1) ** 0.5)
            basis_KP[:count] = scaled_RP[:count]
            means.append(mean_P.view(images_BCHW.shape[1:]))
            bases.append(basis_KP.view(num_components, *images_BCHW.shape[1:]))
        return cls(tuple(texts), torch.stack(means).float().cpu(), torch.stack(bases).float().cpu())

    def check(self, texts: Sequence[str]) -> None:
        """Raise ValueError for a text that it doesn't know."""
        known = set(self.texts)
        if unknown := [text for text in texts if text not in known]:
            raise ValueError(f"caption {unknown[0]!r} is none of the classes that were fitted; fit on these classes.")

    def __call__(self, texts: Sequence[str], seed: int) -> Tensor:
        self.check(texts)
        pictures = []
        for text in texts:
            generator = torch.Generator().manual_seed(text_seed(text, seed))
            draws_K = torch.randn(self.basis.shape[1], generator=generator, dtype=torch.float64)
            label = self.texts.index(text)
            moved = torch.einsum("k,kchw->chw", draws_K, self.basis[label].double())
            pictures.append((self.mean[label].double() + moved).clamp(0, 1).float())
        return torch.stack(pictures)


@dataclass(frozen=True)
class DiffusionGenerator(Generator):
    """A text-to-image pipeline of `diffusers`. Extra: `generate`.

    Args:
        model: Hub id or folder of a pipeline.
        revision: of the Hub's.
        num_inference_steps, guidance_scale: the pipeline's own; the defaults are MirrorCheck's released code's.
        side: of the pictures in pixels; None takes what the pipeline makes by itself.
        device: where it runs, such as `"cuda"`.

    The seed of each picture is `seed` itself, as for a pipeline called by hand. Raises ImportError, at first use,
    without `diffusers`, and OSError for a pipeline that can't be loaded.
    """

    model: str
    revision: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    side: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_whole(1, num_inference_steps=self.num_inference_steps)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], seed: int) -> Tensor:
        pipeline = _diffusion_pipeline(self.model, self.revision, self.device)
        size = {} if self.side is None else {"height": self.side, "width": self.side}
        found = pipeline(
            prompt=list(texts),
            generator=[torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF) for _ in texts],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            output_type="pt",
            **size,
        )
        return found.images.float().cpu().clamp(0, 1)


@lru_cache(maxsize=2)
def _diffusion_pipeline(name: str, revision: str | None, device: str) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("diffusers is missing; pip install diffusers.") from error
    pipeline = DiffusionPipeline.from_pretrained(name, revision=revision, use_safetensors=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
