"""RFI: classes seen only along the strongest directions of what training images look like."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_choice, check_whole
from ..modeling import ZeroShotClassifier
from ..paper import Paper
from ..processes import Processes
from ..prompts.access import summary
from .base import Defence, Fitted, GradientPath, Prediction
from .fit import fingerprints, over_images, read_tensors, write_tensors

if TYPE_CHECKING:
    from ..zero_shot_data.dataset import ImageDataset

logger = logging.getLogger(__name__)
Score = Literal["eigenvalue", "squared", "first"]
Directions = tuple[Tensor, Tensor]  # eigenvalues (R,), descending, and unit eigenvectors (D, R)
TIE = 1e-9  # relative difference of two scores that rounding can't be told from


class SecondMomentSum:
    """Sums of unit vectors phi and of phi phi^T, in float64.

    Args:
        count: vectors so far.
        outer_DD, total_D: the sums; without meaning while there are no vectors.
    """

    def __init__(self, count: int = 0, outer_DD: Tensor | None = None, total_D: Tensor | None = None):
        self.count = count
        self.outer_DD = torch.zeros(0, dtype=torch.float64) if outer_DD is None else outer_DD
        self.total_D = torch.zeros(0, dtype=torch.float64) if total_D is None else total_D

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, beside the count."""
        return {"outer": self.outer_DD, "total": self.total_D}

    def update(self, embeds_ND: Tensor) -> None:
        """Add vectors of any length; their directions count."""
        unit_ND = F.normalize(embeds_ND.detach().double(), dim=-1)
        self.merge(SecondMomentSum(len(unit_ND), unit_ND.T @ unit_ND, unit_ND.sum(dim=0)))

    def merge(self, other: SecondMomentSum) -> None:
        """Add the vectors of another."""
        if other.count == 0:
            return
        empty = self.count == 0
        self.outer_DD = other.outer_DD if empty else self.outer_DD + other.outer_DD
        self.total_D = other.total_D if empty else self.total_D + other.total_D
        self.count += other.count


