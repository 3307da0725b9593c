"""Whether every view of an attack has something to go by in front of a defence, or says why not."""

import torch

from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.evaluation.attack_views import Queries, Scene
from hf_robust_clip.evaluation.gradients import margin_gradient
from hf_robust_clip.evaluation.settings import EvaluationSettings

STEPS = {torch.float64: 1e-6, torch.float32: 5e-4}  # of finite differences: no grey level, by which draws go, changes


def refusal_of(defence, view):
    """Why an evaluation doesn't take the view; None if it does."""
    try:
        EvaluationSettings(["8/255"], attack=PGD(2), view=view).check_against(defence)
    except ValueError as error:
        return str(error)
    return None


def check_attackable(defence, classifier, view, images):
    """AssertionError if a view gets no gradient, zeros, or one of another function than the defence, and the defence
    doesn't say so: by `masked`, or by a refusal that names it.

    Args:
        images: (B, C, H, W) float64, of whole grey levels, none near 0 or 1.
    """
    refusal = refusal_of(defence, view)
    if refusal is not None:
        assert defence.name in refusal
        return
    with defence.prepared(classifier):
        scene = Scene(defence, classifier, state=defence.start(classifier))
        victim = view.victim(scene, images)
        if isinstance(view, Queries):
            answers = [victim.queried(pixels).logits for pixels in (images, images.flip(3))]
            assert (answers[0] - answers[1]).norm(dim=1).min() > 1e-6, "the answers don't look at the images"
            return
        gradient = margin_gradient(victim.gradient_fn, images)
        assert gradient is not None, "there is no graph"
        zeros = ((gradient == 0) | ~gradient.isfinite()).double().flatten(1).mean(dim=1).max()
        masked = defence.masked.get(view.path) if view.goes_through else None
        assert (zeros > 0.5) == bool(masked), f"{zeros:.0%} of the gradients are zero; masked is {masked!r}"
        if view.path is not None:
            check_same_function(scene, view.path, images)
        if view.path == "through" and not masked:
            check_exact(scene, images)


def parts(found):
    """What attacks take gradients of."""
    return [value for value in (found.logits, found.score, found.class_scores) if value is not None]


def check_same_function(scene, path, images):
    """AssertionError if the values along a gradient's path aren't those of the verdict."""
    along, verdict = scene.drawn(images, path), scene.drawn(images)
    assert (along.logits - verdict.logits).abs().max() < 1e-6, f"path {path!r} predicts otherwise than the verdict"
    if verdict.score is not None:
        assert (along.score - verdict.score).abs().max() < 1e-5


def check_exact(scene, images):
    """AssertionError if the gradient along "through" isn't the slope of what it says that it is the gradient of."""
    draw = torch.Generator().manual_seed(0)
    at = images.clone().requires_grad_()
    found = scene.drawn(at, "through")
    weights = [torch.randn(part.shape, generator=draw, dtype=torch.float64) for part in parts(found)]
    path = "none" if found.class_scores is None else "through"  # where these are made
    for number, weight in enumerate(weights):
        step = STEPS[parts(found)[number].dtype]
        value = (parts(found)[number].double() * weight).sum()
        (gradient,) = torch.autograd.grad(value, at, retain_graph=True)
        way = gradient / gradient.norm() + torch.randn(images.shape, generator=draw, dtype=torch.float64) / 20
        ends = [parts(scene.drawn(images + sign * step * way, path))[number].double() for sign in (1, -1)]
        slope = ((ends[0] - ends[1]) * weight).sum() / (2 * step)
        assert torch.isclose((gradient * way).sum(), slope, rtol=0.02), "the gradient isn't that of the defence"
