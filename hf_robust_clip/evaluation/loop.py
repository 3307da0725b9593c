"""Clean and robust accuracy of a classifier, or of one behind a test-time defence, over datasets, radii, attacks and
processes, resumable.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..attacks.auto_attack import AutoAttack
from ..attacks.pgd import LogitsFn, misclassified
from ..attacks.suites import PGD, Member, Suite, Victim, find_adversarial, is_optimising, is_randomised, run_member
from ..checks import Blindness, check_logits, checked_labels
from ..defences.base import Defence, GradientPath, Prediction
from ..digests import signed, unsigned
from ..modeling import CLIPForZeroShotClassification, without_gradients
from ..names import check_shown
from ..processes import Processes, everyone, together
from ..prompts.access import with_prompts
from ..report.report import (
    CONTROLS,
    AttackTarget,
    RobustnessReport,
    blind_warning,
    hardware,
    library_versions,
    prompt_hash,
)
from ..secrets import refuse_tokens
from ..storage import disk_errors
from ..threat_model import ThreatModel
from ..zero_shot_data.fingerprint import dataset_digest
from ..zero_shot_data.loading import ImageDataset, collate_images

logger = logging.getLogger(__name__)
Precision = Literal["fp32", "fast"]
Judge = Callable[[Tensor, Tensor], Tensor]  # images and labels to whether each image stands, (B, judges)
Target = Literal[AttackTarget, "query"]  # what one attack of a suite sees; "query": logits without gradients
THROUGH: tuple[AttackTarget, ...] = ("adaptive", "bpda", "adaptive_worst")  # where gradients go through the defence
ATTACKERS_SEED = 7919  # added to the evaluation's seed: an attack knows a defence, not its draws


@dataclass(frozen=True)
class AdaptiveWorst(Suite):
    """Every kind of attack on a defence, each on the images that the ones before left standing; for
    `EvaluationSettings(target="adaptive_worst")`. An image counts as robust only if it withstood them all.

    In this order, by targets of `EvaluationSettings`: defence-blind PGD and APGD-CE, PGD transferred from the adapted
    classifier, BPDA-PGD, PGD and APGD-CE through the defence, Square on the defence's own logits.

    Args:
        pgd_steps: of each PGD; 0 leaves them all out.
        apgd_steps: of each APGD; 0 leaves them out.
        num_queries: of Square; 0 leaves it out.
        blind: suites that take the place of the two blind attacks: those whose own figures stand beside, so that the
            worst of all is never above them.

    Raises ValueError for a negative number, and if nothing is left.
    """

    pgd_steps: int = 20
    apgd_steps: int = 50
    num_queries: int = 500
    blind: Sequence[Suite] = ()

    def __post_init__(self) -> None:
        for name, value in self._numbers().items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be an integer of at least 0.")
        if not any(self._numbers().values()) and not self.blind:
            raise ValueError("pgd_steps, apgd_steps and num_queries are all 0: no attack is left.")
        object.__setattr__(self, "blind", tuple(self.blind))

    def _numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("pgd_steps", "apgd_steps", "num_queries")}

    def _plan(self, num_classes: int) -> dict[str, tuple[Target, Member | None]]:
        """By name, what an attack sees, and the attack; None if its number is 0."""

        def only(suite: type[Suite], *settings: Any, **more: Any) -> Member | None:
            number = next(iter(more.values())) if more else settings[0]
            return next(iter(suite(*settings, **more).members(num_classes).values())) if number else None

        pgd = only(PGD, self.pgd_steps)
        apgd = only(AutoAttack, ("apgd-ce",), num_steps=self.apgd_steps)
        blind: dict[str, Member | None] = {"pgd": pgd, "apgd-ce": apgd}
        if self.blind:
            blind = {name: own for suite in self.blind for name, own in suite.members(num_classes).items()}
        return {
            **{f"blind {name}": ("defence_blind", member) for name, member in blind.items()},
            "transfer pgd": ("transfer_from_adapted", pgd),
            "bpda pgd": ("bpda", pgd),
            "adaptive pgd": ("adaptive", pgd),
            "adaptive apgd-ce": ("adaptive", apgd),
            "square": ("query", only(AutoAttack, ("square",), num_queries=self.num_queries)),
        }

    def members(self, num_classes: int) -> dict[str, Member]:
        return {name: member for name, (_, member) in self._plan(num_classes).items() if member is not None}

    def targets(self, num_classes: int) -> dict[str, Target]:
        """What each attack sees."""
        return {name: target for name, (target, _) in self._plan(num_classes).items()}

    def name(self, num_classes: int) -> str:
        parts = zip(("PGD", "APGD", "Square"), self._numbers().values(), strict=True)
        own = [f"{name}-{number}" for name, number in parts if number]
        return "+".join([*(suite.name(num_classes) for suite in self.blind), *own])

    def parameters(self, threat_models: Sequence[ThreatModel], num_classes: int) -> dict[str, Any]:
        found: dict[str, Any] = self._numbers()
        if self.pgd_steps:
            found["step_size"] = PGD(self.pgd_steps).parameters(threat_models, num_classes)["step_size"]
        if self.blind:
            found["blind"] = [
                {"name": suite.name(num_classes), **suite.parameters(threat_models, num_classes)}
                for suite in self.blind
            ]
        out = {name: "its number is 0" for name, (_, member) in self._plan(num_classes).items() if member is None}
        return {**found, **({"left_out": out} if out else {})}


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
        target: what the attacks see. `"static"`, the classifier alone, is for evaluations without a defence, the
            others are for those with one. All judge by the defence:

            - `"defence_blind"`: the classifier without the defence, to the end of the attack (PGD keeps the iterate of
              highest loss). Every image is attacked at every radius, whether or not the defence fell before.
            - `"transfer_from_adapted"`: the classifier with the prompts that the defence tuned on the clean image, or
              with the counter-perturbation that it found there, held fixed. For a defence that leaves neither, it is
              the classifier alone, on the images that stand.
            - `"bpda"`: gradients through the views and the prediction, with what was tuned taken as constant.
            - `"adaptive"`: gradients through the views and the tuning.
            - `"adaptive_worst"`: all of these and more, see `AdaptiveWorst`, which must be the attack.
        eot: draws of the defence whose logits are averaged before the loss, in each gradient of `bpda` and `adaptive`:
            the gradient is that of the mean prediction. Other targets take no such gradient.
    """

    radii: Sequence[float | str]
    norm: str = "linf"
    attack: Suite = field(default_factory=PGD)
    batch_size: int = 128
    seed: int = 0
    precision: Precision = "fp32"
    num_workers: int = 0
    target: AttackTarget = "static"
    eot: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be at least 1.")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision={self.precision!r} is unknown; choose one of {', '.join(get_args(Precision))}."
            )
        if not isinstance(self.attack, Suite):
            raise TypeError(f"attack={self.attack!r} must be a suite of attacks, such as PGD(20) or AutoAttack().")
        if self.target not in get_args(AttackTarget):
            raise ValueError(f"target={self.target!r} is unknown; choose one of {', '.join(get_args(AttackTarget))}.")
        if (self.target == "adaptive_worst") != isinstance(self.attack, AdaptiveWorst):
            raise ValueError(
                f"target={self.target!r} doesn't go with attack={self.attack!r}: 'adaptive_worst' and "
                "AdaptiveWorst(...) belong together."
            )
        if not isinstance(self.eot, int) or self.eot < 1:
            raise ValueError(f"eot={self.eot!r} must be an integer of at least 1.")
        self.threat_models()

    def precision_with(self, model: CLIPForZeroShotClassification) -> str:
        """The arithmetic of an evaluation of a model."""
        own = str(model.dtype).removeprefix("torch.")
        return own if self.precision == "fp32" else f"{own}, gradients in bfloat16"

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
    target: Target = "static"

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
    processes: Processes = None,
    state_dir: str | Path | None = None,
    progress: bool = False,
    defence: Defence | None = None,
) -> RobustnessReport:
    """Accuracy on clean images and under attack at every radius: white box on the classifier, or with a defence as
    `settings.target` says.

    Stages in their order: clean, then every attack of the suite at the smallest radius, then at the next. An image
    that falls leaves for good (a smaller ball lies inside the larger); those left are batched anew for the next stage.
    So an image counts as robust at a radius if it withstood every attack at this and every smaller radius. Runs in
    float32 without autocast (see `EvaluationSettings.precision`). Parameters are frozen meanwhile: gradients are taken
    by the pixels alone. The model comes back as it was: mode, gradients, classes, input size.

    With a defence, an image stands if `defence.predict(model, images, seed=settings.seed)` is right. Gradients are
    taken with other seeds: an attack knows the defence, not its draws. Three controls see every image that the
    defence sees, clean and adversarial: the classifier as it is (`"static prompts"`), without adapters and with random
    vision prompts (`"random prompts"`: 2 tokens in up to 9 layers, N(0, 0.02^2), fixed seed), and the mean over 64
    random views (`"ensemble-64"`). A control counts an image as robust if it was right on the clean image and on all
    that was made of it up to the radius; what the defence lost is not attacked any further, except by a blind attack.
    Where a defence is not episodic, results depend on `batch_size` and on the processes.

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
        defence: what predicts in the model's place.

    Where more than 5 % of the input gradients are zero, a warning says that the attack was partly blind.

    Raises ValueError for an empty or an augmented dataset, one whose classes aren't the model's in their order, a
    single class, labels beyond the classes, images outside [0, 1] or of wrong size, a state of another model, dataset,
    defence or setting, a target without a defence, a defence without a target or with a model that lacks what it
    needs, and `precision="fast"` for a model in half precision; FloatingPointError for logits that are not finite,
    naming the stage.
    """
    if defence is not None and not isinstance(model, CLIPForZeroShotClassification):
        model = model.get_base_model()  # of a PeftModel
    _check_target(settings, defence)
    lacking = [name for name in ("dataset_id", "revision", "split") if not hasattr(dataset, name)]
    if lacking:
        raise TypeError(
            f"dataset is a {type(dataset).__name__} without {lacking[0]}, which a report must name; give an "
            "ImageDataset (load_image_dataset, image_dataset), whose first, only and shots choose images."
        )
    told = {"name": name, "task": task, "model_id": model_id, "dataset.dataset_id": dataset.dataset_id,
            "dataset.revision": dataset.revision, "dataset.split": dataset.split}  # fmt: skip
    for what, text in told.items():
        check_shown(text, what)
    refuse_tokens(told, "report")
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
    seen = _targets(settings, num_classes)
    stages = [
        _Stage(threat, member_name, member, seen[member_name])
        for threat in threats
        for member_name, member in settings.attack.members(num_classes).items()
    ]
    with model.prepared_for(dataset), without_gradients(model), model.fixed_class_embeds():
        where = processes, state_dir, progress
        if defence is None:
            evaluation = _Evaluation(model, dataset, settings, stages, *where)
        else:
            evaluation = _DefendedEvaluation(model, dataset, settings, stages, *where, defence=defence)
        evaluation.run()
        resolution = model.input_size
    found = evaluation.gathered()
    share = [found.accuracy(0, k) for k in range(len(stages) + 1)]
    after_each: dict[float, dict[str, float]] = {}
    for stage, value in zip(stages, share[1:], strict=True):
        after_each.setdefault(stage.threat_model.eps, {})[stage.name] = value
    levels = [row[:2] for row in found.levels.values()]
    per_class = {}
    for index, class_name in enumerate(model.class_names):
        own = [level for label, level in levels if label == index]
        per_class[class_name] = (len(own), sum(k > 0 for k in own), sum(k > len(stages) for k in own))
    report = RobustnessReport(
        name=name,
        task=task,
        model=model_id,
        model_revision=getattr(model.config, "_commit_hash", None) or "local",
        dataset=dataset.dataset_id,
        dataset_revision=dataset.revision,
        split=dataset.split,
        num_images=len(found.levels),
        num_classes=num_classes,
        prompt_hash=prompt_hash(model.class_names, model.templates),
        attack=settings.attack.name(num_classes),
        attack_parameters=_attack_parameters(settings, threats, num_classes),
        attack_target=settings.target,
        attack_resolution=resolution,
        norm=settings.norm,
        clean_accuracy=share[0],
        robust_accuracy={radius: list(left.values())[-1] for radius, left in after_each.items()},
        after_each=after_each,
        model_flags=found.flags,
        per_class=per_class,
        zero_gradient_share=found.zeros / found.total if found.total else 0.0,
        seed=settings.seed,
        precision=settings.precision_with(model),
        library_versions=library_versions(),
        hardware=hardware(),
        defence=evaluation.about_defence(found),
        templates=tuple(model.templates),
    )
    warning = blind_warning([report])
    if warning is not None and evaluation.rank == 0:
        logger.warning("%s", warning)
    return report


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
    with model.prepared_for(dataset), without_gradients(model), model.fixed_class_embeds():
        victim = Victim(lambda pixels: model(pixel_values=pixels).logits, seed=settings.seed)
        right = ~misclassified(victim.logits_fn, images, labels)
        adv, stands = run_member(member, victim, images, labels, threat_model)
        order = (right & ~stands).int().sort(descending=True, stable=True).indices[:count]
        with torch.no_grad():
            was, became = (victim.logits_fn(pixels[order]).argmax(dim=1) for pixels in (images, adv))
    truth, was_named, named = (
        [model.class_names[i] for i in index.tolist()] for index in (labels[order], was, became)
    )
    return images[order].cpu(), adv[order].cpu(), truth, was_named, named


