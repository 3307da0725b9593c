"""Image encoders beside the one that is defended: what two pictures have in common as others see it.

Shapes: B images, D embedding width, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_whole
from ..modeling import AutoModelForZeroShotClassification, ZeroShotClassifier


class ImageEncoder(Protocol):
    """What embeds images. Those that are saved with a defence are frozen dataclasses of plain settings."""

    def module(self) -> nn.Module:
        """Images (B, 3, H, W) in [0, 1], of any size, to (B, D), differentiable, with nothing to train; the same
        object each time.
        """


@dataclass(frozen=True)
class ClipEncoder(ImageEncoder):
    """The image encoder of a CLIP or SigLIP checkpoint: images are resized to what it takes.

    Args:
        model: Hub id, folder, or `"digits-clip"`. A checkpoint that is the classifier under attack gives no second
            opinion: what moves the one moves the other.
        revision: of the Hub's.

    Raises OSError, at first use, for a checkpoint that can't be loaded.
    """

    model: str
    revision: str | None = None

    def module(self) -> nn.Module:
        return _clip_tower(self.model, self.revision)


class ClipTower(nn.Module):
    """Images of any size to the projected features of a classifier."""

    def __init__(self, classifier: ZeroShotClassifier):
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.train(False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        side = self.classifier.config.vision_config.image_size
        pixels_BCSS = resized(images_BCHW.to(self.classifier.dtype), side)
        return self.classifier.encode_images(pixels_BCSS).float()


@lru_cache(maxsize=4)
def _clip_tower(name: str, revision: str | None) -> ClipTower:
    where = {} if revision is None else {"revision": revision}
    return ClipTower(AutoModelForZeroShotClassification.from_pretrained(name, **where))


class SmallEncoder(nn.Module):
    """Three convolutions and a linear map: images of any size, resized to S, to (B, D); 0.06 M parameters at D = 64.

    Args:
        side: S, at least 4.
        width: D.
    """

    def __init__(self, side: int, width: int = 64):
        super().__init__()
        check_whole(4, side=side)
        self.side, self.width = side, width
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 64, width),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        kind = next(self.parameters()).dtype
        return self.body(resized(images_BCHW.to(kind), self.side) - 0.5)

    @classmethod
    def loaded(cls, side: int, weights: Mapping[str, Tensor]) -> SmallEncoder:
        """With these weights, in eval mode, with nothing to train."""
        with torch.random.fork_rng(devices=[]):  # what it begins with is drawn
            encoder = cls(side, len(weights["body.8.bias"]))
        encoder.load_state_dict(dict(weights))
        return encoder.requires_grad_(False).eval()


def train_encoder(
    images_BCHW: Tensor, labels_B: Tensor, *, side: int, num_steps: int, seed: int, scale: float = 10.0
) -> SmallEncoder:
    """A `SmallEncoder` whose cosines tell classes apart: softmax of scale * cos(f(x), w_c) on training images, w_c
    learned beside it and left behind; Adam, learning rate 2e-3 falling to 0, batches of 64.

    Everything is drawn by `seed`; global random state stays as it is.
    """
    devices = [images_BCHW.device] if images_BCHW.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        encoder = SmallEncoder(side)
        classes_CD = nn.Parameter(torch.randn(int(labels_B.max()) + 1, encoder.width))
        encoder.to(images_BCHW.device)
        classes_CD.data = classes_CD.data.to(images_BCHW.device)
        optimizer = torch.optim.Adam([*encoder.parameters(), classes_CD], lr=2e-3)
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / num_steps)
            rows = torch.randint(len(images_BCHW), (64,)).to(images_BCHW.device)
            cosine_BC = F.normalize(encoder(images_BCHW[rows]), dim=1) @ F.normalize(classes_CD, dim=1).T
            loss = F.cross_entropy(scale * cosine_BC, labels_B[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return encoder.requires_grad_(False).eval()


def resized(images_BCHW: Tensor, side: int) -> Tensor:
    """Square images of another side: bilinear, smoothed before it is reduced; as they are where the side is theirs."""
    if images_BCHW.shape[-2:] == (side, side):
        return images_BCHW
    smooth = side < images_BCHW.shape[-1]
    return F.interpolate(images_BCHW, size=(side, side), mode="bilinear", align_corners=False, antialias=smooth)
