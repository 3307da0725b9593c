"""Time and memory of test-time prompt tuning (TAPT, ViT-B/16, 64 views): this package against the released code's way.

Both ways hold the same random weights, prompts (2 tokens, 9 layers deep) and statistics, and tune on the same views.
They are first checked to give the same loss, tuned prompts and logits. Printed are wall time, processor time,
images/s and peak memory of each, and the ratio of their times.

`ours`      `TAPT.adapt`: views are made and chosen without a graph, the kept ones alone are differentiated; the text
            side is cut after the last end token, shares its prefix, and has one graph for the batch. Design V never
            runs it.
`released`  written anew after the structure of the released code: one image at a time; a forward of all views with
            a graph, backward through all of them; the text tower reads 77 tokens of every prompt in this forward and
            again in the prediction. To its favour: its views are made beforehand, and not timed.

    python tests/benchmarks/adaptation_speed.py --design VLI --classes 100
    python tests/benchmarks/adaptation_speed.py --design VLI --classes 1000 --images 8 --device cuda
    python tests/benchmarks/adaptation_speed.py --classes 1000 --chunk 100 --choose_bf16

`--vocab` and the stand-in for it: see prompt_speed.py. In fp32 the released way takes about 38 MB for each class:
`--chunk 100` takes its text forward and back 100 classes at a time (what that needs to know beforehand isn't timed).
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import (
    add_output,
    card_told,
    clear_card,
    exact_dtype,
    on_card,
    print_figures,
    resident_peak,
    timed,
    told_if_failed,
)  # fmt: skip
from prompt_speed import NUM_TOKENS, Ours, Released, Task, figures_of, print_table, report_on_card
from torch import Tensor
from torch.nn import functional as F

from hf_robust_clip.defences.alignment import AlignmentTargets
from hf_robust_clip.defences.moments import VisionStatistics
from hf_robust_clip.defences.tapt import TAPT
from hf_robust_clip.defences.views import draw_boxes
from hf_robust_clip.prompts.access import prompt_layers

LAYERS = 8
SEED = 0


class KnownTargets(AlignmentTargets):
    """Random statistics, which fit any model."""

    def check(self, classifier) -> None:
        """There is nothing to compare."""


def make_targets(task: Task) -> KnownTargets:
    vision = task.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1 + NUM_TOKENS
    generator = torch.Generator().manual_seed(SEED)
    shape = (vision.num_hidden_layers, tokens, vision.hidden_size)

    def some() -> VisionStatistics:
        mean, spread = (torch.randn(shape, generator=generator) for _ in range(2))
        return VisionStatistics(mean.to(task.dtype), spread.square().to(task.dtype), 1000, {})

    return KnownTargets(some(), some())


def make_adapter(task: Task, args: argparse.Namespace) -> TAPT:
    return TAPT(
        targets=make_targets(task),
        num_views=args.views,
        align_weight=100 / 9,
        align_layers=LAYERS,
        align_reduction="mean",
        unbiased=False,
        chunk_size=args.our_chunk,
        choose_bf16=args.choose_bf16,
    )


class OursAtTestTime(Ours):
    """This package."""

    def __init__(self, task: Task, args: argparse.Namespace):
        super().__init__(task)
        self.args, self.adapter = args, make_adapter(task, args)
        self.adapter_images = task.images_BCHW
        if args.design == "V":
            for layer in prompt_layers(self.core.text_model):  # no prompts there: the plain tower
                layer.clip_prompt_tokens.clear()
        self.core.requires_grad_(False)

    def adapt(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        found = self.adapter.predict(self.core, self.task.images_BCHW, seed=SEED)
        names = [name for tower in ("vision", "text") for name in found.prompts if name.startswith(f"{tower}_model.")]
        return found.loss, found.logits, [found.prompts[name] for name in names]


class ReleasedAtTestTime(Released):
    """The released code's way."""

    def __init__(self, task: Task, args: argparse.Namespace):
        super().__init__(task)
        self.args, self.adapter = args, make_adapter(task, args)
        size = task.config.vision_config.image_size
        views = draw_boxes(task.images_BCHW, args.views, self.adapter.crop, SEED)
        self.views_BVCHW = views.render(task.images_BCHW, size)
        self.start = [p.detach().clone() for p in self.prompts]
        if args.design == "V":
            self.prompts = self.vision_prompts
            self.text_prompts = []
        self.known_text = None
        if args.chunk and args.design != "V":
            with torch.no_grad():
                self.known_text = torch.cat([self.encode_text(rows) for rows in self.chunks()])

    def features(self, pixels_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Unit image features, and what each layer reads."""
        inputs: list[Tensor] = []
        layers = self.clip.vision_model.encoder.layers
        hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
        try:
            return self.encode_images(pixels_BCHW), inputs
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, logits_VC: Tensor, inputs: list[Tensor]) -> Tensor:
        kept = (-(logits_VC.softmax(1) * logits_VC.log_softmax(1)).sum(1)).argsort()[: self.adapter.num_kept]
        mean_C = logits_VC[kept].softmax(1).mean(0)
        loss = -(mean_C * mean_C.log()).sum()
        targets = self.adapter.targets
        for hidden, *stats in zip(
            inputs[:LAYERS], targets.adversarial.mean, targets.adversarial.variance, targets.clean.mean,
            targets.clean.variance, strict=False,
        ):  # fmt: skip
            mean = hidden[kept].mean(0)
            variance = (hidden[kept] - mean).square().mean(0)
            for mu, s2 in (stats[:2], stats[2:]):
                mu, s2 = mu.to(mean), s2.to(mean)
                loss = loss + 100 / 9 * 0.5 * (0.5 * F.l1_loss(mean, mu) + 0.5 * F.l1_loss(variance, s2))
        return loss

    def adapt(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        rows = [self.adapt_one(views) for views in self.views_BVCHW]
        losses, logits, prompts = zip(*rows, strict=True)
        return torch.stack(losses), torch.stack(logits), [torch.stack(p) for p in zip(*prompts, strict=True)]

    def adapt_one(self, views_VCHW: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.no_grad():
            for p, value in zip(self.prompts, self.start, strict=False):
                p.copy_(value)
                p.grad = None
        optimizer = torch.optim.AdamW(self.prompts, lr=self.adapter.learning_rate)
        scale = self.clip.logit_scale.exp()
        image_VD, inputs = self.features(views_VCHW)
        with torch.no_grad() if self.args.design == "V" else nullcontext():
            text_CD = self.encode_text() if self.known_text is None else self.known_text.clone().requires_grad_()
        loss = self.loss((scale * image_VD @ text_CD.T).float() if self.task.dtype != torch.float64 else
                         scale * image_VD @ text_CD.T, inputs)  # fmt: skip
        loss.backward()
        if self.known_text is not None:
            for rows in self.chunks():
                self.encode_text(rows).backward(text_CD.grad[rows])
        optimizer.step()
        with torch.no_grad():
            image_1D = self.encode_images(views_VCHW[:1])
            tuned_CD = torch.cat([self.encode_text(rows) for rows in self.chunks()])
            logits_C = (scale * image_1D @ tuned_CD.T)[0]
        return loss.detach(), logits_C, [p.detach().clone() for p in self.prompts]


def chosen_alike(way: OursAtTestTime) -> dict[str, float]:
    """Views that are kept, and how many of an image's are the same if they are chosen without bfloat16, on average."""
    run = way.adapter.run(way.core, way.task.images_BCHW, SEED, "none")
    start = way.adapter.initial(way.core, run.own)
    roughly_BK, exactly_BK = (
        replace(way.adapter, choose_bf16=rough).choose(run, start) for rough in (True, False)
    )  # fmt: skip
    same = (roughly_BK[:, :, None] == exactly_BK[:, None]).any(dim=2).sum(dim=1).double().mean()
    return {"kept": roughly_BK.shape[1], "same": float(same)}


WAYS = {"ours": OursAtTestTime, "released": ReleasedAtTestTime}


def run_once(way: OursAtTestTime | ReleasedAtTestTime) -> tuple[Tensor, Tensor, list[Tensor]]:
    with way.task.autocast():
        return way.adapt()


def compare(ours: OursAtTestTime, released: ReleasedAtTestTime) -> dict[str, float]:
    """How far the two differ: loss and logits relatively, prompts by the share of values off by over 1 % of a step."""
    (loss, logits, prompts), (loss2, logits2, prompts2) = run_once(ours), run_once(released)
    flat, flat2 = (torch.cat([p.flatten() for p in found]) for found in (prompts, prompts2))
    step = ours.adapter.learning_rate
    return {
        "loss": float((loss - loss2).norm() / loss2.norm()),
        "logits": float((logits - logits2).norm() / logits2.norm()),
        "prompts": float(((flat - flat2).abs() > 0.01 * step).double().mean()),
    }


def check(args: argparse.Namespace) -> None:
    """Refuse to time two ways that don't agree: at most 25 classes, 16 views and 2 images, without
    autocast."""
    plain = {"dtype": "fp32", "choose_bf16": False, "views": min(args.views, 16), "selected": 0.25}
    exact = argparse.Namespace(**vars(args) | plain)
    task = Task(exact, min(args.images, 2), min(args.classes, 25), exact_dtype(args.device))
    found = compare(OursAtTestTime(task, exact), ReleasedAtTestTime(task, exact))
    gc.collect()
    print("differences: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()), flush=True)
    if not (found["loss"] < 1e-4 and found["logits"] < 1e-3 and found["prompts"] < 0.02):
        raise SystemExit("the two ways differ: their times can't be compared.")


def peak_memory(args: argparse.Namespace, name: str) -> float:
    """Peak resident bytes of a process that takes one way once, interpreter and libraries included."""
    command = [sys.executable, __file__, "--own_peak", "--only", name, "--design", args.design]
    for key in ("images", "classes", "views", "vocab", "chunk", "our_chunk"):
        value = getattr(args, key)
        command += [f"--{key}", str(value)] if value is not None else []
    command += ["--tiny"] if args.tiny else []
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(args: argparse.Namespace) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Times turn by turn on a CPU, and peaks."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in args.only}
    task = Task(args, args.images, args.classes)
    ways = {name: WAYS[name](task, args) for name in args.only}
    for _ in range(args.repeats):
        for name, way in ways.items():
            times[name].append(timed(lambda way=way: run_once(way), args.device))
    return times, {} if args.no_memory else {name: peak_memory(args, name) for name in args.only}


def measure_cuda(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What `on_card` finds of one way (of `released` on one image, since it takes one by one), or the error."""
    count = 1 if name == "released" else args.images
    task = Task(args, count, args.classes)
    found: dict[str, Any] = {}
    with told_if_failed(f"{name}, {count} image(s), {args.classes} classes", found):
        way = WAYS[name](task, args)
        found |= on_card(lambda: run_once(way), count, args.repeats, warm_ups=1) | {"images": count}
        print(f"{name}, {count} image(s): {card_told(found, 'images/s')}", flush=True)
    way = None
    clear_card()
    return found


def run(args: argparse.Namespace) -> None:
    """Check, measure, and print the table."""
    if len(args.only) == 2:
        check(args)
    if args.device == "cuda":
        report_on_card(__file__, args, measure_cuda)
        return
    times, peaks = measure(args)
    alike = {}
    if args.choose_bf16 and "ours" in args.only:
        alike = chosen_alike(OursAtTestTime(Task(args, args.images, args.classes), args))
        print(f"views chosen in bfloat16: {alike['same']:.2f} of {alike['kept']} are those of float32", flush=True)
    print_table(args, times, peaks, args.images, "images/s")
    print_figures(__file__, args, figures_of(args, times, peaks, args.images) | ({"chosen": alike} if alike else {}))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--design", choices=("V", "VLI"), default="VLI")
    parser.add_argument("--images", type=int, help="in one batch (released: one by one); default 1 on CPU, 32 on CUDA")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16: autocast; default fp32 on CPU, bf16 on CUDA")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each way (default 1)")
    parser.add_argument("--vocab", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz; default: a stand-in")
    parser.add_argument("--chunk", type=int, help="classes that `released` holds at once; default all")
    parser.add_argument(
        "--choose_bf16", action="store_true", help="ours chooses the views in bfloat16; on CPU told how many differ"
    )
    parser.add_argument("--our_chunk", type=int, help="`chunk_size` of ours; default all")
    parser.add_argument("--only", nargs=1, choices=tuple(WAYS), default=list(WAYS), help="time one way, unchecked")
    parser.add_argument("--no_memory", action="store_true", help="CPU: don't run each way once more for its memory")
    parser.add_argument("--tiny", action="store_true", help="a tiny CLIP: to try the script, not to measure")
    add_output(parser)
    parser.add_argument("--own_peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    args.images = args.images or (32 if cuda else 1)
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    args.what = "adapt"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.own_peak:
        run_once(WAYS[args.only[0]](Task(args, args.images, args.classes), args))
        print(resident_peak())
        return
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    size = "tiny CLIP" if args.tiny else "ViT-B/16"
    tokens = "CLIP's tokens" if args.vocab else "stand-in tokens"
    print(
        f"{place}, torch {torch.__version__}, {size}, TAPT-{args.design}: {args.images} image(s), {args.views} views, "
        f"{args.classes} classes, {args.dtype}, {tokens}",
        flush=True,
    )
    run(args)


if __name__ == "__main__":
    main()
