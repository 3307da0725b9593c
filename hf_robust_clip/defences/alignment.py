"""Defences that align the views of an image with statistics of training images, and these statistics as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ..checks import check_whole
from ..modeling import ZeroShotClassifier
from ..processes import Processes
from ..prompts.access import num_vision_prompts, summary
from .base import Fitted
from .fit import collect_statistics, fingerprints, read_tensors, write_tensors
from .moments import VisionStatistics
from .tuning import PromptTuning

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..zero_shot_data.dataset import ImageDataset

Reduction = Literal["norm", "mean"]


@dataclass(frozen=True, eq=False)
class AlignmentTargets(Fitted):
    """The statistics that a defence aligns views with.

    Args:
        adversarial: of training images under the classifier's own prompts.
        clean: of the same under clean-trained prompts in the same model; None for methods that don't use them.
    """

    adversarial: VisionStatistics
    clean: VisionStatistics | None = None

    file: ClassVar[str] = "statistics.safetensors"

    @property
    def record(self) -> dict[str, Any]:
        """That of the adversarial statistics."""
        return self.adversarial.record

    def check(self, classifier: ZeroShotClassifier) -> None:
        """Raise ValueError unless these statistics belong to the classifier: its layers, tokens and width, its image
        encoder, and (`adversarial`) the prompts that are active in this.
        """
        self.check_shapes(classifier)
        model, prompts = fingerprints(classifier)
        for name, statistics in self._parts().items():
            if statistics.record.get("model_fingerprint") != model:
                raise ValueError(f"the {name} statistics were made with another image encoder; collect them anew.")
        if self.adversarial.record.get("prompts_fingerprint") != prompts:
            raise ValueError(
                f"the adversarial statistics were made with other prompts in the image encoder "
                f"({self.adversarial.record.get('prompts', 'unknown')}) than the active ones "
                f"({summary(classifier)}); collect them anew after training, or choose their adapter."
            )

    def check_shapes(self, classifier: ZeroShotClassifier) -> None:
        """Raise ValueError unless layers, tokens and width are those of the classifier's image encoder."""
        vision = classifier.config.vision_config
        tokens = classifier.num_image_tokens + num_vision_prompts(classifier)
        expected = vision.num_hidden_layers, tokens, vision.hidden_size
        for name, statistics in self._parts().items():
            given = tuple(statistics.mean.shape)
            if given != expected:
                raise ValueError(
                    f"the {name} statistics are of (layers, tokens, width) {given}, but this classifier's image "
                    f"encoder has {expected}; collect them anew with its model and prompts."
                )

    def _parts(self) -> dict[str, VisionStatistics]:
        return {"adversarial": self.adversarial, **({} if self.clean is None else {"clean": self.clean})}

    def save(self, path: str | Path) -> None:
        """Write `statistics.safetensors` into a folder, or a file of the given name `*.safetensors`, whole or not at
        all: the tensors in their own precision, counts and records in its metadata.
        """
        tensors: dict[str, Tensor] = {}
        metadata = {"format": "pt"}
        for name, statistics in self._parts().items():
            tensors |= {f"{name}.mean": statistics.mean, f"{name}.variance": statistics.variance}
            metadata[name] = json.dumps({"count": statistics.count, "record": statistics.record})
        write_tensors(self._place(path), tensors, metadata)

    @classmethod
    def _place(cls, path: str | Path) -> Path:
        """The file itself, or that of the usual name in a folder."""
        path = Path(path)
        return path if path.suffix == ".safetensors" and not path.is_dir() else path / cls.file

    @classmethod
    def load(cls, path: str | Path) -> AlignmentTargets:
        """Read what `save` wrote, from the folder or the file.

        Raises OSError if the file is missing or damaged, ValueError if it holds something else.
        """
        path = cls._place(path)
        tensors, metadata = read_tensors(
            path, "make it with collect_statistics and AlignmentTargets.save, or TAPTTrainer"
        )
        found: dict[str, VisionStatistics] = {}
        try:
            for name in ("adversarial", *(["clean"] if "clean" in metadata else [])):
                about = json.loads(metadata[name])
                moments = tensors[f"{name}.mean"], tensors[f"{name}.variance"]
                found[name] = VisionStatistics(*moments, int(about["count"]), dict(about["record"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(path)!r} holds no statistics of AlignmentTargets.save ({error!r}).") from error
        return cls(**found)


@dataclass(frozen=True, kw_only=True)
class AlignedTuning(PromptTuning):
    """Tunes trained prompts so that the views of an image look inside like training images.

    Args:
        targets: statistics to align with; `fit` makes them.
        align_weight: of the alignment, against the entropy.
        align_layers: the first so many layers of the encoder; all of a tower that has fewer.

    Raises ValueError for numbers out of range, and for targets that are missing where the loss needs them, or belong
    to another model or other prompts.
    """

    targets: AlignmentTargets | None = field(default=None, repr=False, metadata={"fitted": AlignmentTargets})
    align_weight: float = 1.0
    align_layers: int = 9

    aligns: ClassVar[bool] = True
    needs_prompts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.align_weight < math.inf:
            raise ValueError(f"align_weight={self.align_weight!r} must be at least 0.")
        check_whole(1, align_layers=self.align_layers)

    def fit(
        self,
        classifier: ZeroShotClassifier,
        dataset: ImageDataset,
        *,
        clean_classifier: ZeroShotClassifier | None = None,
        batch_size: int = 64,
        processes: Processes = None,
        state_dir: str | Path | None = None,
        num_workers: int = 0,
        progress: bool = False,
    ) -> Self:
        """With `targets` of clean images under the classifier's prompts and, where one is given, under those of
        `clean_classifier`. Raises ValueError where that is needed and missing, and as `collect_statistics` does.
        """
        if self.needs and clean_classifier is None:
            raise ValueError(f"clean_classifier is missing: {self.name} aligns with clean-trained prompts too.")
        found = {
            name: collect_statistics(
                model,
                dataset,
                batch_size=batch_size,
                processes=processes,
                state_dir=None if state_dir is None else Path(state_dir) / name,
                num_workers=num_workers,
                progress=progress,
            )
            for name, model in (("adversarial", classifier), ("clean", clean_classifier))
            if model is not None
        }
        return replace(self, targets=AlignmentTargets(**found))

    def check(self, classifier: ZeroShotClassifier) -> None:
        super().check(classifier)
        if self.align_weight == 0:
            return
        if self.targets is None:
            raise ValueError(f"targets is missing for {self.name}: call fit(classifier, dataset), or align_weight=0.")
        if self.needs and self.targets.clean is None:
            raise ValueError("targets.clean is missing: fit with a clean_classifier, or set gamma=1.")
        self.targets.check(classifier)


def views_moments(layer_inputs: Sequence[Tensor], num_images: int, unbiased: bool) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance (B, tokens, width) over each image's views, for every layer."""
    rows = [hidden.unflatten(0, (num_images, -1)) for hidden in layer_inputs]
    return [(hidden.mean(dim=1), hidden.var(dim=1, correction=int(unbiased))) for hidden in rows]


def alignment(moments: Sequence[tuple[Tensor, Tensor]], statistics: VisionStatistics, reduction: Reduction) -> Tensor:
    """The distance of moments from statistics, (B,): see `TAPT`."""
    distance_B = 0.0
    for (mean, variance), mu, s2 in zip(moments, statistics.mean, statistics.variance, strict=False):
        parts = (mean - mu.to(mean)).abs(), (variance - s2.to(variance)).abs()
        if reduction == "norm":
            distance_B = distance_B + sum(part.flatten(1).sum(dim=1) for part in parts) / len(moments)
        else:
            distance_B = distance_B + sum(0.5 * part.flatten(1).mean(dim=1) for part in parts)
    return distance_B  # type: ignore[return-value]  # there is a layer
