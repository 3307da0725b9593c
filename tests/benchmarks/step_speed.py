"""Time of one PMG-AFT training step: this package against the way the authors' released code takes it.

Both ways train the same random-weight CLIP of ViT-B/32 size on the same images, prompts and labels, and are first
checked to give the same loss, adversarial images and weight gradients. What is printed are times and their ratio.

`ours`      the objective `PMGAFT.released_preset()` and `pgd`: class embeddings computed once from prompts cut after
            the longest EOS, text tower frozen, attack differentiates the pixels alone, teacher without a graph, one
            student forward for adversarial and clean images. As in the trainer, the embeddings stand still in a step
            (`still_texts`): whether anything changed on the text side is looked at once for student and teacher each.
`released`  written anew after the structure of the released code: the text tower reads all 77 tokens of all prompts in
            every forward (attack, adversarial, teacher, clean); every parameter of student and teacher has gradients
            on, so that the attack and the loss also differentiate both text towers and the teacher; same-size bicubic
            resize; three separate forwards; attack gradients stay in `.grad` until the update (a GradScaler divides
            them by its scale). Left out, to its favour: tokenising the prompts in every step and DataParallel.

On CPU, fp32: 32 images with 25 and 125 classes (256 with 200 and 1000, one eighth). With 125, `released` should take
about 22 GiB; `--images 16 --classes 12 62` keeps the proportions and took 12.6 GiB. `--dtype bf16` times ours also
with its attack alone, and with everything, in bf16 autocast. On CUDA the full sizes, `ours` in bf16 autocast (with
`--compile` also through torch.compile) and `released` in fp16 autocast with a GradScaler.
`--parts` times sub-steps of `ours` and alternatives to them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
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
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import hf_robust_clip
from hf_robust_clip.attacks.pgd import input_gradient, pgd
from hf_robust_clip.modeling import PAPER_TEMPLATE, CLIPForZeroShotClassification
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.pmg_aft import PMGAFT
from hf_robust_clip.threat_model import ThreatModel
from hf_robust_clip.training.batches import in_bfloat16, still_texts

EPS = 1 / 255
NUM_STEPS = 2
SEED = 0
OBJECTIVE = PMGAFT.released_preset()


def clip_config(tiny: bool) -> CLIPConfig:
    """ViT-B/32 (the defaults), or a CLIP small enough for a smoke test."""
    if not tiny:
        return CLIPConfig()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16)


def class_prompts(count: int) -> tuple[list[str], list[str]]:
    """The first `count` ImageNet names, and their prompts."""
    file = Path(hf_robust_clip.__file__).parent / "zero_shot_data" / "class_names.json"
    names = list(dict.fromkeys(json.loads(file.read_text())["imagenet"]))[:count]
    if len(names) < count:
        raise SystemExit(f"--classes {count}: there are only {len(names)} names.")
    return names, [PAPER_TEMPLATE.format(name) for name in names]


def random_token_ids(prompts: list[str], config: CLIPConfig) -> Tensor:
    """(C, 77) token ids as CLIP's tokenizer lays them out, without its vocabulary: BOS, words, EOS up to the end.

    The ids are random, drawn per word so that equal words have equal ids. The EOS stands after as many words as the
    prompt has, but no earlier than position 6 and no later than 12.
    """
    text, generator = config.text_config, torch.Generator().manual_seed(SEED)
    word_ids: dict[str, int] = {}
    ids_CL = torch.full((len(prompts), text.max_position_embeddings), text.eos_token_id)
    for row, prompt in enumerate(prompts):
        words = (prompt.split() + ["x"] * 5)[: min(max(len(prompt.split()), 5), 11)]
        ids_CL[row, 0] = text.bos_token_id
        for place, word in enumerate(words, start=1):
            if word not in word_ids:
                word_ids[word] = int(torch.randint(text.bos_token_id, (1,), generator=generator))
            ids_CL[row, place] = word_ids[word]
    return ids_CL


def random_clip(config: CLIPConfig, device: torch.device, *, teacher: bool) -> CLIPModel:
    """A CLIP of random weights; student and teacher share the text side and differ in the vision side."""
    torch.manual_seed(SEED)
    with device:  # on a card in a hundredth of the time
        model = CLIPModel(config)
    if not teacher:
        generator = torch.Generator(device).manual_seed(SEED + 1)
        with torch.no_grad():
            for parameter in [*model.vision_model.parameters(), *model.visual_projection.parameters()]:
                noise = torch.randn(parameter.shape, generator=generator, device=device)
                parameter.add_(0.2 * parameter.std(correction=0) * noise)
    return model


class Task:
    """The inputs that both ways share. `dtype` is that of weights and images; autocast is up to each way."""

    def __init__(self, args: argparse.Namespace, images: int, classes: int, dtype: torch.dtype = torch.float32):
        self.config, self.device, self.dtype = clip_config(args.tiny), torch.device(args.device), dtype
        self.names, prompts = class_prompts(classes)
        self.token_ids_CL = random_token_ids(prompts, self.config).to(self.device)
        size = self.config.vision_config.image_size
        generator = torch.Generator().manual_seed(SEED)
        self.images_BCHW = torch.rand(images, 3, size, size, generator=generator).to(self.device, dtype)
        self.labels_B = torch.randint(classes, (images,), generator=generator).to(self.device)


class Ours:
    """A PMG-AFT step with this package. `dtype` is autocast's, `attack_dtype` that of the student under attack where
    it is another, `compile` puts both models through torch.compile.
    """

    def __init__(
        self,
        task: Task,
        dtype: torch.dtype = torch.float32,
        *,
        attack_dtype: torch.dtype | None = None,
        compile: bool = False,
    ):
        self.task, self.dtype, self.compile = task, dtype, compile
        self.attack_dtype = attack_dtype or dtype
        self.threat_model = ThreatModel(EPS)
        self.student = self.build(teacher=False).train()
        self.teacher = self.build(teacher=True).requires_grad_(False).eval()
        for parameter in [*self.student.text_parameters(), self.student.logit_scale]:
            parameter.requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.student.vision_parameters(), lr=5e-5, momentum=0.9)
        self.classifiers = [self.student, self.teacher]
        if compile:
            self.classifiers = [torch.compile(model, dynamic=False) for model in self.classifiers]

    def build(self, *, teacher: bool) -> CLIPForZeroShotClassification:
        task = self.task
        mean, std = OBJECTIVE.normalisation
        image_processor = CLIPImageProcessorPil(image_mean=mean, image_std=std)
        processor = SimpleNamespace(image_processor=image_processor)  # no tokenizer
        clip = random_clip(task.config, task.device, teacher=teacher).to(task.dtype)
        model = CLIPForZeroShotClassification.from_clip(clip, processor)
        eos_C = (task.token_ids_CL == task.config.text_config.eos_token_id).int().argmax(dim=1)
        model.class_names, model.templates = tuple(task.names), (PAPER_TEMPLATE,)
        model.class_token_ids = task.token_ids_CL[:, None, : int(eos_C.max()) + 1]
        return model

    def batch(self) -> Batch:
        student, teacher = self.classifiers
        return Batch((self.task.images_BCHW,), self.task.labels_B, None, student, teacher, len(self.task.images_BCHW))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.task.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def attack(self, batch: Batch) -> Tensor:
        settings = {"num_steps": NUM_STEPS, "step_size": EPS, "seed": SEED}
        if self.attack_dtype != self.dtype:
            batch = replace(batch, student=in_bfloat16(batch.student))
        with self.autocast(), frozen(self.student, self.compile):
            return pgd(OBJECTIVE.attack_loss(batch), batch.images, self.threat_model, **settings)

    def losses(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            return OBJECTIVE(batch, adv_BCHW)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self.still_texts():
            batch = self.batch()
            terms = self.losses(batch, self.attack(batch))
        sum(terms.values()).backward()
        self.optimizer.step()

    def still_texts(self) -> AbstractContextManager[None]:
        """Inside, the texts are looked at once for student and teacher, as in a step of the trainer."""
        return still_texts(self.student, self.teacher)


class Released:
    """A PMG-AFT step with the structure of the authors' code. `dtype` is autocast's; fp16 takes a GradScaler."""

    def __init__(self, task: Task, dtype: torch.dtype = torch.float32):
        self.task, self.dtype = task, dtype
        self.student, self.teacher = (self.build(teacher=teacher).eval() for teacher in (False, True))
        self.visual = [*self.student.vision_model.parameters(), *self.student.visual_projection.parameters()]
        self.student.vision_model.train()
        self.optimizer = torch.optim.SGD(self.visual, lr=5e-5, momentum=0.9)
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=dtype == torch.float16)
        mean, std = OBJECTIVE.normalisation
        self.mean = torch.tensor(mean, device=task.device, dtype=task.dtype).view(-1, 1, 1)
        self.std = torch.tensor(std, device=task.device, dtype=task.dtype).view(-1, 1, 1)

    def build(self, *, teacher: bool) -> CLIPModel:
        return random_clip(self.task.config, self.task.device, teacher=teacher).to(self.task.dtype)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.task.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, images_BCHW: Tensor) -> Tensor:
        resized_BCHW = F.interpolate(images_BCHW, size=images_BCHW.shape[-2:], mode="bicubic")
        return (resized_BCHW - self.mean) / self.std

    def classify(self, model: CLIPModel, prepared_BCHW: Tensor) -> Tensor:
        """(B, C) cosines: the text features are scaled, then normalised again, which takes the scale away."""
        image_BD = model.get_image_features(pixel_values=prepared_BCHW).pooler_output
        text_CD = model.get_text_features(input_ids=self.task.token_ids_CL).pooler_output
        image_BD = image_BD / image_BD.norm(dim=1, keepdim=True)
        text_CD = model.logit_scale.exp() * (text_CD / text_CD.norm(dim=1, keepdim=True))
        image_BD = image_BD / image_BD.norm(dim=-1, keepdim=True)
        text_CD = text_CD / text_CD.norm(dim=-1, keepdim=True)
        return image_BD @ text_CD.t()

    def attack(self, start_BCHW: Tensor | None = None) -> Tensor:
        """The perturbation, still a leaf with gradients on; from its own random start unless `start_BCHW` is given."""
        images_BCHW = self.task.images_BCHW
        if start_BCHW is None:
            start_BCHW = images_BCHW + torch.zeros_like(images_BCHW).uniform_(-EPS, EPS)
        delta_BCHW = (start_BCHW.clamp(0, 1) - images_BCHW).requires_grad_()
        with self.autocast():
            for _ in range(NUM_STEPS):
                logits_BC = self.classify(self.student, self.prepare(images_BCHW + delta_BCHW))
                F.cross_entropy(logits_BC, self.task.labels_B).backward()
                moved_BCHW = (delta_BCHW.detach() + EPS * delta_BCHW.grad.sign()).clamp(-EPS, EPS)
                delta_BCHW.data.copy_((images_BCHW + moved_BCHW).clamp(0, 1) - images_BCHW)
                delta_BCHW.grad.zero_()
        return delta_BCHW

    def losses(self, delta_BCHW: Tensor) -> dict[str, Tensor]:
        images_BCHW = self.task.images_BCHW
        with self.autocast():
            adv_BCHW, clean_BCHW = self.prepare(images_BCHW + delta_BCHW), self.prepare(images_BCHW)
            adv_BC = self.classify(self.student, adv_BCHW)
            teacher_BC = self.classify(self.teacher, adv_BCHW)
            clean_BC = self.classify(self.student, clean_BCHW)
            log_adv_BC = adv_BC.log_softmax(dim=1)
            return {
                "ce": F.cross_entropy(adv_BC, self.task.labels_B),
                "kl_general": F.kl_div(log_adv_BC, teacher_BC.softmax(dim=1), reduction="sum"),
                "kl_clean": F.kl_div(log_adv_BC, clean_BC.softmax(dim=1), reduction="sum"),
            }

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = sum(self.losses(self.attack()).values())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@contextmanager
def frozen(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Switch off the gradients of the parameters. A compiled backward computes all of them, asked for or not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and active]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def compare(task: Task) -> dict[str, float]:
    """How far the two ways differ without autocast, from the same random start: relative, for each term, the loss and
    the gradient of the vision weights. In fp32 the KL terms, differences of almost equal numbers, are mostly rounding.

    `pixels` is the share of values of the adversarial images that differ by more than a tenth of a step: rounding can
    turn the sign of a gradient that is almost zero.
    """
    ours = Ours(task)
    batch = ours.batch()
    adv_BCHW = ours.attack(batch)
    terms = ours.losses(batch, adv_BCHW)
    sum(terms.values()).backward()
    values = {name: float(value.detach()) for name, value in terms.items()}
    gradient = torch.cat([p.grad.flatten() for p in ours.student.vision_parameters() if p.grad is not None])
    start_BCHW = ours.threat_model.random_start(task.images_BCHW, SEED)
    del ours, batch, terms
    gc.collect()  # models hold cycles: without this they stay in memory

    released = Released(task)
    delta_BCHW = released.attack(start_BCHW)
    pixels = ((task.images_BCHW + delta_BCHW.detach() - adv_BCHW).abs() > EPS / 10).float().mean()
    released.optimizer.zero_grad()
    other_terms = released.losses(delta_BCHW)
    sum(other_terms.values()).backward()
    others = {name: float(value.detach()) for name, value in other_terms.items()}
    other_gradient = torch.cat([p.grad.flatten() for p in released.visual if p.grad is not None])

    values["loss"], others["loss"] = sum(values.values()), sum(others.values())
    differences = {name: abs(values[name] - others[name]) / abs(others[name]) for name in values}
    differences["gradient"] = float((gradient - other_gradient).norm() / other_gradient.norm())
    return {"ours": values["loss"], "released": others["loss"], "pixels": float(pixels)} | differences


def seconds(function: Callable[[], object], args: argparse.Namespace) -> float:
    """Time of one call."""
    wall, processor = timed(function, args.device)
    return processor if args.processor_time else wall


def alternate(functions: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Times of each function, one warm-up each and then turn by turn, so that a busy moment meets all of them."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(args.repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, args))
    return times


def spread(slow: list[float], fast: list[float], form: str = ".2f") -> str:
    """Median, lowest and highest ratio of the pairs."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(ratios):{form}}x ({min(ratios):{form}} .. {max(ratios):{form}})"


