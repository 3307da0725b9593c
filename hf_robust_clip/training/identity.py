"""Which training a checkpoint is of: it is noted there, and no other training goes on from it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from ..digests import plain, without_places
from ..modeling import descriptions_digest
from ..processes import Processes, everyone
from ..threat_model import parse_radius
from ..zero_shot_data.fingerprint import dataset_digest
from ..zero_shot_data.loading import ImageDataset
from .checkpoints import read_note
from .config import chooses_by_evaluation, compared_arguments, images_per_update

if TYPE_CHECKING:
    from ..modeling import ZeroShotClassifier
    from ..objectives.base import Objective
    from .config import RobustClipConfig

SHOWN = 3  # differences that a message names
_FRACTIONS = ("arguments.eps", "arguments.attack_step_size")
_NOT_OF_THE_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


def model_identity(
    student: nn.Module, core: ZeroShotClassifier, teacher: nn.Module | None, new_adapter: bool
) -> dict[str, Any]:
    """What a training starts from: a digest of the weights, configuration, normalisation, class prompts, and the
    adapter's settings.

    Args:
        student: the model that is trained, `core` or a `PeftModel` around it.
        teacher: one that was given; None where it is the student's own beginning.
        new_adapter: whether the adapter follows from its settings and the seed, so that its weights say no more.
    """
    config = getattr(student, "peft_config", None) if student is not core else None
    return {
        "model": {
            "weights": weights_digest(student, without_trained=new_adapter),
            "config": without_places(core.config.to_dict()),
            "image_mean": core.image_mean.flatten().tolist(),
            "image_std": core.image_std.flatten().tolist(),
            "classes": list(core.class_names),
            "templates": list(core.templates),
            "descriptions": descriptions_digest(core.descriptions),
        },
        "teacher": None if teacher is None else weights_digest(teacher),
        "adapter": {name: _adapter_settings(one) for name, one in config.items()} if config else None,
    }


def training_identity(
    args: RobustClipConfig, objective: Objective, data_collator: Any, optimizers: tuple[Any, Any]
) -> dict[str, Any]:
    """How a training is run: objective with its settings, compared arguments, images per update (and per forward,
    where the objective looks at those), and the optimizer and schedule that were given, if any.
    """
    optimizer, schedule = optimizers
    return {
        "method": objective.paper.method,
        "objective": {"class": type(objective).__qualname__, **asdict(objective)},
        "arguments": compared_arguments(args),
        "images_per_update": images_per_update(args),
        "images_per_forward": args.train_batch_size if objective.couples_images else None,
        "optimizer": None if optimizer is None else _optimizer_settings(optimizer),
        "schedule": None if schedule is None else type(schedule).__qualname__,
        "data_collator": getattr(data_collator, "__qualname__", type(data_collator).__qualname__),
    }


def data_identity(train_dataset: Dataset, eval_dataset: Any, args: RobustClipConfig) -> dict[str, Any]:
    """Of what a training learns, and of what it is evaluated on where that decides over it."""
    found = {"data": _dataset_identity(train_dataset)}
    if chooses_by_evaluation(args):
        found |= eval_identity(eval_dataset)
    return found


def eval_identity(eval_dataset: Any) -> dict[str, Any]:
    """Of what a training is evaluated on, which may be several datasets by name."""
    several = isinstance(eval_dataset, dict)
    named = {name: _dataset_identity(one) for name, one in eval_dataset.items()} if several else None
    return {"eval_data": _dataset_identity(eval_dataset) if named is None else named}


def weights_digest(model: nn.Module, without_trained: bool = False) -> str:
    """16 hexadecimal digits that change with any parameter or saved buffer of a model, their names and types."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not (without_trained and name in trained):
            tensor = tensor.detach().cpu().contiguous()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_same_run(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Raise ValueError, with the differences, unless a whole checkpoint is of this training."""
    if found := differences(read_note(folder)["run"], plain(run)):
        raise ValueError(f"checkpoint {str(folder)!r} is of another training: {_shown(found)}. Resume as it began.")


def check_same_everywhere(run: Mapping[str, Any], processes: Processes) -> None:
    """Raise ValueError on every process unless all of them were started with one training."""
    first, *others = everyone(plain(run), processes)
    for rank, other in enumerate(others, start=1):
        if found := differences(first, other):
            raise ValueError(f"process {rank} was started with another training than process 0: {_shown(found)}.")


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each entry that differs: what it was, what it is now."""
    before, after = dict(_entries(was)), dict(_entries(now))
    return [
        f"{name} was {_short(before.get(name))}, is {_short(after.get(name))} now"
        for name in dict.fromkeys([*before, *after])
        if not _same(name, before.get(name), after.get(name))
    ]


def _shown(found: Sequence[str]) -> str:
    """The first of some differences, and how many more there are."""
    return "; ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _entries(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _same(name: str, before: Any, after: Any) -> bool:
    if name in _FRACTIONS and before is not None and after is not None:
        return parse_radius(before) == parse_radius(after)
    return bool(before == after)


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= 60:
        return text
    return f"{text[:40]}... ({len(value)} entries)" if isinstance(value, list) else f"{text[:60]}..."


def _adapter_settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_ADAPTER}


def _optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    begun = [{**group, "lr": group.get("initial_lr", group["lr"])} for group in optimizer.param_groups]
    groups = [{k: v for k, v in group.items() if k not in ("params", "initial_lr")} for group in begun]
    return {"class": type(optimizer).__qualname__, "groups": groups}


def _dataset_identity(dataset: Any) -> dict[str, Any]:
    """Number of images, and their digest unless the examples differ each time they are asked for."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return {"digest": None, "images": None}
    inner = dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    found = set()
    for _ in range(1 if isinstance(inner, ImageDataset) else 2):
        with _same_random_numbers():
            found.add(dataset_digest(dataset))
    return {"digest": found.pop() if len(found) == 1 else None, "images": len(dataset)}


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Random transforms of a dataset draw the same here each time, and the training's own numbers stay as they are."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
