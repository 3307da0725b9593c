"""What an update of each fine-tuning method costs, and the tables of recipes/README.md that tell it.

    python tests/benchmarks/training_costs.py --count       # passes and memory: computed, a minute on a CPU
    python tests/benchmarks/training_costs.py --measure     # seconds and peak memory: measured
    python tests/benchmarks/training_costs.py --measure --device cuda --size B/32 --images 256 --dtype bf16
    python tests/benchmarks/training_costs.py --write       # the tables, from these and from hub_cards/

The methods are those of recipes/configs/digits-clip/methods_benchmark.yaml, with their settings there. What is found
is kept in training_costs.json beside this file.

Counted are images that pass an image encoder in an update, for each image of the batch: in the attack (forward, and
back to the pixels: 2 forward passes), in the loss (forward, and back to pixels and weights: 3), and without gradients
(1). Their sum is what the update costs in forward passes of one image; text encoders are left out.

Computed memory: weights of student and teacher (4 bytes each; the text side is shared), gradients and two moments of
AdamW for each trained weight, and what autograd keeps for the backward pass of each image in the loss, found by
running the encoder on tensors without memory. Allocator, kernels and the framework's own memory are left out.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import (
    clear_card,
    float32_told,
    kernels_seen,
    profiler,
    resident_peak,
    told_if_failed,
    use_told,
    used,
)  # fmt: skip
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, TrainerCallback

from hf_robust_clip import CLIPForZeroShotClassification, RobustClipConfig, RobustClipTrainer
from hf_robust_clip.command_line import packaged_config
from hf_robust_clip.modeling import scratch
from hf_robust_clip.runs import train
from hf_robust_clip.storage import write_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COSTS = HERE / "training_costs.json"
README = ROOT / "recipes/README.md"
BENCHMARK = "digits-clip/methods_benchmark"
NAMES = ("cat", "dog", "ship", "truck")
TEXTS = {name: [f"a {name} {number}" for number in range(5)] for name in NAMES}  # as many of each as SAFT's
START, BASELINE = "pretrained", "TeCoA"
PROMPTS = ("CoOp", "APT-V", "APT-VLI", "FAP")  # which train prompts alone: their costs are not told here
MEMORY_OF = ("TeCoA", "FARE", "PMG-AFT (released)", "TGA-ZSR", "ACL (labels)", "AdvCL")
MEASURED_SIZES, TOLD_SIZES = ("tiny", "S/32", "B/32", "B/16", "L/14"), ("B/32", "B/16", "L/14")
ADAMW, FLOAT32, GIB = 8, 4, 2**30
IN_MEMORY_TABLE = 64  # images
DISTINCT = 32  # a multiple of the number of classes


@dataclass(frozen=True)
class Size:
    """Of a CLIP: side of pictures and patches in pixels; width, layers and heads of both towers; width in common."""

    image: int
    patch: int
    vision: tuple[int, int, int]
    text: tuple[int, int, int]
    projection: int

    def config(self, **special: Any) -> CLIPConfig:
        """Of a model with as many tokens as OpenAI's, and these numbers of special ones."""
        (width, layers, heads), (text_width, text_layers, text_heads) = self.vision, self.text
        vision = CLIPVisionConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
            image_size=self.image, patch_size=self.patch, projection_dim=self.projection,
        )  # fmt: skip
        text = CLIPTextConfig(
            hidden_size=text_width, num_hidden_layers=text_layers, num_attention_heads=text_heads,
            intermediate_size=4 * text_width, vocab_size=49408, projection_dim=self.projection, **special,
        )  # fmt: skip
        return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=self.projection)


SIZES = {
    "tiny": Size(16, 8, (32, 2, 2), (32, 2, 2), 32),
    "S/32": Size(224, 32, (384, 6, 6), (128, 2, 2), 128),
    "B/32": Size(224, 32, (768, 12, 12), (512, 12, 8), 512),
    "B/16": Size(224, 16, (768, 12, 12), (512, 12, 8), 512),
    "L/14": Size(224, 14, (1024, 24, 16), (768, 12, 12), 768),
}


# ---- a method


def methods() -> dict[str, tuple[str, dict[str, Any]]]:
    """By title, the packaged config and the flags of each method that the benchmark trains."""
    settings = yaml.safe_load(packaged_config(BENCHMARK).read_text(encoding="utf-8"))
    return {row["title"]: (row["config"], row.get("flags", {})) for row in settings["models"] if "config" in row}


