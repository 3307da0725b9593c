"""What attacked images at the head of a stream do to the clean images after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from tqdm import tqdm

from ..attacks.suites import find_adversarial
from ..checks import check_logits, check_whole, checked_labels
from ..defences.base import Defence
from ..modeling import ZeroShotClassifier, without_gradients
from ..report import Measurement, RobustnessReport
from ..threat_model import ThreatModel
from ..zero_shot_data.loading import ImageDataset, collate_images
from .attack_views import Scene
from .loop import check_data
from .settings import EvaluationSettings
from .state import State, fingerprint_of

POISONED, CLEAN_START = "after_poisoning", "after_clean"  # metrics, beside which stands their deviation


@dataclass(frozen=True)
class StreamRun:
    """One order of the images.

    Args:
        order: seed of the permutation.
        eps: radius of the attack on the first images, in units of [0, 1]; 0 where they were left clean.
        fell: how many of these were wrong in the end.
        right: how many of the clean images after them were right.
    """

    order: int
    eps: float
    fell: int
    right: int


@dataclass(frozen=True)
class StreamPoisoning:
    """Clean accuracy after attacked images, over several orders.

    Args:
        num_poisoned: how many images were attacked, m.
        num_clean: how many came after them, all of which are judged.
        runs: for each order one with clean first images, and one for each radius.
    """

    num_poisoned: int
    num_clean: int
    runs: tuple[StreamRun, ...]

    def accuracies(self, eps: float) -> list[float]:
        """On the images after the first m, by order: these attacked at a radius, or clean (0)."""
        return [run.right / self.num_clean for run in self.runs if run.eps == eps]

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Mean over orders and, of at least two, standard deviation (of a sample) of the accuracy after m clean images
        (`"after_clean"`) and, by radius, after m attacked ones (`"after_poisoning"`). The images that are judged are
        the same for each of these in one order, and others in another.
        """
        found = []
        for eps in sorted({run.eps for run in self.runs}):
            metric, own = POISONED if eps else CLEAN_START, self.accuracies(eps)
            found.append(Measurement(metric, mean(own), self.num_clean, eps, counted=False))
            if len(own) > 1:
                found.append(Measurement(f"{metric}_sd", stdev(own), self.num_clean, eps, counted=False))
        return tuple(found)

    def noted_in(self, report: RobustnessReport) -> RobustnessReport:
        """The report of the same evaluation with these figures, and every single run."""
        orders = list(dict.fromkeys(run.order for run in self.runs))
        about = {
            "num_poisoned": self.num_poisoned,
            "num_clean": self.num_clean,
            "orders": orders,
            "runs": [vars(run) for run in self.runs],
        }
        defence = {**(report.defence or {}), "stream_poisoning": about}
        return replace(report, measurements=(*report.measurements, *self.measurements), defence=defence)

    def __str__(self) -> str:
        return (
            f"after poisoning: accuracy on {self.num_clean} clean images after {self.num_poisoned} attacked ones; "
            f"after clean: after the same {self.num_poisoned}, not attacked; mean and standard deviation (sd) over "
            f"{len({run.order for run in self.runs})} random orders."
        )


def check_poisoning(defence: Defence | None, num_poisoned: int, permutations: int, count: int | None = None) -> None:
    """Raise ValueError for a defence without a stream state, which earlier images can't poison, for numbers out of
    range, and for so many attacked ones of `count` images that none is left.
    """
    check_whole(0, stream_poisoning=num_poisoned)
    check_whole(1, permutations=permutations)
    if defence is None or defence.traits.episodic:
        of = "no defence" if defence is None else f"{defence.name}, which is episodic"
        raise ValueError(f"stream_poisoning={num_poisoned!r} does nothing for {of}; it needs a stream state.")
    if count is not None and num_poisoned >= count:
        raise ValueError(f"stream_poisoning={num_poisoned!r} leaves none of {count} images to judge; attack fewer.")


