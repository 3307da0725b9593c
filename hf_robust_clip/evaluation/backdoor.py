"""Clean accuracy of a classifier, and how often a trigger makes it name the target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..checks import check_logits, checked_labels
from ..environment import hardware, library_versions
from ..metrics.backdoor import hits_of_target, tops_of
from ..modeling import ZeroShotClassifier
from ..poisoning.poisoner import check_target
from ..poisoning.triggers import Trigger
from ..processes import Processes, everyone, together
from ..report.backdoor import UNTRIGGERED, BackdoorReport, Stage, success
from ..report.report import CLEAN, Measurement, prompt_hash
from ..zero_shot_data.loading import ImageDataset, collate_images


def measure_backdoor(
    model: ZeroShotClassifier,
    dataset: ImageDataset,
    trigger: Trigger,
    target: str,
    *,
    judge: str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    processes: Processes = None,
) -> tuple[Measurement, ...]:
    """The accuracy on all images as they are; on those of other classes than the target how often the target is among
    the 1, 3 and 5 likeliest classes with the trigger, and how often the likeliest without it.

    Images with and without the trigger are the same finished pixels. Runs in float32, in eval mode; the model comes
    back as it was.

    Args:
        model: with its classes set, in label order of `dataset`.
        dataset: finished pictures with labels.
        target: the class that the trigger means.
        judge: the name of the control that the model is; None for the model that the report is of.
        seed: of what the trigger draws for each image.
        processes: splits the images over its processes; each of them gets all figures.

    Raises ValueError for a target that is none of the classes, a dataset of other classes or of the target's images
    alone, and a trigger larger than the images; FloatingPointError for logits that are not finite.
    """
    check_target(target, model.class_names)
    index, classes = model.class_names.index(target), len(model.class_names)
    rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
    own = Subset(dataset, range(rank, len(dataset), world))

    def answers() -> tuple[Tensor, Tensor, Tensor]:
        found = [(torch.empty(0, classes), torch.empty(0, classes), torch.empty(0, dtype=torch.long))]
        loader: Iterable[dict[str, Any]] = DataLoader(own, batch_size, collate_fn=collate_images)
        with model.prepared_for(dataset), torch.no_grad(), model.fixed_class_embeds():
            for batch in loader:
                images_BCHW = batch["pixel_values"]
                labels_B = checked_labels(batch["labels"], len(images_BCHW), classes)
                found.append((_logits(model, images_BCHW), _logits(model, trigger(images_BCHW, seed)), labels_B))
        clean, triggered, labels = zip(*found, strict=True)
        return torch.cat(clean), torch.cat(triggered), torch.cat(labels)

    everywhere = zip(*everyone(together(answers, processes), processes), strict=True)
    clean_NC, triggered_NC, labels_N = (torch.cat(parts) for parts in everywhere)
    check_logits(clean_NC)
    right_N = clean_NC.argmax(dim=1) == labels_N
    found = {CLEAN: right_N}
    for top in tops_of(len(model.class_names)):
        found[success(top)] = hits_of_target(triggered_NC, labels_N, index, top)
    found[UNTRIGGERED] = hits_of_target(clean_NC, labels_N, index)
    return tuple(
        Measurement(metric, int(hits.sum()) / len(hits), len(hits), judge=judge) for metric, hits in found.items()
    )


def backdoor_report(
    model: ZeroShotClassifier,
    dataset: ImageDataset,
    trigger: Trigger,
    target: str,
    controls: Mapping[str, tuple[Measurement, ...]],
    *,
    name: str,
    stage: Stage,
    model_id: str,
    batch_size: int = 128,
    seed: int = 0,
    processes: Processes = None,
) -> BackdoorReport:
    """Measure a model, and report it beside its controls.

    Args:
        controls: by name what `measure_backdoor` found of each; which there must be, `stage` says.
        name: what tables call the model.
        model_id: Hub id or folder, for the report.
        All others are those of `measure_backdoor`.

    Raises ValueError as that does, and where a control is missing.
    """
    own = measure_backdoor(model, dataset, trigger, target, batch_size=batch_size, seed=seed, processes=processes)
    return BackdoorReport(
        name=name,
        stage=stage,
        model=model_id,
        model_revision=getattr(model.config, "_commit_hash", None) or "local",
        dataset=dataset.dataset_id,
        dataset_revision=dataset.revision,
        split=dataset.split,
        num_images=own[0].n,
        num_others=own[-1].n,
        class_names=tuple(model.class_names),
        templates=tuple(model.templates),
        prompt_hash=prompt_hash(model.class_names, model.templates),
        trigger=str(trigger),
        trigger_parameters=trigger.parameters(),
        target=target,
        resolution=dataset.resolution,
        seed=seed,
        precision=str(model.dtype).removeprefix("torch."),
        library_versions=library_versions(),
        hardware=hardware(),
        measurements=(*(row for rows in controls.values() for row in rows), *own),
    )


def triggered_examples(
    model: ZeroShotClassifier, dataset: ImageDataset, trigger: Trigger, target: str, count: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, list[str], list[str], list[str]]:
    """The first images of other classes for `report.plot_examples`: images (N, 3, H, W), the same with the trigger,
    true names, and what the model calls them without and with it.
    """
    index, chosen = model.class_names.index(target), []
    for row in range(len(dataset)):
        example = dataset[row]
        if example["labels"] != index:
            chosen.append(example)
        if len(chosen) == count:
            break
    batch = collate_images(chosen)
    images, with_trigger = batch["pixel_values"], trigger(batch["pixel_values"], seed)
    with model.prepared_for(dataset), torch.no_grad():
        found = [_logits(model, pixels).argmax(dim=1) for pixels in (images, with_trigger)]
    truth, before, after = ([model.class_names[i] for i in own.tolist()] for own in (batch["labels"], *found))
    return images, with_trigger, truth, before, after


def _logits(model: ZeroShotClassifier, images_BCHW: Tensor) -> Tensor:
    return model(pixel_values=images_BCHW.to(model.device)).logits.float().cpu()
