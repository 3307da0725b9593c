"""Where prompts stand, how many, and how they begin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peft import PeftConfig
from peft.utils import PeftType

from ..checks import check_choice, check_least, check_whole
from .layer import Place

Design = Literal["V", "VLI", "VLJ", "T", "pixel"]
Coupling = Literal["text_to_vision", "vision_to_text"]
PixelRegion = Literal["border", "full"]
COUNTS = ("num_vision_tokens", "num_text_tokens", "vision_depth", "text_depth")


@dataclass
class ClipPromptConfig(PeftConfig):
    """Settings of `ClipPromptModel`: learned prompts in a frozen CLIP or (designs V and pixel) SigLIP.

        model = get_peft_model(clip, ClipPromptConfig(design="VLI"))

    Designs, and what they learn at ViT-B/16 with the defaults:

    - `"V"`: vision prompts, deep. 9 * 2 * 768 = 13,824 parameters.
    - `"VLI"`: vision and text prompts, independent. 13,824 + 9 * 2 * 512 = 23,040.
    - `"VLJ"`: prompts of one side, and linear maps that make those of the other. 9 * 2 * 512 + 9 * (512 * 768 + 768) =
      3,555,072 for `coupling="text_to_vision"`.
    - `"T"`: text prompts. With `num_text_tokens=4, text_depth=1` this is CoOp's unified context: 4 * 512.
    - `"pixel"`: a picture added to the (normalised) pixels: visual prompting. With `clipped` it is added in units of
      [0, 1] before normalisation, x(+) = clip(x + m * delta, 0, 1) with m the region; with `per_class` each class k
      has its own delta_k (C-AVP): 3 * (224^2 - 164^2) = 69,840 values per class at 224 px.

    Vision prompts stand after the patch tokens: they are appended before `pre_layrnorm` (in SigLIP, which has none,
    before the first layer), and before each of the layers 1 .. `vision_depth` - 1 the last tokens are replaced by that
    layer's own. SigLIP's pooling head reads what becomes of them, with the patches. Text prompts replace the
    embeddings of tokens 1 .. n after the start token (positions are added to them), and likewise before the layers
    1 .. `text_depth` - 1. Later layers carry on what the prompts have become.

    Args:
        design: see above.
        num_vision_tokens, num_text_tokens: prompts per layer, at least 0. For VLJ the two must be equal.
        vision_depth, text_depth: layers with prompts, 0 .. the tower's number of layers. 0 leaves a tower as it is.
        context_init: words whose token embeddings the first text prompts begin from; they must hold at least
            `num_text_tokens` tokens, and those beyond stay words (2 prompts and "a photo of a": "of a" stays in the
            template). None begins from N(0, init_std^2), as all deep prompts do.
        context_token_ids: token ids of these words; None asks the tokenizer of the model's checkpoint. Filled in when
            the prompts are injected.
        coupling: for VLJ. `"text_to_vision"` (the default there) learns text prompts and a linear map for each layer
            to vision, as MaPLe does. `"vision_to_text"` does so in the first layer and turns the maps round in deeper
            ones, as FAP does.
        init_std: standard deviation of random prompts.
        pixel_region, border_width: for `"pixel"`: a frame so many pixels wide, or the whole picture. It starts at 0.
        clipped: for `"pixel"`: in units of [0, 1], clipped, as above; only in a classifier of ours, which normalises
            afterwards. None, the default, is true with `per_class` and false without.
        per_class: for `"pixel"`: one prompt for each class of the classifier that they are injected into. Such a
            classifier has no logits of its own: every forward says by `class_prompts` which class' prompt an image
            gets, and a defence makes predictions of that. It is bound to its classes, in their order.
        prompt_size: for clipped prompts: the side of the pictures that they are put on, before these are enlarged to
            what the encoder takes; None puts them on the enlarged pictures.
        modules_to_save: names of further modules to train and save, as everywhere in PEFT.
        family: `"clip"` or `"siglip"`.
        vision_width, text_width, image_size: like `family` of the model that the prompts were made for; filled in when
            they are injected, and compared when they are loaded.
        class_names: those of prompts with `per_class`; filled in when they are injected, and compared whenever classes
            are set.
        image_mean, image_std: the normalisation under which they were trained; filled in when they are injected into a
            classifier of ours, which is given it when they are loaded.

    Raises ValueError for an unknown design, coupling or region, and for counts that don't fit together. Counts beyond
    the model are refused when the prompts are injected.

    Source: TAPT (arXiv 2411.13136) section 3.1, VPT (arXiv 2203.12119), MaPLe (arXiv 2210.03117), CoOp (arXiv
    2109.01134), FAP (arXiv 2403.14774), visual prompting (arXiv 2203.17274), C-AVP (arXiv 2210.06284).
    """

    design: Design = "VLI"
    num_vision_tokens: int = 2
    num_text_tokens: int = 2
    vision_depth: int = 9
    text_depth: int = 9
    context_init: str | None = "a photo of a"
    context_token_ids: list[int] | None = None
    coupling: Coupling | None = None
    init_std: float = 0.02
    pixel_region: PixelRegion = "border"
    border_width: int = 30
    clipped: bool | None = None
    per_class: bool = False
    prompt_size: int | None = None
    modules_to_save: list[str] | None = field(default=None)
    family: str | None = None
    vision_width: int | None = None
    text_width: int | None = None
    image_size: int | None = None
    class_names: list[str] | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    target_modules: ClassVar[None] = None  # the tuner finds them; PEFT asks for the attribute
    places: ClassVar[dict[str, Place]] = {}  # filled in, on the instance, when the prompts are injected

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["CLIP_PROMPT"]
        check_choice(Design, design=self.design)
        if self.coupling is not None:
            check_choice(Coupling, coupling=self.coupling)
        check_choice(PixelRegion, pixel_region=self.pixel_region)
        check_whole(0, **{name: getattr(self, name) for name in COUNTS})
        check_whole(1, border_width=self.border_width)
        check_least(0, init_std=self.init_std)
        self._settle_units()
        if self.design == "VLJ":
            self.coupling = self.coupling or "text_to_vision"
            for vision, text in (("num_vision_tokens", "num_text_tokens"), ("vision_depth", "text_depth")):
                if getattr(self, vision) != getattr(self, text):
                    raise ValueError(
                        f"{vision}={getattr(self, vision)} and {text}={getattr(self, text)} must be equal for "
                        "design='VLJ'."
                    )
        elif self.coupling is not None:
            raise ValueError(f"coupling={self.coupling!r} goes with design='VLJ', not with {self.design!r}.")

    def _settle_units(self) -> None:
        """Of pixel prompts: whether they are clipped. Raises ValueError for settings that don't go together."""
        if self.per_class and self.clipped is False:
            raise ValueError("per_class=True and clipped=False don't go together: class-wise prompts are clipped.")
        self.clipped = self.per_class if self.clipped is None else self.clipped
        if self.clipped and self.design != "pixel":
            name = "per_class" if self.per_class else "clipped"
            raise ValueError(f"{name}=True goes with design='pixel', not with {self.design!r}.")
        if self.prompt_size is not None:
            check_whole(1, prompt_size=self.prompt_size)
            if not self.clipped:
                raise ValueError(
                    f"prompt_size={self.prompt_size} does nothing without clipped=True or per_class=True."
                )

    @property
    def has_vision(self) -> bool:
        """Whether there are prompts in the vision tower."""
        return self.design in ("V", "VLI", "VLJ")

    @property
    def has_text(self) -> bool:
        """Whether there are prompts in the text tower."""
        return self.design in ("VLI", "VLJ", "T")

    def owner(self, layer: int) -> str:
        """For VLJ: the tower whose prompts of this layer are learned; the other's are made from them."""
        return "vision" if self.coupling == "vision_to_text" and layer > 0 else "text"

    def summary(self) -> str:
        """What was chosen, in a few words, for cards."""
        if self.design == "pixel":
            region = f"border of {self.border_width} px" if self.pixel_region == "border" else "whole picture"
            units = ", in [0, 1] and clipped" if self.clipped else ""
            size = f", on pictures of {self.prompt_size} px" if self.prompt_size is not None else ""
            each = f", one for each of {len(self.class_names)} classes" if self.per_class and self.class_names else ""
            return f"design pixel, {region}{units}{size}{each}"
        vision = f", {self.num_vision_tokens} vision tokens in {_layers(self.vision_depth)}" if self.has_vision else ""
        text = f", {self.num_text_tokens} text tokens in {_layers(self.text_depth)}" if self.has_text else ""
        words = f' from "{self.context_init}"' if self.has_text and self.context_init is not None else ""
        coupling = f", {self.coupling}" if self.coupling else ""
        return f"design {self.design}{vision}{text}{words}{coupling}"


def _layers(depth: int) -> str:
    return f"{depth} layer" if depth == 1 else f"{depth} layers"
