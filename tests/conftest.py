"""Fixtures: a CLIP small enough that a whole attack takes milliseconds."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hf_robust_clip.modeling import CLIPForZeroShotClassification

torch.set_num_threads(1)

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


def make_clip(processor: CLIPProcessor, seed: int = 0, image_size: int = 8) -> CLIPModel:
    """A random CLIP with two layers per tower; noise on every parameter, so that no bias is 0 and no scale is 1."""
    tokenizer = processor.tokenizer
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
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


@contextmanager
def through_transformers_adapters() -> Iterator[None]:
    """For what a test does by transformers' own adapter methods; where these ask for a PEFT newer than the installed
    one, as those of transformers 5.24 do, the test is skipped.
    """
    try:
        yield
    except ValueError as error:
        if str(error).startswith("The version of PEFT you are using is not compatible, please use a version >="):
            pytest.skip(f"transformers: {error}")
        raise


@functools.cache
def _classifier(seed: int, dtype: torch.dtype) -> CLIPForZeroShotClassification:
    processor = make_processor()
    model = CLIPForZeroShotClassification.from_clip(make_clip(processor, seed).to(dtype), processor).eval()
    for parameter in (*model.text_parameters(), model.logit_scale):
        parameter.requires_grad_(False)
    return model


@pytest.fixture
def tiny_clip() -> Callable[..., CLIPForZeroShotClassification]:
    """Makes a random 8-pixel classifier of seven names: frozen text tower, eval mode, float64 unless told."""

    def make(
        seed: int = 0, dtype: torch.dtype = torch.float64, class_names: tuple[str, ...] | None = CLASS_NAMES
    ) -> CLIPForZeroShotClassification:
        model = copy.deepcopy(_classifier(seed, dtype))
        if class_names is not None:
            model.set_classes(class_names)
        return model

    return make


@pytest.fixture
def tiny_batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes distinct random images in [0, 1], some values exactly 0 or 1, and labels of the seven classes."""

    def make(size: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = (1.2 * torch.rand(size, 3, 8, 8, generator=generator, dtype=dtype) - 0.1).clamp(0, 1)
        return images, torch.randint(0, len(CLASS_NAMES), (size,), generator=generator)

    return make


@pytest.fixture
def fresh_accelerate(monkeypatch, tmp_path):
    """An empty working folder, and no choice of precision and device: these are made once per process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
