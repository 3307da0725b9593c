"""Time and memory of adversarial prompt training (APT-VLI, ViT-B/16): this package against the released code's way.

Both ways hold the same random weights and prompts (2 tokens, 9 layers deep, in both towers), and are first checked to
give the same values and the same gradients of the prompts. Printed are wall time, processor time, throughput and peak
memory of each, and the ratio of their times.

`--what text`  the text side of a step: unit-length embeddings of all classes, and back to the text prompts.
`--what step`  the whole step: PGD-2 (eps = step = 1/255, cross-entropy) on the second half of the batch, one
               cross-entropy over the clean first half and the attacked second, and back to all prompts. The update
               of these few thousand values is left out.

`ours`      `encode_classes()`: the prefix that all prompts share computed once, no padding. The attack runs inside
            `fixed_class_embeds()`, so that the text is encoded once for the attack and once with gradients.
`released`  written anew after the structure of the released code: the text tower reads 77 tokens of every prompt in
            every forward, with a graph, in the attack too. To its favour: causal attention without a mask tensor, and
            autocast in bf16 where it would take fp16 with a scaler or fp32.

    python tests/benchmarks/prompt_speed.py --what text --classes 100
    python tests/benchmarks/prompt_speed.py --what step --images 32 --classes 1000 --device cuda --dtype bf16

Classes are the first ones of ImageNet, in `a photo of a {}.`. `--vocab` takes CLIP's own merges,
`bpe_simple_vocab_16e6.txt.gz` (the package open_clip_torch has them). Without it words are cut into pieces of up to 6
letters, which makes 454 tokens of the first 100 names where CLIP makes 451, and 4370 of all 1000 where it makes 4167.

In fp32 `released` takes about 38 MB for each class, 38 GB for 1000: these want a card, or `--chunk 100`, which takes
the text forward and back 100 classes at a time.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import (
    GIB,
    add_output,
    card_told,
    clear_card,
    exact_dtype,
    keep,
    on_card,
    print_figures,
    resident_peak,
    timed,
    told_if_failed,
)  # fmt: skip
from peft import get_peft_model
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import hf_robust_clip
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.pgd import pgd
from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.prompts import ClipPromptConfig
from hf_robust_clip.threat_model import ThreatModel

EPS = 1 / 255
NUM_STEPS = 2
NUM_TOKENS = 2
SEED = 0
TEMPLATE = "a photo of a {}."
CONTEXT = "a photo of a"
BOS, EOS = 49406, 49407
Times = dict[str, list[tuple[float, float]]]
UNITS = {"text": "prompts/s", "step": "images/s"}


class Pieces:
    """Stands in for CLIP's tokenizer: pieces of up to 6 letters, single digits, runs of other signs."""

    bos_token_id, eos_token_id, unk_token_id = BOS, EOS, EOS

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, texts: str | list[str], add_special_tokens: bool = True, **unused: object) -> SimpleNamespace:
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=self.encode(texts, add_special_tokens))
        return SimpleNamespace(input_ids=[self.encode(text, add_special_tokens) for text in texts])

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        words = re.findall(r"[a-z]{1,6}|\d|[^\sa-z\d]+", text.lower())
        ids = [self.ids.setdefault(word, len(self.ids)) for word in words]
        return [BOS, *ids, EOS] if add_special_tokens else ids


def make_tokenizer(vocab: Path | None) -> Pieces | CLIPTokenizer:
    """CLIP's tokenizer from the file with its merges, or the stand-in."""
    if vocab is None:
        return Pieces()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    lines = gzip.decompress(vocab.read_bytes()).decode().split("\n")[1 : BOS - 2 * len(letters) + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines if line)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    ids = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": BOS, "<|endoftext|>": EOS}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=77)


def clip_config(*, tiny: bool, text_only: bool) -> CLIPConfig:
    """ViT-B/16, or a CLIP small enough for a smoke test; with one vision layer where only text is measured."""
    size = {"num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64}
    text = size | {"hidden_size": 32} if tiny else {}  # the defaults are those of ViT-B/16
    vision = size | {"hidden_size": 48, "image_size": 32, "patch_size": 8} if tiny else {"patch_size": 16}
    vision |= {"num_hidden_layers": 1} if text_only else {}
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    return CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=32 if tiny else 512)