@dataclass
class _Found:
    """What is known so far: of each image its label and, for each judge, how many stages it withstood before the first
    that it didn't; sums over gradients and over what the defence did.
    """

    levels: dict[int, tuple[int, ...]] = field(default_factory=dict)  # (label, one level per judge)
    done: dict[int, int] = field(default_factory=dict)  # image to the number of stages it went through
    flags: dict[str, bool] = field(default_factory=dict)
    zeros: int = 0
    total: int = 0
    fallbacks: int = 0
    seconds: float = 0.0

    def accuracy(self, judge: int, stage: int) -> float:
        """Share of images that a judge got right in all stages up to this one (0: clean), as far as they went."""
        right = sum(row[1 + judge] > stage or row[1 + judge] == self.done[index] for index, row in self.levels.items())
        return right / len(self.levels)

    def add(self, line: dict[str, Any]) -> None:
        """One finished batch: `stage`, `rows` of (index, label, whether it stands for each judge), `zeros`, `total`,
        and of a defence `fallbacks` and `seconds`.
        """
        if any(self.done.get(row[0], 0) != line["stage"] for row in line["rows"]):
            return  # it is known already, or what came before it is lost
        for index, label, *stands in line["rows"]:
            before = self.levels.get(index, (label, *[0] * len(stands)))[1:]
            after = (n + (right and n == line["stage"]) for n, right in zip(before, stands, strict=True))
            self.levels[index] = (label, *after)
            self.done[index] = line["stage"] + 1
        self.zeros += line["zeros"]
        self.total += line["total"]
        self.fallbacks += line.get("fallbacks", 0)
        self.seconds += line.get("seconds", 0.0) if line["stage"] == 0 else 0.0


