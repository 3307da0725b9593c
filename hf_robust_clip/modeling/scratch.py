"""Small CLIPs to be trained from the beginning, with a tokenizer of their own corpus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..checks import check_whole


@dataclass(frozen=True)
class Size:
    """Of a model whose two towers are alike, but for what is given of the text tower.

    Args:
        image_size: side of pictures in pixels.
        patch_size: side of a token's part of them.
        width: of the residual stream, and of the projections.
        layers, heads: of a tower.
        context_length: tokens that a text may have.
        vocab_size: tokens that the tokenizer may have, at least those of single bytes.
        text_width, text_layers, text_heads: of the text tower; None takes the other's.

    Raises ValueError for a number below 1, a width that its heads don't divide, and patches that don't fill a picture.
    """

    image_size: int = 8
    patch_size: int = 2
    width: int = 64
    layers: int = 2
    heads: int = 4
    context_length: int = 32
    vocab_size: int = 800
    text_width: int | None = None
    text_layers: int | None = None
    text_heads: int | None = None

    def __post_init__(self) -> None:
        check_whole(1, **{name: value for name, value in asdict(self).items() if value is not None})
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be whole patches of patch_size={self.patch_size}.")
        for name, width, heads in (("", self.width, self.heads), ("text_", *self.of_texts()[::2])):
            if width % heads:
                raise ValueError(f"{name}width={width} must be a multiple of {name}heads={heads}.")

    def of_texts(self) -> tuple[int, int, int]:
        """Width, layers and heads of the text tower."""
        return self.text_width or self.width, self.text_layers or self.layers, self.text_heads or self.heads


def make_tokenizer(corpus: Sequence[str], vocab_size: int, context_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-cased byte-level BPE with `</w>`) whose merges come from the captions."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context_length)


def make_model(tokenizer: CLIPTokenizer, size: Size) -> CLIPModel:
    """A CLIP with random weights, drawn from torch's global generator."""
    special = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    text = dict(
        _tower(*size.of_texts()), vocab_size=len(tokenizer), max_position_embeddings=size.context_length, **special
    )
    vision = dict(_tower(size.width, size.layers, size.heads), image_size=size.image_size, patch_size=size.patch_size)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.width))


def _tower(width: int, layers: int, heads: int) -> dict[str, int]:
    """A tower's part of a config."""
    return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads)


def make_processor(size: Size, corpus: Sequence[str]) -> CLIPProcessor:
    """Pictures of `image_size` x `image_size` pixels, normalised as CLIP's are, and a tokenizer of the corpus."""
    side = size.image_size
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )
    return CLIPProcessor(images, make_tokenizer(corpus, size.vocab_size, size.context_length))