def stream_poisoning(
    model: ZeroShotClassifier,
    dataset: ImageDataset,
    settings: EvaluationSettings,
    *,
    defence: Defence,
    num_poisoned: int,
    permutations: int = 5,
    state_dir: str | Path | None = None,
    progress: bool = False,
) -> StreamPoisoning:
    """Clean accuracy of a defence with a stream state after its first `num_poisoned` images were attacked.

    All images come in a random order (`torch.randperm`, seeds `settings.seed`, `settings.seed + 1`, ...). Each of the
    first is attacked at a radius with the state before it, by the attacks of the suite in turn until it falls, and
    joins the stream as they left it; all others are clean and are judged. Beside it stands the same order with its
    first images left clean: the difference is what the attack did to others. With `num_poisoned=0` the deviation is
    that of the order alone.

    Args:
        model, dataset, settings, defence: as in `evaluate_robustness`.
        permutations: how many orders.
        state_dir: a folder for finished runs: one that was killed goes on there.
        progress: show a bar.

    Raises ValueError as `check_poisoning` and `evaluate_robustness` do; FloatingPointError for logits that are not
    finite.
    """
    if not isinstance(model, ZeroShotClassifier):
        model = model.get_base_model()  # of a PeftModel
    check_poisoning(defence, num_poisoned, permutations, len(dataset))
    settings.check_against(defence)
    check_data(dataset)
    fingerprint = {}
    if state_dir is not None:
        first = f"of {num_poisoned} images"
        fingerprint = {**fingerprint_of(model, dataset, settings, defence), "poisoning": first}
    state = State(state_dir, fingerprint, 0, None)
    known = [StreamRun(**line["run"]) for line in state.old_lines]
    threats = [None, *(settings.threat_models() if num_poisoned else [])]
    orders = range(settings.seed, settings.seed + permutations)
    plan = [(order, threat) for order in orders for threat in threats]
    runs = []
    try:
        with model.prepared_for(dataset), without_gradients(model), defence.prepared(model):
            stream = _Stream(model, dataset, settings, defence)
            for order, threat in tqdm(plan, desc="orders", disable=not progress, leave=False):
                eps = 0.0 if threat is None else threat.eps
                run = next((own for own in known if (own.order, own.eps) == (order, eps)), None)
                if run is None:
                    run = StreamRun(order, eps, *stream.run(_permuted(len(dataset), order), num_poisoned, threat))
                    state.note({"stage": 0, "rows": [], "zeros": 0, "total": 0, "run": vars(run)})
                runs.append(run)
    finally:
        state.close()
    return StreamPoisoning(num_poisoned, len(dataset) - num_poisoned, tuple(runs))


def _permuted(count: int, order: int) -> list[int]:
    rows: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(order)).tolist()
    return rows


class _Stream:
    """A defence in front of a prepared classifier, that meets images in any order."""

    def __init__(
        self, model: ZeroShotClassifier, dataset: ImageDataset, settings: EvaluationSettings, defence: Defence
    ):
        self.dataset, self.settings, self.model = dataset, settings, model
        self.plan = settings.plan(len(model.class_names))
        fast = settings.is_fast(model.device)
        self.beginning = Scene(defence, model, None, settings.seed, settings.eot, fast)

    def run(self, rows: Sequence[int], num_first: int, threat: ThreatModel | None) -> tuple[int, int]:
        """How many of the first images were wrong in the end, and how many of the others were right."""
        scene = replace(self.beginning, state=self.beginning.defence.start(self.model))
        fell = right = 0
        for index in rows[:num_first]:
            images, labels = self.load([index])
            if threat is not None:
                images = self.attacked(scene, images, labels, threat)
            scene, stood = self.judged(scene, images, labels, attacked=threat is not None)
            fell += 1 - stood
        for start in range(num_first, len(rows), self.settings.batch_size):
            scene, count = self.judged(scene, *self.load(rows[start : start + self.settings.batch_size]))
            right += count
        return fell, right

    def load(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and labels, looked at."""
        batch = collate_images([self.dataset[i] for i in rows])
        images, labels = batch["pixel_values"].to(self.model.device), batch["labels"].to(self.model.device)
        self.model.check_pixels(images, values=True)
        return images, checked_labels(labels, len(images), len(self.model.class_names))

    def attacked(self, scene: Scene, images_BCHW: Tensor, labels_B: Tensor, threat: ThreatModel) -> Tensor:
        """One image as the first attack that breaks it leaves it, or the last."""
        for view, member in self.plan:
            victim = view.victim(scene, images_BCHW)
            adv_BCHW = find_adversarial(member, victim, images_BCHW, labels_B, threat)
            if not bool(scene.verdict(adv_BCHW).right(labels_B, attacked=True).all()):
                break
        return adv_BCHW

    def judged(self, scene: Scene, images_BCHW: Tensor, labels_B: Tensor, attacked: bool = False) -> tuple[Scene, int]:
        """The scene after some images, and how many of them were right."""
        found = scene.verdict(images_BCHW)
        check_logits(found.logits, scene.defence.name)
        return replace(scene, state=found.state), int(found.right(labels_B, attacked=attacked).sum())
