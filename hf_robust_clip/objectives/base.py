"""What a fine-tuning method is: the loss its attack maximises and the loss its model minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from peft import PeftConfig
from torch import Tensor

from ..attacks.losses import cross_entropy
from ..modeling import ZeroShotOutput
from ..paper import Paper, Unpublished

Classifier = Callable[..., ZeroShotOutput]
NEEDS = frozenset({"labels", "classes", "teacher", "patches", "captions", "texts"})


@dataclass
class Batch:
    """What an objective may look at: one for each step, which attack and loss share.

    Args:
        views: V tensors (B, C, H, W), clean, in [0, 1]: crops of the same B images.
        labels: (B,), class indices; None where the objective doesn't need them.
        captions: (B, L), token ids, one text for each image; None where the objective doesn't need them.
        further_captions: the same of other texts for each image, as many as the objective makes.
        student: the model being trained, pixels to `ZeroShotOutput`, with patch embeddings where the objective needs
            them, and `text_embeds` where it has `templates` or needs texts. `student(pixels, captions=ids)` takes
            texts in the place of classes: `class_embeds` are theirs; `student(pixels, class_prompts=index_B)` chooses
            among class-wise prompts.
        teacher: the frozen pretrained model, if the objective needs it, called in the same way.
        images_per_update: images that one optimiser step sees over all processes and accumulated batches, those of a
            short last one included; 0 where these are all.
        gather: what `gathered` does; None where there is one process.
        num_classes: of the student; 0 where it has none.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    captions: Tensor | None
    student: Classifier
    teacher: Classifier | None = None
    images_per_update: int = 0
    gather: Callable[[Tensor], Tensor] | None = None
    further_captions: tuple[Tensor, ...] = ()
    num_classes: int = 0
    _of: tuple[Batch, slice] | None = field(default=None, repr=False)

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]

    @cached_property
    def stacked(self) -> Tensor:
        """All first views, then all second ones, ...: (V * B, C, H, W). This is what attacks work on."""
        return self.views[0] if len(self.views) == 1 else torch.cat(self.views)

    def rows(self, rows: slice) -> Batch:
        """Some rows of `stacked` as a batch of one view, with their labels and captions. `whole` is this batch."""
        count = len(self.views)
        labels, captions, *further = (
            None if values is None else values.repeat(count, *[1] * (values.dim() - 1))[rows]
            for values in (self.labels, self.captions, *self.further_captions)
        )
        own = {"labels": labels, "captions": captions, "further_captions": tuple(further)}
        part = {"views": (self.stacked[rows],), **own}
        return replace(self, **part, _of=(self, rows))  # type: ignore[arg-type]

    @property
    def whole(self) -> Batch:
        """That of which these are rows, with its other views; a batch that is no part of another is itself."""
        return self if self._of is None else self._of[0]

    def gathered(self, tensor: Tensor) -> Tensor:
        """The rows (B, ...) of all processes in their order, with gradients to each; these ones where there is one.

        Of a loss over gathered rows every process takes the whole: the update is that of one process with all images.
        """
        return tensor if self.gather is None else self.gather(tensor)

    @cached_property
    def teacher_on_clean(self) -> ZeroShotOutput:
        """The frozen model's output for `stacked`, computed once in a step, without a graph."""
        if self._of is not None:
            whole, rows = self._of
            return whole.teacher_on_clean.rows(rows)
        return self.ask_teacher(self.stacked)

    @cached_property
    def teacher_on_first(self) -> ZeroShotOutput:
        """The frozen model's output for the first view alone, (B, ...), computed once in a step, without a graph."""
        whole = self.whole
        if whole is not self:
            return whole.teacher_on_first
        return self.teacher_on_clean if len(self.views) == 1 else self.ask_teacher(self.images)

    @torch.no_grad()
    def ask_teacher(self, images_BCHW: Tensor) -> ZeroShotOutput:
        """The frozen model's output, without a graph. Raises ValueError if there is no teacher."""
        if self.teacher is None:
            raise ValueError("this objective compares with a frozen teacher, but the batch has none.")
        return self.teacher(images_BCHW)

    def student_on_both(self, adv_BCHW: Tensor) -> tuple[ZeroShotOutput, ZeroShotOutput]:
        """The student's outputs for adversarial and clean images (`stacked`), in one forward."""
        both = self.student(torch.cat([adv_BCHW, self.stacked]))
        half = len(adv_BCHW)
        return both.rows(slice(half)), both.rows(slice(half, None))


