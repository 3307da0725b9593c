"""What every zero-shot classifier is, whatever its family: pixels in [0, 1] in, logits of class names out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..checks import check_differentiable, checked_images, checked_labels
from ..pictures import normalisation_of
from ..prompts import ClipPromptConfig
from ..prompts.access import pixel_layer
from .class_texts import ClassTexts
from .image_kernels import image_attention, use_patch_product
from .texts import check_same_classes, parts_of, resolution_of
from .untrusted import check_sizes


@dataclass
class ZeroShotOutput(ModelOutput):
    """What a zero-shot classifier returns.

    Args:
        loss: mean cross-entropy, if labels were given.
        logits: (B, C), s * cos(f(x), t_c) with s = exp(logit_scale); plus the model's logit_bias, where it has one.
        cosine: (B, C), cos(f(x), t_c): the logits at temperature 1, without a bias.
        image_embeds: (B, D), f(x): projected, not normalised.
        class_embeds: (C, D), t_c: of unit length; (G, C, D) where G groups of images have classes of their own.
        patch_embeds: (B, P, D), the patch tokens, projected like the image, without class and prompt tokens; None
            unless they were asked for.
        logit_scale: (), s.
        text_embeds: (K, C, D), further class embeddings; None unless an objective asked for them.

    Of captions in the place of classes the same, (B, N) and (N, D).
    """

    loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]  # always there; `ModelOutput` asks for defaults
    cosine: Tensor = None  # type: ignore[assignment]
    image_embeds: Tensor = None  # type: ignore[assignment]
    class_embeds: Tensor = None  # type: ignore[assignment]
    patch_embeds: Tensor | None = None
    logit_scale: Tensor = None  # type: ignore[assignment]
    text_embeds: Tensor | None = None

    def rows(self, index: Any) -> ZeroShotOutput:
        """The output of some images: a slice, a list or tensor of whole numbers, or a mask (B,). Without the loss,
        which is a mean over all; class embeddings of groups become those of each image, (rows, C, D).
        """
        classes = self.class_embeds
        if classes is not None and classes.dim() == 3:
            classes = classes.repeat_interleave(len(self.logits) // len(classes), dim=0)[index]
        own: Any = (self.logits, self.cosine, self.image_embeds, self.patch_embeds)
        logits, cosine, images, patches = (None if value is None else value[index] for value in own)
        return ZeroShotOutput(None, logits, cosine, images, classes, patches, self.logit_scale, self.text_embeds)


class ZeroShotClassifier(ClassTexts):
    """Pixels in [0, 1] to one logit per class; a model class of transformers mixes it in.

    A family (`clip.py` and `siglip.py` are two) gives what `ClassTexts` asks for, and of its image side
    `image_modules`, tower first; `image_layers`, the tower's layers in their order, and `image_head`, the modules
    after them; `num_image_tokens`, how many tokens a layer reads without prompts; `embedding_width`, D;
    `encode_pixels(pixels, interpolate_pos_encoding)`, the projected features (B, D) and hidden states of pixels that
    are normalised; `project_patches(hidden)`, (B, P, D); and another `score`, where it compares otherwise.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self._init_texts()
        self.processor: Any = None
        self.input_size = config.vision_config.image_size
        channels = config.vision_config.num_channels
        self.register_buffer("image_mean", torch.full((channels, 1, 1), torch.nan), persistent=False)
        self.register_buffer("image_std", torch.full((channels, 1, 1), torch.nan), persistent=False)
        use_patch_product(self.image_modules[0])
        self.normalisation: tuple[list[float], list[float]] | None = None  # the same, as it was given
        self._base_normalisation: tuple[list[float], list[float]] | None = None  # that of the first processor

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no part in the `fixed_class_embeds` of what it is a copy of."""
        return {**self.__dict__, "_fixed": None, "_under_attack": False, "_differentiable": False}

    def require_processor(self) -> Any:
        """The processor; raises ValueError if none was set."""
        if self.processor is None:
            raise ValueError("the model has no processor; load it with from_pretrained or call set_processor first.")
        return self.processor

    def set_processor(self, processor: Any) -> None:
        """Take tokenizer, picture preparation and normalisation from `processor`: its mean and std, or none where it
        says `do_normalize: false`.

        Raises ValueError for a processor that can't be followed (see `pictures.normalisation_of`).
        """
        mean, std = normalisation_of(processor.image_processor)
        check_sizes(processor.image_processor, self.config.vision_config.image_size)
        self.processor = processor
        self.set_normalisation(mean, std)
        self._base_normalisation = self._base_normalisation or self.normalisation

    def has_own_normalisation(self) -> bool:
        """Whether mean and std are others than those that the model came with."""
        return self.normalisation != self._base_normalisation

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise by `mean` and `std` (one value per channel, in units of [0, 1]), in the saved processor too."""
        channels = self.config.vision_config.num_channels
        finite = all(math.isfinite(value) for value in (*mean, *std))
        if len(mean) != channels or len(std) != channels or not finite or not all(value > 0 for value in std):
            raise ValueError(f"mean={mean!r} and std={std!r} must have {channels} finite values each, std positive.")
        with torch.inference_mode(False):
            self.image_mean = torch.tensor(mean, dtype=self.dtype, device=self.device).view(-1, 1, 1)
            self.image_std = torch.tensor(std, dtype=self.dtype, device=self.device).view(-1, 1, 1)
        self.normalisation = list(mean), list(std)
        if self.processor is not None and self._normalisation_differs(mean, std):
            image_processor = self.processor.image_processor
            image_processor.image_mean, image_processor.image_std = list(mean), list(std)
            image_processor.do_normalize = True
        for config in getattr(self, "peft_config", {}).values():
            if isinstance(config, ClipPromptConfig):  # prompts carry it, so that they are never loaded under another
                config.image_mean, config.image_std = list(mean), list(std)

    def _normalisation_differs(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        """Whether the processor says otherwise."""
        own = normalisation_of(self.require_processor().image_processor)
        return [list(values) for values in own] != [list(mean), list(std)]

    def set_input_size(self, side: int | None) -> None:
        """Take images of `side` x `side` pixels and enlarge them inside (bicubic) to what the image encoder takes.

        An attack then works on the pixels of the smaller image, as is the custom for CIFAR (32 px) and STL-10 (96 px).
        None, and the encoder's own size, take images as they are. Raises ValueError for a size beyond the encoder's.
        """
        own = self.config.vision_config.image_size
        if side is not None and not 1 <= side <= own:
            raise ValueError(f"side={side!r} must be in 1 .. {own}, the size that the image encoder takes; or None.")
        self.input_size = own if side is None else side

    @contextmanager
    def prepared_for(
        self,
        dataset: Any,
        template: str | Sequence[str] | None = None,
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        training: bool | None = False,
        labels: bool = True,
    ) -> Iterator[None]:
        """The model as it must be for the images of a dataset: input size, classes, mode; as found afterwards.

        Args:
            dataset: what gives its images; where it names its classes, these must be the model's, in their order.
            template, descriptions: set the dataset's classes, with these, in place of comparing them.
            training: the mode inside; None leaves it.
            labels: whether its labels are used: else nothing is compared.

        Raises ValueError for a dataset of other classes, or of the same in another order.
        """
        before, mode, side = self.input_size, self.training, resolution_of(dataset, self.input_size)
        sets = template is not None or descriptions is not None
        with self.same_classes_after() if sets else nullcontext():
            try:
                if sets:
                    self.set_classes(parts_of(dataset)[0].class_names, template, descriptions)
                if labels:
                    check_same_classes(self.class_names, dataset)
                self.set_input_size(side)
                if training is not None:
                    self.train(training)
                yield
            finally:
                self.input_size = before
                if training is not None:
                    self.train(mode)

    def forward(  # pixels to logits, where the model of transformers pairs pixels with texts
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_patches: bool = False,
        captions: Tensor | None = None,
        class_prompts: Tensor | None = None,
    ) -> ZeroShotOutput:
        """Logits for each class, or each caption.

        Args:
            pixel_values: (B, C, H, W), float in [0, 1], not normalised.
            labels: (B,), class indices, for the mean cross-entropy in `loss`.
            interpolate_pos_encoding: accept another image size than the checkpoint's.
            output_patches: give `patch_embeds`.
            captions: (N, L), token ids of texts that stand in the place of the classes, with a graph.
            class_prompts: (B,), with class-wise prompts in the model: the classes whose prompts the images get.

        Raises ValueError if no classes are set, the shape is wrong, a label is out of range, or (in eval mode, outside
        of `fixed_class_embeds`) values lie outside [0, 1]; and with class-wise prompts if none are chosen. Compiled
        code doesn't look at values.
        """
        if not self.class_names and captions is None:
            raise ValueError("the model has no classes; call set_classes(class_names) first.")
        if not torch.compiler.is_compiling():
            values = False if self.training else None
            self.check_pixels(pixel_values, values=values, any_size=interpolate_pos_encoding)
        if output_patches:
            image_embeds_BD, patch_embeds_BPD = self.encode_patches(
                pixel_values, interpolate_pos_encoding, class_prompts
            )
        else:
            image_embeds_BD = self.encode_images(pixel_values, interpolate_pos_encoding, class_prompts)
            patch_embeds_BPD = None
        class_embeds = self.class_embeds if captions is None else self.encode_captions(captions)
        logits_BC, cosine_BC, image_embeds_BD = self.score(image_embeds_BD, class_embeds)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BC, checked_labels(labels, len(logits_BC), len(self.class_names)))
        scale = self.logit_scale.exp().squeeze()
        return ZeroShotOutput(loss, logits_BC, cosine_BC, image_embeds_BD, class_embeds, patch_embeds_BPD, scale)

    def encode_images(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, class_prompts: Tensor | None = None
    ) -> Tensor:
        """f(x), (B, D): projected, not normalised. Images (B, C, H, W) in [0, 1] of `input_size`, or of the size that
        the encoder takes; nothing of them is checked. Raises ValueError where quantised layers hide a gradient, and
        for class-wise prompts without a choice of them, (B,), and the other way round.
        """
        return self._encoded(self._normalised(pixel_values, class_prompts), interpolate_pos_encoding)[0]

    def encode_patches(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, class_prompts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """f(x), (B, D), and the projected patch tokens (B, P, D); see `encode_images`."""
        pixels = self._normalised(pixel_values, class_prompts)
        embeds_BD, hidden_BTW = self._encoded(pixels, interpolate_pos_encoding)
        return embeds_BD, self.project_patches(hidden_BTW)

    def _encoded(self, pixels_BCHW: Tensor, interpolate_pos_encoding: bool) -> tuple[Tensor, Tensor]:
        """What `encode_pixels` gives, by the kernels that are fast here."""
        tower = self.image_modules[0]
        if torch.compiler.is_compiling():
            return self.encode_pixels(pixels_BCHW, interpolate_pos_encoding)
        with image_attention(tower, pixels_BCHW):
            return self.encode_pixels(pixels_BCHW, interpolate_pos_encoding)

    def _normalised(self, pixel_values: Tensor, class_prompts: Tensor | None) -> Tensor:
        if pixel_values.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if not self._differentiable:
                check_differentiable(self.image_modules[0])
            self._differentiable = self._under_attack
        side, layer = self.config.vision_config.image_size, pixel_layer(self.image_modules[0])
        units = None if layer is None else layer.in_units()
        if layer is None and class_prompts is not None:
            raise ValueError("class_prompts chooses among class-wise prompts (per_class=True); the model has none.")
        if layer is not None and units is not None and units.side != side:
            pixel_values = layer.put_unit_pixels(pixel_values, class_prompts)
        if self.input_size != side and pixel_values.shape[-1] != side:
            pixel_values = F.interpolate(pixel_values, size=(side, side), mode="bicubic", align_corners=False)
        if layer is not None and units is not None and units.side == side:
            pixel_values = layer.put_unit_pixels(pixel_values, class_prompts)
        return (pixel_values - self.image_mean) / self.image_std

    def score(self, image_embeds_BD: Tensor, class_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and cosines (B, C) of image embeddings with unit class embeddings, (C, D) or (G, C, D) for G groups
        of images in their order; and the image embeddings in the precision, at least float32, in which they were
        compared: bfloat16 would leave two digits of 100 * cos.
        """
        with torch.autocast(image_embeds_BD.device.type, enabled=False):
            head = torch.promote_types(image_embeds_BD.dtype, torch.float32)
            image_embeds_BD = image_embeds_BD.to(head)
            cosine_BC = _cosine(F.normalize(image_embeds_BD, dim=-1), class_embeds.to(head))
            return self.logit_scale.exp().to(head) * cosine_BC, cosine_BC, image_embeds_BD

    def check_pixels(self, pixel_values: Tensor, *, values: bool | None = None, any_size: bool = False) -> None:
        """Raise ValueError/TypeError unless the images fit this model: channels, size and values in [0, 1].

        Args:
            values: whether to look at these, which takes a device's time; None does so outside of
                `fixed_class_embeds`.
            any_size: accept every size.
        """
        expected = (self.config.vision_config.num_channels, self.input_size, self.input_size)
        given = tuple(pixel_values.shape[1:])
        if pixel_values.dim() != 4 or given[0] != expected[0] or (given != expected and not any_size):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; this model takes (batch, {expected[0]}, "
                f"{expected[1]}, {expected[2]}): convert the images to RGB and resize them with the model's processor."
            )
        if not self._under_attack if values is None else values:
            checked_images(pixel_values, "pixel_values")

    def vision_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the image encoder, its projection included."""
        return [parameter for module in self.image_modules for parameter in module.parameters()]


def _cosine(images_BD: Tensor, classes: Tensor) -> Tensor:
    """Products of unit vectors (B, C), with classes (C, D), or (G, C, D) for G groups of images in their order."""
    if classes.dim() == 2:
        return images_BD @ classes.T
    if len(images_BD) % len(classes):
        raise ValueError(f"{len(images_BD)} images don't divide among prompts for {len(classes)} samples.")
    return (images_BD.view(len(classes), -1, images_BD.shape[1]) @ classes.mT).flatten(0, 1)


@contextmanager
def without_gradients(module: torch.nn.Module) -> Iterator[None]:
    """Parameters with `requires_grad` off inside, as found outside."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