@dataclass(frozen=True, eq=False)
class SecondMoment(Fitted):
    """The second moment of the unit image embeddings of training images, Sigma = (1/n) sum_i phi_i phi_i^T.

    Args:
        outer_DD: sum_i phi_i phi_i^T, float64, on the CPU.
        total_D: sum_i phi_i, likewise.
        count: n.
        made: what it was made from and with, in JSON types; see `fit.collect_statistics`.

    Raises ValueError for other shapes, no images, and values that aren't finite.
    """

    outer_DD: Tensor
    total_D: Tensor
    count: int
    made: Mapping[str, Any] = field(default_factory=dict)

    file: ClassVar[str] = "second_moment.safetensors"

    def __post_init__(self) -> None:
        width = self.total_D.numel()
        if self.total_D.shape != (width,) or self.outer_DD.shape != (width, width) or not width:
            shapes = tuple(self.outer_DD.shape), tuple(self.total_D.shape)
            raise ValueError(
                f"outer_DD and total_D have the shapes {shapes[0]} and {shapes[1]}; give (D, D) and (D,)."
            )
        if self.count < 1:
            raise ValueError(f"count={self.count!r}: a second moment needs at least one image.")
        if not (self.outer_DD.isfinite().all() and self.total_D.isfinite().all()):
            raise ValueError("outer_DD or total_D has values that aren't finite; check the weights they come from.")

    @property
    def record(self) -> dict[str, Any]:
        return dict(self.made)

    @cached_property
    def plain(self) -> Directions:
        """Eigenvalues above rounding, descending, and eigenvectors of Sigma."""
        return _directions(self.outer_DD / self.count)

    @cached_property
    def centred(self) -> Directions:
        """The same of the covariance, Sigma - m m^T with the mean m."""
        mean_D = self.total_D / self.count
        return _directions(self.outer_DD / self.count - torch.outer(mean_D, mean_D))

    def check(self, classifier: ZeroShotClassifier) -> None:
        """Raise ValueError unless it was fitted on the classifier's image encoder with its active prompts."""
        model, prompts = fingerprints(classifier)
        if self.made.get("model_fingerprint") != model:
            raise ValueError("moment was fitted on another image encoder; fit(classifier, dataset) anew.")
        if self.made.get("prompts_fingerprint") != prompts:
            raise ValueError(
                f"moment was fitted under other prompts in the image encoder ({self.made.get('prompts', 'unknown')}) "
                f"than the active ones ({summary(classifier)}); fit(classifier, dataset) anew."
            )

    def save(self, path: str | Path) -> None:
        about = json.dumps({"count": self.count, "record": self.record})
        tensors = {"outer": self.outer_DD, "total": self.total_D}
        write_tensors(Path(path) / self.file, tensors, {"format": "pt", "second_moment": about})

    @classmethod
    def load(cls, path: str | Path) -> SecondMoment:
        tensors, metadata = read_tensors(Path(path) / cls.file, "make it with RFI.fit and DefendedClassifier")
        try:
            about = json.loads(metadata["second_moment"])
            return cls(tensors["outer"], tensors["total"], int(about["count"]), dict(about["record"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{cls.file} in {str(path)!r} holds no second moment ({error!r}).") from error


def _directions(moment_DD: Tensor) -> Directions:
    """Eigenvalues above rounding, descending, with their eigenvectors."""
    values_D, vectors_DD = torch.linalg.eigh(moment_DD.double().cpu())
    least = values_D[-1].clamp_min(0) * len(values_D) * torch.finfo(torch.float64).eps
    kept = values_D > least
    return values_D[kept].flip(0), vectors_DD[:, kept].flip(1)


def scores(class_embeds_CD: Tensor, directions: Directions, score: Score) -> Tensor:
    """How much a direction u_i counts for a class t_c, (C, R): lambda_i (t_c . u_i)^2; `"squared"` with lambda_i^2;
    `"first"` lambda_i for every class.
    """
    values_R, vectors_DR = directions
    if score == "first":
        return values_R.expand(len(class_embeds_CD), -1)
    power = 2 if score == "squared" else 1
    return values_R**power * (class_embeds_CD @ vectors_DR).square()


def projected(class_embeds_CD: Tensor, directions: Directions, top_k: int, score: Score) -> tuple[Tensor, Tensor]:
    """The class embeddings projected on the union of each class's `top_k` best directions, (C, D), not of unit length;
    and which directions are in it, (R,) bool.
    """
    _, vectors_DR = directions
    best_CK = scores(class_embeds_CD, directions, score).topk(top_k, dim=1).indices
    kept_R = torch.zeros(vectors_DR.shape[1], dtype=torch.bool, device=best_CK.device)
    kept_R[best_CK.flatten()] = True
    return (class_embeds_CD @ vectors_DR * kept_R) @ vectors_DR.T, kept_R


@dataclass(frozen=True, kw_only=True)
class RFI(Defence):
    """Robust feature inference: class embeddings are projected on the directions in which training images are strong.

        Sigma = (1/n) sum_i phi_i phi_i^T = U diag(lambda) U^T      score_c(u_i) = lambda_i (t_c . u_i)^2
        U~ = the union over c of the `top_k` best u_i               z_c = s * phi . t~_c,   t~_c = U~ U~^T t_c

    with unit image embeddings phi = f(x)/||f(x)||; t~ keeps its length, which is at most 1. Nothing is drawn or tuned:
    a gradient goes straight through, on every path. Other classes make another union, of the same second moment.

    `paper_preset` is the default. `released_preset` scores by lambda^2 (t.u)^2, `first_k_preset` takes the first top_k
    directions whatever the classes: the authors' code has both, and runs the second.

    Args:
        moment: what `fit` makes, of (training) images without their labels.
        top_k: directions of each class; None takes as many as there are classes, as the authors' code does.
        score: `"eigenvalue"` (above), `"squared"` (lambda^2), or `"first"`.
        centred: directions of the covariance: another method, for comparison.
        renormalised: give t~ unit length: another method, for comparison.

    If the union is all that the images span, RFI does nothing to them: that is warned of, and its rank is part of a
    report. Raises ValueError for settings out of range; before `fit`; for a moment of another image encoder or other
    prompts; and for a top_k above the number of directions.
    Source: arXiv 2307.11672 (TMLR 2024) and its released code. The paper has a linear head on raw features, so unit
    embeddings are ours. The code takes eigenvectors of a solver that doesn't order them, so that its first k are
    whichever come first, and on tiny-ImageNet fits on the test images; here they are in descending order.
    """

    moment: SecondMoment | None = field(default=None, repr=False, metadata={"fitted": SecondMoment})
    top_k: int | None = None
    score: Score = "eigenvalue"
    centred: bool = False
    renormalised: bool = False

    paper = Paper.cited("rfi", "singh2024rfi", arxiv="2307.11672")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(Score, score=self.score)
        if self.top_k is not None:
            check_whole(1, top_k=self.top_k)

    @classmethod
    def paper_preset(cls) -> RFI:
        """As the paper writes it: the defaults."""
        return cls()

    @classmethod
    def released_preset(cls) -> RFI:
        """The score that the authors' code computes class by class."""
        return cls(score="squared")

    @classmethod
    def first_k_preset(cls) -> RFI:
        """What the authors' scripts run."""
        return cls(score="first")

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
    ) -> RFI:
        """With the `moment` of the images of a dataset.

        Raises ValueError as `collect_statistics` does, and for a top_k above the number of images or the embeddings'
        width.
        """
        width = classifier.class_embeds.shape[1] if classifier.class_names else len(dataset)
        most = min(len(dataset), width)
        if self.top_k is not None and self.top_k > most > 0:
            raise ValueError(f"top_k={self.top_k!r} is above {most}, the most directions there can be; set it lower.")
        found, record = over_images(
            classifier,
            dataset,
            SecondMomentSum,
            lambda sums, pixels_BCHW: sums.update(classifier.encode_images(pixels_BCHW)),
            batch_size=batch_size,
            processes=processes,
            state_dir=state_dir,
            num_workers=num_workers,
            progress=progress,
        )
        return replace(self, moment=SecondMoment(found.outer_DD.cpu(), found.total_D.cpu(), found.count, record))

    def check(self, classifier: ZeroShotClassifier) -> None:
        super().check(classifier)
        if self.moment is None:
            raise ValueError(f"moment is missing for {self.name}: call fit(classifier, dataset) on training images.")
        self.moment.check(classifier)
        self._number(classifier)

    def _directions(self) -> Directions:
        assert self.moment is not None
        return self.moment.centred if self.centred else self.moment.plain

    def _number(self, classifier: ZeroShotClassifier) -> int:
        """K. Raises ValueError if there are fewer directions."""
        number = len(classifier.class_names) if self.top_k is None else self.top_k
        there = len(self._directions()[0])
        if number > there:
            asked = f"top_k={self.top_k!r}" + ("" if self.top_k else f", as many as the {number} classes,")
            raise ValueError(f"{asked} is above the {there} directions that the images of moment span; set it lower.")
        return number

    def union(self, classifier: ZeroShotClassifier) -> Tensor:
        """An orthonormal basis (D, rank) of the union for the classifier's classes. Raises ValueError as `check`."""
        self.check(classifier)
        return self._directions()[1][:, self._projected(classifier)[1].cpu()]

    def _projected(self, classifier: ZeroShotClassifier) -> tuple[Tensor, Tensor]:
        classes_CD = classifier.class_embeds.double()
        values_R, vectors_DR = (part.to(classes_CD.device) for part in self._directions())
        return projected(classes_CD, (values_R, vectors_DR), self._number(classifier), self.score)

    def remarks(self, classifier: ZeroShotClassifier, images_BCHW: Tensor) -> tuple[str, ...]:
        """The union's rank, and what makes it useless or arbitrary."""
        self.check(classifier)
        number, directions = self._number(classifier), self._directions()
        rank, there = self.union(classifier).shape[1], len(directions[0])
        found = [f"the union of {number} directions for each class has rank {rank} of {there}"]
        if rank == there:
            found.append(_full(rank))
        if number < there:
            classes_CD = classifier.class_embeds.double().cpu()
            first_CK = scores(classes_CD, directions, self.score).topk(number + 1, dim=1).values
            if (first_CK[:, -2] - first_CK[:, -1] <= TIE * first_CK[:, 0]).any():
                found.append("two directions tie for the last place of a class: the union is arbitrary")
        return tuple(found)

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        classes_CD, kept_R = self._projected(classifier)
        if kept_R.all():
            _warn_once(_full(len(kept_R)))
        if self.renormalised:
            classes_CD = F.normalize(classes_CD, dim=-1)
        with torch.set_grad_enabled(path != "none"):
            logits_BC = classifier.score(classifier.encode_images(images_BCHW), classes_CD)[0]
        return Prediction(logits_BC, torch.zeros(len(logits_BC), dtype=torch.bool, device=logits_BC.device))


def _full(rank: int) -> str:
    return f"the union is all {rank} directions that the images of the fit span: RFI does nothing to such; lower top_k"


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s.", text)
