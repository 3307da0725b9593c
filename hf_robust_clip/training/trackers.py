"""Attacked pictures for the trackers of `report_to`; loss terms and accuracies go there by the Trainer itself."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    rewrite_logs,
)
from transformers.trainer_callback import CallbackHandler

from ..prediction import Prediction
from ..report.plots import plot_examples

logger = logging.getLogger(__name__)
STEP = "train/global_step"  # what the Trainer's own figures are drawn over, where a tracker counts for itself


def _to_tensorboard(tracker: Any, name: str, picture: Image.Image, caption: str, step: int) -> None:
    if tracker.tb_writer is not None:
        tracker.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")


def _to_trackio(tracker: Any, name: str, picture: Image.Image, caption: str, step: int) -> None:
    tracker._trackio.log({name: tracker._trackio.Image(picture, caption=caption), STEP: step})


def _to_wandb(tracker: Any, name: str, picture: Image.Image, caption: str, step: int) -> None:
    if tracker._wandb is not None:
        tracker._wandb.log({name: tracker._wandb.Image(picture, caption=caption), STEP: step})


# How each tracker takes a picture, by the Trainer's callback for it; a tracker more is a line here.
TAKES: dict[type[TrainerCallback], Callable[[Any, str, Image.Image, str, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    TrackioCallback: _to_trackio,
    WandbCallback: _to_wandb,
}


@dataclass(frozen=True)
class Shown:
    """Images of an evaluation, (N, 3, H, W) in [0, 1], with the names of their classes and of those predicted."""

    images: Tensor
    adversarials: Tensor
    truth: Sequence[str]
    before: Sequence[str]
    after: Sequence[str]


class AttackedPictures(TrainerCallback):
    """Logs, at each evaluation of a `RobustClipTrainer`, its first images: clean, perturbation magnified, attacked and
    what the model saw in them, as one picture named `eval/attacked`, or `eval/<dataset>_attacked` where there are
    several.

    They are the same images every time, so that one can follow them through a training; the attack is that of the
    evaluation, PGD with `eval_attack_steps`. Trackers that take pictures are TensorBoard, Trackio and wandb; of others
    is said, once, that they get numbers alone. A tracker that fails is told in a warning, and the training goes on.
    Where a detector judges, there is no picture: an image that it flags is of no class.

    A `RobustClipTrainer` has one already; give it another in `callbacks` for another number, or take it away by
    `trainer.remove_callback(AttackedPictures)`.

    Args:
        num_images: how many, at least 1 (a process shows no more than its first batch).

    Raises ValueError for a `num_images` below 1.
    """

    def __init__(self, num_images: int = 4):
        if num_images < 1:
            raise ValueError(f"num_images={num_images!r} must be at least 1.")
        self.num_images = num_images
        self._trackers: list[TrainerCallback] = []
        self._name = ""
        self._shown: Shown | None = None
        self._told: set[str] = set()

    def begin(self, callbacks: Sequence[TrainerCallback], prefix: str) -> None:
        """Forget the last evaluation; see who takes pictures of one whose figures begin with `prefix`."""
        self._shown = None
        self._name = next(iter(rewrite_logs({f"{prefix}_attacked": 0})))
        self._trackers = [own for own in callbacks if isinstance(own, tuple(TAKES))]
        kinds = {type(own) for own in callbacks}
        for name, kind in INTEGRATION_TO_CALLBACK.items():
            if kind in kinds and kind not in TAKES:
                self._tell(logger.info, f"report_to={name!r} gets figures, but no attacked pictures")

    def show(
        self,
        class_names: Sequence[str],
        images: Tensor,
        adversarials: Tensor,
        labels: Tensor,
        clean: Prediction,
        attacked: Prediction,
    ) -> None:
        """Keep the first images of an evaluation's first batch, if a tracker takes them and no detector flags them.

        Args:
            class_names: of the model.
            images, adversarials: (B, 3, H, W) in [0, 1].
            labels: (B,), the true classes.
            clean, attacked: what was made of them.
        """
        if not self._trackers or self._shown is not None or clean.flagged is not None or attacked.flagged is not None:
            return
        first = slice(self.num_images)
        indices = (own[first].tolist() for own in (labels, clean.logits.argmax(dim=1), attacked.logits.argmax(dim=1)))
        truth, before, after = ([class_names[i] for i in own] for own in indices)
        whole, changed = (pixels[first].detach().float().cpu() for pixels in (images, adversarials))
        self._shown = Shown(whole, changed, truth, before, after)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # the Trainer's own signature
        """Draw them, and hand them to each tracker."""
        shown, self._shown = self._shown, None
        if shown is None or not state.is_world_process_zero:
            return
        caption = f"PGD-{getattr(args, 'eval_attack_steps', '')} on the first images, step {state.global_step}"
        try:
            picture = drawn(shown, caption)
        except Exception as error:  # a training is worth more than its pictures
            self._tell(logger.warning, f"attacked pictures can't be drawn: {error}")
            return
        for tracker in self._trackers:
            take = next(take for kind, take in TAKES.items() if isinstance(tracker, kind))
            try:
                take(tracker, self._name, picture, caption, state.global_step)
            except Exception as error:  # whatever a tracker raises
                self._tell(
                    logger.warning, f"{type(tracker).__name__} took no picture: {type(error).__name__}: {error}"
                )

    def _tell(self, say: Callable[[str, str], None], text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            say("%s", text)


def pictures_of(handler: CallbackHandler) -> list[AttackedPictures]:
    """Those among the callbacks of a trainer."""
    return [own for own in handler.callbacks if isinstance(own, AttackedPictures)]


def drawn(shown: Shown, title: str) -> Image.Image:
    """What `plot_examples` draws of them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "attacked.png")
        plot_examples(file, shown.images, shown.adversarials, shown.truth, shown.before, shown.after, title)
        with Image.open(file) as picture:
            return picture.convert("RGB")
