"""Where a classifier looks in images that are attacked as an evaluation attacks them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..attacks.suites import Member, Victim, find_adversarial, plain_victim
from ..checks import check_whole, checked_labels
from ..explain import map_share, patch_map, saliency
from ..modeling import ZeroShotClassifier, without_gradients
from ..report.explanations import Explanation, Look
from ..threat_model import ThreatModel
from ..zero_shot_data.loading import ImageDataset, collate_images
from .settings import EvaluationSettings


def explain_images(
    model: ZeroShotClassifier,
    dataset: ImageDataset,
    settings: EvaluationSettings,
    count: int,
    *,
    name: str,
    task: str,
) -> Explanation:
    """Where a classifier looks in the first `count` images of a dataset, or in all where it has fewer, clean and
    attacked.

    All are attacked by the first attack of `settings`, at the largest radius, white box on this model, those too that
    are misclassified when clean. PGD takes all its steps and keeps the iterate of highest loss, where an accuracy
    needs the first misclassified one: otherwise images of a model that falls early would be changed less than those
    of one that withstands, and what moves less under attack would say nothing. Attacks that let go of an image once it
    is misclassified (`Member.keeps_rows` is false) are named "until misclassified": with these, how far maps move
    can't be compared between models.

    Args:
        model: with its classes set, in label order of `dataset`.
        name: what tables call the model.
        task: what tables call the images.

    Raises ValueError for a count below 1, and as `evaluate_robustness` does for the dataset.
    """
    check_whole(1, count=count)
    num_classes, threat_model = len(model.class_names), settings.threat_models()[-1]
    member, *further = settings.attack.members(num_classes)
    attack = f"{member.name} alone" if further else settings.attack.name(num_classes)
    until = "" if member.keeps_rows else ", until misclassified,"
    indices = list(range(min(count, len(dataset))))
    found: list[tuple[Tensor, Tensor, Look, Look]] = []
    with model.prepared_for(dataset), without_gradients(model), model.fixed_class_embeds():
        victim = replace(
            plain_victim(lambda pixels: model(pixel_values=pixels).logits), seed=settings.seed, to_the_end=True
        )
        for start in range(0, len(indices), settings.batch_size):
            batch = collate_images([dataset[i] for i in indices[start : start + settings.batch_size]])
            found.append(_explained(model, batch["pixel_values"], batch["labels"], victim, member, threat_model))
    labels, rivals, clean, attacked = zip(*found, strict=True)
    return Explanation(
        model=name,
        task=task,
        attack=f"{attack}{until} at {threat_model}",
        class_names=tuple(model.class_names),
        labels=torch.cat(labels),
        rivals=torch.cat(rivals),
        clean=_joined(clean),
        attacked=_joined(attacked),
        map_share=map_share(model),
    )


def _explained(
    model: ZeroShotClassifier,
    images_BCHW: Tensor,
    labels_B: Tensor,
    victim: Victim,
    member: Member,
    threat_model: ThreatModel,
) -> tuple[Tensor, Tensor, Look, Look]:
    """True classes and rivals of a batch, and where the model looks before and after."""
    images_BCHW = images_BCHW.to(model.device)
    model.check_pixels(images_BCHW, values=True)
    labels_B = checked_labels(labels_B, len(images_BCHW), len(model.class_names)).to(model.device)
    adv_BCHW = find_adversarial(member, victim, images_BCHW, labels_B, threat_model)
    with torch.no_grad():
        rivals_BC = victim.logits(adv_BCHW).scatter(1, labels_B[:, None], -torch.inf)
    rivals_B = rivals_BC.argmax(dim=1)
    clean, attacked = (_look(model, pixels_BCHW, labels_B, rivals_B) for pixels_BCHW in (images_BCHW, adv_BCHW))
    return labels_B.cpu(), rivals_B.cpu(), clean, attacked


def _look(model: ZeroShotClassifier, images_BCHW: Tensor, labels_B: Tensor, rivals_B: Tensor) -> Look:
    maps_BCHW, rows_B = patch_map(model, images_BCHW), torch.arange(len(images_BCHW), device=images_BCHW.device)
    with torch.no_grad():
        logits_BC = model(pixel_values=images_BCHW).logits
    parts = (
        images_BCHW,
        logits_BC.softmax(dim=1),
        maps_BCHW[rows_B, labels_B],
        maps_BCHW[rows_B, rivals_B],
        saliency(model, images_BCHW, labels_B),
    )
    return Look(*(part.float().cpu() for part in parts))


def _joined(looks: tuple[Look, ...]) -> Look:
    parts = zip(*((look.images, look.probabilities, look.true_maps, look.rival_maps, look.saliency) for look in looks),
                strict=True)  # fmt: skip
    return Look(*(torch.cat(part) for part in parts))