def run_cpu(args: argparse.Namespace, classes: int) -> dict[str, Any]:
    """Times of both ways, turn by turn."""
    task = Task(args, args.images, classes)
    ways: dict[str, Callable[[], Ours | Released]] = {
        "ours": lambda: Ours(task),
        "ours, attack in bf16": lambda: Ours(task, attack_dtype=torch.bfloat16),
        "ours bf16": lambda: Ours(task, torch.bfloat16),
        "released": lambda: Released(task),
    }
    wanted = {"ours", "released"} if args.dtype == "fp32" else set(ways)
    ways = {name: make for name, make in ways.items() if name in wanted and name.startswith(args.only or "")}
    times = alternate({name: make().step for name, make in ways.items()}, args)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{classes} classes: " + ", ".join(f"{name} {value:.3f} s" for name, value in medians.items()), end="")
    print(flush=True)
    figures: dict[str, Any] = {name: {"s": value} for name, value in medians.items()}
    for name in () if args.only else [name for name in ways if name != "released"]:
        print(f"{classes} classes: {name} is faster by {spread(times['released'], times[name])}", flush=True)
        ratios = [b / a for a, b in zip(times[name], times["released"], strict=True)]
        figures[name]["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return figures


def peak_memory(args: argparse.Namespace, classes: int) -> None:
    """Peak resident memory of each way, in a process of its own (interpreter and libraries included)."""
    peaks = {}
    for way in ("ours", "released"):
        options = ["--only", way, "--memory", "--images", str(args.images), "--classes", str(classes)]
        command = [sys.executable, __file__, *options, *(["--tiny"] if args.tiny else [])]
        peaks[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    listed = ", ".join(f"{way} {peak / GIB:.2f} GiB" for way, peak in peaks.items())
    print(f"{classes} classes: peak memory {listed}; {peaks['released'] / peaks['ours']:.2f}x", flush=True)


def own_peak_memory(args: argparse.Namespace) -> None:
    """What the child process of `peak_memory` does: two steps, then its highest resident size in bytes."""
    task = Task(args, args.images, args.classes[0])
    way = (Ours if args.only == "ours" else Released)(task)
    for _ in range(2):
        way.step()
    print(resident_peak())


def run_cuda(
    args: argparse.Namespace, classes: int, written: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:  # fmt: skip
    """Times, memory and use of the card, one way after the other: together they may not fit. After each, `written` is
    given what is known.
    """
    task = Task(args, args.images, classes)
    own = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    other = torch.float16 if args.dtype == "bf16" else torch.float32
    ways: dict[str, Callable[[], Ours | Released]] = {f"ours {args.dtype}": lambda: Ours(task, own)}
    if args.compile and classes == args.classes[0]:
        ways[f"ours {args.dtype} compiled"] = lambda: Ours(task, own, compile=True)
    ways[f"released {'fp16' if args.dtype == 'bf16' else 'fp32'}"] = lambda: Released(task, other)
    if args.only:
        ways = {name: make for name, make in ways.items() if name.startswith(args.only)}

    operations, figures = None, {}
    for name, make in ways.items():
        figures[name] = found = {}
        with told_if_failed(f"{classes} classes: {name}, {args.images} images", found):
            way = make()
            known = operations if getattr(way, "compile", False) else None
            found |= on_card(way.step, args.images, args.repeats, operations=known)
            operations = found["operations"]
            print(f"{classes} classes: {name}: {card_told(found, 'images/s')}", flush=True)
        way = None
        torch.compiler.reset()
        clear_card()
        written(figures)
    speeds = {name: found["per_s"] for name, found in figures.items() if "per_s" in found}
    slow = [speed for name, speed in speeds.items() if name.startswith("released")]
    for name, speed in speeds.items():
        if slow and name.startswith("ours"):
            figures[name]["ratio"] = speed / slow[0]
            print(f"{classes} classes: {name} is faster by {speed / slow[0]:.2f}x", flush=True)
    return figures


def run_parts(args: argparse.Namespace, classes: int) -> None:
    """Times of the sub-steps of `ours`, and of alternatives with the same result."""
    task = Task(args, args.images, classes)
    ours = Ours(task)
    batch, student = ours.batch(), ours.student
    attack_loss = OBJECTIVE.attack_loss(batch)
    start_BCHW = ours.threat_model.random_start(batch.images, SEED)

    def frozen_gradient() -> None:
        with frozen(student):
            input_gradient(attack_loss, start_BCHW)

    def separately(adv_BCHW: Tensor) -> None:
        halves = student(adv_BCHW), student(batch.images)
        terms = F.cross_entropy(OBJECTIVE.scores(halves[0]), batch.labels)
        for guide in (batch.ask_teacher(adv_BCHW), halves[1]):
            terms = terms + OBJECTIVE.reduced_kl(OBJECTIVE.scores(guide), OBJECTIVE.scores(halves[0]), batch)
        terms.backward()

    parts = {
        "whole step": ours.step,
        "random start": lambda: ours.threat_model.random_start(batch.images, SEED),
        "attack gradient": lambda: input_gradient(attack_loss, start_BCHW),
        "attack gradient, parameters frozen": frozen_gradient,
        "teacher forward": lambda: batch.ask_teacher(start_BCHW),
        "losses and backward, one student forward": lambda: sum(ours.losses(batch, start_BCHW).values()).backward(),
        "losses and backward, two student forwards": lambda: separately(start_BCHW),
        "optimizer": ours.optimizer.step,
    }
    with ours.still_texts():
        times = alternate(parts, args)
    whole = statistics.median(times["whole step"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{classes} classes: {name}: {median:.3f} s, {median / whole:.1%} of a step")
    one, two = (times[f"losses and backward, {number}"] for number in ("one student forward", "two student forwards"))
    print(f"{classes} classes: one student forward is faster than two by {spread(two, one, '.3f')}")
    all_on, off = times["attack gradient"], times["attack gradient, parameters frozen"]
    print(f"{classes} classes: frozen parameters make the attack faster by {spread(all_on, off, '.3f')}", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="batch size; default 32 on CPU, 256 on CUDA")
    parser.add_argument("--classes", type=int, nargs="+", help="default 25 125 on CPU, 200 1000 on CUDA")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each way (default 3)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="ours; default fp32 on CPU, bf16 on CUDA; on CPU bf16 is beside fp32"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="CUDA: also ours through torch.compile, for the first of the classes",
    )
    parser.add_argument(
        "--processor_time", action="store_true", help="CPU: clock processor time; for a busy machine, on one thread"
    )
    parser.add_argument("--only", choices=("ours", "released"), help="time one way alone, without the check")
    parser.add_argument("--memory", action="store_true", help="CPU: also the peak memory of each way")
    parser.add_argument("--parts", action="store_true", help="time sub-steps of ours instead")
    parser.add_argument("--tiny", action="store_true", help="a tiny CLIP: to try the script, not to measure")
    add_output(parser)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    args.images = args.images or (256 if cuda else 32)
    args.classes = args.classes or ([200, 1000] if cuda else [25, 125])
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here.")
    if cuda and args.processor_time:
        parser.error("--processor_time is for --device cpu.")
    if not cuda and args.compile:
        parser.error("--compile is for --device cuda.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.only and args.memory:
        own_peak_memory(args)
        return
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    size = "tiny CLIP" if args.tiny else "ViT-B/32"
    clock = "processor time" if args.processor_time else "wall time"
    print(
        f"{place}, torch {torch.__version__}, {size}, {args.images} images, {args.dtype}, PGD-{NUM_STEPS}, {clock}",
        flush=True,
    )
    figures: dict[str, Any] = {}
    for classes in args.classes:
        gc.collect()
        if args.parts:
            run_parts(args, classes)
            continue
        if not args.only and not (args.device == "cuda" and figures):  # there both comparisons would be the same
            found = compare(Task(args, min(args.images, 32), min(classes, 125), exact_dtype(args.device)))
            listed = ", ".join(f"{name} {value:.7g}" for name, value in found.items())
            print(
                f"{classes} classes: loss ours, released, share of other pixels, relative differences: {listed}",
                flush=True,
            )
            if not found["loss"] < 1e-4:
                raise SystemExit("the two ways differ in their loss: their times can't be compared.")
            gc.collect()
        if args.device == "cuda":

            def written(of_classes: dict[str, Any], key: str = str(classes)) -> None:
                keep(__file__, args, figures | {key: of_classes})

            figures[str(classes)] = run_cuda(args, classes, written)
            continue
        figures[str(classes)] = run_cpu(args, classes)
        keep(__file__, args, figures)
        if args.memory:
            peak_memory(args, classes)
    if not args.parts:
        print_figures(__file__, args, figures)


if __name__ == "__main__":
    main()
