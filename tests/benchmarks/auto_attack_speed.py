"""AutoAttack on one model and the same images: ours against a plain run of pyautoattack, seconds and who falls.

    python tests/benchmarks/auto_attack_speed.py --model out/pmgaft --radius 16/255 --images 128

The plain run attacks an `nn.Module` that encodes all class prompts in every forward, with the parameters as
loaded; `--cached_text` gives it class embeddings that are encoded once. Ours runs in float32 and `fast` (gradients in
bfloat16, every break confirmed in float32), inside `fixed_class_embeds` as `evaluate_robustness` runs it. All run in
one process, one after the other, `--rounds` times in turn.

    python tests/benchmarks/auto_attack_speed.py --device cuda

On a card the defaults are ViT-B/32 of random weights, 1000 classes, 256 images, 3 steps and 25 queries at 0.02/255,
with cached class embeddings in the plain run: half a minute. TFLOP/s count each image that passed the image encoder;
the share of the time in kernels is that of a suite with 2 steps, 1 target and 5 queries.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import (
    GIB,
    add_output,
    clear_card,
    count_operations,
    keep,
    kernels_of,
    print_figures,
    told_if_failed,
    use_told,
    used,
)  # fmt: skip
from pyautoattack import AutoAttack as PlainAutoAttack
from step_speed import Ours, Task
from torch import Tensor

from hf_robust_clip import CLIPForZeroShotClassification, ThreatModel, digits_clip_path, load_image_dataset
from hf_robust_clip.attacks.auto_attack import AutoAttack, auto_attack
from hf_robust_clip.modeling import without_gradients
from hf_robust_clip.zero_shot_data.loading import collate_images

RANDOM = "random-vit-b-32"
RUNS = ("plain", "ours", "fast")


class PlainClassifier(torch.nn.Module):
    """Logits by the whole CLIP: pictures and all prompts, as a user of `CLIPModel` would write it."""

    def __init__(self, model: CLIPForZeroShotClassification, cached: bool):
        super().__init__()
        self.model = model
        self.text_CD = model.class_embeds.detach().clone() if cached else None

    def forward(self, pixels: Tensor) -> Tensor:
        image = self.model.get_image_features(pixel_values=(pixels - self.model.image_mean) / self.model.image_std)
        image = torch.nn.functional.normalize(image.pooler_output, dim=-1)
        text_CD = self.model.encode_classes() if self.text_CD is None else self.text_CD
        return self.model.logit_scale.exp() * image @ text_CD.T


def seconds(run: Callable[[], Tensor], device: str) -> tuple[float, float, Tensor]:
    """Wall time, processor time and the result."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    used = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    result = run()
    wait()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime, result


