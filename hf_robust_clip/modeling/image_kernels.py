"""The image encoder's slow places, computed another way with the same result up to rounding: attacks live on the
gradient by pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRODUCT_TOKENS = 300  # ViT-L/14 has 257; the weights of attention are kept for the gradient, T * T of each head


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


class AttentionByProducts(TorchFunctionMode):
    """Lets attention of at most `PRODUCT_TOKENS` tokens (more would fill memory), without a mask, dropout or grouped
    heads, be two matrix products, in the inputs' own precision:

        softmax(q k^T / sqrt(d)) v

    In bfloat16 on a CPU its gradient takes a third of the time of torch's plain kernel, which goes by float32, and an
    eighth of that of the fused one (65 tokens, 6 heads of 32, 100 images, one thread).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_plain(args[3:], kwargs):
            query: Tensor = args[0] if args else kwargs["query"]
            if query.shape[-2] <= PRODUCT_TOKENS:
                return attention_by_products(*args[:3], **{key: kwargs[key] for key in _PLAIN if key in kwargs})
        return func(*args, **kwargs)


_PLAIN = ("query", "key", "value", "scale")


def _is_plain(further: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of attention asks for nothing beside its inputs and a scale."""
    asked = [*further, *(value for key, value in kwargs.items() if key not in _PLAIN)]
    return all(not isinstance(value, Tensor) and not value for value in asked)


def attention_by_products(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v of (..., T, d), scale 1 / sqrt(d) unless given; (..., T, d)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax((query * scale) @ key.transpose(-1, -2), dim=-1) @ value


def image_attention(tower: nn.Module, pixels_BCHW: Tensor) -> AbstractContextManager[object]:
    """The attention kernel for a forward of the image tower: on a CPU in bfloat16 `AttentionByProducts`, else torch's
    choice.

    With gradient checkpointing it is torch's too: a layer that runs again must take the same one.
    """
    if pixels_BCHW.device.type != "cpu":
        return nullcontext()
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if (autocast or next(tower.parameters()).dtype) != torch.bfloat16:
        return nullcontext()
    again = any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
    return nullcontext() if again or not torch.backends.cuda.math_sdp_enabled() else AttentionByProducts()
