"""Pretrain a small CLIP with its own small tokenizer, on labelled pictures with captions made from their class names.

    python recipes/pretrain.py --config recipes/configs/mini-clip/pretrain.yaml --output_dir out/mini-clip

Seeded, and resumable: a run that was killed goes on from `<output_dir>/pretraining.safetensors`. Writes a complete
checkpoint (config, safetensors, tokenizer, image processor) that plain `CLIPModel` and `CLIPProcessor` load.
"""

import argparse
import json
import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hf_robust_clip.zero_shot_data.loading import load_image_dataset


@dataclass(frozen=True)
class Source:
    """One set of labelled pictures, and how many of them each batch holds."""

    dataset: str
    per_batch: int
    class_names: list | None = None
    flip: bool = False
    split: str = "train"


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and for how long."""

    sources: list
    captions: list
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    context_length: int = 32
    vocab_size: int = 800
    steps: int | list = 3000  # a list: cycles, each with its own peak learning rate and fresh moments
    learning_rate: float | list = 1e-3
    weight_decay: float = 0.1
    shift: int = 1  # pictures are moved by up to so many pixels
    seed: int = 0
    save_every: int = 500


def make_tokenizer(corpus: list[str], vocab_size: int, context_length: int) -> CLIPTokenizer:
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


def make_model(tokenizer: CLIPTokenizer, settings: Settings) -> CLIPModel:
    """A CLIP whose two towers have the same width and depth."""
    tower = dict(
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
    )
    special = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    text = dict(tower, vocab_size=len(tokenizer), max_position_embeddings=settings.context_length, **special)
    vision = dict(tower, image_size=settings.image_size, patch_size=settings.patch_size)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.width))


def make_image_processor(side: int) -> CLIPImageProcessorPil:
    """Pictures of `side` x `side` pixels, normalised as CLIP's are."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )


def contrastive_loss(logits_NC: Tensor, concepts_N: Tensor) -> Tensor:
    """CLIP's symmetric loss of N pictures and one caption per concept that the batch shows.

    Every picture of a concept matches its caption, so a caption's target is the mean over them.
    """
    shown_C, own_N = concepts_N.unique(return_inverse=True)
    logits_NC = logits_NC[:, shown_C]
    match_CN = F.one_hot(own_N, len(shown_C)).T.float()
    match_CN = match_CN / match_CN.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits_NC, own_N) + F.cross_entropy(logits_NC.T, match_CN)) / 2


