"""Time of the gradient by pixels, which attacks live on: this package against a plain forward of the same weights.

    python tests/benchmarks/gradient_speed.py --images 16
    python tests/benchmarks/gradient_speed.py --device cuda --images 256

`plain` cuts patches by a convolution and leaves the attention kernel to torch; `ours` is the classifier as it is. Both
in float32 and in bfloat16 autocast, turn by turn; printed are times, ratios to plain float32, and how far each
gradient is from that: relative distance, and share of equal signs. ViT-B/32 of random weights, 25 classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring import add_output, card_told, keep, on_card, print_figures, told_if_failed
from step_speed import Ours, Task, alternate
from torch import Tensor
from torch.nn import functional as F

from hf_robust_clip.attacks.pgd import input_gradient
from hf_robust_clip.modeling import CLIPForZeroShotClassification, classifier
from hf_robust_clip.modeling.image_kernels import use_convolution, use_patch_product


@contextmanager
def plainly(model: CLIPForZeroShotClassification) -> Iterator[None]:
    """The model without this package's kernels."""
    ours = classifier.image_attention
    use_convolution(model.vision_model)
    classifier.image_attention = lambda *given: nullcontext()
    try:
        yield
    finally:
        classifier.image_attention = ours
        use_patch_product(model.vision_model)


def gradient(
    model: CLIPForZeroShotClassification, images_BCHW: Tensor, labels_B: Tensor, plain: bool, dtype: torch.dtype
) -> Tensor:
    def loss(pixels_BCHW: Tensor) -> Tensor:
        with torch.autocast(pixels_BCHW.device.type, dtype, enabled=dtype != torch.float32):
            logits_BC = model(pixel_values=pixels_BCHW).logits
        return F.cross_entropy(logits_BC, labels_B, reduction="none")

    with plainly(model) if plain else nullcontext():
        return input_gradient(loss, images_BCHW)[1]


def without_rounding(way: Callable[[], Tensor]) -> Tensor:
    """With convolutions in float32 on a card too, where torch rounds them to ten bits unless told."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return way()
    finally:
        torch.backends.cudnn.allow_tf32 = before


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--processor_time", action="store_true", help="CPU: clock processor time; for a busy machine")
    parser.add_argument("--tiny", action="store_true", help="a tiny CLIP: to try the script, not to measure")
    add_output(parser)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here.")
    torch.set_num_threads(args.threads)
    task = Task(args, args.images, 25)
    model = Ours(task).student.eval().requires_grad_(False)
    ways: dict[str, Callable[[], Tensor]] = {
        f"{who} {name}": partial(gradient, model, task.images_BCHW, task.labels_B, who == "plain", dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for who in ("plain", "ours")
    }
    figures: dict[str, dict[str, Any]] = {name: {} for name in ways}
    with model.fixed_class_embeds():
        exact = without_rounding(ways["plain fp32"])
        if args.device == "cuda":
            times = {}
            for name, way in ways.items():
                with told_if_failed(name, figures[name]):
                    figures[name] |= on_card(way, args.images, args.repeats)
                    times[name] = [figures[name]["wall_s"]]
                    print(f"{name}: {card_told(figures[name], 'images/s')}", flush=True)
                keep(__file__, args, figures)
        else:
            times = alternate(ways, args)
        found = {name: ways[name]() for name in times}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times.get("plain fp32", []), values, strict=False)] or [0.0]
        off = float((found[name] - exact).norm() / exact.norm())
        signs = float((found[name].sign() == exact.sign()).double().mean())
        row = {"s": median(values), "ratio": [median(ratios), min(ratios), max(ratios)], "off": off, "signs": signs}
        figures[name] |= row
        print(
            f"{name}: {row['s']:.4f} s, {median(ratios):.2f}x ({min(ratios):.2f} .. {max(ratios):.2f}), "
            f"off by {off:.1e}, {signs:.2%} of signs equal",
            flush=True,
        )
    print_figures(__file__, args, figures)


if __name__ == "__main__":
    main()
