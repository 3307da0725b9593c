"""A batch of images whose prompts are each image's own: what a classifier makes of it.

Shapes: B images, V views of each, K of them kept, C classes, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..modeling import ZeroShotClassifier
from ..prompts.access import coupled_parameters, prompts_of, with_prompts
from .base import GradientPath
from .views import Views

Prompts = dict[str, Tensor]


@dataclass
class Run:
    """A batch on its way through the loop: what is computed of it, and with which prompts in place.

    Args:
        own: what is tuned, with the values that the classifier has.
    """

    classifier: ZeroShotClassifier
    images: Tensor
    views: Views
    own: Prompts
    path: GradientPath
    chunk_size: int | None

    def __post_init__(self) -> None:
        model = self.classifier
        text = {id(p) for p in model.text_parameters()}
        vision = {id(p) for p in (*model.vision_parameters(), *coupled_parameters(model.image_modules[0]))}
        parameters = prompts_of(model)
        self.text_names = [name for name in self.own if id(parameters[name]) in text]
        self.moves_vision = any(id(parameters[name]) in vision for name in self.own)
        self.first_embeds: Tensor | None = None

    def is_shared(self, prompts: Prompts) -> bool:
        """Whether all images have these prompts."""
        return all(value.shape == self.own[name].shape for name, value in prompts.items())

    def class_embeds(self, prompts: Prompts) -> Tensor:
        """(C, D), or (B, C, D) where the text tower's prompts are those of each image."""
        model = self.classifier
        if all(prompts[name] is self.own[name] for name in self.text_names):
            return model.class_embeds
        parts = slices(len(model.class_names), self.chunk_size)
        return torch.cat([self._encode_classes(prompts, classes) for classes in parts], dim=-2)

    def _encode_classes(self, prompts: Prompts, classes: slice) -> Tensor:
        return with_prompts(self.classifier, prompts, lambda: self.classifier.encode_classes(classes=classes))

    def text_gradient(self, shared: Prompts, cotangent_BCD: Tensor) -> Prompts:
        """J^T g for each image's g: the class embeddings' graph is built once, a chunk of classes at a time."""
        through = self.path == "through"
        leaves = {name: shared[name].detach().clone().requires_grad_() for name in self.text_names}
        total: Prompts = {}
        for classes in slices(len(self.classifier.class_names), self.chunk_size):
            embeds_CD = self._encode_classes({**shared, **leaves}, classes)
            rows = [
                torch.autograd.grad(embeds_CD, list(leaves.values()), g_CD, retain_graph=True, create_graph=through)
                for g_CD in cotangent_BCD[:, classes]
            ]
            for name, grads in zip(leaves, zip(*rows, strict=True), strict=True):
                total[name] = torch.stack(grads) if name not in total else total[name] + torch.stack(grads)
        return total

    def embed_views(self, prompts: Prompts) -> Tensor:
        """f of all views, (B, V, D); what is known already where no tuned prompt moves it."""
        if self.first_embeds is None or self.moves_vision or self.path != "none":
            self.first_embeds = embed_views(self.classifier, self.images, self.views, prompts, self.chunk_size)
        return self.first_embeds

    def roughly_embedded(self, prompts: Prompts) -> Tensor:
        """f of all views, (B, V, D), in bfloat16: to choose by, and kept for nothing else."""
        with torch.autocast(self.images.device.type, torch.bfloat16):
            return embed_views(self.classifier, self.images, self.views, prompts, self.chunk_size)

    def embed_image(self, prompts: Prompts) -> Tensor:
        """f of the images themselves, (B, D)."""
        if self.first_embeds is not None and not self.moves_vision and self.path == "none":
            return self.first_embeds[:, 0]
        return embed_pixels(self.classifier, self.images[:, None], prompts)[:, 0]

    def kept(self, kept_BK: Tensor, images: Tensor) -> Tensor:
        """The kept views (B, K, C, H, W) of the images; their embeddings (B, K, D) if no tuned prompt moves them."""
        kept, through = self.views.take(kept_BK), self.path == "through"
        if not self.moves_vision and through:
            return embed_views(self.classifier, images, kept, {}, self.chunk_size)
        if not self.moves_vision and self.first_embeds is None:
            with torch.no_grad():
                return embed_views(self.classifier, images, kept, {}, self.chunk_size)
        if not self.moves_vision:
            assert self.first_embeds is not None
            return self.first_embeds.take_along_dim(kept_BK[..., None], dim=1)
        images = images if through else images.detach()
        return kept.render(images, self.classifier.config.vision_config.image_size)

    def logits(self, embeds_BVD: Tensor, class_embeds: Tensor) -> Tensor:
        """(B, V, C)."""
        logits = self.classifier.score(embeds_BVD.flatten(0, 1), class_embeds)[0]
        return logits.unflatten(0, embeds_BVD.shape[:2])


def embed_views(
    classifier: ZeroShotClassifier, images_BCHW: Tensor, views: Views, prompts: Prompts, chunk: int | None
) -> Tensor:
    """f of the views of each image, (B, V, D), at most `chunk` of them in one forward (at least one of each image)."""
    count, size = views.boxes.shape[1], classifier.config.vision_config.image_size
    step = None if chunk is None else max(1, chunk // max(1, len(images_BCHW)))
    found = []
    for part in slices(count, step):
        index = torch.arange(count, device=images_BCHW.device)[part].expand(len(images_BCHW), -1)
        found.append(embed_pixels(classifier, views.take(index).render(images_BCHW, size), prompts))
    return torch.cat(found, dim=1)


def embed_pixels(classifier: ZeroShotClassifier, pixels_BVCHW: Tensor, prompts: Prompts) -> Tensor:
    """f of V pictures of each image, (B, V, D)."""
    rows = pixels_BVCHW.flatten(0, 1)
    embeds = with_prompts(classifier, prompts, lambda: classifier.encode_images(rows))
    return embeds.unflatten(0, pixels_BVCHW.shape[:2])


def slices(count: int, size: int | None) -> list[slice]:
    """0 .. count - 1 in parts of at most `size`; None: in one."""
    if size is None or size >= count:
        return [slice(0, count)]
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def differentiable_twice() -> Any:
    """Attention whose gradient has a gradient: fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH)
