"""What an evaluation has found so far, in memory and in files from which a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..defences.base import Defence, StreamState
from ..defences.fit import read_tensors, write_tensors
from ..digests import file_digest, signed, unsigned, without_places
from ..environment import library_versions, same_libraries
from ..metrics import accuracy_after_each
from ..modeling import ZeroShotClassifier, descriptions_digest
from ..names import shown_name
from ..processes import Processes, check_agreed, everyone, together
from ..report import prompt_hash
from ..storage import disk_errors
from ..zero_shot_data.fingerprint import dataset_digest
from ..zero_shot_data.loading import ImageDataset
from .adversarial import SavedImage, has_pictures
from .detection import Alarm
from .settings import EvaluationSettings

Line = dict[str, Any]
SHOWN = 120  # characters of what a state is of, in an error


@dataclass
class Found:
    """What is known so far: of each image its label and, for each judge, how many stages it withstood before the first
    that it didn't; sums over gradients and over what the defence did.
    """

    levels: dict[int, tuple[int, ...]] = field(default_factory=dict)  # (label, one level per judge)
    done: dict[int, int] = field(default_factory=dict)  # image to the number of stages it went through
    gradients: dict[int, tuple[int, int]] = field(default_factory=dict)  # by stage: entries, and how many were zero
    fallbacks: int = 0
    seconds: float = 0.0
    alarms: dict[int, dict[int, Alarm]] = field(default_factory=dict)  # of a detector, by stage and image
    saved: dict[tuple[int, int], SavedImage] = field(default_factory=dict)  # by stage and image

    def right(self, judge: int, stages: int) -> np.ndarray:
        """Whether a judge (0: the defence) got each image right when clean and at each of `stages` attacks, as far as
        the image went: (N, 1 + stages) bool.
        """
        rows = [
            [row[1 + judge] > stage or row[1 + judge] == self.done[index] for stage in range(stages + 1)]
            for index, row in self.levels.items()
        ]
        return np.array(rows, dtype=bool)

    @property
    def zeros(self) -> int:
        """How many entries of gradients were zero or not finite."""
        return sum(zeros for _, zeros in self.gradients.values())

    @property
    def total(self) -> int:
        """How many entries there were."""
        return sum(total for total, _ in self.gradients.values())

    def blindness(self, stages: Collection[int]) -> float:
        """The share of zeros, in [0, 1], in some stages; 0 where no gradient was taken."""
        total, zeros = (sum(own) for own in zip((0, 0), *(self.gradients.get(n, (0, 0)) for n in stages), strict=True))
        return zeros / max(total, 1)

    def accuracies(self, judge: int, stages: int) -> list[float]:
        """The clean accuracy by a judge, and the robust accuracy after each of `stages` attacks."""
        return accuracy_after_each(self.right(judge, stages))

    def add(self, line: Line) -> None:
        """One finished batch: `stage`, `rows` of (index, label, whether it stands for each judge), `zeros`, `total`,
        and of a defence `fallbacks` and `seconds`, of a detector `alarms` of (index, score, whether flagged, whether
        the class is right), and where pictures are saved what `AdversarialLog.keep` gives.
        """
        if any(self.done.get(row[0], 0) != line["stage"] for row in line["rows"]):
            return  # it is known already, or what came before it is lost
        for index, label, *stands in line["rows"]:
            before = self.levels.get(index, (label, *[0] * len(stands)))[1:]
            after = (n + (right and n == line["stage"]) for n, right in zip(before, stands, strict=True))
            self.levels[index] = (label, *after)
            self.done[index] = line["stage"] + 1
        total, zeros = self.gradients.get(line["stage"], (0, 0))
        self.gradients[line["stage"]] = total + line["total"], zeros + line["zeros"]
        for index, *alarm in line.get("alarms", ()):
            self.alarms.setdefault(line["stage"], {})[index] = Alarm(*alarm)
        kept = line.get("saved") or {"file": None, "rows": []}
        for place, (index, *own) in enumerate(kept["rows"]):
            self.saved[line["stage"], index] = SavedImage(kept["file"], place, *own)
        self.fallbacks += line.get("fallbacks", 0)
        self.seconds += line.get("seconds", 0.0) if line["stage"] == 0 else 0.0


class State:
    """The finished batches of all processes: read from a folder if there is one, and each new one written there.

    Args:
        folder: None keeps them in memory alone.
        fingerprint: what must be the same for a folder's lines to be of use.
        rank: of this process, which writes a file of its own.

    Raises ValueError for a damaged line, for the state of another evaluation, and where processes evaluate different
    things; `NotWritten` where the disk is full or closed.
    """

    def __init__(self, folder: str | Path | None, fingerprint: dict[str, str], rank: int, processes: Processes):
        self.processes = processes
        self.found = Found()
        self.old_lines: list[Line] = []
        self.new_lines: list[Line] = []
        self.file: IO[str] | None = None
        self.folder, self.keeps = Path(folder or ""), folder is not None
        self.fingerprint, self.rank = fingerprint, rank
        if processes is not None and processes.num_processes > 1:
            check_agreed({**fingerprint, "libraries": same_libraries()}, processes)
        if folder is None:
            return
        own = together(lambda: _read_state(Path(folder), fingerprint), processes)
        read = [line for lines in everyone(own, processes) for line in lines]  # folders may differ by machine
        self.old_lines = sorted(read, key=lambda line: line["stage"])
        for line in self.old_lines:
            self.found.add(line)

    def _open(self) -> None:
        """This process's file, from the first batch on: of a run that ends before it, nothing is left."""
        if self.keeps and self.file is None:
            with disk_errors(self.folder, "state_dir"):
                self.file = _open_state(self.folder, self.rank, self.fingerprint)

    def note(self, line: Line, stream: Any = None) -> None:
        """One finished batch of this process, and the stream state after it, which is kept until the next is."""
        self.found.add(line)
        self._open()
        if self.file is not None:
            if isinstance(stream, StreamState):
                line = {**line, "stream": self._keep(stream)}
            with disk_errors(self.file.name, "state"):
                self.file.write(signed(json.dumps(line)))
                self.file.flush()
            for path in self.folder.glob("stream-*.safetensors") if "stream" in line else ():
                if path.name != f"stream-{line['stream']}.safetensors":
                    path.unlink(missing_ok=True)
        self.new_lines.append(line)

    def _keep(self, stream: StreamState) -> str:
        """Write a stream state down, under the digest of its file."""
        with disk_errors(self.folder, "state_dir"):
            write_tensors(draft := self.folder / "stream.safetensors", stream.tensors(), {})
            found = file_digest(draft)
            draft.replace(self.folder / f"stream-{found}.safetensors")
        return found

    def stream_after(self, stage: int, index: int, first: Any) -> Any:
        """The stream state after a batch of a stage that ended with an image, made of the `first`; None where it can't
        be had, and the stage must begin anew.
        """
        lines = [line for line in self.old_lines if line["stage"] == stage and line["rows"][-1][0] == index]
        kept = lines[-1].get("stream") if lines else None
        path = self.folder / f"stream-{kept}.safetensors"
        if not isinstance(first, StreamState) or not path.is_file() or file_digest(path) != kept:
            return None
        return first.restored(read_tensors(path)[0])

    def check_shared(self) -> None:
        """Raise ValueError on every process unless each sees the state files of all the others."""
        self._open()
        count = len(everyone(None, self.processes))  # by now all of them are open

        def check() -> None:
            if not all((self.folder / f"state-{rank}.jsonl").is_file() for rank in range(count)):
                raise ValueError(f"save_adversarial: {str(self.folder)!r} isn't shared by all processes; share it.")

        together(check, self.processes)

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # each line was flushed
                self.file.close()

    def gathered(self) -> Found:
        """What all processes found together."""
        if self.processes is None or self.processes.num_processes == 1:
            return self.found
        found = Found()
        new = [line for lines in everyone(self.new_lines, self.processes) for line in lines]
        for line in [*self.old_lines, *sorted(new, key=lambda line: line["stage"])]:  # as each process went on
            found.add(line)
        return found