def shifted(images_BCHW: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to `most` pixels in both directions, the edge filled with black."""
    size = images_BCHW.shape[-1]
    padded = F.pad(images_BCHW, (most, most, most, most))
    offsets = torch.randint(0, 2 * most + 1, (len(images_BCHW), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, offsets, strict=True)])


def load_pictures(source: Source, split: str, processor: CLIPProcessor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """All pictures as bytes (N, 3, H, W), their labels, and the class names."""
    data = load_image_dataset(source.dataset, split, processor, class_names=source.class_names)
    blocks = [range(i, min(i + 1000, len(data))) for i in range(0, len(data), 1000)]
    pixels, labels = [], []
    for block in tqdm(blocks, desc=f"{source.dataset}, {split}"):
        rows = data.__getitems__(list(block))
        pixels.append(torch.stack([(255 * row["pixel_values"]).round().byte() for row in rows]))
        labels += [row["labels"] for row in rows]
    return torch.cat(pixels), torch.tensor(labels), data.class_names


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def learning_rates(settings: Settings) -> list[float]:
    """The learning rate of every update. Each cycle: linear warm-up over three tenths, then a cosine to zero."""
    rates = []
    for steps, peak in zip(as_list(settings.steps), as_list(settings.learning_rate), strict=True):
        warm = max(1, steps * 3 // 10)
        rates += [float(peak) * max(step / warm, 1e-3) for step in range(warm)]
        rates += [float(peak) * (1 + math.cos(math.pi * step / (steps - warm))) / 2 for step in range(steps - warm)]
    return rates


def save_state(
    file: Path, step: int, model: CLIPModel, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Weights, moments and random state after `step` updates, whole or not at all."""
    moments = {
        f"{i}.{k}": v for i, row in optimizer.state_dict()["state"].items() for k, v in row.items() if k != "step"
    }
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {
        f"optimizer.{k}": v for k, v in moments.items()
    }
    partial = file.with_suffix(".part")
    save_file(
        {k: v.contiguous() for k, v in tensors.items()} | {"generator": generator.get_state()},
        partial,
        {"step": str(step)},
    )
    partial.replace(file)


def load_state(file: Path, model: CLIPModel, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    """The opposite of `save_state`; returns the number of updates done."""
    with safe_open(file, "pt") as stored:
        step = int(stored.metadata()["step"])
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  # not a dict
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    rows: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            rows.setdefault(int(index), {"step": torch.tensor(float(step))})[name] = tensor
    optimizer.load_state_dict({"state": rows, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="one cycle of so many, in place of the config's")
    options = parser.parse_args()
    values = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    if options.steps is not None:
        values |= {"steps": options.steps, "learning_rate": max(as_list(values["learning_rate"]))}
    settings = Settings(**values)
    sources = [Source(**row) for row in settings.sources]

    set_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    image_processor = make_image_processor(settings.image_size)
    mean_C11, std_C11 = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    letters_only = CLIPProcessor(image_processor, make_tokenizer(["a"], 1, settings.context_length))
    pictures = [load_pictures(source, source.split, letters_only) for source in sources]
    concepts = list(dict.fromkeys(name.lower() for _, _, names in pictures for name in names))
    texts = [caption.format(name) for name in concepts for caption in settings.captions]
    tokenizer = make_tokenizer(texts, settings.vocab_size, settings.context_length)
    processor = CLIPProcessor(image_processor, tokenizer)
    tokens = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    tokens_CTL = tokens.view(len(concepts), len(settings.captions), -1)
    concept_of = [torch.tensor([concepts.index(name.lower()) for name in names]) for _, _, names in pictures]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(tokenizer, settings).to(device)
    tokens_CTL, mean_C11, std_C11 = (tensor.to(device) for tensor in (tokens_CTL, mean_C11, std_C11))
    rates = learning_rates(settings)
    starts = [0, *accumulate(as_list(settings.steps))]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    state = options.output_dir / "pretraining.safetensors"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    done = load_state(state, model, optimizer, generator) if state.is_file() else 0
    model.train()
    for step in tqdm(range(done, len(rates)), desc="pretraining", initial=done, total=len(rates)):
        if step in starts:
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
            generator.manual_seed(settings.seed + starts.index(step))
        optimizer.param_groups[0]["lr"] = rates[step]
        pixels, labels = [], []
        for source, (images, own, _), to_concept in zip(sources, pictures, concept_of, strict=True):
            rows = torch.randint(0, len(images), (source.per_batch,), generator=generator)
            batch = shifted(images[rows], settings.shift, generator)
            if source.flip:
                mirrored = torch.rand(len(rows), generator=generator) < 0.5
                batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
            pixels.append(batch.float() / 255)
            labels.append(to_concept[own[rows]])
        template = torch.randint(0, len(settings.captions), (len(concepts),), generator=generator)
        output = model(
            input_ids=tokens_CTL[torch.arange(len(concepts)), template],
            pixel_values=(torch.cat(pixels).to(device) - mean_C11) / std_C11,
        )
        loss = contrastive_loss(output.logits_per_image, torch.cat(labels).to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP does
        if (step + 1) % settings.save_every == 0 and step + 1 < len(rates):
            save_state(state, step + 1, model, optimizer, generator)

    model.eval()
    for source, to_concept in zip(sources, concept_of, strict=True):
        images, own, _ = load_pictures(source, "test", processor)
        with torch.no_grad():
            logits_BC = torch.cat(
                [
                    model(
                        input_ids=tokens_CTL[to_concept, 0], pixel_values=(block.to(device) / 255 - mean_C11) / std_C11
                    ).logits_per_image
                    for block in images.split(500)
                ]
            )
        accuracy = (logits_BC.argmax(1).cpu() == own).float().mean().item()
        print(f"zero-shot accuracy on {len(own)} test pictures of {source.dataset}: {accuracy:.1%}")
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
