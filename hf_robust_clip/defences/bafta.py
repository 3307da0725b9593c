"""BaFTA: class centroids that follow the stream of test images, without a gradient.

Shapes: B images, V views of each, C classes, D embedding width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_whole
from ..crops import RandomResizedCrop
from ..modeling import ZeroShotClassifier
from ..paper import Paper
from .base import Defence, GradientPath, Prediction, StreamState, Traits
from .fit import fingerprints
from .memory import activation_bytes
from .prompted import embed_views
from .tuning import check_views
from .views import draw_boxes

logger = logging.getLogger(__name__)

Weights = Literal["repaired", "literal"]
AssignedBy = Literal["centroids", "text", "aggregate"]
MovedBy = Literal["image", "views"]

RESOLUTION = 1e-5  # singular values are equal, or 0, within this part of the largest; lengths are 0 below it
CENTROIDS_ALONE = ("max_directions", "assigned_by", "moved_by")  # settings that do nothing without centroids


@dataclass(frozen=True)
class TextSpace:
    """What the class texts span, without their common direction, and whose it is.

    Args:
        projection_DD: P*, see `text_projection`.
        class_names, class_embeds_CD: of the classifier.
        encoders: fingerprints of its image encoder and of the prompts in it.
    """

    projection_DD: Tensor
    class_names: tuple[str, ...]
    class_embeds_CD: Tensor
    encoders: tuple[str, str]

    def project(self, embeds: Tensor) -> Tensor:
        """pi(v) = P* v / ||P* v||, (..., D), at least in float32; 0 for v of which next to nothing is left."""
        with torch.autocast(embeds.device.type, enabled=False):
            embeds = embeds.to(self.projection_DD)
            left = F.normalize(embeds, dim=-1) @ self.projection_DD
            length = left.norm(dim=-1, keepdim=True)
            return torch.where(length > RESOLUTION, left / length.clamp_min(RESOLUTION), torch.zeros_like(left))

    def check(self, classifier: ZeroShotClassifier) -> None:
        """Raise ValueError unless it is of this classifier and its classes."""
        mend = "begin anew with start(classifier)"
        if self.class_names != tuple(classifier.class_names):
            raise ValueError(f"state is of the classes {self.class_names[:3]}...; {mend}.")
        own, given = self.class_embeds_CD, classifier.class_embeds
        if own.shape != given.shape or not (own is given or torch.allclose(own, given.to(own), rtol=0, atol=1e-4)):
            raise ValueError(f"state is of other class embeddings (texts, or a text encoder); {mend}.")
        if self.encoders != fingerprints(classifier):
            raise ValueError(f"state is of another image encoder; {mend}.")


@dataclass(frozen=True)
class BaFTAState(StreamState):
    """What the images so far left behind.

    Args:
        centroids_CD: w, of unit length, in the projected space.
        counts_C: k, how many images moved each centroid.
        space: where they lie; it stays as it is.

    Raises ValueError for shapes that don't belong together.
    """

    centroids_CD: Tensor
    counts_C: Tensor
    space: TextSpace = field(repr=False)

    def __post_init__(self) -> None:
        shape = self.space.class_embeds_CD.shape
        for name, given, wanted in (
            ("centroids_CD", self.centroids_CD, shape),
            ("counts_C", self.counts_C, shape[:1]),
        ):
            if given.shape != wanted:
                raise ValueError(f"state.{name} has shape {tuple(given.shape)}; give {tuple(wanted)}.")

    def tensors(self) -> dict[str, Tensor]:
        return {"centroids": self.centroids_CD, "counts": self.counts_C}

    def restored(self, tensors: Mapping[str, Tensor]) -> BaFTAState:
        centroids_CD, counts_C = tensors["centroids"].to(self.centroids_CD), tensors["counts"].to(self.counts_C)
        return replace(self, centroids_CD=centroids_CD, counts_C=counts_C)

    @torch.no_grad()
    def moved(self, class_1: Tensor, direction_D: Tensor) -> BaFTAState:
        """After an image: w_y <- norm(k_y w_y + pi(v)), k_y <- k_y + 1. This state stays as it is.

        An image without a direction (0, or not finite) moves nothing, nor does one that cancels its centroid.

        Args:
            class_1: y, of shape (1,).
            direction_D: pi(v).
        """
        count_11 = self.counts_C[class_1][:, None].to(self.centroids_CD)
        sum_1D = count_11 * self.centroids_CD[class_1] + direction_D
        length_11 = sum_1D.norm(dim=1, keepdim=True)
        counts_1 = ((length_11 > RESOLUTION) & (direction_D.norm() > 0.5) & length_11.isfinite())[:, 0]
        own_1D = torch.where(counts_1[:, None], sum_1D / length_11.clamp_min(RESOLUTION), self.centroids_CD[class_1])
        centroids_CD = self.centroids_CD.index_copy(0, class_1, own_1D)
        return replace(self, centroids_CD=centroids_CD, counts_C=self.counts_C.index_add(0, class_1, counts_1.long()))


def text_projection(class_embeds_CD: Tensor, max_directions: int | None = None) -> Tensor:
    """P* = sum over i = 2 .. m of e_i e_i^T, (D, D) float64 on the CPU, e_i the right singular vectors of the class
    embeddings by falling singular value, uncentred. The first, which all classes share, is left out, and so are those
    that the classes don't span.

    With m = D (more classes than D, no limit) that is I - e_1 e_1^T.

    Args:
        max_directions: m at most, at least 2; None takes all.

    Raises ValueError where P* is arbitrary, since singular values are equal at one of its ends, and where nothing is
    left of the classes, or of one.
    """
    embeds_CD = class_embeds_CD.detach().double().cpu()
    _, singular_M, directions_MD = torch.linalg.svd(embeds_CD, full_matrices=False)
    least = RESOLUTION * float(singular_M[0])
    rank = int((singular_M > least).sum())
    if rank < 2:
        raise ValueError("class embeddings are all in one direction: nothing tells them apart; set other classes.")
    last = rank if max_directions is None else min(rank, max_directions)
    if float(singular_M[0] - singular_M[1]) <= least:
        raise ValueError(
            f"class embeddings have two equal largest singular values, {float(singular_M[0]):.6g}: which direction to "
            "leave out is arbitrary; set other classes or templates, or beta=0."
        )
    if last < rank and float(singular_M[last - 1] - singular_M[last]) <= least:
        raise ValueError(f"max_directions={max_directions!r} parts equal singular values; give another number.")
    kept_KD = directions_MD[1:last]
    projection_DD = kept_KD.T @ kept_KD
    lost_C = (embeds_CD @ projection_DD).norm(dim=1) <= RESOLUTION * embeds_CD.norm(dim=1)
    if lost_C.any():
        raise ValueError(
            f"class {int(lost_C.nonzero()[0])} lies in the direction that all classes share, and nothing is left of "
            "it; set other classes or templates, or beta=0."
        )
    return projection_DD


def renyi_entropy(log_p: Tensor, alpha: float) -> Tensor:
    """H_a(p) = log(sum_c p_c^a) / (1 - a) of log probabilities (..., C), in nats: 0 .. log C."""
    return (alpha * log_p).logsumexp(dim=-1) / (1 - alpha)


@dataclass(frozen=True, kw_only=True)
class BaFTA(Defence):
    """Classifies each view by the texts and by centroids that follow the images of the stream; the surer a prediction
    is, the more it counts.

        p = (sum_b R(p^b) p^b + beta sum_b R(q^b) q^b) / (sum_b R(p^b) + beta sum_b R(q^b)),  z = log p
        p^b = softmax(s cos(f(x^b), t)),  q^b = softmax(s cos(pi(f(x^b)), w)),  pi(v) = P* v / ||P* v||

    Centroids begin as w_c = pi(t_c), k_c = 0; after each image w_y <- norm(k_y w_y + pi(v)), k_y <- k_y + 1, with y
    the nearest centroid of the image itself, v = f(x). R(p) = 1 - H_a(p) / log C, in [0, 1]; where it is 0 throughout,
    all views count alike. Predictions come before the update. `text_projection` makes P*.

    A stream: the order of images counts, and what is predicted for an image depends on those before it. Nothing that
    an attack asks changes the state. With `beta=0` (BaFTA-TE, the stateless control) the texts alone vote, and images
    are independent.

    With two classes P* has rank 1: every cosine with a centroid is 1 or -1, the vote q is one of two fixed vectors,
    and the nearest centroid, on which an image lies exactly, is never moved by it. A warning says so.

    Args:
        num_views: V, the image itself and num_views - 1 random crops, at least 2.
        beta: weight of the centroids, at least 0.
        alpha: a of the entropy, positive and not 1.
        weights: `"repaired"`, R; or `"literal"`, -H_a as it is printed, in numerator and denominator alike: there the
            signs cancel, and unsure views count more.
        max_directions: m, at least 2; None takes all that the classes span.
        assigned_by: what y is the class of: the centroids of the image itself, its texts, or p.
        moved_by: v: the image's feature, or the mean over the views of their pi.
        crop, chunk_size: as in `PromptTuning`.

    A gradient `"through"` is exact, R included, with the centroids as they stand (y moves later images only); to
    `"identity"` the weights R are constants. Raises ValueError for numbers out of range, class embeddings without P*,
    and a state of other classes or another model; TypeError for what is no `BaFTAState`.
    Source: arXiv 2406.11309, of which no code was released; equations, a = 0.5 and the views as its reviews tell them.
    Never stated, and ours: beta, R in place of the printed weight, what y and v are taken of, and k_c = 0. The cut at
    150 directions is unchecked.
    """

    num_views: int = 64
    beta: float = 1.0
    alpha: float = 0.5
    weights: Weights = "repaired"
    max_directions: int | None = 150
    assigned_by: AssignedBy = "centroids"
    moved_by: MovedBy = "image"
    crop: RandomResizedCrop = field(default_factory=RandomResizedCrop)
    chunk_size: int | None = None

    paper = Paper.cited("bafta", "hu2024bafta", arxiv="2406.11309")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_views(self.num_views, self.chunk_size)
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be a number of at least 0.")
        if not 0 < self.alpha < math.inf or self.alpha == 1:
            raise ValueError(f"alpha={self.alpha!r} must be positive and not 1.")
        check_choice(Weights, weights=self.weights)
        check_choice(AssignedBy, assigned_by=self.assigned_by)
        check_choice(MovedBy, moved_by=self.moved_by)
        if self.max_directions is not None:
            check_whole(2, max_directions=self.max_directions)

    @property
    def traits(self) -> Traits:
        return Traits(randomised=True, episodic=self.beta == 0)

    @property
    def name(self) -> str:
        return "bafta" if self.beta else "bafta_te"

    def idle_settings(self) -> dict[str, str]:
        return {} if self.beta else dict.fromkeys(CENTROIDS_ALONE, "with beta=0, which has no centroids")

    def start(self, classifier: ZeroShotClassifier) -> BaFTAState | None:
        """The centroids before the first image; None with `beta=0`.

        Raises ValueError as `text_projection` does.
        """
        if self.beta == 0:
            return None
        self.check(classifier)
        with torch.inference_mode(False), torch.no_grad():
            embeds_CD = classifier.class_embeds.detach()
        projection_DD = text_projection(embeds_CD, self.max_directions)
        kind = torch.promote_types(embeds_CD.dtype, torch.float32)
        if len(embeds_CD) == 2:
            _warn_of_two_classes()
        embeds_CD = embeds_CD if embeds_CD.dtype == kind else embeds_CD.to(kind)
        space = TextSpace(
            projection_DD.to(embeds_CD), tuple(classifier.class_names), embeds_CD, fingerprints(classifier)
        )
        counts_C = torch.zeros(len(embeds_CD), dtype=torch.long, device=embeds_CD.device)
        return BaFTAState(space.project(embeds_CD), counts_C, space)

    def _predict(
        self, classifier: ZeroShotClassifier, images_BCHW: Tensor, state: Any, seed: int, path: GradientPath
    ) -> Prediction:
        if self.beta:
            if not isinstance(state, BaFTAState):
                raise TypeError(f"state is a {type(state).__name__}; give that of BaFTA.start or of a prediction.")
            state.space.check(classifier)
        views = draw_boxes(images_BCHW, self.num_views, self.crop, seed)
        with torch.set_grad_enabled(path != "none"):
            embeds_BVD = embed_views(classifier, images_BCHW, views, {}, self.chunk_size)
            log_p_BVC = _log_softmax(classifier, embeds_BVD.flatten(0, 1), classifier.class_embeds, len(images_BCHW))
            fell_back = torch.zeros(len(images_BCHW), dtype=torch.bool, device=images_BCHW.device)
            fixed = path == "identity"
            if not self.beta:
                return Prediction(self.aggregate(log_p_BVC, fixed_weights=fixed), fell_back)
            pi_BVD = state.space.project(embeds_BVD)
            logits = []
            for log_p_VC, pi_VD in zip(log_p_BVC, pi_BVD, strict=True):
                log_q_VC = _log_softmax(classifier, pi_VD, state.centroids_CD, 1)[0]
                logits.append(self.aggregate(log_p_VC, log_q_VC, fixed_weights=fixed))
                state = self._after(state, log_p_VC, log_q_VC, logits[-1], pi_VD)
        return Prediction(torch.stack(logits), fell_back, state=state)

    def aggregate(self, log_p: Tensor, log_q: Tensor | None = None, *, fixed_weights: bool = False) -> Tensor:
        """log p of all views together, (..., C), from log probabilities (..., V, C) by the texts and, unless beta is
        0, by the centroids.

        Args:
            fixed_weights: take the weights of views as constants of a gradient.
        """
        parts = [log_p] if log_q is None else [log_p, log_q]
        weights = [self.log_weights(part) for part in parts]
        if log_q is not None:
            weights[1] = weights[1] + math.log(self.beta)
        log_w = torch.cat(weights, dim=-1)
        log_w = log_w.detach() if fixed_weights else log_w
        votes = log_w[..., None] + torch.cat(parts, dim=-2)
        return votes.logsumexp(dim=-2) - log_w.logsumexp(dim=-1, keepdim=True)

    def log_weights(self, log_p: Tensor) -> Tensor:
        """log R of each prediction (..., C), never below the smallest number: so that views without any weight at all
        count alike.
        """
        entropy = renyi_entropy(log_p, self.alpha)
        weight = entropy if self.weights == "literal" else 1 - entropy / math.log(log_p.shape[-1])
        return weight.clamp_min(torch.finfo(weight.dtype).tiny).log()

    def _after(
        self, state: BaFTAState, log_p_VC: Tensor, log_q_VC: Tensor, log_C: Tensor, pi_VD: Tensor
    ) -> BaFTAState:
        """The state after an image: of its views, the first is the image itself."""
        told = {"centroids": log_q_VC[0], "text": log_p_VC[0], "aggregate": log_C}[self.assigned_by]
        direction_D = pi_VD[0] if self.moved_by == "image" else F.normalize(pi_VD.mean(dim=0), dim=-1)
        return state.moved(told.argmax(dim=-1, keepdim=True), direction_D)

    def _bytes_per_image(self, classifier: ZeroShotClassifier) -> float:
        at_once = self.num_views if self.chunk_size is None else min(self.num_views, self.chunk_size)
        return at_once * activation_bytes(classifier, graph=False)


@cache
def _warn_of_two_classes() -> None:
    """Once."""
    logger.warning("BaFTA has two classes: all cosines with centroids are 1 or -1, and images don't move centroids.")


def _log_softmax(classifier: ZeroShotClassifier, embeds_ND: Tensor, classes_CD: Tensor, rows: int) -> Tensor:
    """log probabilities (rows, N / rows, C) at the classifier's temperature."""
    logits_NC = classifier.score(embeds_ND, classes_CD)[0]
    return logits_NC.log_softmax(dim=-1).unflatten(0, (rows, -1))