class Passes:
    """Counts images that pass a model's image encoder, with the gradient by pixels and without."""

    def __init__(self, model: CLIPForZeroShotClassification):
        self.counts = {"with gradient": 0, "without": 0}
        model.vision_model.register_forward_pre_hook(self.seen, with_kwargs=True)

    def seen(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        wanted = torch.is_grad_enabled() and pixels.requires_grad
        self.counts["with gradient" if wanted else "without"] += len(pixels)


def trained(options: argparse.Namespace) -> tuple[CLIPForZeroShotClassification, Tensor, Tensor]:
    """A checkpoint with test images and labels of a dataset."""
    model = CLIPForZeroShotClassification.from_pretrained(options.model).to(options.device).eval()
    data = load_image_dataset(options.dataset, "test", model.require_processor()).first(options.images)
    model.set_classes(data.class_names)
    batch = collate_images([data[i] for i in range(len(data))])
    return model, batch["pixel_values"].to(options.device), batch["labels"].to(options.device)


def random_vit(options: argparse.Namespace) -> tuple[CLIPForZeroShotClassification, Tensor, Tensor]:
    """ViT-B/32 of random weights on random images; what it predicts counts as the truth. Take a small radius."""
    task = Task(
        argparse.Namespace(tiny=options.tiny, device=options.device), images=options.images, classes=options.classes
    )
    model = Ours(task).student.eval()
    with torch.no_grad():
        parts = task.images_BCHW.split(options.batch_size)
        labels = torch.cat([model(pixel_values=part).logits.argmax(dim=1) for part in parts])
    return model, task.images_BCHW, labels


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a checkpoint or {RANDOM}; default digits-clip on CPU, {RANDOM} on CUDA")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--radius", help="default 16/255, of the random model 0.02/255")
    parser.add_argument("--images", type=int, help="default 128 on CPU, 256 on CUDA")
    parser.add_argument("--queries", type=int, help="default 5000 on CPU, 25 on CUDA")
    parser.add_argument("--steps", type=int, help="default 100 on CPU, 3 on CUDA")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--classes", type=int, default=1000, help="of the random model")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--cached_text", action=argparse.BooleanOptionalAction, help="default on CUDA")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    add_output(parser)
    parser.add_argument("--tiny", action="store_true", help="a tiny random CLIP: to try the script, not to measure")
    options = parser.parse_args(argv)
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here.")
    options.model = options.model or (RANDOM if cuda or options.tiny else digits_clip_path())
    options.radius = options.radius or ("0.02/255" if options.model == RANDOM else "16/255")
    options.images = options.images or (256 if cuda else 128)
    options.queries = options.queries or (25 if cuda else 5000)
    options.steps = options.steps or (3 if cuda else 100)
    options.cached_text = cuda if options.cached_text is None else options.cached_text
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    torch.set_num_threads(options.threads)
    model, images, labels = random_vit(options) if options.model == RANDOM else trained(options)
    threat_model, targets = ThreatModel(options.radius), min(9, len(model.class_names) - 1)
    suite = AutoAttack(num_steps=options.steps, num_queries=options.queries)

    def logits(pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).logits

    def fast_logits(pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16):
            return model(pixel_values=pixels).logits

    def plain() -> Tensor:
        attack = PlainAutoAttack(
            PlainClassifier(model, options.cached_text), norm="Linf", eps=threat_model.eps, seed=0,
            device=options.device,
        )  # fmt: skip
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        attack.square.n_queries = options.queries
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = options.steps
        adv, _ = attack.run_standard_evaluation(images, labels, batch_size=options.batch_size)
        model.zero_grad(set_to_none=True)
        return adv

    def ours(fast: bool, suite: AutoAttack = suite, told: bool = True) -> Tensor:
        with without_gradients(model), model.fixed_class_embeds():
            adv, left = auto_attack(
                logits, images, labels, threat_model, version=suite, batch_size=options.batch_size,
                fast_logits_fn=fast_logits if fast else None,
            )  # fmt: skip
        if told:
            print("   left after each:", {name: round(100 * value, 2) for name, value in left.items()})
        return adv

    every = {"plain": plain, "ours": lambda: ours(False), "fast": lambda: ours(True)}
    runs = {name: every[name] for name in options.only}
    passes, cuda = Passes(model), options.device == "cuda"
    some = images[: options.batch_size].clone().requires_grad_()

    def one_gradient(judge: Callable[[Tensor], Tensor] = logits) -> None:
        torch.autograd.grad(judge(some).sum(), some)

    with torch.enable_grad(), without_gradients(model), model.fixed_class_embeds():  # kernels are loaded and chosen
        one_gradient(fast_logits)
        operations = count_operations(one_gradient) / len(some)  # of an image, forward and back to its pixels
    stands: dict[str, Tensor] = {}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    figures: dict[str, Any] = {}

    def measured(name: str) -> None:
        passes.counts = dict.fromkeys(passes.counts, 0)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        wall, processor, adv = seconds(runs[name], options.device)
        row = figures.setdefault(name, {"wall_s": [], "ratio": []})
        row |= {"passes": passes.counts, "images_per_s": len(images) / wall}
        if cuda:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        with torch.no_grad():
            parts = adv.split(options.batch_size)
            stands[name] = torch.cat([logits(part).argmax(dim=1) for part in parts]) == labels
        spent[name].append((wall, processor))
        first = next(iter(stands))
        ratios = [spent[first][-1][k] / spent[name][-1][k] for k in (0, 1)]
        row["robust"] = float(stands[name].double().mean())
        row["judged_otherwise"] = int((stands[name] != stands[first]).sum())
        row["wall_s"].append(wall)
        row["ratio"].append(ratios[0])
        print(
            f"{name:8s} {wall:8.1f} s wall, {processor:8.1f} s processor; {ratios[0]:.2f}x, {ratios[1]:.2f}x of "
            f"{first}; robust {100 * row['robust']:.2f} %, {row['judged_otherwise']} images judged otherwise",
            flush=True,
        )
        if cuda and name != "plain":  # which also differentiates by weights
            whole = row["passes"]["with gradient"] + row["passes"]["without"] / 2
            short = AutoAttack(num_steps=2, num_targets=1, num_queries=5)
            row |= used(whole * operations, wall)
            row |= kernels_of(lambda: ours(name == "fast", short, told=False), calls=1)
            print(f"{name:8s} peak {row['peak_gib']:.1f} GiB, {use_told(row)}", flush=True)

    for _ in range(options.rounds):
        for name in runs:
            with told_if_failed(name, figures.setdefault(name, {"wall_s": [], "ratio": []})):
                measured(name)
            keep(__file__, options, figures)
            if cuda:
                clear_card()
    print_figures(__file__, options, figures)


if __name__ == "__main__":
    main()