@functools.cache
def read_run(title: str) -> train.TrainingRun:
    """The training of a method, as the benchmark starts it."""
    config, flags = methods()[title]
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--{key}={value}" for key, value in {**flags, "output_dir": folder, "use_cpu": "true"}.items()]
        return train.read(words, packaged_config(config))


class Pictures(torch.utils.data.Dataset):
    """Random pictures, `DISTINCT` of them in turn: tensors, or whole pictures where a method takes several crops of
    each.
    """

    def __init__(self, count: int, side: int, whole: bool):
        self.count, self.side, self.whole = count, side, whole
        self.rows = [self.row(index) for index in range(min(count, DISTINCT))]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index % DISTINCT]

    def row(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        if self.whole:
            picture = torch.randint(0, 256, (3, self.side, self.side), generator=generator, dtype=torch.uint8)
            return {"picture": picture, "labels": index % len(NAMES)}
        return {
            "pixel_values": torch.rand(3, self.side, self.side, generator=generator),
            "labels": index % len(NAMES),
        }


def make_trainer(
    title: str, size: str, images: int, folder: str, *, device: str = "cpu", dtype: str = "fp32", updates: int = 1,
    callbacks: list[TrainerCallback] | None = None,
) -> RobustClipTrainer:  # fmt: skip
    """A training of random weights by a method of the benchmark."""
    run, sizes = read_run(title), SIZES[size]
    corpus = ["This is a photo of a", "This is not a photo of a", *NAMES, *(t for own in TEXTS.values() for t in own)]
    processor = scratch.make_processor(scratch.Size(image_size=sizes.image, context_length=77), corpus)
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    with torch.device(device):  # on a card in a hundredth of the time
        clip = CLIPModel(sizes.config(**special))
    model = CLIPForZeroShotClassification.from_clip(clip, processor)
    several = "texts" in run.method.objective.needs
    model.set_classes(NAMES, run.template, TEXTS if several else None)
    args = RobustClipConfig(
        folder, eps="4/255", attack_steps=run.training.attack_steps, attack_step_size="2/255", max_steps=updates,
        per_device_train_batch_size=images, optim="adamw_torch", learning_rate=1e-5, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_strategy="no", use_cpu=device == "cpu", bf16=dtype == "bf16",
        dataloader_drop_last=True,
    )  # fmt: skip
    data = Pictures(images * updates, sizes.image, whole=run.method.objective.num_views > 1)
    return RobustClipTrainer(model, args, run.method.objective, data, callbacks=callbacks)


# ---- passes


def passes(title: str) -> dict[str, Any]:
    """Images that pass an image encoder in one update, for each image of the batch, and what the method needs."""
    images, found = 6, {"attack": 0, "loss": 0, "without gradients": 0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(title, "tiny", images, folder)
        attacking: list[bool] = []
        attacked = trainer._attacked

        def watched(*args: Any) -> Any:
            attacking.append(True)
            try:
                return attacked(*args)
            finally:
                attacking.pop()

        def seen(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            pixels = args[0] if args else kwargs["pixel_values"]
            trained = any(parameter.requires_grad for parameter in module.parameters())
            kind = "without gradients"
            if torch.is_grad_enabled() and (pixels.requires_grad or trained):
                kind = "attack" if attacking else "loss"
            found[kind] += len(pixels)

        trainer._attacked = watched  # type: ignore[method-assign]
        for model in filter(None, (trainer.classifier(), trainer.teacher)):
            model.vision_model.register_forward_pre_hook(seen, with_kwargs=True)
        trainer.train()
        needs = sorted(trainer.training_objective.needs)
    by_image = {kind: count / images for kind, count in found.items()}
    total = 2 * by_image["attack"] + 3 * by_image["loss"] + by_image["without gradients"]
    steps = trainer.attack.num_steps if trainer.training_objective.attacked else 0
    return {"needs": needs, "attack_steps": steps, **by_image, "forward_passes": total}


# ---- memory


def kept_for_backward(size: str, dtype: str) -> tuple[int, int]:
    """Bytes that autograd keeps of each image in the image encoder, and besides, whatever the number of images."""
    found = {}
    for images in (1, 2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            clip = CLIPModel(SIZES[size].config())
            storages: dict[int, int] = {}
            weights = {p.untyped_storage()._cdata for p in clip.parameters()}

            def keep(tensor: torch.Tensor, storages: dict[int, int] = storages, weights: set[int] = weights) -> Any:
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    storages[storage._cdata] = storage.nbytes()
                return tensor

            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
            ):
                side = SIZES[size].image
                kept = clip.get_image_features(pixel_values=torch.rand(images, 3, side, side)).pooler_output
                found[images] = sum(storages.values())
            del kept
    return found[2] - found[1], 2 * found[1] - found[2]


def operations(size: str) -> int:
    """Floating-point operations of the forward pass of one image: multiplications and additions of the products."""
    side, config = SIZES[size].image, SIZES[size].config()
    config._attn_implementation = "eager"  # products that the counter knows
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        CLIPModel(config).get_image_features(pixel_values=torch.rand(1, 3, side, side))
    return counter.get_total_flops()


def parameters(size: str) -> tuple[int, int]:
    """Of a CLIP, and of its image side."""
    with torch.device("meta"):
        clip = CLIPModel(SIZES[size].config())
    image_side = [*clip.vision_model.parameters(), *clip.visual_projection.parameters()]
    return sum(p.numel() for p in clip.parameters()), sum(p.numel() for p in image_side)


def memory(counted: Mapping[str, Any], size: Mapping[str, int]) -> tuple[float, float]:
    """GiB of an update whatever the number of images, and of each image, computed."""
    teacher = size["image_side"] if "teacher" in counted["needs"] else 0
    weights = FLOAT32 * (size["parameters"] + teacher)
    trained = (FLOAT32 + ADAMW) * size["image_side"]
    return (weights + trained + size["kept_once"]) / GIB, counted["loss"] * size["kept_of_each_image"] / GIB


# ---- times


class Clock(TrainerCallback):
    """Seconds of each update: of the processor on a CPU, by the clock on a GPU, where the last one is profiled."""

    def __init__(self, device: str):
        self.cuda, self.seconds, self.began = device == "cuda", [], 0.0
        self.record: torch.profiler.profile | None = None

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cuda and state.global_step == state.max_steps - 1:
            self.record = profiler()
            self.record.start()
        self.began = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.began)
        if self.record is not None:
            self.record.stop()


def measured(title: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of an update after a first one, and peak memory in bytes: on a CPU what the process took beyond
    what it had before the model was made, on a GPU of tensors; there also the use of the card.
    """
    cuda, clock = args.device == "cuda", Clock(args.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident_peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            title, args.size, args.images, folder, device=args.device, dtype=args.dtype,
            updates=1 + args.repeats + cuda, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else resident_peak()
    del trainer
    gc.collect()
    seconds = statistics.median(clock.seconds[1 : 1 + args.repeats])
    found: dict[str, Any] = {"seconds": seconds, "peak_bytes": peak - before}
    if cuda:
        costs = load()
        of_image = costs["passes"][title]["forward_passes"] * costs["sizes"][f"{args.size} {args.dtype}"]["operations"]
        found |= {"images_per_s": args.images / seconds, "before_bytes": before}
        found |= used(args.images * of_image, seconds)
        with told_if_failed(f"{title}: time in kernels", {}):
            found |= kernels_seen(clock.record, 1)
            found["kernel_share"] = min(1.0, found["kernels_s"] / seconds)
    return found


def threads() -> int:
    """Of a measurement on a CPU."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def measured_apart(title: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measured` in a process of its own, so that no method has the memory of another."""
    own = ["--one", title, "--size", args.size, "--images", str(args.images), "--dtype", args.dtype,
           "--device", args.device, "--repeats", str(args.repeats)]  # fmt: skip
    done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(next(iter(done.stderr.splitlines()[-1:]), f"status {done.returncode}"))
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, written: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Every method, one after the other (on a GPU in one process, whose memory is cleared between them); one that
    doesn't fit is told and left out. After each, `written` is given what is known.
    """
    cuda = args.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, threads: {threads()}"
    found: dict[str, Any] = {}
    whole = {"size": args.size, "images": args.images, "dtype": args.dtype, "device": name, "repeats": args.repeats}
    whole |= {"float32": float32_told()} if cuda else {}
    whole["methods"] = found
    for title in sorted(args.methods or methods(), key=lambda title: title != BASELINE):
        with told_if_failed(title, {}):
            found[title] = measured(title, args) if cuda else measured_apart(title, args)
            print(title, cost_told(found[title], found.get(BASELINE), args.images), flush=True)
        if cuda:
            clear_card()
        written(whole)
    return whole


def cost_told(own: Mapping[str, Any], base: Mapping[str, Any] | None, images: int) -> str:
    """Seconds of an update, images/s, memory and, where they are known, the ratio to TeCoA and the use of the card."""
    line = f"{own['seconds']:.3f} s, {images / own['seconds']:.1f} images/s, peak {own['peak_bytes'] / GIB:.2f} GiB"
    if base:
        line += f", {own['seconds'] / base['seconds']:.2f} times {BASELINE}'s time"
    if own.get("before_bytes", 0) > GIB / 4:
        line += f" ({own['before_bytes'] / GIB:.2f} GiB were there before)"
    return f"{line}; {use_told(own)}" if "tflops" in own else line


# ---- tables


@dataclass(frozen=True)
class Figures:
    """A benchmark of methods: where its report is, under which attack and radius it is told, and by what names which
    tasks, of several their mean.
    """

    benchmark: str
    attack: str
    radius: float
    groups: Mapping[str, Sequence[str]]

    @property
    def report(self) -> Path:
        return ROOT / "hub_cards" / self.benchmark / "report.csv"

    @property
    def heads(self) -> list[str]:
        return [f"{told}: {group}" for told in ("clean", self.attack) for group in self.groups]


DIGITS = Figures(
    "methods-benchmark", "APGD", 24 / 255, {"trained on": ["trained classes"], "held out": ["held-out classes"]}
)
SMALL_CLIP = Figures(
    "mini-benchmark",
    "PGD-20",
    2 / 255,
    yaml.safe_load(packaged_config("mini-clip/benchmark").read_text(encoding="utf-8"))["groups"],
)


def robustness(figures: Figures) -> dict[str, list[float]]:
    """By method, clean and then robust accuracy of each group, in percent: means over tasks and seeds."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    with figures.report.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name, metric = row["name"].partition(", seed ")[0], row["metric"]
            own = not row["member"] and not row["judge"] and row["attack"].startswith(figures.attack)
            asked = {"accuracy": 0.0, "robust_accuracy": figures.radius}
            if own and float(row["eps"]) == asked.get(metric):
                values = found.setdefault(name, {}).setdefault((metric, row["task"]), [])
                values.append(100 * float(row["value"]))
    return {
        name: [
            statistics.mean(statistics.mean(own[metric, task]) for task in tasks)
            for metric in ("accuracy", "robust_accuracy")
            for tasks in figures.groups.values()
        ]
        for name, own in found.items()
    }


def changes(figures: Figures) -> dict[str, list[float]]:
    """`robustness` of each method less that before it, those first that gained most under attack where the last group
    is.
    """
    found = robustness(figures)
    start = found.pop(START)
    told = {name: [after - before for after, before in zip(own, start, strict=True)] for name, own in found.items()}
    return dict(sorted(told.items(), key=lambda row: -row[1][-1]))


def needs_told(counted: Mapping[str, Any]) -> str:
    return ", ".join(counted["needs"]) or "nothing"


def small_clip(costs: Mapping[str, Any]) -> str:
    """The table of methods by the small CLIP that was fine-tuned on CIFAR-10."""
    needs = {title: needs_told(own) for title, own in costs["passes"].items()} | dict.fromkeys(PROMPTS, "labels")
    rows = [[name, needs[name], *map("{:+.1f}".format, own)] for name, own in changes(SMALL_CLIP).items()]
    return as_markdown(["", "needs", *SMALL_CLIP.heads], rows)


def which_method(costs: Mapping[str, Any]) -> str:
    """The table of methods by the digits, with what they cost."""
    base, timed = costs["passes"][BASELINE]["forward_passes"], costs["measured"]["methods"]
    rows = []
    for name, own in changes(DIGITS).items():
        counted = costs["passes"][name]
        seconds = f"{timed[name]['seconds'] / timed[BASELINE]['seconds']:.1f}" if name in timed else "-"
        cost = [f"{counted['forward_passes'] / base:.1f}", seconds]
        rows.append([name, needs_told(counted), *map("{:+.1f}".format, own), *cost])
    about = f"`seconds`: measured, {setting_told(costs)}, median of {costs['measured']['repeats']} updates."
    return f"{as_markdown(['', 'needs', *DIGITS.heads, 'passes', 'seconds'], rows)}\n\n{about}"


def setting_told(costs: Mapping[str, Any]) -> str:
    """What was measured on what."""
    own = costs["measured"]
    return f"ViT-{own['size']} of random weights, {own['images']} images, {own['dtype']}, {own['device']}"


def memory_table(costs: Mapping[str, Any]) -> str:
    """GiB of an update whatever the number of images, and of each 64, by method and size."""
    rows = []
    for name in MEMORY_OF:
        cells = []
        for size in TOLD_SIZES:
            fixed, each = memory(costs["passes"][name], costs["sizes"][f"{size} bf16"])
            cells.append(f"{fixed:.1f} + {IN_MEMORY_TABLE * each:.1f}")
        rows.append([name, f"{costs['passes'][name]['loss']:g}", *cells])
    sizes = [costs["sizes"][f"{size} bf16"] for size in TOLD_SIZES]
    rows.append(["trained weights, millions", "", *(f"{own['image_side'] / 1e6:.0f}" for own in sizes)])
    rows.append(["forward pass of an image, GFLOP", "", *(f"{own['operations'] / 1e9:.1f}" for own in sizes)])
    table = as_markdown(["", "images in the loss", *(f"ViT-{size}" for size in TOLD_SIZES)], rows)
    return f"{table}\n\nMeasured / computed: {checked(costs)} GiB ({setting_told(costs)})."


def checked(costs: Mapping[str, Any]) -> str:
    """Of some methods, what was measured beside what is computed for the same images."""
    told, own = [], costs["measured"]
    for name in filter(own["methods"].get, MEMORY_OF):
        fixed, each = memory(costs["passes"][name], costs["sizes"][f"{own['size']} {own['dtype']}"])
        peak = own["methods"][name]["peak_bytes"] / GIB
        told.append(f"{name} {peak:.2f} / {fixed + own['images'] * each:.2f}")
    return ", ".join(told)


def as_markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(line).strip() + " |" if line[0] else "|" + " | ".join(line) + " |" for line in lines
    )


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "small CLIP": small_clip,
    "which method": which_method,
    "memory": memory_table,
}


def parts(text: str) -> Iterator[tuple[str, int, int]]:
    """Where in a README each table stands, between two comments."""
    for name in TABLES:
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        start = text.index(begin) + len(begin)
        yield name, start, text.index(end, start)


def write(costs: Mapping[str, Any]) -> None:
    """Put the tables into the README."""
    text = README.read_text(encoding="utf-8")
    for name in TABLES:
        _, start, end = next(part for part in parts(text) if part[0] == name)
        text = text[:start] + TABLES[name](costs) + text[end:]
    README.write_text(text, encoding="utf-8")


def load() -> dict[str, Any]:
    return json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {}


def save(costs: Mapping[str, Any], file: Path) -> None:
    write_text(file, json.dumps(costs, indent=1) + "\n")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count passes, compute memory")
    parser.add_argument("--measure", action="store_true", help="time updates")
    parser.add_argument("--write", action="store_true", help="write the tables of recipes/README.md")
    parser.add_argument("--size", choices=MEASURED_SIZES, default="S/32")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--methods", nargs="+", help="titles; default all")
    parser.add_argument("--output", type=Path, default=COSTS, help="where all that is known is written (JSON)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.one:
        if args.device == "cpu":
            torch.set_num_threads(threads())
        print(json.dumps(measured(args.one, args)))
        return
    costs = load()
    if args.count:
        costs["passes"] = {title: passes(title) for title in methods()}
        costs["sizes"] = {
            f"{size} {dtype}": size_of(size, dtype) for size in MEASURED_SIZES for dtype in ("fp32", "bf16")
        }
    if args.measure:
        costs["measured"] = measure(args, lambda found: save({**costs, "measured": found}, args.output))
    save(costs, args.output)
    if args.write:
        write(costs)


def size_of(size: str, dtype: str) -> dict[str, int]:
    """What the memory of a model follows from."""
    (every, image_side), (each, once) = parameters(size), kept_for_backward(size, dtype)
    return {
        "parameters": every,
        "image_side": image_side,
        "kept_of_each_image": each,
        "kept_once": once,
        "operations": operations(size),
    }


if __name__ == "__main__":
    main()
