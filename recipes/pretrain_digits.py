"""Pretrain the small CLIP that ships with the package, on scikit-learn's handwritten digits with captions.

    python recipes/pretrain_digits.py --output_dir out/digits-clip

Seeded; about two minutes on two cores. Writes a complete checkpoint (config, safetensors, tokenizer, image processor)
that plain `CLIPModel` and `CLIPProcessor` load.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hf_robust_clip.zero_shot_data.digits import DIGIT_NAMES, digits_split

CAPTIONS = (
    "This is a photo of a {}",
    "This is a photo of {}.",
    "This is a photo of the digit {}.",
    "a photo of a {}.",
    "a photo of the number {}.",
    "a photo of the handwritten digit {}.",
    "a small grey picture of a {}",
    "somebody wrote the number {}",
    "{}",
)
CONTEXT_LENGTH = 32
IMAGE_SIZE = 8


def make_tokenizer(vocab_size: int = 800) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-cased byte-level BPE with `</w>`) whose merges come from the captions."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    corpus = [caption.format(name) for caption in CAPTIONS for name in DIGIT_NAMES]
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_LENGTH)


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of 0.35 M parameters: three layers of width 64 in each tower, patches of 2 x 2 pixels."""
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    special = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    text = dict(tower, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT_LENGTH, **special)
    vision = dict(tower, image_size=IMAGE_SIZE, patch_size=2)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def contrastive_loss(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss of N pictures and one caption per digit; all pictures of a digit match its caption."""
    match_CN = F.one_hot(labels_N, logits_NC.shape[1]).T.float()
    match_CN = match_CN / match_CN.sum(dim=1, keepdim=True).clamp(min=1)
    return (F.cross_entropy(logits_NC, labels_N) + F.cross_entropy(logits_NC.T, match_CN)) / 2


def shifted(images_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture moved by -1, 0 or 1 pixel in both directions, the edge filled with background."""
    size = images_BCHW.shape[-1]
    padded = F.pad(images_BCHW, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (len(images_BCHW), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, offsets, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    set_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )
    mean_C11, std_C11 = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def load(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        data = digits_split(split)
        pixels = image_processor(list(data["image"]), do_normalize=False, return_tensors="pt").pixel_values
        return pixels, torch.tensor(list(data["label"]))

    images, labels = load("train")
    captions = [caption.format(name) for name in DIGIT_NAMES for caption in CAPTIONS]
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids.view(len(DIGIT_NAMES), len(CAPTIONS), -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps)
    model.train()
    for _ in tqdm(range(options.steps), desc="pretraining"):
        rows = torch.randint(0, len(images), (options.batch_size,), generator=generator)
        caption_of_digit = torch.randint(0, len(CAPTIONS), (len(DIGIT_NAMES),), generator=generator)
        pixels = (shifted(images[rows], generator) - mean_C11) / std_C11
        output = model(input_ids=tokens[torch.arange(len(DIGIT_NAMES)), caption_of_digit], pixel_values=pixels)
        loss = contrastive_loss(output.logits_per_image, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP does

    model.eval()
    test_images, test_labels = load("test")
    with torch.no_grad():
        logits = model(input_ids=tokens[:, 0], pixel_values=(test_images - mean_C11) / std_C11).logits_per_image
    accuracy = (logits.argmax(1) == test_labels).float().mean().item()
    print(f"zero-shot accuracy on {len(test_labels)} test pictures: {accuracy:.1%}; loss {loss.item():.3f}")
    model.save_pretrained(options.output_dir)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
