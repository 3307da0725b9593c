"""The image encoder's slow places, computed another way with the same result up to rounding: attacks live on the
gradient by pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

MATH_TOKENS = 200  # up to so many, measured in bfloat16 on a CPU, the fused attention's backward is the slower one


class PatchProduct(nn.Conv2d):
    """The convolution that cuts a picture into patches and projects each, as a matrix product:

        y_p = W vec(x_p) + b

    for kernel = stride, no padding, dilation or groups, and sides that are whole numbers of patches; else it is the
    convolution that it was. Parameters and their names are the convolution's own. A strided convolution's gradient by
    its input is slow: 5.5 times as slow as this in float32, 10 times in bfloat16 (ViT-B/32, 16 images, one thread).
    """

    def forward(self, input: Tensor) -> Tensor:  # the base class' own name
        """(B, C, H, W) to (B, width, H / patch, W / patch)."""
        high, wide = self.kernel_size
        if not self._cuts_patches() or input.shape[-2] % high or input.shape[-1] % wide or input.dim() != 4:
            return super().forward(input)
        grid_BCYHXW = input.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
        patches_BYXK = grid_BCYHXW.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches_BYXK, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def _cuts_patches(self) -> bool:
        whole = self.stride == self.kernel_size and self.padding in ((0, 0), "valid")
        return whole and self.dilation == (1, 1) and self.groups == 1


def use_patch_product(tower: nn.Module) -> None:
    """Let a tower's plain convolution of patches be a `PatchProduct`, in place; any other module there stays."""
    embeddings = getattr(tower, "embeddings", None)
    if type(getattr(embeddings, "patch_embedding", None)) is nn.Conv2d:
        embeddings.patch_embedding.__class__ = PatchProduct  # type: ignore[union-attr]


def use_convolution(tower: nn.Module) -> None:
    """Let a `PatchProduct` in a tower be the plain convolution again, in place: for what leaves this package."""
    embeddings = getattr(tower, "embeddings", None)
    if type(getattr(embeddings, "patch_embedding", None)) is PatchProduct:
        embeddings.patch_embedding.__class__ = nn.Conv2d  # type: ignore[union-attr]


def image_attention(tower: nn.Module, pixels_BCHW: Tensor, tokens: int) -> AbstractContextManager[object]:
    """The attention kernel for a forward of the image tower: on a CPU in half precision, where a gradient is wanted of
    at most `MATH_TOKENS` tokens, the plain one (a third of the fused one's time at 50 tokens); else torch's choice.

    With gradient checkpointing it is torch's too: a layer that runs again must take the same one.
    """
    if pixels_BCHW.device.type != "cpu" or tokens > MATH_TOKENS or not torch.is_grad_enabled():
        return nullcontext()
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if (autocast or next(tower.parameters()).dtype) not in (torch.bfloat16, torch.float16):
        return nullcontext()
    again = any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
    return nullcontext() if again or not torch.backends.cuda.math_sdp_enabled() else sdpa_kernel(SDPBackend.MATH)
