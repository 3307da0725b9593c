"""Projected gradient descent (Madry et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import NO_GRADIENT, check_whole, checked_labels
from ..prediction import Predict, Prediction, by_logits, withstood
from ..threat_model import ThreatModel, parse_radius

LossFn = Callable[[Tensor], Tensor]
LogitsFn = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1] to logits (B, classes)
ClassificationLoss = Callable[[Tensor, Tensor], Tensor]  # logits and labels to one value per image, to be maximised
OnGradient = Callable[[Tensor], None]
LONGEST = 1000.0  # a step further than any two images lie apart, of which rounding would leave nothing


@dataclass(frozen=True)
class PGDSettings:
    """How PGD walks. `step_size` is in pixel units of [0, 1] (float or fraction such as `"1/255"`).

    Raises ValueError for fewer than one step or a step size that is not positive, or beyond 1000.
    """

    num_steps: int
    step_size: float
    random_start: bool = True
    keep_best: bool = False

    def __post_init__(self) -> None:
        check_whole(1, num_steps=self.num_steps)
        step_size = parse_radius(self.step_size, "step_size")
        if step_size == 0:
            raise ValueError("step_size=0 never moves an image; give a positive step such as '1/255'.")
        if step_size > LONGEST:
            raise ValueError(f"step_size={step_size:g} leaves every image; steps are in units of [0, 1].")
        object.__setattr__(self, "step_size", step_size)


def input_gradient(loss_fn: LossFn, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The losses (B,) and the gradient of their sum with respect to the images, (B, C, H, W).

    Works under `torch.no_grad` too; no parameter's `.grad` is touched. Raises ValueError unless `loss_fn` returns one
    loss per image.
    """
    with torch.enable_grad():
        images_BCHW = images_BCHW.detach().requires_grad_()
        losses_B = loss_fn(images_BCHW)
        if not losses_B.requires_grad:
            raise ValueError(NO_GRADIENT)
        if losses_B.shape != images_BCHW.shape[:1]:
            given = tuple(losses_B.shape)
            raise ValueError(f"loss_fn gives {given}, not one loss per image; reduction='none' does.")
        (grad_BCHW,) = torch.autograd.grad(losses_B.sum(), images_BCHW, allow_unused=True)
    if grad_BCHW is None:
        raise ValueError(NO_GRADIENT)
    return losses_B.detach(), grad_BCHW


