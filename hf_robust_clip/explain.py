"""Where a classifier looks: text-guided maps of patches, and saliency by pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from .checks import NO_GRADIENT, check_choice, check_logits, checked_images, checked_labels
from .modeling import ZeroShotClassifier, without_gradients

Score = Literal["logit", "log_odds"]


def patch_map(classifier: Any, images_BCHW: Tensor) -> Tensor:
    """What each patch of an image has in common with the text of each class:

        M[b, c, i, j] = cos(F_ij(x_b), t_c)

    with F_ij(x) the last layer's token of the patch in row i, column j, sent through what follows that layer (norm and
    projection) as if it were the class token, and t_c the class embedding of unit length. Class token and prompts are
    no patches, and left out. SigLIP has no class token: F_ij(x) is what its attention pooling would give if all tokens
    were equal to this one (`SiglipForZeroShotClassification.project_patches`).

    Patch (i, j) stands at the pixels [i * p, (i + 1) * p) x [j * p, (j + 1) * p), with p the encoder's patch size, of
    the image that the encoder takes, to which smaller images are enlarged first (`map_share` says where a map ends).
    By then its token has mixed with all others: the map says where the model keeps something that resembles the text,
    not where in the picture that comes from. Pretraining compares the pooled feature alone with texts; nothing makes
    patches agree with them, and maps of plain CLIPs often are higher beside an object than on it. Compare maps of one
    class, image or model with another's; a single one proves little.

    Args:
        classifier: `ZeroShotClassifier` with its classes set, or a `PeftModel` around one.
        images_BCHW: float in [0, 1], not normalised, squares of the classifier's `input_size`.

    Returns:
        (B, C, h, w), cosines in [-1, 1], float32 or float64, detached; h = w = image_size // patch_size.

    Raises TypeError for another kind of classifier, a defended one among them: a defence looks at other images, or
    with other prompts; ValueError as the classifier does for images that aren't its own (size, shape, range) and where
    it has no classes; FloatingPointError for what isn't finite.

    Source: arXiv 2410.21802 (TGA-ZSR, NeurIPS 2024), which has the same tokens and texts; as a loss it normalises
    them otherwise (`objectives.TGAZSR`). Cosine is what the classifier itself compares by. That plain CLIPs mark what
    lies beside an object: arXiv 2304.05653.
    """
    with _looked_at(classifier, images_BCHW) as (model, images_BCHW), torch.no_grad():
        found = model(pixel_values=images_BCHW, output_patches=True)
        check_logits(found.logits)
        head = torch.promote_types(found.patch_embeds.dtype, torch.float32)
        patches_BPD = F.normalize(found.patch_embeds.to(head), dim=-1)
        texts = found.class_embeds.to(head)
        if texts.dim() == 3:  # classes of each group of images
            texts = texts.repeat_interleave(len(images_BCHW) // len(texts), dim=0)
        map_BCP = texts @ patches_BPD.mT
    side = _grid_side(model)
    if map_BCP.shape[2] != side**2:
        raise ValueError(f"the model gives {map_BCP.shape[2]} patches of an image, not {side} x {side}.")
    return map_BCP.unflatten(2, (side, side))


def map_share(classifier: Any) -> float:
    """Share of an image's side that the patches cover, in (0, 1]: 1 unless the patch size doesn't divide the side;
    then the right and the lower edge are in no patch, 6 of 384 pixels with SigLIP's patches of 14.
    """
    vision = _core(classifier).config.vision_config
    return (vision.image_size // vision.patch_size) * vision.patch_size / vision.image_size


def saliency(classifier: Any, images_BCHW: Tensor, labels_B: Any = None, *, score: Score = "logit") -> Tensor:
    """How fast the score of a class changes with each pixel:

        S[b, i, j] = || d g_y(x_b) / d x_b[:, i, j] ||_2

    over the channels, with g_y = z_y, the logit (`"logit"`), or g_y = z_y - log sum_{c != y} exp(z_c), the log odds
    log(p_y / (1 - p_y)) of y against all other classes (`"log_odds"`). What raises the logits of all classes alike,
    as the contrast of a picture may, counts in the first and cancels in the second. The log-probability isn't offered:
    its gradient is that of the log odds times 1 - p_y, and rounds to zero where the model is sure.

    A unit is one of g for each step of size 1 in [0, 1], along the pixel's steepest colour. It is a derivative: true
    of small changes. Models are told apart by the pattern, or on one scale by the size; each picture brought to its
    own largest value hides that a robust model's is many times smaller.

    Args:
        classifier: `ZeroShotClassifier` with its classes set, or a `PeftModel` around one.
        images_BCHW: float in [0, 1], not normalised, squares of the classifier's `input_size`.
        labels_B: the class y of each image; None takes the one that is predicted.
        score: g.

    Returns:
        (B, H, W), at least 0, of the images' own size, float32 or float64, detached.

    The gradient is of the classifier by the pixels alone, in eval mode: parameters keep their `grad`. Images don't
    influence one another. Raises as `patch_map` does, a defended classifier included: most defences have no gradient,
    or one that isn't theirs. Raises ValueError for labels that don't fit, an unknown score, log odds with a single
    class, and a classifier without gradients by the pixels (quantised).

    Source: arXiv 1312.6034 (Simonyan et al., 2013), who take the class score before the softmax; of the channels they
    take the largest absolute value, the norm here doesn't depend on the choice of colour axes.
    """
    check_choice(Score, score=score)
    with _looked_at(classifier, images_BCHW) as (model, images_BCHW), torch.enable_grad():
        if score == "log_odds" and len(model.class_names) == 1:
            raise ValueError(f"score={score!r} compares classes, but there is one, {model.class_names[0]!r}.")
        pixels_BCHW = images_BCHW.detach().clone().requires_grad_()
        logits_BC = model(pixel_values=pixels_BCHW).logits
        check_logits(logits_BC)
        labels_B = logits_BC.argmax(dim=1) if labels_B is None else checked_labels(labels_B, *logits_BC.shape)
        labels_B1 = labels_B.to(logits_BC.device)[:, None]
        score_B = logits_BC.gather(1, labels_B1).squeeze(1)
        if score == "log_odds":
            score_B = score_B - logits_BC.scatter(1, labels_B1, -torch.inf).logsumexp(dim=1)
        if not score_B.requires_grad:
            raise ValueError(NO_GRADIENT)
        (grad_BCHW,) = torch.autograd.grad(score_B.sum(), pixels_BCHW)
    return grad_BCHW.to(torch.promote_types(grad_BCHW.dtype, torch.float32)).norm(dim=1)


def _core(classifier: Any) -> ZeroShotClassifier:
    found = classifier.get_base_model() if isinstance(classifier, PeftModel) else classifier
    if not isinstance(found, ZeroShotClassifier):
        raise TypeError(
            f"classifier is a {type(classifier).__name__}; give a ZeroShotClassifier (of a defended one its "
            ".classifier: a defence itself has no map)."
        )
    return found


@contextmanager
def _looked_at(classifier: Any, images_BCHW: Any) -> Iterator[tuple[ZeroShotClassifier, Tensor]]:
    """The classifier in eval mode, without autocast and gradients of parameters; and its images, checked."""
    model, images_BCHW = _core(classifier), checked_images(images_BCHW, "images_BCHW")
    model.check_pixels(images_BCHW, values=False)
    training, device = model.training, images_BCHW.device.type
    with without_gradients(model), torch.inference_mode(False), torch.autocast(device, enabled=False):
        model.eval()
        try:
            with model.fixed_class_embeds():
                yield model, images_BCHW
        finally:
            model.train(training)


def _grid_side(model: ZeroShotClassifier) -> int:
    vision = model.config.vision_config
    return vision.image_size // vision.patch_size
