"""Checkpoints of a training: whether one is whole, and whether weights are finite."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def check_checkpoint(folder: str | Path) -> None:
    """Raise OSError unless a training can go on from a checkpoint: state readable, safetensors files of their full
    length with finite weights, optimizer and schedule there.
    """
    folder = Path(folder)
    try:
        json.loads((folder / "trainer_state.json").read_text())  # the Trainer writes it last
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise FileNotFoundError("no *.safetensors")
        for file in weights:
            _check_finite(file)
        if not (any(folder.glob("optimizer*")) and (folder / "scheduler.pt").is_file()):
            raise FileNotFoundError("no optimizer and schedule, as save_only_model=True leaves it")
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(
            f"checkpoint {str(folder)!r} is missing or cut short ({error}); resume from an earlier one."
        ) from error


def newest_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The `checkpoint-<step>` folder of the highest step from which a training can go on, or None."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name)]
    for folder in sorted(folders, key=step_of, reverse=True):
        try:
            check_checkpoint(folder)
        except OSError:
            continue
        return folder
    return None


def step_of(folder: str | Path) -> int:
    """Of a `checkpoint-<step>` folder the step."""
    return int(Path(folder).name.split("-")[1])


def best_beside(checkpoint: str | Path) -> Path | None:
    """Beside a checkpoint the one with the best weights until then, wherever both lay when they were written; None if
    there is none yet. Raises OSError if it is gone.
    """
    best = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["best_model_checkpoint"]
    if best is None:
        return None
    folder = Path(checkpoint).with_name(Path(best).name)
    if not folder.is_dir():
        raise OSError(
            f"{str(folder)!r} with the best weights until {Path(checkpoint).name} is missing; start without resume."
        )
    return folder


def checkpoint_to_resume(wanted: str | Path | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: True the newest whole one, a path that one, else None.

    Raises OSError if a named one is cut short or missing, ValueError if there is none to go on from.
    """
    if not wanted:
        return None
    if wanted is not True:
        check_checkpoint(wanted)
        return Path(wanted)
    newest = newest_whole_checkpoint(output_dir)
    if newest is None:
        raise ValueError(f"no whole checkpoint in {str(output_dir)!r} to resume from; start without resume.")
    return newest


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first trained parameter that holds NaN or infinity, or None. Of sharded ones this process's
    part is looked at.
    """
    trained = [(name, own_part(p.detach())) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return None
    finite = torch.stack([tensor.isfinite().all() for _, tensor in trained])
    return None if finite.all() else trained[int((~finite).int().argmax())][0]


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _check_finite(file: Path) -> None:
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118  # it is no dict
            tensor = weights.get_tensor(name)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name} in {file.name} is not finite")