class Task:
    """What both ways share: classes, images, weights and prompts, always the same for the same arguments."""

    def __init__(self, args: argparse.Namespace, images: int, classes: int, dtype: torch.dtype = torch.float32):
        self.args, self.device, self.dtype = args, torch.device(args.device), dtype
        self.config = clip_config(tiny=args.tiny, text_only=args.what == "text")
        file = Path(hf_robust_clip.__file__).parent / "zero_shot_data" / "class_names.json"
        self.names = list(dict.fromkeys(json.loads(file.read_text())["imagenet"]))[:classes]
        if len(self.names) < classes:
            raise SystemExit(f"--classes {classes}: there are only {len(self.names)} names.")
        self.tokenizer = make_tokenizer(args.vocab)
        side, generator = self.config.vision_config.image_size, torch.Generator().manual_seed(SEED)
        self.images_BCHW = torch.rand(images, 3, side, side, generator=generator).to(self.device, dtype)
        self.labels_B = torch.randint(classes, (images,), generator=generator).to(self.device)
        self.text_weights_CD = torch.randn(classes, self.config.projection_dim, generator=generator).to(
            self.device, dtype
        )

    def clip(self) -> CLIPModel:
        torch.manual_seed(SEED)
        with self.device:  # on a card in a hundredth of the time
            return CLIPModel(self.config).to(self.dtype).requires_grad_(False)

    def depth(self, tower: str) -> int:
        return min(9, getattr(self.config, f"{tower}_config").num_hidden_layers)

    def prompts(self) -> list[Tensor]:
        """One tensor (n, D) per layer, the vision tower's before those of the text tower."""
        generator = torch.Generator().manual_seed(SEED + 1)
        widths = [
            width
            for tower, width in (
                ("vision", self.config.vision_config.hidden_size),
                ("text", self.config.text_config.hidden_size),
            )
            for _ in range(self.depth(tower))
        ]
        made = [0.02 * torch.randn(NUM_TOKENS, width, generator=generator) for width in widths]
        return [prompt.to(self.device, self.dtype) for prompt in made]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16")


class Ours:
    """Both measurements with this package."""

    def __init__(self, task: Task):
        self.task, self.threat_model = task, ThreatModel(EPS)
        image_processor = CLIPImageProcessorPil(image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD)
        processor = SimpleNamespace(image_processor=image_processor, tokenizer=task.tokenizer)
        self.core = CLIPForZeroShotClassification.from_clip(task.clip(), processor)
        self.core.set_classes(task.names, TEMPLATE)
        self.model = get_peft_model(
            self.core,
            ClipPromptConfig(
                design="VLI",
                num_vision_tokens=NUM_TOKENS,
                num_text_tokens=NUM_TOKENS,
                vision_depth=task.depth("vision"),
                text_depth=task.depth("text"),
                context_init=CONTEXT,
            ),
        ).train()
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.prompts = [p for tower in ("vision", "text") for name, p in named if f".{tower}_model." in name]
        with torch.no_grad():
            for parameter, values in zip(self.prompts, task.prompts(), strict=True):
                parameter.copy_(values)

    def chunks(self) -> list[slice]:
        return [slice(None)]

    def encode_text(self, rows: slice = slice(None)) -> Tensor:
        return self.core.encode_classes()[rows]

    def attack(self, images_BCHW: Tensor, labels_B: Tensor, start_BCHW: Tensor | None = None) -> Tensor:
        """`start_BCHW` is where it starts in any case."""
        with self.core.fixed_class_embeds():
            return pgd(
                lambda pixels_BCHW: cross_entropy(self.model(pixel_values=pixels_BCHW).logits, labels_B),
                images_BCHW,
                self.threat_model,
                num_steps=NUM_STEPS,
                step_size=EPS,
                seed=SEED,
            )

    def logits(self, images_BCHW: Tensor) -> Tensor:
        return self.model(pixel_values=images_BCHW).logits


