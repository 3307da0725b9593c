"""Checkpoints of a training: whether one is whole, which one is gone on from, and whether weights are finite."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checkpoint_notes import CHECKPOINT
from ..digests import damaged_file, digest, digests
from ..hub import clear_checkpoint
from ..modeling.untrusted import ADAPTER
from ..normalisation import carry_normalisation
from ..processes import Processes, everyone, together
from ..prompts import ClipPromptConfig
from ..storage import write_text, written_whole
from .preparation import classifier_in

logger = logging.getLogger(__name__)
RUN_FILE = "training_run.json"
SAVES = ".saves-"  # before the number of a process that does, in the name of a file that is there for a moment
WEIGHTS = r"(adapter_)?model(-\d+-of-\d+)?\.safetensors"


class NothingToResume(ValueError):
    """There is no checkpoint to go on from."""


def note_checkpoint(folder: str | Path, run: Mapping[str, Any], processes: int) -> None:
    """Write, as the last file of a checkpoint, which training it is of, in how many processes, and the digests of all
    other files: with it a checkpoint is whole.

    Args:
        run: in JSON types.
    """
    files = [f for f in Path(folder).rglob("*") if f.is_file() and f.name[0] != "." and f.suffix != ".md"]
    note = {"run": run, "processes": processes, "files": digests(folder, (f for f in files if f.name != RUN_FILE))}
    note["digest"] = digest(json.dumps(note).encode())
    write_text(Path(folder, RUN_FILE), json.dumps(note, indent=1) + "\n")


def read_note(folder: str | Path) -> dict[str, Any]:
    """What `note_checkpoint` wrote. Raises ValueError if it is missing, damaged, or something else."""
    try:
        note = json.loads(Path(folder, RUN_FILE).read_text(encoding="utf-8"))
        if note.pop("digest") == digest(json.dumps(note).encode()):
            return note
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{RUN_FILE} is missing or damaged")


def check_files(folder: str | Path) -> None:
    """Raise OSError unless all files of a checkpoint are there as they were written."""
    _refuse(folder, _damage(folder))


def check_checkpoint(folder: str | Path, processes: Processes = None) -> None:
    """`check_files`. Raises OSError, too, without weights, optimizer, schedule, state of the training, or the random
    state of this process, where there were as many as now.
    """
    _refuse(folder, _damage(folder) or _lack(folder, processes))


def save_adapter(model: PeftModel, folder: str | Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write an adapter, and beside it the image processor, whose normalisation it was trained with."""
    classifier = classifier_in(model)
    with written_whole(folder) as draft:
        classifier.require_processor().image_processor.save_pretrained(draft)
        # embedding layers are frozen: no need to look for them on the Hub
        model.save_pretrained(str(draft), state_dict=state_dict, save_embedding_layers=False)
        (draft / "README.md").unlink(missing_ok=True)  # a draft of a card, by PEFT
        for name, config in model.peft_config.items():
            if not isinstance(config, ClipPromptConfig):
                carry_normalisation(classifier, draft / ("" if name == "default" else name) / ADAPTER)


def check_fit(folder: str | Path, model: nn.Module) -> None:
    """Raise OSError unless the weights in a checkpoint, of an adapter its own, are the model's by name and shape:
    transformers would load those that are, and leave the others as they begin.
    """
    adapted = isinstance(model, PeftModel)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False) if adapted else model.state_dict()
    expected = {name: list(tensor.shape) for name, tensor in tensors.items()}
    found: dict[str, list[int]] = {}
    for file in Path(folder).iterdir():
        if re.fullmatch(WEIGHTS, file.name):
            try:
                with safe_open(file, "pt") as weights:
                    found |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
            except SafetensorError as error:
                _refuse(folder, f"{file.name} is damaged ({error})")
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            there, here = (f"of shape {own[name]}" if name in own else "missing" for own in (found, expected))
            _refuse(folder, f"{name} in its weights is {there}, in the model {here}")


def drop_old_checkpoints(newest: str | Path, limit: int | None, best: str | None) -> None:
    """Delete all but `limit` whole checkpoints, the oldest first, never the newest or the best; what else lies in the
    folder of the run, or in theirs, stays.
    """
    if limit is None or limit <= 0:
        return
    kept = {Path(place).resolve() for place in (newest, best) if place is not None}
    notes = sorted(
        Path(newest).resolve().parent.glob(f"checkpoint-*/{RUN_FILE}"), key=lambda note: note.stat().st_mtime_ns
    )
    old = [note.parent for note in notes if note.parent not in kept]
    for place in old[: max(0, len(notes) - max(limit, len(kept)))]:
        clear_checkpoint(place)


def check_seen(folder: str | Path, *, needed: bool, processes: Processes) -> None:
    """Say that some processes don't see a new checkpoint, so that a training can't go on from it there. Raises OSError
    in place of that, on every process, where checkpoints are needed in the training itself.
    """
    if processes is not None:
        processes.wait_for_everyone()
    seen = everyone(Path(folder, RUN_FILE).is_file(), processes)
    if all(seen):
        return
    blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
    text = (
        f"output_dir={str(Path(folder).parent)!r} is another folder for process {blind}: a training can't go on from "
        "checkpoints there; share the folder, or set save_on_each_node=True."
    )
    if needed:
        raise OSError(text)
    if processes is None or processes.is_main_process:
        logger.warning("%s", text)


