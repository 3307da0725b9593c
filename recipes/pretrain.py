"""Pretrain a small CLIP with its own small tokenizer, on labelled pictures with captions made from their class names.

    python recipes/pretrain.py --config recipes/configs/mini-clip/pretrain.yaml --output_dir out/mini-clip

Seeded, and resumable: a run that was killed goes on from the checkpoints in `<output_dir>/cycle-<n>`. Writes a
complete checkpoint (config, safetensors, tokenizer, image processor) that plain `CLIPModel` and `CLIPProcessor` load.
"""

import random
import re
import sys
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import CLIPProcessor, set_seed

from hf_robust_clip import (
    CLIPForZeroShotClassification,
    Contrastive,
    EvaluationSettings,
    NoAttack,
    RobustClipConfig,
    RobustClipTrainer,
    evaluate_robustness,
    load_image_dataset,
)
from hf_robust_clip.checks import check_whole
from hf_robust_clip.command_line import CommandLine, read_command
from hf_robust_clip.hub import dump_recipe
from hf_robust_clip.modeling import check_classes
from hf_robust_clip.modeling.scratch import Size, make_model, make_processor
from hf_robust_clip.names import is_path, shown_folder, shown_name, without_paths
from hf_robust_clip.report import CardInfo, RobustnessReport, make_card, save_reports
from hf_robust_clip.report.card import FROM_SCRATCH
from hf_robust_clip.runs.interruptions import one_line_errors
from hf_robust_clip.training.checkpoints import NothingToResume
from hf_robust_clip.training.logit_scale import LimitScale
from hf_robust_clip.zero_shot_data.dataset import ImageDataset