def fingerprint_of(
    model: ZeroShotClassifier,
    dataset: ImageDataset,
    settings: EvaluationSettings,
    defence: Defence,
    pixels: str | None = None,
) -> dict[str, str]:
    """What must be the same for a state to be of use: weights, configuration and classes, images, attacks, the defence
    with its statistics, and what the attacks see of it.

    Args:
        pixels: how adversarial pictures are saved, if they are.

    Nothing that is computed by the model, since its rounding differs between devices and numbers of threads.
    """
    tensors = [*model.parameters(), model.class_token_ids, model.image_mean, model.image_std]
    adapters = [
        (layer.active_adapters, layer.disable_adapters, getattr(layer, "scaling", None), *_units(layer))
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    text = f"{without_places(model.config.to_dict())} {adapters}"
    threats, num_classes = settings.threat_models(), len(model.class_names)
    own = library_versions()["hf_robust_clip"]  # another version may attack otherwise
    attack = own, settings.attack.name(num_classes), settings.attack.parameters(threats, num_classes)
    precision = "fast" if settings.is_fast(model.device) else "fp32"
    views = [view for view, _ in settings.plan(num_classes)]
    whole = defence.traits.episodic and not defence.traits.couples_images
    batches = "" if whole else f" batches of {settings.batch_size}"
    return {
        "model": f"{_digest(tensors)} {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "classes": prompt_hash(model.class_names, model.templates, descriptions_digest(model.descriptions)),
        "dataset": f"{shown_name(dataset.dataset_id)} {dataset.revision} {dataset.split}, {len(dataset)} images like "
        f"{dataset_digest(dataset, every=True)}",
        "attack": f"{attack} {settings.norm} {[t.eps for t in threats]} seed {settings.seed} {precision}",
        "defence": f"{defence.name} {defence.parameters()} {_digest(_tensors(defence))} {views} eot "
        f"{settings.eot}{batches}",
        **({} if pixels is None else {"pictures": pixels}),
    }


def _units(layer: BaseTunerLayer) -> list[Any]:
    """How pixel prompts are put on pictures, where it is in [0, 1]: the same values would be other prompts else."""
    return [units] if (units := getattr(layer, "unit_pixels", None)) else []


def _tensors(value: Any) -> list[Tensor]:
    """All tensors inside a setting, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _digest(tensors: Sequence[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def _read_state(folder: Path, fingerprint: dict[str, str]) -> list[Line]:
    """The finished batches in all state files of a folder; a last line that was cut short is left out. Raises
    ValueError for a damaged line, and for the state of another evaluation.
    """
    lines = []
    for file in sorted(folder.glob("state-*.jsonl")):
        for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
            try:
                line = json.loads(unsigned(text))
            except ValueError as error:
                what = "the file" if number == 1 else "this line"
                raise ValueError(f"{file}, line {number} is damaged or of another format; delete {what}.") from error
            if number > 1:
                lines += [line] if has_pictures(folder, line) else []  # else they are made again
            elif other := [key for key in {**fingerprint, **line} if line.get(key) != fingerprint.get(key)]:
                then, now = _where_they_differ(str(line.get(other[0])), str(fingerprint.get(other[0])))
                raise ValueError(
                    f"{file} is the state of another evaluation: its {other[0]} is {then!r}, now it is {now!r}. "
                    "Delete the folder, or choose another."
                )
    return lines


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Both texts, of long ones the part where they differ."""
    if max(len(one), len(other)) <= SHOWN:
        return one, other
    first = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, one.rfind(" ", 0, max(first - 20, 0)) + 1)
    cut = [text[start : start + SHOWN] for text in (one, other)]
    shown = [
        ("..." if start else "") + part + ("..." if len(text) > start + SHOWN else "")
        for text, part in zip((one, other), cut, strict=True)
    ]
    return shown[0], shown[1]


def _open_state(folder: Path, rank: int, fingerprint: dict[str, str]) -> IO[str]:
    """This process's state file, open for appending after its last complete line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{rank}.jsonl"
    whole = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
    if whole:
        os.truncate(path, whole)
        return path.open("a", encoding="utf-8")
    file = path.open("w", encoding="utf-8")
    file.write(signed(json.dumps(fingerprint)))
    file.flush()
    return file
