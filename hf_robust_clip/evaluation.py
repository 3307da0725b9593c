"""Clean and robust accuracy of a classifier, over datasets, radii, attacks and processes, resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .attacks.pgd import LogitsFn, misclassified
from .attacks.suites import PGD, Member, Suite, Victim, is_optimising, is_randomised, run_member
from .modeling import CLIPForZeroShotClassification, check_labels, without_gradients
from .report import RobustnessReport, hardware, library_versions, prompt_hash
from .threat_model import ThreatModel
from .zero_shot_data.loading import ImageDataset, collate_images

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

logger = logging.getLogger(__name__)
Precision = Literal["fp32", "fast"]
Judge = Callable[[Tensor, Tensor], Tensor]  # images and labels to whether each image stands


@dataclass(frozen=True)
class EvaluationSettings:
    """How hard to attack.

    Args:
        radii: radii in units of [0, 1], floats or fractions such as `"1/255"`.
        norm: `"linf"` or `"l2"`.
        attack: the attacks: `PGD(...)` or `AutoAttack(...)`.
        batch_size: images per forward; results don't depend on it beyond rounding.
        seed: of all that attacks draw.
        precision: `"fp32"`, or `"fast"`: gradients and queries in bfloat16, every break confirmed in float32, so that
            no image is counted as broken that isn't. Fewer breaks may be found.
        num_workers: processes that load pictures ahead.
    """

    radii: Sequence[float | str]
    norm: str = "linf"
    attack: Suite = field(default_factory=PGD)
    batch_size: int = 128
    seed: int = 0
    precision: Precision = "fp32"
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be at least 1.")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision={self.precision!r} is unknown; choose one of {', '.join(get_args(Precision))}."
            )
        if not isinstance(self.attack, Suite):
            raise TypeError(f"attack={self.attack!r} must be a suite of attacks, such as PGD(20) or AutoAttack().")
        self.threat_models()

    def threat_models(self) -> list[ThreatModel]:
        """One for each radius, ascending. Raises ValueError if there is none, or a radius is 0."""
        if isinstance(self.radii, str) or not self.radii:
            raise ValueError(f"radii={self.radii!r} must be a list of at least one radius, such as ['1/255'].")
        threats = sorted({ThreatModel(r, self.norm) for r in self.radii}, key=lambda threat: threat.eps)  # type: ignore[arg-type]
        if not threats[0].eps > 0:
            raise ValueError(f"radii={self.radii!r} hold 0, which is the clean accuracy; leave it out.")
        return threats


@dataclass(frozen=True)
class _Stage:
    """One attack at one radius."""

    threat_model: ThreatModel
    name: str
    member: Member

    def __str__(self) -> str:
        return f"{self.name} at {self.threat_model}"


def evaluate_robustness(
    model: CLIPForZeroShotClassification,
    dataset: ImageDataset,
    settings: EvaluationSettings,
    *,
    name: str,
    task: str,
    model_id: str,
    processes: Accelerator | PartialState | None = None,
    state_dir: str | Path | None = None,
    progress: bool = False,
) -> RobustnessReport:
    """Accuracy on clean images and under attack (white box, on the plain classifier) at every radius.

    Stages in their order: clean, then every attack of the suite at the smallest radius, then at the next. An image
    that falls leaves for good (a smaller ball lies inside the larger); those left are batched anew for the next stage.
    So an image counts as robust at a radius if it withstood every attack at this and every smaller radius. Runs in
    float32 without autocast (see `EvaluationSettings.precision`). Parameters are frozen meanwhile: gradients are taken
    by the pixels alone. The model comes back as it was: mode, gradients, classes, input size.

    Args:
        model: with its classes set, in label order of `dataset`.
        dataset: pictures with labels. Pictures smaller than the model's input are enlarged inside the model, after the
            attack.
        settings: radii and attacks.
        name: what tables call the model.
        task: what tables call the images.
        model_id: Hub id or folder, for the report.
        processes: splits the images over its processes; each of them gets the whole report.
        state_dir: a folder for what is done already. A run that was killed goes on from it, on any number of
            processes, without repeating finished images, and ends with the same report.
        progress: show a bar for each stage on the main process.

    Raises ValueError for an empty or an augmented dataset, a single class, labels beyond the classes, images outside
    [0, 1] or of wrong size, and a state of another model, dataset or setting.
    """
    if len(dataset) == 0:
        raise ValueError("dataset is empty; nothing to evaluate.")
    if getattr(dataset, "augment", False):
        raise ValueError(
            "dataset.augment=True gives whole pictures for training; evaluate replace(data, augment=False)."
        )
    num_classes = len(model.class_names)
    if num_classes == 1:
        raise ValueError(
            f"there is one class, {model.class_names[0]!r}: nothing can be misclassified; set_classes more."
        )
    threats = settings.threat_models()
    stages = [
        _Stage(threat, member_name, member)
        for threat in threats
        for member_name, member in settings.attack.members(num_classes).items()
    ]
    before = model.training, model.input_size
    try:
        model.eval().set_input_size(None if dataset.attack_resolution is None else dataset.resolution)
        with without_gradients(model):
            evaluation = _Evaluation(model, dataset, settings, stages, processes, state_dir, progress)
            evaluation.run()
        resolution = model.input_size
    finally:
        model.train(before[0]).set_input_size(before[1])
    found = evaluation.gathered()
    levels = list(found.levels.values())  # (label, how many of (clean, *stages) it withstood in a row)
    share = [sum(level > k for _, level in levels) / len(levels) for k in range(len(stages) + 1)]
    after_each: dict[float, dict[str, float]] = {}
    for stage, value in zip(stages, share[1:], strict=True):
        after_each.setdefault(stage.threat_model.eps, {})[stage.name] = value
    per_class = {}
    for index, class_name in enumerate(model.class_names):
        own = [level for label, level in levels if label == index]
        per_class[class_name] = (len(own), sum(k > 0 for k in own), sum(k > len(stages) for k in own))
    precision = str(model.dtype).removeprefix("torch.")
    return RobustnessReport(
        name=name,
        task=task,
        model=model_id,
        model_revision=getattr(model.config, "_commit_hash", None) or "local",
        dataset=dataset.dataset_id,
        dataset_revision=dataset.revision,
        split=dataset.split,
        num_images=len(levels),
        num_classes=num_classes,
        prompt_hash=prompt_hash(model.class_names, model.templates),
        attack=settings.attack.name(num_classes),
        attack_parameters=settings.attack.parameters(threats, num_classes),
        attack_target="static",
        attack_resolution=resolution,
        norm=settings.norm,
        clean_accuracy=share[0],
        robust_accuracy={radius: list(left.values())[-1] for radius, left in after_each.items()},
        after_each=after_each,
        model_flags=found.flags,
        per_class=per_class,
        zero_gradient_share=found.zeros / found.total if found.total else 0.0,
        seed=settings.seed,
        precision=precision if settings.precision == "fp32" else f"{precision}, gradients in bfloat16",
        library_versions=library_versions(),
        hardware=hardware(),
    )


def adversarial_examples(
    model: CLIPForZeroShotClassification, dataset: ImageDataset, settings: EvaluationSettings, count: int = 6
) -> tuple[Tensor, Tensor, list[str], list[str], list[str]]:
    """A few images, attacked at the largest radius by the first attack, for `report.plot_examples`.

    Returns (images (N, C, H, W), adversarial images, true names, names predicted before, names predicted after), at
    most `count` of the first 64 images of the dataset: those that fall first.
    """
    examples = [dataset[i] for i in range(min(64, len(dataset)))]
    batch = collate_images(examples)
    images, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
    threat_model, member = (
        settings.threat_models()[-1],
        next(iter(settings.attack.members(len(model.class_names)).values())),
    )
    before = model.training, model.input_size
    try:
        model.eval().set_input_size(None if dataset.attack_resolution is None else dataset.resolution)
        with without_gradients(model):
            victim = Victim(lambda pixels: model(pixel_values=pixels).logits, seed=settings.seed)
            right = ~misclassified(victim.logits_fn, images, labels)
            adv, stands = run_member(member, victim, images, labels, threat_model)
            order = (right & ~stands).int().sort(descending=True, stable=True).indices[:count]
            with torch.no_grad():
                was, became = (victim.logits_fn(pixels[order]).argmax(dim=1) for pixels in (images, adv))
    finally:
        model.train(before[0]).set_input_size(before[1])
    truth, was_named, named = (
        [model.class_names[i] for i in index.tolist()] for index in (labels[order], was, became)
    )
    return images[order].cpu(), adv[order].cpu(), truth, was_named, named


@dataclass
class _Found:
    """What is known so far: of each image its label and how many stages it withstood; sums over gradients."""

    levels: dict[int, tuple[int, int]] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)  # image to the number of stages it went through
    flags: dict[str, bool] = field(default_factory=dict)
    zeros: int = 0
    total: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """One finished batch: `stage`, `rows` of (index, label, stands), `zeros`, `total`."""
        new = [row for row in line["rows"] if self.done.get(row[0], 0) == line["stage"]]
        for index, label, stands in new:  # a batch that is known already counts once
            level = self.levels.get(index, (label, 0))[1]
            self.levels[index] = (label, level + stands)
            self.done[index] = line["stage"] + 1
        if new:
            self.zeros += line["zeros"]
            self.total += line["total"]


class _Evaluation:
    """Runs the stages on this process's images, and writes down each finished batch."""

    def __init__(
        self,
        model: CLIPForZeroShotClassification,
        dataset: ImageDataset,
        settings: EvaluationSettings,
        stages: Sequence[_Stage],
        processes: Accelerator | PartialState | None,
        state_dir: str | Path | None,
        progress: bool,
    ):
        self.model, self.dataset, self.settings, self.stages = model, dataset, settings, stages
        self.processes = processes
        self.rank: int = processes.process_index if processes else 0
        self.world: int = processes.num_processes if processes else 1
        self.show = progress and self.rank == 0
        self.found = _Found()
        self.new_lines: list[dict[str, Any]] = []
        self.old_lines: list[dict[str, Any]] = []
        self.file = None
        if state_dir is not None:
            fingerprint = _fingerprint(model, dataset, settings)
            self.old_lines = _read_state(Path(state_dir), fingerprint)
            for line in self.old_lines:
                self.found.add(line)
            if processes is not None:
                processes.wait_for_everyone()  # all have read before any writes
            self.file = _open_state(Path(state_dir), self.rank, fingerprint)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        return self.model(pixel_values=images_BCHW).logits

    def fast_logits(self, images_BCHW: Tensor) -> Tensor:
        with torch.autocast(images_BCHW.device.type, torch.bfloat16):
            return self.model(pixel_values=images_BCHW).logits

    def run(self) -> None:
        """Every stage, on the images of this process that stand."""
        own = range(self.rank, len(self.dataset), self.world)
        try:
            self.check_model(own)
            self.run_stage(0, "clean", list(own), self.clean)
            for number, stage in enumerate(self.stages, start=1):
                standing = [i for i in own if self.found.levels[i][1] >= number]
                self.run_stage(number, str(stage), standing, self.attack(stage))
        finally:
            if self.file is not None:
                self.file.close()

    def check_model(self, own: range) -> None:
        """Look for random numbers and for optimisation inside the classifier, on a few images."""
        few = [self.dataset[i] for i in own[:4]] or [self.dataset[0]]
        images_BCHW = collate_images(few)["pixel_values"].to(self.model.device)
        self.found.flags = {
            "randomised": is_randomised(self.logits, images_BCHW),
            "optimising": is_optimising(self.logits, images_BCHW),
        }
        if self.rank == 0 and any(self.found.flags.values()):
            what = " and ".join(name for name, found in self.found.flags.items() if found)
            logger.warning(
                "the classifier looks %s: attacks on the plain classifier overrate it. Attack it with "
                "AutoAttack.rand(), or through its defence.",
                what,
            )

    def run_stage(self, number: int, title: str, rows: list[int], judge: Judge) -> None:
        """`judge` on the rows that have not been through this stage."""
        todo = [i for i in rows if self.found.done.get(i, 0) == number]
        loader = DataLoader(
            Subset(self.dataset, todo),
            self.settings.batch_size,
            collate_fn=collate_images,
            num_workers=self.settings.num_workers,
        )
        place = 0
        for batch in tqdm(loader, desc=title, disable=not self.show, leave=False):
            images, labels = batch["pixel_values"].to(self.model.device), batch["labels"].to(self.model.device)
            check_labels(labels, len(self.model.class_names))
            self.zeros = self.total = 0
            stands = judge(images, labels)
            index = todo[place : place + len(labels)]
            place += len(labels)
            triples = zip(index, labels.tolist(), map(int, stands.tolist()), strict=True)
            self.note({"stage": number, "rows": list(triples), "zeros": self.zeros, "total": self.total})

    def note(self, line: dict[str, Any]) -> None:
        self.found.add(line)
        self.new_lines.append(line)
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def clean(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        return ~misclassified(self.logits, images_BCHW, labels_B)

    def attack(self, stage: _Stage) -> Judge:
        fast: LogitsFn | None = self.fast_logits if self.settings.precision == "fast" else None
        deterministic = not self.found.flags["randomised"]
        victim = Victim(self.logits, fast, deterministic, self.settings.seed, self.count_zeros)
        return lambda images, labels: run_member(stage.member, victim, images, labels, stage.threat_model)[1]

    def count_zeros(self, grad_BCHW: Tensor) -> None:
        self.zeros += int((grad_BCHW == 0).sum())
        self.total += grad_BCHW.numel()

    def gathered(self) -> _Found:
        """What all processes found together."""
        if self.world == 1:
            return self.found
        from accelerate.utils import gather_object

        found = _Found(flags=self.found.flags)
        lines = gather_object([*self.old_lines, *self.new_lines])  # old ones too: folders may differ by machine
        for line in sorted(lines, key=lambda line: line["stage"]):
            found.add(line)
        for flags in gather_object([self.found.flags]):
            found.flags = {name: found.flags[name] or flags[name] for name in flags}
        return found


def _fingerprint(
    model: CLIPForZeroShotClassification, dataset: ImageDataset, settings: EvaluationSettings
) -> dict[str, str]:
    """What must be the same for a state to be of use: weights and classes, images, attacks.

    Of the images the first, middle and last are looked at: other draws and other preparation show in them. Nothing
    that is computed by the model, since its rounding differs between devices and numbers of threads.
    """
    head = (model.class_token_ids, model.image_mean, model.image_std)
    few = [dataset[i] for i in sorted({0, len(dataset) // 2, len(dataset) - 1})]
    pictures = _digest([example["pixel_values"] for example in few]), [int(example["labels"]) for example in few]
    threats, num_classes = settings.threat_models(), len(model.class_names)
    own = library_versions()["hf_robust_clip"]  # another version may attack otherwise
    attack = own, settings.attack.name(num_classes), settings.attack.parameters(threats, num_classes)
    return {
        "model": _digest([*model.parameters(), *head]),
        "classes": prompt_hash(model.class_names, model.templates),
        "dataset": f"{dataset.dataset_id} {dataset.revision} {dataset.split}, {len(dataset)} images like {pictures}",
        "attack": f"{attack} {settings.norm} {[t.eps for t in threats]} seed {settings.seed} {settings.precision}",
    }


def _digest(tensors: Sequence[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def _read_state(folder: Path, fingerprint: dict[str, str]) -> list[dict[str, Any]]:
    """The finished batches in all state files of a folder, by stage; a last line that was cut short is left out."""
    lines = []
    for file in sorted(folder.glob("state-*.jsonl")):
        complete = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        for number, text in enumerate(complete):
            line = json.loads(text)
            if number == 0:
                other = [key for key in fingerprint if line.get(key) != fingerprint[key]]
                if other:
                    raise ValueError(
                        f"{file} is the state of another evaluation: its {other[0]} is {line.get(other[0])!r}, now it "
                        f"is {fingerprint[other[0]]!r}. Delete the folder, or choose another."
                    )
            else:
                lines.append(line)
    return sorted(lines, key=lambda line: line["stage"])


def _open_state(folder: Path, rank: int, fingerprint: dict[str, str]):
    """This process's state file, open for appending after its last complete line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{rank}.jsonl"
    whole = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
    if whole:
        os.truncate(path, whole)
        return path.open("a", encoding="utf-8")
    file = path.open("w", encoding="utf-8")
    file.write(json.dumps(fingerprint) + "\n")
    file.flush()
    return file
