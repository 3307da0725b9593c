"""A SigLIP small enough that a whole attack takes milliseconds, with SigLIP2's own kind of tokenizer."""

import string

import torch
from tiny import CLASS_NAMES
from transformers import (
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from hf_robust_clip.modeling import SiglipForZeroShotClassification

CONTEXT_LENGTH = 64
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def make_siglip_processor(image_size: int = 8, tokenizer_cls: type = Siglip2Tokenizer, **changes) -> SiglipProcessor:
    """A tokenizer that knows single letters only, with the settings of the published SigLIP2 ones."""
    letters = [*string.ascii_letters, *string.digits, *".,'-\u2581"]
    settings = dict(
        padding_side="right",
        model_input_names=["input_ids"],
        add_bos_token=False,
        add_eos_token=True,
        model_max_length=CONTEXT_LENGTH,
    )
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = tokenizer_cls(vocab=vocab, merges=[], **{**settings, **changes})
    return SiglipProcessor(SiglipImageProcessorPil(size={"height": image_size, "width": image_size}), tokenizer)


def make_siglip_config(processor: SiglipProcessor, image_size: int = 8, **vision) -> SiglipConfig:
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = processor.tokenizer
    text = dict(
        tower,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return SiglipConfig(text_config=text, vision_config=dict(tower, image_size=image_size, patch_size=4, **vision))


def make_siglip(processor: SiglipProcessor, seed: int = 0, image_size: int = 8, **vision) -> SiglipModel:
    """A random SigLIP with two layers per tower; noise on every parameter, so that no bias is 0 and no scale is 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        siglip = SiglipModel(make_siglip_config(processor, image_size, **vision))
        with torch.no_grad():
            for parameter in siglip.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            siglip.logit_scale.fill_(2.5)
            siglip.logit_bias.fill_(-3.0)
    return siglip


def tiny_siglip(
    seed: int = 0, dtype: torch.dtype = torch.float64, class_names: tuple[str, ...] | None = CLASS_NAMES
) -> SiglipForZeroShotClassification:
    """A random 8-pixel classifier of seven names: frozen text tower, eval mode, float64 unless told."""
    processor = make_siglip_processor()
    model = SiglipForZeroShotClassification.from_siglip(make_siglip(processor, seed).to(dtype), processor).eval()
    for parameter in (*model.text_parameters(), model.logit_scale, model.logit_bias):
        parameter.requires_grad_(False)
    if class_names is not None:
        model.set_classes(class_names)
    return model