class Released:
    """Both measurements with the structure of the released code."""

    def __init__(self, task: Task):
        self.task, self.clip = task, task.clip().eval()
        self.prompts = [nn.Parameter(values) for values in task.prompts()]
        depth = task.depth("vision")
        self.vision_prompts, self.text_prompts = self.prompts[:depth], self.prompts[depth:]
        rows = task.tokenizer([TEMPLATE.replace("{}", name) for name in task.names]).input_ids
        length = task.config.text_config.max_position_embeddings
        ids_CL = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=task.device)
        self.ends_C = ids_CL.argmax(dim=1)
        self.embedded_CLD = self.clip.text_model.embeddings.token_embedding(ids_CL)
        self.mean, self.std = (
            torch.tensor(values, device=task.device, dtype=task.dtype).view(-1, 1, 1)
            for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )

    def chunks(self) -> list[slice]:
        """Classes whose graphs are held at once: `--chunk` of them, or all."""
        count = len(self.embedded_CLD)
        size = self.task.args.chunk or count
        return [slice(i, i + size) for i in range(0, count, size)]

    def encode_text(self, rows: slice = slice(None)) -> Tensor:
        def insert(hidden_CLD: Tensor, prompts: Tensor) -> Tensor:
            own = prompts.to(hidden_CLD.dtype).expand(len(hidden_CLD), -1, -1)
            return torch.cat([hidden_CLD[:, :1], own, hidden_CLD[:, 1 + NUM_TOKENS :]], dim=1)

        text = self.clip.text_model
        hidden_CLD = self.embedded_CLD[rows]
        if self.text_prompts:
            hidden_CLD = insert(hidden_CLD, self.text_prompts[0])
        hidden_CLD = hidden_CLD + text.embeddings.position_embedding.weight
        for i, layer in enumerate(text.encoder.layers):
            if 0 < i < len(self.text_prompts):
                hidden_CLD = insert(hidden_CLD, self.text_prompts[i])
            hidden_CLD = layer(hidden_CLD, None, is_causal=True)
        hidden_CLD = text.final_layer_norm(hidden_CLD)
        pooled_CD = hidden_CLD[torch.arange(len(hidden_CLD), device=hidden_CLD.device), self.ends_C[rows]]
        return F.normalize(self.clip.text_projection(pooled_CD), dim=-1)

    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        def own(prompts: Tensor, hidden_BTD: Tensor) -> Tensor:
            return prompts.to(hidden_BTD.dtype).expand(len(hidden_BTD), -1, -1)

        vision = self.clip.vision_model
        hidden_BTD = vision.embeddings((images_BCHW - self.mean) / self.std)
        hidden_BTD = vision.pre_layrnorm(torch.cat([hidden_BTD, own(self.vision_prompts[0], hidden_BTD)], dim=1))
        for i, layer in enumerate(vision.encoder.layers):
            if 0 < i < len(self.vision_prompts):
                kept = hidden_BTD[:, :-NUM_TOKENS]
                hidden_BTD = torch.cat([kept, own(self.vision_prompts[i], hidden_BTD)], dim=1)
            hidden_BTD = layer(hidden_BTD, None)
        return F.normalize(self.clip.visual_projection(vision.post_layernorm(hidden_BTD[:, 0])), dim=-1)

    def attack(self, images_BCHW: Tensor, labels_B: Tensor, start_BCHW: Tensor | None = None) -> Tensor:
        """From `start_BCHW`, or a random start of its own."""
        adv_BCHW = start_BCHW
        if adv_BCHW is None:
            adv_BCHW = (images_BCHW + torch.empty_like(images_BCHW).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(NUM_STEPS):
            adv_BCHW = adv_BCHW.detach().requires_grad_()
            (grad_BCHW,) = torch.autograd.grad(F.cross_entropy(self.logits(adv_BCHW), labels_B), adv_BCHW)
            delta_BCHW = (adv_BCHW.detach() + EPS * grad_BCHW.sign() - images_BCHW).clamp(-EPS, EPS)
            adv_BCHW = (images_BCHW + delta_BCHW).clamp(0, 1)
        return adv_BCHW

    def logits(self, images_BCHW: Tensor) -> Tensor:
        text_CD, image_BD = self.encode_text(), self.encode_images(images_BCHW)
        return (self.clip.logit_scale.exp() * image_BD @ text_CD.T).to(self.task.dtype)


WAYS: dict[str, type[Ours] | type[Released]] = {"ours": Ours, "released": Released}


def run_once(way: Ours | Released, start_BCHW: Tensor | None = None) -> Tensor:
    """What is timed. Leaves the gradients in the prompts; returns the class embeddings or the loss."""
    task = way.task
    for parameter in way.prompts:
        parameter.grad = None
    with task.autocast():
        if task.args.what == "text":
            parts = []
            for rows in way.chunks():
                embeds_CD = way.encode_text(rows)
                (embeds_CD * task.text_weights_CD[rows]).sum().backward()
                parts.append(embeds_CD.detach())
            return torch.cat(parts)
        half = len(task.images_BCHW) // 2
        adv_BCHW = way.attack(task.images_BCHW[half:], task.labels_B[half:], start_BCHW)
        mixed_BCHW = torch.cat([task.images_BCHW[:half], adv_BCHW])
        loss = F.cross_entropy(way.logits(mixed_BCHW), task.labels_B)
        loss.backward()
        return loss.detach()


def compare(ours: Ours, released: Released) -> dict[str, float]:
    """How far the two differ, from the same random start: the values, and the gradient of all prompts, relatively."""
    task = ours.task
    start_BCHW = None
    if task.args.what == "step":
        start_BCHW = ours.threat_model.random_start(task.images_BCHW[len(task.images_BCHW) // 2 :], SEED)
    values = [run_once(way, start_BCHW) for way in (ours, released)]
    grads = [torch.cat([p.grad.flatten() for p in way.prompts if p.grad is not None]) for way in (ours, released)]
    return {
        "values": float((values[0] - values[1]).norm() / values[1].norm()),
        "gradients": float((grads[0] - grads[1]).norm() / grads[1].norm()),
    }


def check(args: argparse.Namespace) -> None:
    """Refuse to time two ways that don't agree. At most 125 classes and 8 images, without autocast."""
    exact = argparse.Namespace(**vars(args) | {"dtype": "fp32"})
    task = Task(exact, min(args.images, 8), min(args.classes, 125), exact_dtype(args.device))
    found = compare(Ours(task), Released(task))
    gc.collect()  # models hold cycles
    print("relative differences: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()), flush=True)
    if not (found["values"] < 1e-5 and found["gradients"] < 1e-2):  # pixels whose gradient is almost 0 turn its sign
        raise SystemExit("the two ways differ: their times can't be compared.")


def measure_cpu(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Times turn by turn after one warm-up, so that a busy moment meets both ways."""
    task = Task(args, args.images, args.classes)
    ways = {name: WAYS[name](task) for name in args.only}
    for way in ways.values():
        run_once(way)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            times[name].append(timed(lambda way=way: run_once(way), args.device))
    return times


def peak_memory(args: argparse.Namespace, name: str) -> float:
    """Peak resident bytes of a process that takes one way once, interpreter and libraries included."""
    command = [sys.executable, __file__, "--own_peak", "--only", name, "--what", args.what]
    command += ["--images", str(args.images), "--classes", str(args.classes)]
    command += ["--vocab", str(args.vocab)] if args.vocab else []
    command += ["--tiny"] if args.tiny else []
    command += ["--chunk", str(args.chunk)] if args.chunk else []
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def own_peak_memory(args: argparse.Namespace) -> int:
    """What the process of `peak_memory` does."""
    run_once(WAYS[args.only[0]](Task(args, args.images, args.classes)))
    return resident_peak()


def measure_cuda(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What `on_card` finds of one way, or the error."""
    task = Task(args, args.images, args.classes)
    count = args.classes if args.what == "text" else args.images
    found: dict[str, Any] = {}
    with told_if_failed(f"{name}, {args.images} images, {args.classes} classes", found):
        way = WAYS[name](task)
        found |= on_card(lambda: run_once(way), count, args.repeats)
        print(f"{name}: {card_told(found, UNITS[args.what])}", flush=True)
    way = None
    clear_card()
    return found


def report_on_card(
    file: str, args: argparse.Namespace, measure: Callable[[argparse.Namespace, str], dict[str, Any]]
) -> None:
    """Measure each way that is asked for, keeping what there is, and print all with their ratios."""
    figures: dict[str, Any] = {}
    for name in args.only:
        figures[name] = measure(args, name)
        keep(file, args, figures)
    print_figures(file, args, compared_on_card(figures))


def compared_on_card(figures: dict[str, Any]) -> dict[str, Any]:
    """What was found of ours and released on a card, with the ratios of time and memory where both fitted."""
    ours, released = figures.get("ours", {}), figures.get("released", {})
    if "wall_s" in ours and "wall_s" in released:
        figures["ratio"] = ours["per_s"] / released["per_s"]
        figures["memory_ratio"] = released["peak_gib"] / ours["peak_gib"]
        print(f"ours is faster by {figures['ratio']:.2f}x; released needs {figures['memory_ratio']:.2f}x the memory")
    return figures


def run(args: argparse.Namespace) -> None:
    """Check, measure, and print the table."""
    if len(args.only) == 2:
        check(args)
    if args.device == "cuda":
        report_on_card(__file__, args, measure_cuda)
        return
    times = measure_cpu(args)
    gc.collect()
    peaks = {} if args.no_memory else {name: peak_memory(args, name) for name in args.only}
    count = args.classes if args.what == "text" else args.images
    print_table(args, times, peaks, count, UNITS[args.what])
    if len(peaks) == 2:
        print(f"released needs {peaks['released'] / peaks['ours']:.2f}x the memory")
    print_figures(__file__, args, figures_of(args, times, peaks, count))


def figures_of(args: argparse.Namespace, times: Times, peaks: dict[str, float], count: int) -> dict[str, Any]:
    """The table as numbers."""
    found: dict[str, Any] = {}
    for name, rows in times.items():
        wall = statistics.median(wall for wall, _ in rows) if rows else None
        speed = {"wall_s": wall, "per_s": count / wall} if wall else {"wall_s": None}
        found[name] = speed | ({"peak_gib": peaks[name] / GIB} if name in peaks else {})
    if all(times.get(name) for name in WAYS):
        ratios = [b[0] / a[0] for a, b in zip(times["ours"], times["released"], strict=True)]
        found["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


def print_table(args: argparse.Namespace, times: Times, peaks: dict[str, float], count: int, unit: str) -> None:
    """Wall and processor time, speed and memory of each way, and the ratios of their times."""
    print(f"{'':10}{'wall s':>10}{'cpu s':>10}{unit:>12}{'peak GiB':>10}")
    for name, rows in times.items():
        if rows:
            wall, processor = (statistics.median(column) for column in zip(*rows, strict=True))
            peak = f"{peaks[name] / GIB:10.2f}" if name in peaks else f"{'-':>10}"
            print(f"{name:10}{wall:10.3f}{processor:10.3f}{count / wall:12.4f}{peak}", flush=True)
    if all(times.get(name) for name in WAYS):
        for i, clock in enumerate(("wall", "cpu")):
            ratios = [b[i] / a[i] for a, b in zip(times["ours"], times["released"], strict=True)]
            spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} .. {max(ratios):.2f})"
            print(f"ours is faster by {spread} in {clock} time")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=tuple(UNITS), default="step")
    parser.add_argument("--images", type=int, help="batch size of the step; default 4 on CPU, 32 on CUDA")
    parser.add_argument("--classes", type=int, help="default 125 on CPU, 1000 on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16: autocast; default fp32 on CPU, bf16 on CUDA")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way (default 3)")
    parser.add_argument("--vocab", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz; default: a stand-in")
    parser.add_argument("--chunk", type=int, help="text: classes that `released` holds at once; default all")
    parser.add_argument("--only", nargs=1, choices=tuple(WAYS), default=list(WAYS), help="time one way, unchecked")
    parser.add_argument("--no_memory", action="store_true", help="CPU: don't run each way once more for its memory")
    parser.add_argument("--tiny", action="store_true", help="a tiny CLIP: to try the script, not to measure")
    add_output(parser)
    parser.add_argument("--own_peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    args.images = args.images or (32 if cuda else 4)
    args.classes = args.classes or (1000 if cuda else 125)
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here.")
    if args.what == "step" and args.images < 2:
        parser.error(f"--images {args.images}: half of the batch is attacked; give at least 2.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.own_peak:
        print(own_peak_memory(args))
        return
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    size = "tiny CLIP" if args.tiny else "ViT-B/16"
    load = f"{args.classes} classes" if args.what == "text" else f"{args.images} images, {args.classes} classes"
    tokens = "CLIP's tokens" if args.vocab else "stand-in tokens"
    print(f"{place}, torch {torch.__version__}, {size}, {args.what}: {load}, {args.dtype}, {tokens}", flush=True)
    run(args)


if __name__ == "__main__":
    main()
