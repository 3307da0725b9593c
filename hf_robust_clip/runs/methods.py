"""How a run reaches objectives, trainers and defences."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..defences.base import Defence
from ..modeling import CLIPForZeroShotClassification
from ..objectives.base import Objective
from ..prompts import ClipPromptConfig
from ..training import trainer as trainers
from ..training.config import RobustClipConfig
from ..training.trainer import RobustClipTrainer, TAPTTrainer
from ..zero_shot_data.loading import ImageDataset


def default_prompts(objective: type[Objective]) -> ClipPromptConfig | None:
    """The adapter that an objective trains by default; None for the image encoder."""
    own = [cls for cls in vars(trainers).values() if getattr(cls, "objective_cls", None) is objective]
    return copy.deepcopy(own[0].default_peft_config()) if own else None


def make_trainer(
    model: CLIPForZeroShotClassification,
    args: RobustClipConfig,
    objective: Objective,
    data: ImageDataset,
    peft_config: PeftConfig | None,
    defence: Defence | None,
) -> RobustClipTrainer:
    """The trainer of an objective, and of the defence that is fitted afterwards."""
    if defence is not None:
        return TAPTTrainer(model, args, objective, data, peft_config=peft_config, adaptation=defence)  # type: ignore[arg-type]
    return RobustClipTrainer(model, args, objective, data, peft_config=peft_config)


def fit_defences(
    trainer: RobustClipTrainer, defences: dict[str, Defence], data: ImageDataset, state_dir: Path
) -> dict[str, Defence]:
    """The defences, fitted on training images with the trained classifier; the first is what the trainer saves."""
    if not isinstance(trainer, TAPTTrainer):
        return defences
    targets = trainer.collect_statistics(data, state_dir=state_dir)
    fitted: dict[str, Defence] = {
        title: replace(defence, targets=targets)  # type: ignore[call-arg]
        for title, defence in defences.items()
    }
    trainer.adaptation = next(iter(fitted.values()))  # type: ignore[assignment]
    return fitted


def defended(trainer: RobustClipTrainer) -> Any:
    """What is saved of a classifier with a defence."""
    return trainer.defended() if isinstance(trainer, TAPTTrainer) else None
