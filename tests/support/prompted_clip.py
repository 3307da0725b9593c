"""A CLIP with three layers and unequal widths, and the rows over which prompts are tested."""

import functools

import torch
from peft import PeftModel, get_peft_model
from tiny import CONTEXT_LENGTH, make_processor
from transformers import CLIPConfig, CLIPModel

from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.prompts import ClipPromptConfig

NAMES = ("zero", "one", "a b", "three's", "ice-cream", "six")
TEMPLATE = "a bc d {}."
ROWS = {
    "V": dict(design="V", num_vision_tokens=2, vision_depth=3),
    "V-shallow": dict(design="V", num_vision_tokens=3, vision_depth=1),
    "T": dict(design="T", num_text_tokens=2, text_depth=2),
    "T-shallow": dict(design="T", num_text_tokens=4, text_depth=1),
    "T-random": dict(design="T", num_text_tokens=1, text_depth=3, context_init=None),
    "VLI": dict(design="VLI", num_vision_tokens=3, num_text_tokens=2, vision_depth=2, text_depth=3),
    "VLJ": dict(design="VLJ", vision_depth=3, text_depth=3),
    "VLJ-vision": dict(design="VLJ", vision_depth=2, text_depth=2, coupling="vision_to_text"),
    "pixel-border": dict(design="pixel", border_width=2),
    "pixel-full": dict(design="pixel", pixel_region="full"),
}
TEXT_ROWS = [name for name, row in ROWS.items() if row["design"] in ("T", "VLI", "VLJ")]
TOKEN_ROWS = [name for name, row in ROWS.items() if row["design"] != "pixel"]


CLASS_WISE = dict(design="pixel", border_width=2, per_class=True)


def make_config(row: str, **changes) -> ClipPromptConfig:
    return ClipPromptConfig(**{"context_init": "a bc d", **ROWS[row], **changes})


@functools.cache
def _weights(seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = CLIPModel(_clip_config()).double()
        return {
            name: value + 0.2 * torch.randn_like(value) if value.is_floating_point() and value.dim() else value
            for name, value in clip.state_dict().items()
        }


def _clip_config() -> CLIPConfig:
    tokenizer = make_processor().tokenizer
    tower = dict(num_hidden_layers=3, num_attention_heads=2)
    text = dict(
        tower,
        hidden_size=16,
        intermediate_size=24,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(tower, hidden_size=20, intermediate_size=28, image_size=8, patch_size=4)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


def make_base(seed: int = 0, dtype: torch.dtype = torch.float64, cls: type = CLIPForZeroShotClassification):
    """A random frozen CLIP; as a classifier with its classes set."""
    clip = CLIPModel(_clip_config()).to(dtype)
    clip.load_state_dict(_weights(seed))
    clip.requires_grad_(False).eval()
    if cls is CLIPModel:
        return clip
    model = CLIPForZeroShotClassification.from_clip(clip, make_processor())
    model.set_classes(NAMES, TEMPLATE)
    return model


def make_prompted(row: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> PeftModel:
    """A classifier with prompts of a row, random and larger than they begin, and different in every layer."""
    model = get_peft_model(make_base(seed, dtype), make_config(row, **changes))
    randomise(model, seed + 1)
    return model.eval()


def make_class_wise(seed: int = 0, **changes) -> CLIPForZeroShotClassification:
    """A classifier with a random pixel prompt for each of its classes."""
    model = get_peft_model(make_base(seed), ClipPromptConfig(**{**CLASS_WISE, **changes}))
    randomise(model, seed + 1)
    return model.eval().get_base_model()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every trainable parameter with N(0, 0.5^2)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def make_images(count: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random images in [0, 1]."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def prompt_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
