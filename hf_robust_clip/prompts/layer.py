"""A module of CLIP with prompts before (or, for token embeddings, after) it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

MERGE = (
    "prompts can't be merged into the weights: they are tokens, not a change of a matrix. Keep the adapter, or take "
    "it off with unload()."
)


@dataclass(frozen=True)
class Place:
    """Which module it is: the input of layer `index` of a tower (0: where tokens enter), or the pixels."""

    tower: Literal["vision", "text", "pixel"]
    index: int


@dataclass(frozen=True)
class UnitPixels:
    """How an adapter's pixel prompts are put on pictures in [0, 1].

    Args:
        side: of these pictures.
        class_names: the classes that each have a prompt; None where one prompt is for all.
    """

    side: int
    class_names: tuple[str, ...] | None = None


class ClipPromptLayer(nn.Module, BaseTunerLayer):
    """Puts the active adapter's prompts into what the wrapped module reads.

    Prompts of an adapter have shape (n, D); with a leading dimension, (B, n, D), every sample carries its own: the
    rows of the input are then B groups of equal size, in their order (B images, or B * k for k views of each), or a
    single row that is repeated for all. Put such tensors in their place by `torch.func.functional_call`, or set the
    parameter's data.
    """

    adapter_layer_names = ("clip_prompt_tokens", "clip_prompt_projection")

    def __init__(self, base_layer: nn.Module, place: Place, first_word: int = 1):
        super().__init__()
        self.base_layer = base_layer
        self.place = place
        self.first_word = first_word  # the position of the first token that text prompts replace
        self.clip_prompt_tokens = nn.ParameterDict()
        self.clip_prompt_projection = nn.ModuleDict()
        self.partner: list[ClipPromptLayer] = []  # the same layer of the other tower; in a list: not a submodule
        self.pixel_index: dict[str, Tensor] = {}
        self.unit_pixels: dict[str, UnitPixels] = {}
        self.unclipped_gradient = False  # whether a gradient takes clipping for the identity
        self.bare = False  # whether a forward that chooses no class' prompt is that of the network without prompts

    def update_layer(self, adapter_name: str, tokens: Tensor | None, projection: nn.Linear | None = None) -> None:
        """Give an adapter prompts of its own, or a map from those of the other tower."""
        if tokens is not None:
            self.clip_prompt_tokens[adapter_name] = nn.Parameter(tokens)
        if projection is not None:
            self.clip_prompt_projection[adapter_name] = projection

    @property
    def active_names(self) -> list[str]:
        """Of the active adapters."""
        return list(self.active_adapters)  # type: ignore[arg-type]  # PEFT doesn't say what it is

    def prompts(self) -> Tensor | None:
        """The active adapter's prompts here, (n, D) or (B, n, D); None if it has none here or adapters are off."""
        active = self.active_names
        if self.disable_adapters or not active:
            return None
        if len(active) > 1:
            raise ValueError(f"{len(active)} prompt adapters are active ({', '.join(active)}); set_adapter(one).")
        if active[0] in self.clip_prompt_tokens:
            return self.clip_prompt_tokens[active[0]]
        if active[0] in self.clip_prompt_projection:
            linear: nn.Linear = self.clip_prompt_projection[active[0]]  # type: ignore[assignment]
            source = self.partner[0].clip_prompt_tokens[active[0]].to(linear.weight.dtype)
            return source @ linear.weight.mT + linear.bias[..., None, :]  # a leading B is allowed in any of the three
        return None

    def coupled_parameters(self) -> list[nn.Parameter]:
        """Parameters of the other tower that these prompts are made from."""
        if self.disable_adapters or not self.partner:
            return []
        own = self.clip_prompt_projection
        return [self.partner[0].clip_prompt_tokens[name] for name in self.active_names if name in own]

    def put_prompts(self, hidden_BTD: Tensor) -> Tensor:
        """The hidden states with the prompts in their place; as they are if there are none."""
        prompts = self.prompts()
        if prompts is None:
            return hidden_BTD
        hidden_BTD, prompts = match_rows(hidden_BTD, prompts)
        count = prompts.shape[1]
        if self.place.tower == "text":
            first = self.first_word
            if hidden_BTD.shape[1] < first + count + 1:
                raise ValueError(f"the texts have {hidden_BTD.shape[1]} tokens, too few around {count} text prompts.")
            return torch.cat([hidden_BTD[:, :first], prompts, hidden_BTD[:, first + count :]], dim=1)
        kept = hidden_BTD if self.place.index == 0 else hidden_BTD[:, : hidden_BTD.shape[1] - count]
        return torch.cat([kept, prompts], dim=1)

    def put_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """The pictures with the pixel prompt (C, N) or (B, C, N) added at its N pixels."""
        prompts = self.prompts()
        if prompts is None or self.in_units() is not None:
            return pixels_BCHW
        pixels_BCN, prompts = match_rows(pixels_BCHW.flatten(2), prompts)
        where = self.pixel_index[self.active_names[0]].to(pixels_BCHW.device)
        return pixels_BCN.index_add(2, where, prompts).view(-1, *pixels_BCHW.shape[1:])

    def in_units(self) -> UnitPixels | None:
        """How the active prompts are put on pictures in [0, 1]; None if they aren't, or there are none."""
        return None if self.prompts() is None else self.unit_pixels.get(self.active_names[0])

    def put_unit_pixels(self, pixels_BCHW: Tensor, class_prompts: Tensor | None = None) -> Tensor:
        """clip(x + m * delta, 0, 1) of pictures in [0, 1], with the prompt delta (C, N) at its N pixels; of class-wise
        ones (K, C, N), or others with a leading dimension, delta is that of each picture's class.

        Args:
            class_prompts: (B,), these classes. None, while `bare`, leaves the pictures as they are.

        Raises ValueError for pictures of another side, for class-wise prompts without a choice, and for a choice among
        prompts that aren't class-wise, or beyond the classes.
        """
        units, prompts = self.in_units(), self.prompts()
        assert units is not None and prompts is not None
        if units.class_names is None and class_prompts is not None:
            raise ValueError("class_prompts chooses among class-wise prompts (per_class=True); these are for all.")
        if units.class_names is not None:
            if class_prompts is None:
                if self.bare:
                    return pixels_BCHW
                raise ValueError(
                    "the classifier has a prompt for each class, and no logits without a choice (class_prompts): "
                    "predict by the defence that was saved with it."
                )
            check_class_prompts(class_prompts, len(pixels_BCHW), len(units.class_names))
            prompts = prompts.index_select(0, class_prompts)
        if pixels_BCHW.shape[2:] != (units.side, units.side):
            raise ValueError(
                f"pixel_values of {tuple(pixels_BCHW.shape[2:])} px can't take prompts made for {units.side} px; give "
                "pictures of that size."
            )
        pixels_BCN, prompts = match_rows(pixels_BCHW.flatten(2), prompts)
        where = self.pixel_index[self.active_names[0]].to(pixels_BCHW.device)
        sum_BCN = pixels_BCN.index_add(2, where, prompts)
        clipped_BCN = sum_BCN.clamp(0, 1)
        if self.unclipped_gradient:
            clipped_BCN = sum_BCN + (clipped_BCN - sum_BCN).detach()
        return clipped_BCN.view(-1, *pixels_BCHW.shape[1:])

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:  # whatever the wrapped module takes
        if self.place.tower == "pixel":
            return self.base_layer(self.put_pixels(x), *args, **kwargs)
        if self.place == Place("text", 0):  # token ids to embeddings
            return self.put_prompts(self.base_layer(x, *args, **kwargs))
        return self.base_layer(self.put_prompts(x), *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: prompts are not part of a weight."""
        raise ValueError(MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def __repr__(self) -> str:
        return "clip_prompt." + super().__repr__()


def check_class_prompts(index_B: Tensor, count: int, num_classes: int) -> None:
    """Raise ValueError/TypeError unless these are classes (B,), one for each of `count` pictures. On a GPU, which one
    would have to wait for, nobody looks at the numbers: there `index_select` refuses those beyond the classes.
    """
    if not isinstance(index_B, Tensor) or index_B.dtype != torch.long:
        raise TypeError("class_prompts must be a tensor of whole numbers (torch.long), a class for each image.")
    if index_B.shape != (count,):
        raise ValueError(f"class_prompts {tuple(index_B.shape)} must have a class for each of {count} images.")
    looked_at = index_B.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and count and not 0 <= int(index_B.min()) <= int(index_B.max()) < num_classes:
        raise ValueError(f"class_prompts={index_B.tolist()} must lie in 0 .. {num_classes - 1}.")


def match_rows(input_BX: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Input rows and prompts (B, n, D) with as many rows, in the input's dtype.

    Raises ValueError if the rows are neither one nor a multiple of the prompts' B.
    """
    rows = len(input_BX)
    prompts = prompts.to(input_BX.dtype)
    if prompts.dim() == 2:
        return input_BX, prompts.expand(rows, -1, -1)
    groups = len(prompts)
    if rows == 1:
        return input_BX.expand(groups, *input_BX.shape[1:]), prompts
    if rows % groups:
        raise ValueError(f"{rows} inputs don't divide among prompts for {groups} samples; give each equally many.")
    return input_BX, prompts.repeat_interleave(rows // groups, dim=0)