def logits_and_gradient(
    logits_fn: LogitsFn, loss: ClassificationLoss, images_BCHW: Tensor, labels_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, classes), losses (B,) and the gradient of their sum by the images (B, C, H, W), in one forward."""
    seen = []

    def loss_fn(pixels_BCHW: Tensor) -> Tensor:
        logits_BC = logits_fn(pixels_BCHW)
        seen.append(logits_BC.detach())
        return loss(logits_BC, labels_B)

    losses_B, grad_BCHW = input_gradient(loss_fn, images_BCHW)
    return seen[0], losses_B, grad_BCHW


def have_fallen(logits_BC: Tensor, images_BCHW: Tensor, labels_B: Tensor, confirm: Predict | None) -> Tensor:
    """Whether images fall by these logits and, where `confirm` is given, by its predictions too, (B,)."""
    fallen_B = ~Prediction(logits_BC).verdict(labels_B)
    if confirm is not None and fallen_B.any():
        rows = fallen_B.nonzero().squeeze(1)
        fallen_B[rows] = ~withstood(confirm, images_BCHW[rows], labels_B[rows])
    return fallen_B


def pgd(
    loss_fn: LossFn,
    images_BCHW: Tensor,
    threat_model: ThreatModel,
    *,
    num_steps: int,
    step_size: float,
    random_start: bool = True,
    keep_best: bool = False,
    seed: int = 0,
    on_gradient: OnGradient | None = None,
) -> Tensor:
    """Images in the threat model that raise `loss_fn`, by projected steepest ascent.

    x_0 = a uniform point of the ball (or x); x_{k+1} = project(x_k + step_size * sign(grad loss(x_k))) for L-inf, with
    the gradient divided by its L2 norm in place of the sign for L2. Images never influence one another.

    Args:
        loss_fn: maps adversarial images (B, C, H, W) to one loss per image (B,), to be maximised.
        images_BCHW: float images within the threat model's bounds ([0, 1], not normalised).
        num_steps: number of gradients taken per image, at least 1.
        step_size: step in pixel units, float or fraction such as `"1/255"`.
        random_start: start from `threat_model.random_start(images, seed)`; else from the images.
        keep_best: return, image by image, the iterate (start included) with the highest loss instead of the last one.
            It costs one forward more; the loss reached then never falls as `num_steps` grows.
        seed: of the random start.
        on_gradient: called with each gradient (B, C, H, W), for instance to count exact zeros.

    Returns:
        Detached images in the ball and within bounds; the images themselves if eps is 0.

    Raises ValueError for images outside the bounds or NaN, a bad step number or step size, and a loss of wrong shape.
    """
    settings = PGDSettings(num_steps, step_size, random_start, keep_best)
    images_BCHW = threat_model.checked(images_BCHW).detach()
    if threat_model.eps == 0 or len(images_BCHW) == 0:
        return images_BCHW.clone()
    adv_BCHW = threat_model.random_start(images_BCHW, seed) if random_start else images_BCHW.clone()
    best_BCHW, best_B = adv_BCHW, images_BCHW.new_full(images_BCHW.shape[:1], -torch.inf)

    def keep(losses_B: Tensor) -> None:
        nonlocal best_BCHW, best_B
        better_B = losses_B.to(best_B) > best_B
        best_BCHW = torch.where(better_B[:, None, None, None], adv_BCHW, best_BCHW)
        best_B = torch.where(better_B, losses_B.to(best_B), best_B)

    for _ in range(num_steps):
        losses_B, grad_BCHW = input_gradient(loss_fn, adv_BCHW)
        if on_gradient is not None:
            on_gradient(grad_BCHW)
        if keep_best:
            keep(losses_B)
        adv_BCHW = threat_model.ascend(adv_BCHW, grad_BCHW, images_BCHW, settings.step_size)
    if not keep_best:
        return adv_BCHW
    with torch.no_grad():
        keep(loss_fn(adv_BCHW))
    return best_BCHW


def pgd_until_misclassified(
    logits_fn: LogitsFn,
    images_BCHW: Tensor,
    labels_B: Tensor,
    threat_model: ThreatModel,
    *,
    loss: ClassificationLoss,
    num_steps: int,
    step_size: float,
    random_start: bool = True,
    seed: int = 0,
    confirm: Predict | None = None,
    deterministic: bool = True,
    on_gradient: OnGradient | None = None,
) -> Tensor:
    """PGD as an evaluation runs it: an image leaves the batch as soon as any iterate is misclassified.

    The iterates are those of `pgd`. An image also leaves when its iterates have entered a cycle (found by Brent's
    method, on exactly equal pixels): with a constant step and a deterministic classifier it would only visit again
    what it has visited.

    Args:
        logits_fn: the classifier, images to logits; used for the gradients.
        images_BCHW, labels_B: float images within bounds, and their classes.
        loss: of logits and labels, one value per image, maximised: `cross_entropy`, `cw_margin`, `dlr`.
        num_steps, step_size, random_start, seed, on_gradient: as in `pgd`.
        confirm: what decides, where `logits_fn` is cheaper or another; an iterate counts as misclassified only if this
            prediction is wrong too, and not flagged.
        deterministic: False for classifiers that draw random numbers; cycles then mean nothing.

    Returns:
        Detached images in the threat model: the first misclassified iterate where there is one, else the last iterate.
        An image that is misclassified as it is comes back unchanged.

    Raises ValueError as `pgd` does.
    """
    settings = PGDSettings(num_steps, step_size, random_start)
    found_BCHW = threat_model.checked(images_BCHW).detach().clone()
    labels_B = checked_labels(labels_B, len(found_BCHW)).to(found_BCHW.device)
    rows_B = withstood(confirm or by_logits(logits_fn), found_BCHW, labels_B).nonzero().squeeze(1)
    if threat_model.eps == 0 or len(rows_B) == 0:
        return found_BCHW
    clean, labels = found_BCHW[rows_B], labels_B[rows_B]
    adv = threat_model.random_start(clean, seed) if random_start else clean.clone()
    saved, saved_at = adv, 0
    for step in range(num_steps):
        logits, _, grad = logits_and_gradient(logits_fn, loss, adv, labels)
        if on_gradient is not None:
            on_gradient(grad)
        done = have_fallen(logits, adv, labels, confirm)
        following = threat_model.ascend(adv, grad, clean, settings.step_size)
        if deterministic:
            cycling = (following == saved).flatten(1).all(dim=1)
            if step + 1 >= 2 * saved_at:  # Brent: the saved iterate moves on at powers of two
                saved, saved_at = following, step + 1
            done = done | cycling
        found_BCHW[rows_B] = torch.where(done[:, None, None, None], adv, following)
        if done.any():
            left = ~done
            rows_B, clean, labels, saved = rows_B[left], clean[left], labels[left], saved[left]
            following = following[left]
        adv = following
        if len(rows_B) == 0:
            break
    return found_BCHW
