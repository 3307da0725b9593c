"""Random views of a batch of images: where they lie, and how they look.

Shapes: B images, V views of each (view 0 is the image itself), K of them chosen, S side of a view in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_whole
from ..crops import DRAWS, RandomResizedCrop, grey_levels, picture_key


@dataclass(frozen=True)
class Views:
    """Boxes in images, and whether left and right are swapped: what `render` makes pictures of.

    Args:
        boxes: (B, V, 4) int64, top, left, height and width in pixels of the images.
        mirrored: (B, V) bool.
    """

    boxes: Tensor
    mirrored: Tensor

    def take(self, index_BK: Tensor) -> Views:
        """The views of these indices, of each image its own, in their order."""
        return Views(self.boxes.gather(1, index_BK[..., None].expand(-1, -1, 4)), self.mirrored.gather(1, index_BK))

    def render(self, images_BCHW: Tensor, size: int) -> Tensor:
        """The views (B, V, C, size, size), in the images' dtype, differentiable (once) by the images.

        A box is resized bilinearly, pixel centres at half, with what lies outside it unseen:
        `F.interpolate(crop, size, mode="bilinear")`. Nothing is smoothed before a box larger than `size` is reduced.
        A box of the whole image, not mirrored, is the image itself: as it is if its sides are `size`, else resized as
        the classifier does inside (bicubic, which may leave [0, 1] a little).
        """
        rows, count = self.mirrored.shape
        height, width = images_BCHW.shape[2:]
        kind = torch.promote_types(images_BCHW.dtype, torch.float32)
        y_BVS = _coordinates(self.boxes[..., 0], self.boxes[..., 2], size, kind)
        x_BVS = _coordinates(self.boxes[..., 1], self.boxes[..., 3], size, kind)
        x_BVS = torch.where(self.mirrored[..., None], x_BVS.flip(2), x_BVS)
        shape = rows, count, size, size
        grid_BVSS2 = torch.stack(
            [
                ((2 * x_BVS + 1) / width - 1)[:, :, None, :].expand(shape),
                ((2 * y_BVS + 1) / height - 1)[:, :, :, None].expand(shape),
            ],
            dim=4,
        )
        pixels_BCTS = F.grid_sample(
            images_BCHW.to(kind), grid_BVSS2.flatten(1, 2), padding_mode="border", align_corners=False
        )
        views_BVCSS = pixels_BCTS.to(images_BCHW.dtype).unflatten(2, (count, size)).transpose(1, 2)
        image, view = ((self.boxes == self._whole(height, width)).all(dim=2) & ~self.mirrored).nonzero(as_tuple=True)
        if len(image):
            own_BCSS = images_BCHW
            if (height, width) != (size, size):
                own_BCSS = F.interpolate(images_BCHW, (size, size), mode="bicubic", align_corners=False)
            views_BVCSS[image, view] = own_BCSS[image]
        return views_BVCSS

    def _whole(self, height: int, width: int) -> Tensor:
        return self.boxes.new_tensor([0, 0, height, width])


def draw_boxes(images_BCHW: Tensor, num_views: int, crop: RandomResizedCrop, seed: int) -> Views:
    """Each image itself and `num_views - 1` random boxes of it, on the images' device.

    The draws of an image depend on `seed` and on its own grey levels alone: not on the rest of the batch, its place in
    it, the device or any global random state. More views leave the first ones as they are.

    Args:
        images_BCHW: (B, C, H, W), floats in [0, 1] or uint8.
        num_views: V, at least 2.
        crop: how large and of what shape the boxes are, and how often they are mirrored.
        seed: a whole number, of which 64 bits count.

    Raises ValueError for fewer than two views.
    """
    check_whole(2, num_views=num_views)
    rows, _, height, width = images_BCHW.shape
    images_BCHW = grey_levels(images_BCHW) if images_BCHW.is_floating_point() else images_BCHW
    draws_BVR = torch.empty(rows, num_views - 1, DRAWS, dtype=torch.float64)
    for draws_VR, image_CHW in zip(draws_BVR, images_BCHW.cpu(), strict=True):
        draws_VR.uniform_(generator=torch.Generator().manual_seed(picture_key(image_CHW, seed)))
    boxes_N4, mirrored_N = crop.boxes(height, width, draws_BVR.flatten(0, 1))
    boxes_BV4 = boxes_N4.view(rows, num_views - 1, 4)
    whole_B14 = torch.tensor([0, 0, height, width]).expand(rows, 1, 4)
    return Views(
        torch.cat([whole_B14, boxes_BV4], dim=1).to(images_BCHW.device),
        F.pad(mirrored_N.view(rows, num_views - 1), (1, 0)).to(images_BCHW.device),
    )


def _coordinates(start_BV: Tensor, length_BV: Tensor, size: int, kind: torch.dtype) -> Tensor:
    """Where `size` pixels of a resized side are read, (B, V, size): pixels of the image, never outside the box."""
    middle_S = torch.arange(size, device=start_BV.device, dtype=kind) + 0.5
    inside_BVS = middle_S * (length_BV[..., None].to(kind) / size) - 0.5
    return start_BV[..., None] + inside_BVS.clamp(min=0).minimum(length_BV[..., None].to(kind) - 1)