@dataclass(frozen=True)
class Source:
    """One set of labelled pictures, and how many of them each batch holds; its split test is what is measured."""

    dataset: str
    per_batch: int
    class_names: list[str] | None = None
    flip: bool = False
    split: str = "train"

    def __post_init__(self) -> None:
        check_whole(1, per_batch=self.per_batch)
        if {"test", "all"} & set(re.split(r"\[.*?\]|\+", self.split)):
            raise ValueError(f"split={self.split!r} of {self.dataset!r} holds what is measured; train on another.")


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and for how long.

    Args:
        output_dir: where the checkpoint goes.
        sources: the sets of pictures.
        captions: templates with `{}` for the class name; in a batch each class has one of them.
        image_size, patch_size, width, layers, heads, context_length, vocab_size: of the model; both towers are alike,
            but for those of the text tower that are given:
        text_width, text_layers, text_heads: of the text tower; null takes the other's.
        steps: updates; a list: cycles, each with its own peak learning rate and fresh moments.
        learning_rate: peak after three tenths of a cycle, from which a cosine leads to zero.
        weight_decay, max_grad_norm: of AdamW; 0 clips no gradients.
        shift: pictures are moved by up to so many pixels, the edge filled with black.
        seed: of everything.
        save_every: updates between checkpoints.
        bf16: forward and backward in bfloat16 where that is safe (autocast); weights and updates stay in float32.
        workers: processes that make batches ahead.
        float16: the checkpoint is stored in half precision, half the size.
    """

    output_dir: str
    sources: list[Source]
    captions: list[str]
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    context_length: int = 32
    vocab_size: int = 800
    text_width: int | None = None
    text_layers: int | None = None
    text_heads: int | None = None
    steps: int | list[int] = 3000
    learning_rate: float | list[float] = 1e-3
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    shift: int = 1
    seed: int = 0
    save_every: int = 500
    bf16: bool = False
    workers: int = 0
    float16: bool = False

    def __post_init__(self) -> None:
        check_classes(["a class"], self.captions)
        check_whole(0, shift=self.shift, workers=self.workers)
        rates = self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]
        if isinstance(self.steps, list) and len(self.steps) != len(rates):
            raise ValueError(
                f"steps={self.steps!r} are cycles; learning_rate={self.learning_rate!r} must give as many."
            )
        self.size  # noqa: B018  # which refuses what no model can have

    @property
    def size(self) -> Size:
        """Of the model."""
        return Size(**{field.name: getattr(self, field.name) for field in fields(Size)})

    def cycles(self) -> list[tuple[int, float]]:
        """Updates and peak learning rate of each; a single number of steps takes the highest rate."""
        rates = self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]
        if isinstance(self.steps, int):
            return [(self.steps, max(rates))]
        return list(zip(self.steps, rates, strict=True))


REQUIRED = [field.name for field in fields(Settings) if field.default is MISSING]
COMMAND = CommandLine({"": (Settings,)}, {}, REQUIRED)


class CaptionedPictures(Dataset):
    """Batches of so many pictures of each source with captions. Example i follows from the seed and i alone, so that a
    training that goes on sees what it would have seen; in a batch all pictures of a class have one caption.
    """

    def __init__(self, settings: Settings, seed: int, steps: int, sources: list[ImageDataset]):
        self.settings, self.seed, self.steps = settings, seed, steps
        self.places = [k for k, source in enumerate(settings.sources) for _ in range(source.per_batch)]
        self.names = [[name.lower() for name in data.class_names] for data in sources]
        self.pictures = [as_bytes(data) for data in sources]

    def __len__(self) -> int:
        return self.steps * len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples.")
        batch, place = divmod(index, len(self.places))
        source, draw = self.places[place], random.Random(f"{self.seed} {index}")
        images, labels = self.pictures[source]
        row = draw.randrange(len(images))
        image = shifted(images[row], self.settings.shift, draw)
        if self.settings.sources[source].flip and draw.random() < 0.5:
            image = image.flip(-1)
        name = self.names[source][labels[row]]
        caption = random.Random(f"{self.seed} {batch} {name}").choice(self.settings.captions)
        return {"pixel_values": image.float() / 255, "captions": caption.replace("{}", name)}


def as_bytes(data: ImageDataset) -> tuple[Tensor, list[int]]:
    """All pictures as bytes (N, 3, H, W), and their labels."""
    blocks = [range(i, min(i + 1000, len(data))) for i in range(0, len(data), 1000)]
    pixels, labels = [], []
    for block in tqdm(blocks, desc=f"{data.dataset_id}, {data.split}"):
        rows = data.__getitems__(block)
        pixels.append(torch.stack([(255 * row["pixel_values"]).round().byte() for row in rows]))
        labels += [row["labels"] for row in rows]
    return torch.cat(pixels), labels


def shifted(image_CHW: Tensor, most: int, draw: random.Random) -> Tensor:
    """A picture moved by up to `most` pixels in both directions, the edge filled with black."""
    height, width = image_CHW.shape[1:]
    y, x = draw.randint(0, 2 * most), draw.randint(0, 2 * most)
    return F.pad(image_CHW, (most, most, most, most))[:, y : y + height, x : x + width]


def train_cycle(model: CLIPForZeroShotClassification, data: CaptionedPictures, folder: str, rate: float) -> None:
    """One warm-up and cosine, from where its checkpoints in `folder` end."""
    settings = data.settings
    args = RobustClipConfig(
        output_dir=folder,
        max_steps=data.steps,
        per_device_train_batch_size=len(data.places),
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=rate,
        weight_decay=settings.weight_decay,
        warmup_steps=0.3,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=50,
        save_steps=settings.save_every,
        save_total_limit=1,
        seed=settings.seed,
        bf16=settings.bf16,
        dataloader_num_workers=settings.workers,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = RobustClipTrainer(model, args, Contrastive(), data, callbacks=[LimitScale()])
    try:
        trainer.train(resume_from_checkpoint=True)
    except NothingToResume:
        trainer.train()


def measure(model: CLIPForZeroShotClassification, data: ImageDataset, settings: Settings) -> RobustnessReport:
    """Zero-shot accuracy on all pictures, as a report for the card."""
    how, place = EvaluationSettings((), attack=NoAttack(), batch_size=500), shown_folder(settings.output_dir)
    task = shown_name(data.dataset_id)
    with model.prepared_for(data, settings.captions[0]):
        return evaluate_robustness(model, data, how, name=Path(place).name, task=task, model_id=place)


def pretrain(settings: Settings) -> CLIPForZeroShotClassification:
    """Make tokenizer and model, train, say how accurate it is, and save it."""
    set_seed(settings.seed)

    def load(source: Source, split: str, processor: CLIPProcessor) -> ImageDataset:
        return load_image_dataset(source.dataset, split, processor, class_names=source.class_names)

    letters_only = make_processor(settings.size, ["a"])
    sources = [load(source, source.split, letters_only) for source in settings.sources]
    names = dict.fromkeys(name.lower() for data in sources for name in data.class_names)
    texts = [caption.replace("{}", name) for name in names for caption in settings.captions]
    processor = make_processor(settings.size, texts)
    model = CLIPForZeroShotClassification.from_clip(make_model(processor.tokenizer, settings.size), processor)
    model.tokenize(texts)  # a training would cut those that are too long
    for number, (steps, rate) in enumerate(settings.cycles()):
        data = CaptionedPictures(settings, settings.seed + number, steps, sources)
        train_cycle(model, data, f"{settings.output_dir}/cycle-{number + 1}", rate)
    save(model.eval(), settings)
    reports = [measure(model, load(source, "test", processor), settings) for source in settings.sources]
    for report in reports:
        about = f"{report.num_images} test pictures of {report.task}"
        print(f"zero-shot accuracy on {about}: {report.clean_accuracy:.1%}")
    write_card(model, settings, reports, list(names))
    return model


def save(model: CLIPForZeroShotClassification, settings: Settings) -> None:
    """Write the checkpoint; one in half precision is read as float32 again."""
    if not settings.float16:
        return model.save_pretrained(settings.output_dir)
    model.half().save_pretrained(settings.output_dir)
    config = Path(settings.output_dir, "config.json")
    config.write_text(config.read_text(encoding="utf-8").replace('"float16"', '"float32"'), encoding="utf-8")
    model.float()


def write_card(
    model: CLIPForZeroShotClassification,
    settings: Settings,
    reports: list[RobustnessReport],
    class_names: list[str],
) -> None:
    """Card, report and recipe beside the weights."""
    folder = Path(settings.output_dir)
    steps = [f"{steps} of {rate:g}" for steps, rate in settings.cycles()]
    told = {
        "start": FROM_SCRATCH,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images_per_update": sum(source.per_batch for source in settings.sources),
        "updates_and_peak_learning_rate": ", ".join(steps),
        "weight_decay": settings.weight_decay,
        "training_precision": "bfloat16 autocast" if settings.bf16 else "float32",
        "seed": settings.seed,
    }
    data = [f"{shown_name(source.dataset)}, split {source.split}" for source in settings.sources]
    info = CardInfo(
        repo_id=shown_folder(settings.output_dir),
        base_model="",
        training_data="; ".join(data),
        paper=Contrastive.paper,
        settings={"method": "Contrastive", **told},
        template=settings.captions[0],
        class_names=class_names,
        limits=f"It knows the {len(class_names)} classes of these sets and hardly any others.",
        datasets=list(dict.fromkeys(report.dataset for report in reports if not is_path(report.dataset))),
    )
    (folder / "recipe.yaml").write_text(dump_recipe(without_paths(asdict(settings))), encoding="utf-8")
    save_reports(folder / "report.json", reports, card=info)
    make_card(reports, (), info).save(folder / "README.md")


def main() -> None:
    with one_line_errors():
        default = Path(__file__).parent / "configs/digits-clip/pretrain.yaml"
        given = read_command(COMMAND, sys.argv[1:], default, __doc__ or "")
        pretrain(given.group(Settings, given.made()))


if __name__ == "__main__":
    main()
