"""Clean and robust accuracy of a classifier, or of one behind a test-time defence, over datasets, radii, attacks and
processes, resumable.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..attacks.suites import find_adversarial, is_optimising, is_randomised, plain_victim, run_member
from ..checks import Blindness, check_logits, checked_labels
from ..defences.base import Defence, Traits
from ..defences.undefended import Undefended
from ..environment import tell_float32
from ..modeling import ZeroShotClassifier, without_gradients
from ..names import check_shown
from ..prediction import Prediction
from ..processes import Processes, everyone, together
from ..report import RobustnessReport, blind_warning, choose_examples
from ..secrets import refuse_tokens
from ..zero_shot_data.loading import ImageDataset, collate_images
from .adversarial import AdversarialLog, SaveAdversarial, check_saving
from .attack_views import Scene
from .controls import controls_of
from .detection import Alarm, alarms_of
from .gradients import blind_views
from .settings import EvaluationSettings, Stage
from .state import Found, State, fingerprint_of
from .summary import Summary

logger = logging.getLogger(__name__)
REMARKED = 16  # images by which a defence says what must be said of it


def evaluate_robustness(
    model: ZeroShotClassifier,
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
    save: SaveAdversarial | None = None,
) -> RobustnessReport:
    """Accuracy on clean images and under attack at every radius: white box on the classifier, or with a defence as
    `settings.view` says.

    Stages in their order: clean, then every attack of the suite at the smallest radius, then at the next. An image
    that falls leaves for good (a smaller ball lies inside the larger); those left are batched anew for the next stage.
    So an image counts as robust at a radius if it withstood every attack at this and every smaller radius. Runs in
    float32 without autocast (see `EvaluationSettings.precision`). Parameters are frozen meanwhile: gradients are taken
    by the pixels alone. The model comes back as it was: mode, gradients, classes, input size.

    An image stands if `defence.predict(model, images, seed=settings.seed)` is right (`Prediction.right`): of a class
    that is the label, and of no alarm; an attacked image that raises one withstood. Gradients are taken with other
    seeds: an attack knows the defence, not its draws. With a defence, three controls see every image that it sees,
    clean and adversarial: the classifier as it is (`"static prompts"`), without adapters and with random vision
    prompts (`"random prompts"`: 2 tokens in up to 9 layers, N(0, 0.02^2), fixed seed), and the mean over 64 random
    views (`"ensemble-64"`). A control counts an image as robust if it was right on the clean image and on all that was
    made of it up to the radius; what the defence lost is not attacked any further, except by a blind attack.

    A defence that isn't episodic meets the images as a stream, on one process: every stage is one of its own, from
    `defence.start`, of all images in their order, those that fell too; each is attacked with the state before it, and
    the state goes on by the verdict's prediction, never by what attacks asked. A stage that was cut short goes on
    where its state was written down (`StreamState`), and else begins anew.

    A defence whose images are coupled meets the same batches at every stage, on one process: those that fell stay in
    theirs, and each batch is attacked as a whole to the end, by attacks that let go of no image (PGD). Its figures
    depend on the batch size, which the report says.

    Args:
        model: with its classes set, in label order of `dataset`.
        dataset: pictures with labels. Pictures smaller than the model's input are enlarged inside the model, after the
            attack.
        settings: radii, attacks and what they see.
        name: what tables call the model.
        task: what tables call the images.
        model_id: Hub id or folder, for the report.
        processes: splits the images over its processes; each of them gets the whole report.
        state_dir: a folder for what is done already. A run that was killed goes on from it, on any number of
            processes, without repeating finished images, and ends with the same report.
        progress: show a bar for each stage on the main process.
        defence: what predicts in the model's place; None is `Undefended()`.
        save: where to save the adversarial pictures. They are written down with the state, in the folder of which all
            processes must see one another's files, and put together at the end; the report gets a figure of them as
            they are saved, `robust_accuracy_as_uint8` say.

    Where more than 5 % of the input gradients are zero, a warning says that the attack was partly blind. A view
    through the defence whose gradients are zero on some of four images is warned of, and remarked in the report, as is
    each of several attacks with more than 5 % of zeros. One that gets no gradient at all is refused (ValueError).

    Raises ValueError for an empty or an augmented dataset, one whose classes aren't the model's in their order, a
    single class, labels beyond the classes, images outside [0, 1] or of wrong size, a state of another model, dataset,
    defence or setting, a view of a defence without one, a defence without such a view, with a model that lacks what it
    needs, with a stream state or coupled images on several processes, with coupled images under an attack that lets go
    of some, or of other traits than it says, and `precision="fast"` for a model that isn't in float32; for an attack
    on pictures that are adversarial already; for `save` without a `state_dir` or an attack, of a dataset whose terms
    forbid it, of a defence that meets a stream or couples images, in a format that can't stay in the ball, and without
    a common folder of all processes. FloatingPointError for logits that are not finite, naming the stage.
    """
    defence = Undefended() if defence is None else defence
    if not isinstance(defence, Defence):
        raise TypeError(f"defence is a {type(defence).__name__}; give a test-time defence such as TAPT(targets=...).")
    if not isinstance(model, ZeroShotClassifier):
        model = model.get_base_model()  # of a PeftModel
    settings.check_against(defence)
    check_data(dataset, name=name, task=task, model_id=model_id)
    check_attacked(dataset, settings)
    if save is not None:
        if state_dir is None or not settings.attack.has_radii:
            raise ValueError(f"save={save!r} needs {'an attack' if state_dir else 'a state_dir'}.")
        check_saving(defence, dataset.dataset_id)
    if len(model.class_names) == 1:
        raise ValueError(f"there is one class, {model.class_names[0]!r}: nothing can go wrong; set_classes more.")
    with model.prepared_for(dataset), without_gradients(model), model.fixed_class_embeds():
        evaluation = _Evaluation(model, dataset, settings, defence, processes, state_dir, progress, save)
        summary = evaluation.summary(evaluation.run())
        report = summary.report(name, task, model_id)
        if save is not None:
            first, folder = evaluation.rank == 0, evaluation.state.folder
            together(lambda: summary.save_pictures(save, folder, report) if first else None, processes)
    warning = blind_warning([report])
    if warning is not None and evaluation.rank == 0:
        logger.warning("%s", warning)
    return report


def adversarial_examples(
    model: ZeroShotClassifier, dataset: ImageDataset, settings: EvaluationSettings, count: int = 6
) -> tuple[Tensor, Tensor, list[str], list[str], list[str]]:
    """A few images, attacked at the largest radius by the first attack, for `report.plot_examples`.

    Returns (images (N, C, H, W), adversarial images, true names, names predicted before, names predicted after), at
    most `count` of the first 64 images of the dataset: some that fell and some that withstood.
    """
    examples = [dataset[i] for i in range(min(64, len(dataset)))]
    batch = collate_images(examples)
    images, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
    threat_model, member = settings.threat_models()[-1], settings.attack.members(len(model.class_names))[0]
    with model.prepared_for(dataset), without_gradients(model), model.fixed_class_embeds():
        model.check_pixels(images, values=True)
        victim = replace(plain_victim(lambda pixels: model(pixel_values=pixels).logits), seed=settings.seed)
        with torch.no_grad():
            clean = victim.predict(images)
        right = clean.right(checked_labels(labels, *clean.logits.shape))
        adv, stands = run_member(member, victim, images, labels, threat_model)
        order = choose_examples(right.tolist(), stands.tolist(), count)
        with torch.no_grad():
            was, became = (victim.logits(pixels[order]).argmax(dim=1) for pixels in (images, adv))
    truth, was_named, named = (
        [model.class_names[i] for i in index.tolist()] for index in (labels[order], was, became)
    )
    return images[order].cpu(), adv[order].cpu(), truth, was_named, named


def check_data(dataset: ImageDataset, **told: str) -> None:
    """Raise TypeError or ValueError for images that can't be evaluated, and for names that a report can't show."""
    lacking = [name for name in ("dataset_id", "revision", "split") if not hasattr(dataset, name)]
    if lacking:
        raise TypeError(f"dataset is a {type(dataset).__name__} without {lacking[0]}; give an ImageDataset.")
    told |= {f"dataset.{what}": getattr(dataset, what) for what in ("dataset_id", "revision", "split")}
    for what, text in told.items():
        check_shown(text, what)
    refuse_tokens(told, "report")
    if len(dataset) == 0:
        raise ValueError("dataset is empty; nothing to evaluate.")
    if getattr(dataset, "augment", False):
        raise ValueError("dataset.augment=True gives whole pictures; evaluate replace(data, augment=False).")


def check_attacked(dataset: ImageDataset, settings: EvaluationSettings) -> None:
    """Raise ValueError for an attack on pictures that are adversarial already: its ball would lie around them."""
    if getattr(dataset, "attacked", False) and settings.attack.has_radii:
        raise ValueError(
            f"attack={settings.attack.name(len(dataset.class_names))!r}: the pictures of {dataset.dataset_id!r} are "
            "adversarial already; take the attack none, or the clean pictures."
        )


class _Evaluation:
    """Runs the stages on this process's images, and writes down each finished batch."""

    def __init__(
        self,
        model: ZeroShotClassifier,
        dataset: ImageDataset,
        settings: EvaluationSettings,
        defence: Defence,
        processes: Processes,
        state_dir: str | Path | None,
        progress: bool,
        save: SaveAdversarial | None = None,
    ):
        self.model, self.dataset, self.settings, self.defence = model, dataset, settings, defence
        self.processes = processes
        self.rank: int = processes.process_index if processes else 0
        self.world: int = processes.num_processes if processes else 1
        self.in_order = not defence.traits.episodic or defence.traits.couples_images
        if self.world > 1 and self.in_order:
            raise ValueError(f"{defence.name} meets images in one order: use 1, not {self.world} processes.")
        self.stages = settings.stages(len(model.class_names))
        self.texts = model.class_token_ids
        self.show = progress and self.rank == 0
        self.flags: dict[str, bool] = {}
        self.remarks: tuple[str, ...] = ()
        self.tuned = 0
        self.detects = False
        pixels, fingerprint = None if save is None else save.pixels, {}
        if state_dir is not None or self.world > 1:  # several may lie on machines whose files differ
            fingerprint = together(lambda: fingerprint_of(model, dataset, settings, defence, pixels), processes)
        self.state = State(state_dir, fingerprint, self.rank, processes)
        self.saving = save
        self.log: AdversarialLog | None = None
        self.controls = controls_of(defence, model, settings.seed)
        self.blindness = Blindness()
        self.scene = Scene(
            defence,
            model,
            seed=settings.seed,
            eot=settings.eot,
            fast=settings.is_fast(model.device),
            on_gradient=self.blindness,
        )

    def run(self) -> Found:
        """Every stage, on the images of this process that stand, or that its view attacks all the same; what all
        processes found.
        """
        own = range(self.rank, len(self.dataset), self.world)
        try:
            with self.defence.prepared(self.model):
                self.check_model(own)
                self.run_stage(0, None, list(own))
                for number, stage in enumerate(self.stages, start=1):
                    every = self.settings.view.attacks_the_fallen or self.in_order
                    left = [i for i in own if every or self.state.found.levels[i][1] >= number]
                    self.run_stage(number, stage, left)
        finally:
            self.state.close()
        return self.state.gathered()

    def summary(self, found: Found) -> Summary:
        """What a report is made of; every process must ask for it."""
        everywhere = everyone(self.flags, self.processes)
        return Summary(
            model=self.model,
            dataset=self.dataset,
            settings=self.settings,
            defence=self.defence,
            stages=self.stages,
            found=found,
            controls=list(self.controls),
            flags={flag: any(each[flag] for each in everywhere) for flag in self.flags},
            remarks=everyone(self.remarks, self.processes)[0],
            tuned=self.tuned,
            saved_as=None if self.saving is None else self.saving.pixels,
        )

    def check_model(self, own: range) -> None:
        """Look for random numbers and for optimisation inside the classifier, on a few images; the defence must take
        them, and leaves what it tuned.
        """
        if self.settings.precision == "fast" and self.model.dtype != torch.float32:  # autocast leaves float64 alone
            raise ValueError(f"precision='fast' is for models in float32, this one is in {self.model.dtype}.")
        if self.settings.precision == "fast" and not self.scene.fast and self.rank == 0:
            tell_float32("precision='fast'")
        few = [self.dataset[i] for i in own[:4]] or [self.dataset[0]]
        images_BCHW = collate_images(few)["pixel_values"].to(self.model.device)
        self.model.check_pixels(images_BCHW, values=True)
        self.flags = {
            "randomised": is_randomised(self.scene.logits, images_BCHW),
            "optimising": is_optimising(self.scene.logits, images_BCHW),
        }
        self.scene = replace(self.scene, randomised=self.flags["randomised"])
        if self.rank == 0 and any(self.flags.values()):
            what = " and ".join(name for name, found in self.flags.items() if found)
            logger.warning(
                "the classifier looks %s: attacks on the plain classifier overrate it. Attack it with "
                "AutoAttack.rand(), or through its defence.",
                what,
            )
        if self.defence.defends:
            self.check_traits(images_BCHW)
            first_BCHW = self.first_images()
            found = self.defence.predict(self.model, images_BCHW, seed=self.settings.seed)
            self.tuned = sum(value[0].numel() for value in found.prompts.values())
            self.remarks = self.defence.remarks(self.model, first_BCHW)
            self.detects = found.flagged is not None
            if self.defence.traits.couples_images:
                size = min(self.settings.batch_size, len(self.dataset))
                self.remarks += (f"its figures are those of batches of {size}, whose images change one another",)
        self.stages = [stage for stage in self.stages if self.detects or not stage.member.of_detectors]
        if not self.stages and self.settings.attack.has_radii:
            raise ValueError(f"attack={self.settings.attack!r} attacks detectors alone; nothing here flags images.")
        if self.saving is not None:
            self.state.check_shared()
            balls = [stage.threat_model for stage in self.stages]
            self.log = log = AdversarialLog(self.state.folder, self.saving.pixels, balls)
            together(lambda: log.check(images_BCHW), self.processes)
        if self.detects and getattr(self.dataset, "attacked", False):
            told = f"{self.defence.name} flags images, and of attacked ones an alarm is right"
            raise ValueError(f"{told}: saved pictures are not measured again; read their columns.")
        if self.detects and self.defence.traits.couples_images:
            raise ValueError(f"{self.defence.name} flags images by what is beside them: no attack here knows of that.")
        if self.defence.defends:
            by_gradients = [stage.view for stage in self.stages if not stage.member.by_queries]
            blind = blind_views(by_gradients, self.scene, first_BCHW[:4])
            self.remarks += blind
            for remark in blind if self.rank == 0 else ():
                logger.warning("%s.", remark)

    def first_images(self) -> Tensor:
        """A few images, on every process the same."""
        batch = collate_images([self.dataset[i] for i in range(min(REMARKED, len(self.dataset)))])
        images_BCHW: Tensor = batch["pixel_values"].to(self.model.device)
        self.model.check_pixels(images_BCHW, values=True)
        return images_BCHW

    def check_traits(self, images_BCHW: Tensor) -> None:
        """Raise ValueError for a defence that draws or tunes without saying so: attacks would be chosen wrongly; and
        for one that does neither and whose images change one another: figures would depend on how they are batched.
        """
        seeds = itertools.count(self.settings.seed)

        def logits(pixels_BCHW: Tensor) -> Tensor:
            return self.defence.predict(self.model, pixels_BCHW, seed=next(seeds)).logits

        traits, looks = self.defence.traits, {"randomised": is_randomised, "optimising": is_optimising}
        for name, is_so in looks.items():
            if not getattr(traits, name) and is_so(logits, images_BCHW):
                raise ValueError(f"{self.defence.name} is {name}, and its traits don't say so: Traits({name}=True).")
        if traits == Traits() and self.model.dtype in (torch.float32, torch.float64):
            whole, alone = (self.scene.verdict(pixels).logits[0] for pixels in (images_BCHW, images_BCHW[:1]))
            if (whole - alone).norm() > 1e-3 * alone.norm():
                raise ValueError(f"{self.defence.name} couples the images of a batch: Traits(couples_images=True).")

    def run_stage(self, number: int, stage: Stage | None, rows: list[int]) -> None:
        """Judge the rows that have not been through this stage; a stream begins anew."""
        done = self.state.found.done
        todo = [i for i in rows if done.get(i, 0) == number]
        if todo and not self.defence.traits.episodic:
            todo = self.begin_stream(number, rows, todo)
        title = "clean" if stage is None else str(stage)
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
            self.model.check_pixels(images, values=True)
            index = todo[place : place + len(labels)]
            place += len(labels)
            try:
                line, judged = self.judge(stage, images, labels)
                if self.log is not None:
                    line["saved"] = self.kept(number, index, images, labels, *judged, line["stands"])
            except FloatingPointError as error:
                raise FloatingPointError(f"{title}: {error}") from error
            stands, alarms = line.pop("stands"), line.pop("alarms", None)
            if alarms is not None:
                line["alarms"] = [(i, *each) for i, each in zip(index, alarms, strict=True)]
            noted = [(i, label, *each) for i, label, each in zip(index, labels.tolist(), stands, strict=True)]
            self.state.note({"stage": number, "rows": noted, **line}, self.scene.state)

    def begin_stream(self, number: int, rows: list[int], todo: list[int]) -> list[int]:
        """What of a stage is to be judged, with the state that the first of it meets: the rows that are left, where
        the state after the others was written down, else all.
        """
        first, past = self.defence.start(self.model), rows[: len(rows) - len(todo)]
        kept = self.state.stream_after(number, past[-1], first) if past and past + todo == rows else None
        self.scene = replace(self.scene, state=first if kept is None else kept)
        return rows if kept is None else todo

    def kept(
        self,
        number: int,
        index: list[int],
        images_BCHW: Tensor,
        labels_B: Tensor,
        adv_BCHW: Tensor,
        prediction: Prediction,
        stands: list[list[int]],
    ) -> dict[str, Any]:
        """The pictures of a batch that are saved: of those that stood before, what fell, and after the last attack at
        a radius the others too; of clean ones what is wrong.
        """
        assert self.log is not None
        later = [stage.threat_model for stage in self.stages[number:]]
        last = number > 0 and self.stages[number - 1].threat_model not in later
        levels = self.state.found.levels
        stood = [number == 0 or levels[i][1] >= number for i in index]
        rows = [row for row, before in enumerate(stood) if before and (last or not stands[row][0])]
        return self.log.keep(
            number, index, images_BCHW, labels_B, adv_BCHW, prediction, rows, lambda pixels: self.scene.verdict(pixels)
        )

    def judge(
        self, stage: Stage | None, images_BCHW: Tensor, labels_B: Tensor
    ) -> tuple[dict[str, Any], tuple[Tensor, Prediction]]:
        """A batch as the stage attacks it (None: as it is): `stands`, whether the defence and each control is right,
        (B, judges), and what is counted; and the last images that were judged, the whole batch but in a stream.
        """
        self.blindness.reset()
        stands, fallbacks, seconds = [], 0, 0.0
        alarms: list[Alarm] = []
        for rows in _parts(len(labels_B), one_by_one=not self.defence.traits.episodic):
            images, labels = images_BCHW[rows], labels_B[rows]
            if stage is not None:
                images = self.attacked(stage, images, labels)
            start = _now(images.device)
            prediction = self.scene.verdict(images)
            seconds += _now(images.device) - start
            if self.defence.defends:
                check_logits(prediction.logits, self.defence.name)
            if self.model.class_token_ids is not self.texts:
                raise ValueError(f"{self.defence.name} changed the classifier's classes; it must put them back.")
            stands.append(self.verdicts(prediction, images, labels, attacked=stage is not None))
            alarms += alarms_of(prediction, labels)
            fallbacks += 0 if prediction.fell_back is None else int(prediction.fell_back.sum())
            self.scene = replace(self.scene, state=prediction.state)  # the one place where a stream goes on
        line = {
            "stands": torch.cat(stands).int().tolist(),
            "zeros": self.blindness.zeros,
            "total": self.blindness.total,
        } | ({"alarms": alarms} if alarms else {})
        line |= {"fallbacks": fallbacks, "seconds": seconds} if self.defence.defends else {}
        return line, (images, prediction)

    def verdicts(self, prediction: Prediction, images_BCHW: Tensor, labels_B: Tensor, attacked: bool) -> Tensor:
        """Whether the defence, and each control, is right, (B, judges)."""
        found = [prediction.right(labels_B, attacked=attacked)]
        for control in self.controls.values():
            with torch.no_grad():
                own = prediction if control is None else control(images_BCHW)
            found.append(own.right(labels_B, attacked=attacked))
        return torch.stack(found, dim=1)

    def attacked(self, stage: Stage, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """The images as an attack leaves them: a victim that belongs to its images takes an attack that lets go of
        rows one by one.
        """
        found = []
        for rows in _parts(len(labels_B), one_by_one=stage.view.held_fixed and not stage.member.keeps_rows):
            victim = stage.view.victim(self.scene, images_BCHW[rows])
            found.append(find_adversarial(stage.member, victim, images_BCHW[rows], labels_B[rows], stage.threat_model))
        return torch.cat(found)


def _parts(count: int, one_by_one: bool) -> list[slice]:
    """Rows that are taken together."""
    return [slice(i, i + 1) for i in range(count)] if one_by_one else [slice(None)]


def _now(device: torch.device) -> float:
    """Seconds, when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
