"""Whether attacks that go through a defence have anything to go by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..attacks.pgd import LogitsFn
from .attack_views import AttackView, Scene


def margin_gradient(logits_fn: LogitsFn, images_BCHW: Tensor) -> Tensor | None:
    """The gradient of z_first - z_second by the images (B, C, H, W), the two highest logits of each; None where there
    is no graph. However sure a classifier is, this one doesn't vanish by itself.
    """
    images_BCHW = images_BCHW.detach().requires_grad_()
    logits_BC = logits_fn(images_BCHW)
    if not logits_BC.requires_grad:
        return None
    best_B2 = logits_BC.topk(2, dim=1).values
    return torch.autograd.grad((best_B2[:, 0] - best_B2[:, 1]).sum(), images_BCHW, allow_unused=True)[0]


def blind_views(views: Iterable[AttackView], scene: Scene, images_BCHW: Tensor) -> tuple[str, ...]:
    """What a report must say of views through the defence that get gradients of exactly zero, or none that is finite,
    for some of a few images, with the reason that the defence gives (`Defence.masked`).

    Raises ValueError for a defence that gives such a view no gradient at all: nothing could be attacked through it.
    """
    scene = replace(scene, eot=1, on_gradient=None)
    found = []
    for view in {view.name: view for view in views if view.goes_through}.values():
        with torch.enable_grad():
            gradient = margin_gradient(view.victim(scene, images_BCHW).gradient_fn, images_BCHW)
        name = scene.defence.name
        if gradient is None:
            raise ValueError(
                f"{name} gives view {view.name!r} no gradient: its logits have no graph. Let `_predict` keep one "
                "unless path is 'none', or attack by other views (DefenceBlind(), Queries())."
            )
        norm_B = gradient.flatten(1).norm(dim=1)
        blind = int((~norm_B.isfinite() | (norm_B == 0)).sum())
        if blind:
            why = "" if view.path is None else scene.defence.masked.get(view.path, "")
            told = f"its gradients through {name} are zero on {blind} of the first {len(norm_B)} images"
            found.append(f"view {view.name!r} is blind: {told} ({why or 'of which it gives no reason'})")
    return tuple(found)