@dataclass(frozen=True)
class Objective(ABC):
    """A fine-tuning method: a frozen dataclass of its hyperparameters with two functions of a batch.

    A new method is one file with one subclass; `paper` says where it comes from, if it was published. `attack_loss`
    defaults to the cross-entropy of the student. Terms are means over the images of the batch (or such means times
    `batch.images_per_update`): batches are weighed by their images.

    `needs`: of "labels", "classes" (of the model, without labels), "teacher" (the frozen pretrained model), "patches"
    (patch embeddings of student and teacher), "captions" (a text for each image; the text tower is trained) and
    "texts" (the embedding of every text of the classes, of which each must have equally many).
    `templates`: texts with `{}` for the class name in which the classes are embedded too, by the frozen text side,
    once. Outputs of student and teacher have them as `text_embeds` (K, C, D), one for each template; with "texts" in
    `needs` the classes' own texts come first.
    `num_views`: random crops of each picture in a batch; more than one takes a dataset of whole pictures. Views that
    can be made of finished images, and other captions, are `further_views` and `edited_captions`.
    `couples_images`: whether the loss, or the choice of attacked images, depends on which images share a forward
    batch; then it matters how an update is divided over accumulated batches, and over processes unless
    `batch.gathered` is asked for the images of all.
    `least_images`: what a forward batch over all processes must hold: 2 where an image is contrasted with others.
    `peft_config`: the adapter that is trained where none is given; None trains the image encoder itself.
    `judged_by`: the test-time defence that makes predictions of what is trained, by its `paper.method`, where the
    classifier has no logits of its own (class-wise prompts); None where it has.
    `attacked`: whether there is an attack at all.
    `needs_random_start`: whether the attack's loss has no gradient at the image itself, so that without a random start
    the attack would go nowhere.

    Several views: the attack works on `batch.stacked`, all first views, then all second ones. `attacked_rows` chooses
    among its V * B rows; `attack_loss` gets these rows alone as its batch, with their labels, and finds all others in
    `batch.whole`; `__call__` gets the whole batch, and of `stacked` the rows attacked where they were chosen, clean
    elsewhere.
    """

    paper: ClassVar[Paper] = Unpublished()  # type: ignore[assignment]
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    templates: ClassVar[tuple[str, ...]] = ()
    num_views: ClassVar[int] = 1
    couples_images: ClassVar[bool] = False
    least_images: ClassVar[int] = 1
    peft_config: ClassVar[PeftConfig | None] = None
    judged_by: ClassVar[str | None] = None
    attacked: ClassVar[bool] = True
    needs_random_start: ClassVar[bool] = False

    def title(self, design: str | None = None) -> str:
        """What tables call it. `design` is that of the prompts, where some are trained."""
        return self.paper.method

    def control(self) -> Objective | None:
        """What the same training does without the method: a cleaning is shown beside it. None: there is no such."""
        return None

    def further_views(self, images_BCHW: Tensor, seed: int) -> tuple[Tensor, ...]:
        """Other views of finished images, (B, C, H, W) in [0, 1] each, which follow the `num_views` in a batch: each
        image's a function of itself and the seed, which is another in every step.
        """
        return ()

    def edited_captions(self, captions: Sequence[str], seed: int) -> tuple[list[str], ...]:
        """Other texts for each image, `batch.further_captions`: a function of its caption and the seed, as above."""
        return ()

    def attacked_rows(self, count: int) -> slice:
        """Which of the `count` rows of `batch.stacked` are attacked; the others reach `__call__` as they are."""
        return slice(None)

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """(mean, std) if the method prescribes its own; None keeps those of the checkpoint's image processor."""
        return None

    def attack_loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The loss that the attack maximises: adversarial images (B, C, H, W), those of `batch.rows(attacked_rows)`,
        to one value per image (B,).
        """
        return lambda adv_BCHW: cross_entropy(batch.student(adv_BCHW).logits, batch.labels)

    @abstractmethod
    def __call__(self, batch: Batch, adv_BCHW: Tensor) -> dict[str, Tensor]:
        """The scalar terms, by name, whose sum is minimised."""
