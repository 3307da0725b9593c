"""What an evaluation found, as a report."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..checks import BLIND_ABOVE
from ..defences.base import Defence
from ..environment import hardware, library_versions
from ..metrics import right_throughout
from ..modeling import ZeroShotClassifier, descriptions_digest
from ..report import Measurement, RobustnessReport, accuracies, percent, prompt_hash
from ..report.outcomes import Outcomes, make_outcomes
from ..zero_shot_data.adversarial import PixelFormat
from ..zero_shot_data.fingerprint import dataset_digest, pictures_digest
from ..zero_shot_data.loading import ImageDataset
from .adversarial import Kept, SaveAdversarial, save_adversarial
from .detection import detection
from .settings import EvaluationSettings, Stage
from .state import Found

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What all processes found together, with all that a report says of how.

    Args:
        model, dataset, settings, defence: of the evaluation; the model as it was prepared for the dataset.
        stages: its attacks, each at a radius, in their order.
        found: on every image.
        controls: names of the judges after the defence.
        flags: what the classifier looks like: `"randomised"`, `"optimising"`.
        remarks: what must be said of the defence.
        tuned: how many numbers it tunes for an image.
        saved_as: how adversarial pictures are saved, if they are.
    """

    model: ZeroShotClassifier
    dataset: ImageDataset
    settings: EvaluationSettings
    defence: Defence
    stages: Sequence[Stage]
    found: Found
    controls: Sequence[str]
    flags: dict[str, bool]
    remarks: tuple[str, ...]
    tuned: int
    saved_as: PixelFormat | None

    def report(self, name: str, task: str, model_id: str) -> RobustnessReport:
        """Accuracies and whatever they depend on."""
        model, settings, found = self.model, self.settings, self.found
        num_classes, descriptions = len(model.class_names), descriptions_digest(model.descriptions)
        couples = self.defence.traits.couples_images
        return RobustnessReport(
            name=name,
            task=task,
            model=model_id,
            model_revision=getattr(model.config, "_commit_hash", None) or "local",
            dataset=self.dataset.dataset_id,
            dataset_revision=self.dataset.revision,
            split=self.dataset.split,
            num_images=len(found.levels),
            class_names=tuple(model.class_names),
            prompt_hash=prompt_hash(model.class_names, model.templates, descriptions),
            attack=settings.attack.name(num_classes),
            attack_parameters=settings.attack_parameters(num_classes, to_the_end=couples),
            view=settings.seen,
            attack_resolution=model.input_size,
            norm=settings.norm,
            model_flags=self.flags,
            zero_gradient_share=found.blindness(found.gradients),
            seed=settings.seed,
            precision=settings.precision_with(model),
            library_versions=library_versions(),
            hardware=hardware(),
            measurements=(
                *self.accuracies(),
                *detection(found.alarms, [(stage.threat_model.eps, stage.member.name) for stage in self.stages]),
                *(() if self.saved_as is None else self.kept(self.saved_as).measurements()),
            ),
            defence=self.about_defence() if self.defence.defends else None,
            templates=tuple(model.templates),
            descriptions=descriptions,
            standard_attack=settings.attack.is_standard,
            outcomes=self.outcomes(),
        )

    def accuracies(self) -> tuple[Measurement, ...]:
        """Clean and robust accuracy, after each attack, of each class and of the controls."""
        clean, *robust = self.found.accuracies(0, len(self.stages))
        after_each: dict[float, dict[str, float]] = {}
        for stage, value in zip(self.stages, robust, strict=True):
            after_each.setdefault(stage.threat_model.eps, {})[stage.member.name] = value
        return accuracies(clean, after_each, self.per_class(), self.of_controls())

    def outcomes(self) -> Outcomes | None:
        """On which images the defence was right, clean and up to each radius; None where not all were judged."""
        levels = self.found.levels
        if sorted(levels) != list(range(len(self.dataset))):
            return None
        right_NS = right_throughout(self.found.right(0, len(self.stages)))[np.argsort(list(levels))]
        last = {0.0: 0} | {stage.threat_model.eps: number for number, stage in enumerate(self.stages, start=1)}
        return make_outcomes(pictures_digest(self.dataset), {eps: right_NS[:, stage] for eps, stage in last.items()})

    def kept(self, saved_as: PixelFormat) -> Kept:
        """The adversarial pictures of all processes."""
        stages = [(stage.threat_model, stage.member.name, stage.view.name) for stage in self.stages]
        labels, withstood = ({index: row[i] for index, row in self.found.levels.items()} for i in (0, 1))
        return Kept(withstood, labels, self.found.saved, stages, saved_as)

    def save_pictures(self, saving: SaveAdversarial, state_dir: Path, report: RobustnessReport) -> None:
        """Write the adversarial pictures of all processes, which lie in `state_dir`."""
        adapted = any(isinstance(module, BaseTunerLayer) for module in self.model.modules())
        plain = self.model.config.model_type == "clip" and not adapted and not self.defence.defends
        normalisation = self.model.normalisation if plain else None
        kept = self.kept(saving.pixels)
        save_adversarial(saving, kept, state_dir, report, self.dataset, normalisation=normalisation)

    def per_class(self) -> dict[str, tuple[int, int, int]]:
        """By class name: images, and how many of them the defence got right when clean and at the end."""
        labels = torch.tensor([row[0] for row in self.found.levels.values()])
        right_NS = torch.from_numpy(self.found.right(0, len(self.stages)))
        clean_N, end_N = right_NS[:, 0], right_NS.all(dim=1)
        of_class = {class_name: labels == index for index, class_name in enumerate(self.model.class_names)}
        return {
            class_name: (int(rows.sum()), int((rows & clean_N).sum()), int((rows & end_N).sum()))
            for class_name, rows in of_class.items()
        }

    def of_controls(self) -> dict[str, dict[float, float]]:
        """By control its accuracy at each radius, 0 for clean; the last attack at a radius counts."""
        radii = [0.0, *(stage.threat_model.eps for stage in self.stages)]
        return {
            name: dict(zip(radii, self.found.accuracies(judge, len(self.stages)), strict=True))
            for judge, name in enumerate(self.controls, start=1)
        }

    def about_defence(self) -> dict[str, Any]:
        """What the report says of the defence."""
        remarks = (*self.remarks, *self.blind_attacks())
        return {
            **({"remarks": list(remarks)} if remarks else {}),
            "name": self.defence.name,
            "parameters": self.defence.parameters(),
            "traits": asdict(self.defence.traits),
            "tuned": self.tuned,
            "fallbacks": self.found.fallbacks,
            "ms_per_image": 1000 * self.found.seconds / len(self.found.levels),
            **({} if self.defence.traits.episodic else {"stream": self.about_stream()}),
        }

    def blind_attacks(self) -> tuple[str, ...]:
        """Which of several attacks got too many gradients of zero: in the share of all of them it would drown."""
        numbers: dict[str, list[int]] = {}
        for number, stage in enumerate(self.stages, start=1):
            numbers.setdefault(stage.member.name, []).append(number)
        shares = {name: self.found.blindness(of_attack) for name, of_attack in numbers.items() if len(numbers) > 1}
        blind = [f"{name} {percent(share)}" for name, share in shares.items() if share > BLIND_ABOVE]
        told = "attacks that were (partly) blind, with the share of their gradients that was exactly zero"
        return (f"{told}: {', '.join(blind)}",) if blind else ()

    def about_stream(self) -> dict[str, Any]:
        """In which order the images came, and how often their class changed: sorted by class they make another stream
        than shuffled.
        """
        labels = [self.found.levels[index][0] for index in sorted(self.found.levels)]
        changes = sum(one != other for one, other in itertools.pairwise(labels))
        if 1 < len(set(labels)) == changes + 1 < len(labels):
            logger.warning("the stream has the images class by class; of shuffled ones the figures may be others.")
        return {
            "order": "of the dataset",
            "images_in_order": dataset_digest(self.dataset, every=True),
            "class_changes": changes,
        }
