"""Projected gradient descent (Madry et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..threat_model import ThreatModel, check_images, parse_radius

LossFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PGDSettings:
    """How PGD walks. `step_size` is in pixel units of [0, 1] (float or fraction such as `"1/255"`).

    Raises ValueError for fewer than one step or a step size that is not positive.
    """

    num_steps: int
    step_size: float
    random_start: bool = True
    keep_best: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps!r} must be an integer of at least 1.")
        step_size = parse_radius(self.step_size, "step_size")
        if step_size == 0:
            raise ValueError("step_size=0 never moves an image; give a positive step such as '1/255'.")
        object.__setattr__(self, "step_size", step_size)


def input_gradient(loss_fn: LossFn, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The losses (B,) and the gradient of their sum with respect to the images, (B, C, H, W).

    Works under `torch.no_grad` too; no parameter's `.grad` is touched. Raises ValueError unless `loss_fn` returns one
    loss per image.
    """
    with torch.enable_grad():
        images_BCHW = images_BCHW.detach().requires_grad_()
        losses_B = loss_fn(images_BCHW)
        if losses_B.shape != images_BCHW.shape[:1]:
            raise ValueError(
                f"loss_fn must return one loss per image, shape ({len(images_BCHW)},), got {tuple(losses_B.shape)}; "
                "use reduction='none': a batch mean would make the attack depend on the batch."
            )
        (grad_BCHW,) = torch.autograd.grad(losses_B.sum(), images_BCHW)
    return losses_B.detach(), grad_BCHW


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
    on_gradient: Callable[[Tensor], None] | None = None,
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
    check_images(images_BCHW, bounds=threat_model.bounds)
    images_BCHW = images_BCHW.detach()
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
