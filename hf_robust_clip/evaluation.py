"""Clean and robust accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from .attacks.losses import cross_entropy
from .attacks.pgd import PGDSettings, pgd
from .modeling import CLIPForZeroShotClassification, check_labels
from .report import RobustnessReport, hardware, library_versions, prompt_hash
from .threat_model import ThreatModel
from .zero_shot_data.loading import ImageDataset, collate_images

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


@dataclass(frozen=True)
class EvaluationSettings:
    """How hard to attack.

    Args:
        radii: radii in units of [0, 1], floats or fractions such as `"1/255"`.
        norm: `"linf"` or `"l2"`.
        num_steps: PGD steps; 20 is PGD-20.
        step_size: in units of [0, 1]; None takes 2.5 * eps / num_steps at each radius.
        batch_size: images per forward; results don't depend on it beyond rounding.
        seed: of the random start.
    """

    radii: Sequence[float | str]
    norm: str = "linf"
    num_steps: int = 20
    step_size: float | str | None = None
    batch_size: int = 128
    seed: int = 0

    def threats(self) -> list[tuple[ThreatModel, PGDSettings]]:
        """The threat models in ascending order of radius, each with its attack. Raises ValueError if there is none."""
        if isinstance(self.radii, str) or not self.radii:
            raise ValueError(f"radii={self.radii!r} must be a list of at least one radius, such as ['1/255'].")
        PGDSettings(self.num_steps, 1.0)  # raises for a bad number of steps
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be at least 1.")
        threats = sorted({ThreatModel(r, self.norm) for r in self.radii}, key=lambda threat: threat.eps)  # type: ignore[arg-type]
        if not threats[0].eps > 0:
            raise ValueError(f"radii={self.radii!r} hold 0, which is the clean accuracy; leave it out.")
        steps = [2.5 * t.eps / self.num_steps if self.step_size is None else self.step_size for t in threats]
        return [(t, PGDSettings(self.num_steps, s, keep_best=True)) for t, s in zip(threats, steps, strict=True)]  # type: ignore[arg-type]


class _ZeroShare:
    """Counts exactly-zero gradient values."""

    zeros = total = 0

    def __call__(self, grad_BCHW: Tensor) -> None:
        self.zeros += int((grad_BCHW == 0).sum())
        self.total += grad_BCHW.numel()


def evaluate_robustness(
    model: CLIPForZeroShotClassification,
    dataset: ImageDataset,
    settings: EvaluationSettings,
    *,
    name: str,
    task: str,
    model_id: str,
    processes: Accelerator | PartialState | None = None,
) -> RobustnessReport:
    """Accuracy on clean images and under PGD (cross-entropy, white box, best iterate) at every radius.

    An image counts as robust at a radius if it is classified correctly clean and after the attack at this and every
    smaller radius (a smaller ball lies inside the larger). Images that fell leave the batch; the rest go on. Runs in
    float32, without autocast. The model comes back as it was: mode, gradients, classes.

    Args:
        model: with its classes set, in label order of `dataset`.
        dataset: pictures with labels.
        settings: radii and attack.
        name: what tables call the model.
        task: what tables call the images.
        model_id: Hub id or folder, for the report.
        processes: splits the images over its processes; each of them gets the whole report.

    Raises ValueError for an empty dataset, labels beyond the classes, images outside [0, 1] or of wrong size.
    """
    if len(dataset) == 0:
        raise ValueError("dataset is empty; nothing to evaluate.")
    threats = settings.threats()
    rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
    loader = DataLoader(
        Subset(dataset, range(rank, len(dataset), world)), settings.batch_size, collate_fn=collate_images
    )
    zero_share = _ZeroShare()
    results: list[tuple[int, int]] = []  # per image: label, how many of (clean, *radii) it withstood
    training = model.training
    model.eval()
    try:
        for batch in loader:
            images, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
            check_labels(labels, len(model.class_names))
            withstood = _withstood(model, images, labels, threats, settings.seed, zero_share)
            results += zip(labels.tolist(), withstood.tolist(), strict=True)
    finally:
        model.train(training)
    zeros, total = zero_share.zeros, zero_share.total
    if world > 1:
        from accelerate.utils import gather_object

        results = gather_object(results)
        zeros, total = (sum(counts) for counts in zip(*gather_object([(zeros, total)]), strict=True))
    share = [sum(k > level for _, k in results) / len(results) for level in range(len(threats) + 1)]
    per_class = {}
    for index, class_name in enumerate(model.class_names):
        own = [k for label, k in results if label == index]
        per_class[class_name] = (len(own), sum(k > 0 for k in own), sum(k > len(threats) for k in own))
    parameters = {**asdict(threats[0][1]), "loss": "cross_entropy"}
    parameters["step_size"] = [attack.step_size for _, attack in threats]
    return RobustnessReport(
        name=name,
        task=task,
        model=model_id,
        model_revision=getattr(model.config, "_commit_hash", None) or "local",
        dataset=dataset.dataset_id,
        dataset_revision=dataset.revision,
        split=dataset.split,
        num_images=len(results),
        num_classes=len(model.class_names),
        prompt_hash=prompt_hash(model.class_names, model.templates),
        attack=f"PGD-{settings.num_steps}",
        attack_parameters=parameters,
        attack_target="static",
        attack_resolution=model.config.vision_config.image_size,
        norm=settings.norm,
        clean_accuracy=share[0],
        robust_accuracy={threat.eps: value for (threat, _), value in zip(threats, share[1:], strict=True)},
        after_each={threat.eps: {"pgd": value} for (threat, _), value in zip(threats, share[1:], strict=True)},
        model_flags={"randomised": False, "optimising": False},
        per_class=per_class,
        zero_gradient_share=zeros / total if total else 0.0,
        seed=settings.seed,
        precision=str(model.dtype).removeprefix("torch."),
        library_versions=library_versions(),
        hardware=hardware(),
    )


def _withstood(
    model: CLIPForZeroShotClassification,
    images_BCHW: Tensor,
    labels_B: Tensor,
    threats: Sequence[tuple[ThreatModel, PGDSettings]],
    seed: int,
    zero_share: _ZeroShare,
) -> Tensor:
    """How many of (clean, radius 1, radius 2, ...) each image withstood in a row, shape (B,)."""

    def correct(pixels: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return model(pixels).logits.argmax(dim=1) == labels

    alive = correct(images_BCHW, labels_B)
    withstood_B = alive.long()
    rows = alive.nonzero().squeeze(1)
    for threat_model, attack in threats:
        if len(rows) == 0:
            break
        images, labels = images_BCHW[rows], labels_B[rows]
        loss_fn = partial(_attack_loss, model, labels)
        adv = pgd(loss_fn, images, threat_model, **asdict(attack), seed=seed, on_gradient=zero_share)
        rows = rows[correct(adv, labels)]
        withstood_B[rows] += 1
    return withstood_B


def _attack_loss(model: CLIPForZeroShotClassification, labels_B: Tensor, adv_BCHW: Tensor) -> Tensor:
    return cross_entropy(model(adv_BCHW).logits, labels_B)
