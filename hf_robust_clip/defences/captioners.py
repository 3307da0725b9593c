"""What an image shows, as a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..modeling.texts import check_classes


class Captioner(Protocol):
    """Images to texts. Those that are saved with a defence are frozen dataclasses of plain settings."""

    def __call__(self, images_BCHW: Tensor, named: Sequence[str]) -> list[str]:
        """One text for each image (B, C, H, W) in [0, 1]; `named` is the class that the classifier gives each."""

    def of_classes(self, class_names: Sequence[str]) -> list[str] | None:
        """The text of an image of each class, in their order; None where texts don't follow from classes."""


@dataclass(frozen=True)
class ZeroShotCaptioner(Captioner):
    """The class that a zero-shot classifier names, in a template.

    Args:
        template: with `{}` for the class name. Two classes of one text are refused.

    Raises ValueError for a template without `{}`.
    """

    template: str = "a photo of a {}."

    def __post_init__(self) -> None:
        check_classes(["a class", "another"], self.template)

    def __call__(self, images_BCHW: Tensor, named: Sequence[str]) -> list[str]:
        return [self.template.replace("{}", name) for name in named]

    def of_classes(self, class_names: Sequence[str]) -> list[str] | None:
        return [self.template.replace("{}", name) for name in class_names]


@dataclass(frozen=True)
class CaptioningModel(Captioner):
    """A captioning model of transformers (BLIP, GIT, ...), greedy. Extra: `generate`.

    Args:
        model: Hub id or folder.
        revision: of the Hub's.
        prompt: what captions begin with, for models that go on from a text; None for none.
        max_new_tokens: of a caption.

    Raises OSError, at first use, for a model that can't be loaded.
    """

    model: str
    revision: str | None = None
    prompt: str | None = None
    max_new_tokens: int = 30

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, named: Sequence[str]) -> list[str]:
        model, processor = _captioning_model(self.model, self.revision)
        model = model.to(images_BCHW.device)
        pictures = [(255 * image).round().byte().permute(1, 2, 0).cpu().numpy() for image in images_BCHW.detach()]
        texts = {} if self.prompt is None else {"text": [self.prompt] * len(pictures)}
        given = processor(images=pictures, return_tensors="pt", **texts).to(images_BCHW.device)
        tokens = model.generate(**given, max_new_tokens=self.max_new_tokens, do_sample=False)
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    def of_classes(self, class_names: Sequence[str]) -> list[str] | None:
        return None


@lru_cache(maxsize=2)
def _captioning_model(name: str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = {"revision": revision or "main", "trust_remote_code": False}
    model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True, **where)
    return model.requires_grad_(False).eval(), AutoProcessor.from_pretrained(name, **where)