class _Evaluation:
    """Runs the stages on this process's images, and writes down each finished batch."""

    defence: Defence | None = None
    attacks_the_fallen = False

    def __init__(
        self,
        model: CLIPForZeroShotClassification,
        dataset: ImageDataset,
        settings: EvaluationSettings,
        stages: Sequence[_Stage],
        processes: Processes,
        state_dir: str | Path | None,
        progress: bool,
    ):
        self.model, self.dataset, self.settings, self.stages = model, dataset, settings, stages
        self.processes = processes
        self.rank: int = processes.process_index if processes else 0
        self.world: int = processes.num_processes if processes else 1
        self.show = progress and self.rank == 0
        self.found, self.blindness = _Found(), Blindness()
        self.new_lines: list[dict[str, Any]] = []
        self.old_lines: list[dict[str, Any]] = []
        self.file = None
        if state_dir is not None:
            fingerprint = _fingerprint(model, dataset, settings)
            if self.defence is not None:
                fingerprint["defence"] = _defence_fingerprint(self.defence, settings, self.world)
            _check_same_everywhere(fingerprint, processes)
            own = together(lambda: _read_state(Path(state_dir), fingerprint), processes)
            read = [line for lines in everyone(own, processes) for line in lines]  # folders may differ by machine
            self.old_lines = sorted(read, key=lambda line: line["stage"])
            for line in self.old_lines:
                self.found.add(line)
            with disk_errors(state_dir, "state_dir"):
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
                left = [i for i in own if self.attacks_the_fallen or self.found.levels[i][1] >= number]
                self.run_stage(number, str(stage), left, self.attack(stage))
        finally:
            if self.file is not None:
                with suppress(OSError):  # each line was flushed
                    self.file.close()

    def check_model(self, own: range) -> None:
        """Look for random numbers and for optimisation inside the classifier, on a few images."""
        if self.settings.precision == "fast" and self.model.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"precision='fast' takes gradients in bfloat16 and confirms them in float32, and the model is in "
                f"{str(self.model.dtype).removeprefix('torch.')}: load it with dtype=torch.float32, or use 'fp32'."
            )
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
            labels = checked_labels(labels, len(images), len(self.model.class_names))
            self.blindness.reset()
            try:
                stands = judge(images, labels).int().tolist()
            except FloatingPointError as error:
                raise FloatingPointError(f"{title}: {error}") from error
            index = todo[place : place + len(labels)]
            place += len(labels)
            noted = [(i, label, *each) for i, label, each in zip(index, labels.tolist(), stands, strict=True)]
            blind = {"zeros": self.blindness.zeros, "total": self.blindness.total}
            self.note({"stage": number, "rows": noted, **blind, **self.more()})

    def more(self) -> dict[str, Any]:
        """What else is noted of the batch just judged."""
        return {}

    def note(self, line: dict[str, Any]) -> None:
        self.found.add(line)
        self.new_lines.append(line)
        if self.file is not None:
            with disk_errors(self.file.name, "state"):
                self.file.write(signed(json.dumps(line)))
                self.file.flush()

    def clean(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        return ~misclassified(self.logits, images_BCHW, labels_B)[:, None]

    def attack(self, stage: _Stage) -> Judge:
        fast: LogitsFn | None = self.fast_logits if self.settings.precision == "fast" else None
        deterministic = not self.found.flags["randomised"]
        victim = Victim(self.logits, fast, deterministic, self.settings.seed, self.blindness)
        return lambda images, labels: run_member(stage.member, victim, images, labels, stage.threat_model)[1][:, None]

    def about_defence(self, found: _Found) -> dict[str, Any] | None:
        """What the report says of the defence."""
        return None

    def gathered(self) -> _Found:
        """What all processes found together."""
        if self.world == 1:
            return self.found
        found = _Found(flags=self.found.flags)
        new = [line for lines in everyone(self.new_lines, self.processes) for line in lines]
        for line in [*self.old_lines, *sorted(new, key=lambda line: line["stage"])]:  # as each process went on
            found.add(line)
        for flags in everyone(self.found.flags, self.processes):
            found.flags = {name: found.flags[name] or flags[name] for name in flags}
        return found


class _DefendedEvaluation(_Evaluation):
    """Judges by a defence and the controls; attacks what the target says."""

    defence: Defence

    def __init__(self, *args: Any, defence: Defence):
        from ..defences.ensemble import Ensemble

        self.defence = defence
        super().__init__(*args)
        self.attacks_the_fallen = self.settings.target == "defence_blind"
        self.attackers_seed = self.settings.seed + ATTACKERS_SEED
        self.fallbacks, self.seconds, self.tuned = 0, 0.0, 0
        plain = _with_random_prompts(self.model)
        ensemble = Ensemble(memory_budget=defence.memory_budget)
        self.controls: dict[str, LogitsFn | None] = {  # None: the defence itself
            "static prompts": self.logits,
            "random prompts": lambda pixels: plain(pixel_values=pixels).logits,
            "ensemble-64": None
            if defence == ensemble
            else lambda pixels: ensemble.predict(self.model, pixels, seed=self.settings.seed).logits,
        }
        assert tuple(self.controls) == CONTROLS

    def run(self) -> None:
        with self.defence.prepared(self.model):
            super().run()

    def check_model(self, own: range) -> None:
        """Look at the classifier as ever; the defence must take a few images, and leave what it tuned."""
        super().check_model(own)
        few = [self.dataset[i] for i in own[:4]] or [self.dataset[0]]
        adaptation = self.predict(collate_images(few)["pixel_values"].to(self.model.device))
        self.tuned = sum(value[0].numel() for value in adaptation.prompts.values())

    def predict(self, images_BCHW: Tensor) -> Prediction:
        return self.defence.predict(self.model, images_BCHW, seed=self.settings.seed)

    def defended(self, images_BCHW: Tensor) -> Tensor:
        return self.predict(images_BCHW).logits

    def verdicts(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Whether the defence, and each control, is right, (B, judges)."""
        start = _now(images_BCHW.device)
        adaptation = self.predict(images_BCHW)
        self.seconds = _now(images_BCHW.device) - start
        self.fallbacks = 0 if adaptation.fell_back is None else int(adaptation.fell_back.sum())
        check_logits(adaptation.logits, self.defence.name)
        own_B = adaptation.logits.argmax(dim=1) == labels_B
        others = (own_B if f is None else ~misclassified(f, images_BCHW, labels_B) for f in self.controls.values())
        return torch.stack([own_B, *others], dim=1)

    def more(self) -> dict[str, Any]:
        return {"fallbacks": self.fallbacks, "seconds": self.seconds}

    def clean(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        return self.verdicts(images_BCHW, labels_B)

    def attack(self, stage: _Stage) -> Judge:
        def judge(images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
            parts = [slice(None)]
            if stage.target == "transfer_from_adapted" and not isinstance(self.settings.attack, PGD | AdaptiveWorst):
                parts = [slice(i, i + 1) for i in range(len(labels_B))]  # attacks let go of rows, prompts don't follow
            found = []
            for rows in parts:
                victim = self.victim(stage.target, images_BCHW[rows])
                found.append(
                    find_adversarial(stage.member, victim, images_BCHW[rows], labels_B[rows], stage.threat_model)
                )
            return self.verdicts(torch.cat(found), labels_B)

        return judge

    def victim(self, target: Target, images_BCHW: Tensor) -> Victim:
        """What an attack on these images sees."""
        queried = Victim(self.defended, seed=self.settings.seed, on_gradient=self.blindness)
        if target == "query":
            return queried
        if target in ("adaptive", "bpda"):
            return replace(queried, fast_logits_fn=self.cheaper(self.mean_logits(target)))
        logits_fn = self.logits if target == "defence_blind" else self.adapted_to(images_BCHW)
        fast = self.cheaper(logits_fn) if self.settings.precision == "fast" else None
        deterministic = not self.found.flags["randomised"]
        return replace(queried, logits_fn=logits_fn, fast_logits_fn=fast, deterministic=deterministic, to_the_end=True)

    def mean_logits(self, target: Target) -> LogitsFn:
        """The defence's logits averaged over `eot` draws, with a graph."""
        path: GradientPath = "through" if target == "adaptive" else "identity"
        seeds = [self.attackers_seed + draw for draw in range(self.settings.eot)]

        def logits_fn(images_BCHW: Tensor) -> Tensor:
            draws = [self.defence.predict(self.model, images_BCHW, seed=seed, path=path).logits for seed in seeds]
            return torch.stack(draws).mean(dim=0)

        return logits_fn

    def adapted_to(self, images_BCHW: Tensor) -> LogitsFn:
        """The classifier as the defence adapts it to these images, with what it found held fixed."""
        adaptation = self.defence.predict(self.model, images_BCHW, seed=self.attackers_seed)
        counter = 0 if adaptation.images is None else adaptation.images - images_BCHW

        def logits_fn(pixels_BCHW: Tensor) -> Tensor:
            moved = pixels_BCHW if adaptation.images is None else (pixels_BCHW + counter).clamp(0, 1)
            return with_prompts(self.model, adaptation.prompts, lambda: self.logits(moved))

        return logits_fn

    def cheaper(self, logits_fn: LogitsFn) -> LogitsFn:
        """In bfloat16 if the settings say so."""
        if self.settings.precision != "fast":
            return logits_fn

        def fast(images_BCHW: Tensor) -> Tensor:
            with torch.autocast(images_BCHW.device.type, torch.bfloat16):
                return logits_fn(images_BCHW)

        return fast

    def about_defence(self, found: _Found) -> dict[str, Any]:
        last = {stage.threat_model.eps: number for number, stage in enumerate(self.stages, start=1)}
        return {
            "name": self.defence.name,
            "parameters": self.defence.parameters(),
            "traits": asdict(self.defence.traits),
            "tuned": self.tuned,
            "controls": {
                name: {
                    "clean": found.accuracy(judge, 0),
                    "robust": {radius: found.accuracy(judge, number) for radius, number in last.items()},
                }
                for judge, name in enumerate(self.controls, start=1)
            },
            "fallbacks": found.fallbacks,
            "ms_per_image": 1000 * found.seconds / len(found.levels),
        }


def _check_target(settings: EvaluationSettings, defence: Defence | None) -> None:
    """Raise ValueError unless what is attacked goes with what is judged."""
    if settings.eot > 1 and settings.target not in THROUGH:
        raise ValueError(
            f"eot={settings.eot!r} averages gradients through a defence, which target={settings.target!r} takes none "
            f"of; choose one of {', '.join(THROUGH)}, or leave it at 1."
        )
    if defence is None:
        if settings.target != "static":
            raise ValueError(
                f"target={settings.target!r} attacks a test-time defence, and there is none; give defence=..., or "
                "target='static'."
            )
        return
    if not isinstance(defence, Defence):
        raise TypeError(f"defence is a {type(defence).__name__}; give a test-time adapter such as TAPT(targets=...).")
    if settings.target == "static":
        raise ValueError(
            f"target='static' says nothing of {defence.name}: choose target='defence_blind', 'adaptive', 'bpda', "
            "'transfer_from_adapted' or 'adaptive_worst'."
        )
    if getattr(settings.attack, "eot", 1) > 1:
        raise ValueError(
            f"attack={settings.attack!r} would average equal gradients: the draws of a defence follow from seed and "
            "image. Set eot of EvaluationSettings."
        )


def _targets(settings: EvaluationSettings, num_classes: int) -> dict[str, Target]:
    """What each attack of the suite sees."""
    if isinstance(settings.attack, AdaptiveWorst):
        return settings.attack.targets(num_classes)
    names = settings.attack.members(num_classes)
    queries = settings.target in THROUGH  # Square asks the defence itself
    return {name: "query" if queries and name == "square" else settings.target for name in names}


def _attack_parameters(settings: EvaluationSettings, threats: Sequence[ThreatModel], num_classes: int) -> dict:
    """The suite's, with what the target makes of them."""
    own = settings.attack.parameters(threats, num_classes)
    if settings.target in THROUGH:
        own = {**own, "eot": settings.eot}
    elif settings.target != "static" and "counts" in own:
        own = {**own, "counts": "the iterate of highest loss"}
    return own


def _with_random_prompts(model: CLIPForZeroShotClassification) -> CLIPForZeroShotClassification:
    """A copy without adapters and with vision prompts, always the same: 2 in up to 9 layers each, N(0, 0.02^2)."""
    from peft import get_peft_model

    from ..prompts import ClipPromptConfig

    plain = copy.deepcopy(model)
    for name, module in reversed(list(plain.named_modules())):  # the innermost first
        base = getattr(module, "base_layer", getattr(module, "original_module", None))
        if base is not None:
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, base)
    plain.__dict__.pop("peft_config", None)
    depth = min(9, plain.config.vision_config.num_hidden_layers)
    devices = [plain.device] if plain.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        prompted = get_peft_model(plain, ClipPromptConfig(design="V", num_vision_tokens=2, vision_depth=depth))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prompted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return plain.requires_grad_(False).eval()


def _now(device: torch.device) -> float:
    """Seconds, when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _defence_fingerprint(defence: Defence, settings: EvaluationSettings, world: int) -> str:
    """What must be the same of a defence: settings, statistics, and what the attacks see of it."""
    text = f"{defence.name} {defence.parameters()} {_digest(_tensors(defence))} {settings.target} eot {settings.eot}"
    return text if defence.traits.episodic else f"{text} batches of {settings.batch_size} on {world}"


def _tensors(value: Any) -> list[Tensor]:
    """All tensors inside a setting, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _fingerprint(
    model: CLIPForZeroShotClassification, dataset: ImageDataset, settings: EvaluationSettings
) -> dict[str, str]:
    """What must be the same for a state to be of use: weights, configuration and classes, images, attacks.

    Nothing that is computed by the model, since its rounding differs between devices and numbers of threads.
    """
    tensors = [*model.parameters(), model.class_token_ids, model.image_mean, model.image_std]
    adapters = [
        (layer.active_adapters, layer.disable_adapters, getattr(layer, "scaling", None))
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    text = f"{_without_places(model.config.to_dict())} {adapters}"
    threats, num_classes = settings.threat_models(), len(model.class_names)
    own = library_versions()["hf_robust_clip"]  # another version may attack otherwise
    attack = own, settings.attack.name(num_classes), settings.attack.parameters(threats, num_classes)
    return {
        "model": f"{_digest(tensors)} {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "classes": prompt_hash(model.class_names, model.templates),
        "dataset": f"{dataset.dataset_id} {dataset.revision} {dataset.split}, {len(dataset)} images like "
        f"{dataset_digest(dataset, every=True)}",
        "attack": f"{attack} {settings.norm} {[t.eps for t in threats]} seed {settings.seed} {settings.precision}",
    }


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, sorted, without what says where it was loaded from, how it was stored and by which version."""
    passing = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures")
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in sorted(config.items())
        if name not in passing
    }


def _digest(tensors: Sequence[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def _check_same_everywhere(fingerprint: dict[str, str], processes: Processes) -> None:
    """Raise ValueError on every process unless all of them evaluate the same."""
    first, *others = everyone(fingerprint, processes)
    for rank, other in enumerate(others, start=1):
        if wrong := [key for key in first if first[key] != other.get(key)]:
            own = f"{other.get(wrong[0])!r}, not {first[wrong[0]]!r}"
            raise ValueError(f"process {rank} was started with another {wrong[0]} than process 0: {own}.")


def _read_state(folder: Path, fingerprint: dict[str, str]) -> list[dict[str, Any]]:
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
                raise ValueError(
                    f"{file}, line {number} is damaged or of another format; delete {what}, and its images are "
                    "evaluated again."
                ) from error
            if number > 1:
                lines.append(line)
            elif other := [key for key in fingerprint if line.get(key) != fingerprint[key]]:
                raise ValueError(
                    f"{file} is the state of another evaluation: its {other[0]} is {line.get(other[0])!r}, now it "
                    f"is {fingerprint[other[0]]!r}. Delete the folder, or choose another."
                )
    return lines


def _open_state(folder: Path, rank: int, fingerprint: dict[str, str]):
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
