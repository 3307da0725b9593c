"""Pretrain the small CLIP that ships with the package, on scikit-learn's handwritten digits with captions.

    python recipes/pretrain_digits.py --output_dir out/digits-clip

Seeded; about two minutes on two cores. Writes a complete checkpoint (config, safetensors, tokenizer, image processor)
that plain `CLIPModel` and `CLIPProcessor` load.
"""

import argparse
import math
from pathlib import Path

import torch
from pretrain import Settings, contrastive_loss, make_image_processor, make_model, make_tokenizer, shifted
from tqdm import tqdm
from transformers import CLIPProcessor, set_seed
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


SETTINGS = Settings(
    sources=[],
    captions=list(CAPTIONS),
    image_size=IMAGE_SIZE,
    patch_size=2,
    width=64,
    layers=3,
    heads=4,
    context_length=CONTEXT_LENGTH,
)


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
    corpus = [caption.format(name) for caption in CAPTIONS for name in DIGIT_NAMES]
    tokenizer = make_tokenizer(corpus, SETTINGS.vocab_size, CONTEXT_LENGTH)
    model = make_model(tokenizer, SETTINGS)
    image_processor = make_image_processor(IMAGE_SIZE)
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
        pixels = (shifted(images[rows], SETTINGS.shift, generator) - mean_C11) / std_C11
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