def check_own_folder(folder: str | Path, *, saves: bool, processes: Processes) -> None:
    """Raise ValueError on every process where several of those that save, one on each machine, share a folder: their
    files would be written over one another.

    Args:
        saves: whether this process does.
    """
    if processes is None or processes.num_processes == 1:
        return
    mark = Path(folder, f"{SAVES}{processes.process_index}")

    def look() -> None:
        there = sorted(path.name for path in Path(folder).glob(f"{SAVES}*")) if saves else []
        if len(there) > 1:
            raise ValueError(
                f"save_on_each_node=True, but output_dir={str(folder)!r} is one folder for several machines; leave it "
                "out, or name a folder for each."
            )

    try:
        if saves:
            Path(folder).mkdir(parents=True, exist_ok=True)
            mark.touch()
        processes.wait_for_everyone()
        together(look, processes)
    finally:
        mark.unlink(missing_ok=True)


def newest_whole_checkpoint(output_dir: str | Path, processes: Processes = None) -> Path | None:
    """The `checkpoint-<step>` folder of the highest step from which a training can go on in every process, each of
    which looks into an output folder that may be its machine's own; None where no process has any whole one. A line
    for each that is passed over says why.

    Raises OSError, on every process, where all that some have are missing or damaged on others.
    """
    there = [f.name for f in Path(output_dir).glob("checkpoint-*") if CHECKPOINT.fullmatch(f.name)]
    names = {name for own in everyone(there, processes) for name in own}
    missed = None
    for name in sorted(names, key=step_of, reverse=True):
        folder = Path(output_dir, name)
        faults = everyone(_damage(folder) or _lack(folder, processes), processes)
        if not any(faults):
            return folder
        rank, fault = next((rank, text) for rank, text in enumerate(faults) if text)
        where = f" by process {rank}" if len(faults) > 1 else ""
        if processes is None or processes.is_main_process:
            logger.warning("%s is passed over%s: %s.", name, where, fault)
        if not all(faults):
            missed = missed or f"others can go on from {name}, process {rank} can't: {fault}."
    if missed is not None:
        raise OSError(f"{missed} Copy it there, share the folder, or train with save_on_each_node=True.")
    return None


def step_of(folder: str | Path) -> int:
    """Of a `checkpoint-<step>` folder the step."""
    return int(Path(folder).name.split("-")[1])


def best_beside(checkpoint: str | Path) -> Path | None:
    """Beside a checkpoint the one with the best weights until then, wherever both lay when they were written; None if
    there is none yet. Raises OSError as `check_files`.
    """
    best = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["best_model_checkpoint"]
    if best is None:
        return None
    folder = Path(checkpoint).with_name(Path(best).name)
    check_files(folder)
    return folder


def checkpoint_to_resume(
    wanted: str | Path | bool | None, output_dir: str | Path, processes: Processes = None
) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, the same step in every process: True the newest whole one, a
    path that one, else None.

    Raises, on every process, OSError if a named one is cut short or missing, `NothingToResume` if there is none to go
    on from, ValueError if the processes don't want the same.
    """
    wishes = everyone(Path(wanted).name if isinstance(wanted, str | Path) and wanted else bool(wanted), processes)
    if len(set(wishes)) > 1:
        raise ValueError(f"resume_from_checkpoint is {wishes} in the order of processes; start all with the same.")
    if not wanted:
        return None
    if wanted is not True:
        together(lambda: check_checkpoint(wanted, processes), processes)
        return Path(wanted)
    newest = newest_whole_checkpoint(output_dir, processes)
    if newest is None:
        raise NothingToResume(f"no whole checkpoint in {str(output_dir)!r} to resume from; start without resume.")
    return newest


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first trained parameter that holds NaN or infinity, or None."""
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return None
    finite = torch.stack([tensor.isfinite().all() for _, tensor in trained])
    return None if finite.all() else trained[int((~finite).int().argmax())][0]


def _refuse(folder: str | Path, fault: str | None) -> None:
    if fault:
        raise OSError(f"checkpoint {str(folder)!r} is not whole: {fault}; resume from another one, or delete it.")


def _damage(folder: str | Path) -> str | None:
    """What of a checkpoint is not as it was written."""
    try:
        return damaged_file(folder, read_note(folder)["files"])
    except (OSError, ValueError) as error:
        return str(error)


def _lack(folder: str | Path, processes: Processes) -> str | None:
    """What an undamaged checkpoint lacks to go on from it in this process."""
    note = read_note(folder)
    rank, count = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    random_state = "rng_state.pth" if count == 1 else f"rng_state_{rank}.pth"
    needed = {"weights": WEIGHTS, "optimizer": "optimizer", "schedule": r"scheduler\.pt",
              "state": r"trainer_state\.json"}  # fmt: skip
    if note["processes"] == count:
        needed["random state of this process"] = re.escape(random_state)
    files = [*note["files"], *(file.name for file in Path(folder).glob("rng_state*"))]  # others' lie on their machines
    lacking = [what for what, name in needed.items() if not any(re.match(name, file) for file in files)]
    return f"it has no {lacking[0]}, as save_only_model=True leaves it" if lacking else None
