"""A CLIP small enough that a whole attack takes milliseconds."""

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six")
CONTEXT_LENGTH = 32


def make_processor(image_size: int = 8) -> CLIPProcessor:
    """A tokenizer that knows single letters only, and CLIP's own picture preparation."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=CONTEXT_LENGTH
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )
    return CLIPProcessor(image_processor, tokenizer)


def make_clip(
    processor: CLIPProcessor, seed: int = 0, image_size: int = 8, hidden_act: str = "quick_gelu"
) -> CLIPModel:
    """A random CLIP with two layers per tower; noise on every parameter, so that no bias is 0 and no scale is 1."""
    tokenizer = processor.tokenizer
    tower = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act=hidden_act
    )
    text = dict(
        tower,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(tower, image_size=image_size, patch_size=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        with torch.no_grad():
            for name, parameter in clip.named_parameters():
                if name != "logit_scale":
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return clip
