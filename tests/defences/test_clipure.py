"""CLIPure-Cos: a naive version by autograd, what its steps do to an embedding, and its gradients."""

import math
from dataclasses import replace

import pytest
import torch
from prompted_clip import NAMES, TEMPLATE, make_base, make_images, make_prompted
from torch.nn import functional as F

from hf_robust_clip.defences.clipure import CLIPure

CLOSE = dict(rtol=0, atol=1e-9)


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def naive(embeds_BD, text_D, num_steps, step_size, over, exact=False):
    """Gradients of the cosine by autograd, one image after the other; with their own graph if `exact`."""
    units = [e / e.norm() for e in embeds_BD]
    for _ in range(num_steps):
        pulls = []
        for u in units:
            u = u if u.requires_grad else u.requires_grad_()
            cosine = u @ text_D / (u.norm() * text_D.norm())
            pulls.append(torch.autograd.grad(cosine, u, create_graph=exact, retain_graph=True)[0])
        whole = torch.stack(pulls).square().sum().sqrt()
        moved = [
            u + step_size * g / (whole if over == "batch" else g.norm()) for u, g in zip(units, pulls, strict=True)
        ]
        units = [u / u.norm() for u in moved]
    return torch.stack(units)


def parts(classifier, count=3):
    images = make_images(count)
    with torch.no_grad():
        text = classifier.requires_grad_(False).blank_embeds().mean(0)
        return images, classifier.encode_images(images), text / text.norm()


# ---- the formula


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("row", ["plain", "VLI"])
def test_predictions_are_those_of_the_naive_version(over, row):
    classifier = make_base() if row == "plain" else make_prompted(row).get_base_model()
    images, embeds, text = parts(classifier)
    for num_steps, step_size in ((1, 0.5), (3, 2.0)):
        defence = CLIPure(num_steps=num_steps, step_size=step_size, normalised_over=over)
        found = defence.predict(classifier, images).logits
        units = naive(embeds, text, num_steps, step_size, over).detach()
        wanted = classifier.logit_scale.exp() * units @ classifier.class_embeds.T
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
        assert (found - classifier(images).logits).abs().max() > 1e-2


def test_a_step_turns_by_the_arcus_tangens_of_its_size():
    text = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    angle = math.radians(78)
    embed = torch.tensor([[math.cos(angle), 0.0, math.sin(angle)]], dtype=torch.float64)
    for size in (0.1, 1.0, 30.0):
        found = CLIPure(num_steps=1, step_size=size).purified(5 * embed, text)[0]
        turned = angle - math.atan(size)
        torch.testing.assert_close(found, double([math.cos(turned), 0, math.sin(turned)]), **CLOSE)


def test_the_authors_numbers_bring_an_image_by_itself_back():
    """Nearer to the text than 88.1 degrees, as images of CLIP are; exactly, so is the gradient."""
    text = F.normalize(torch.linspace(-1, 2, 8).double(), dim=0)
    embeds = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    embeds = F.normalize(embeds + (0.3 - embeds @ text)[:, None] * text, dim=1)
    defence = CLIPure()
    assert (defence.num_steps, defence.step_size, defence.normalised_over) == (10, 30.0, "image")
    torch.testing.assert_close(defence.purified(embeds, text), embeds, **CLOSE)
    weights = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double()
    grads = {}
    for path in ("through", "identity"):
        at = embeds.clone().requires_grad_()
        grads[path] = torch.autograd.grad((defence.purified(at, text, path) * weights).sum(), at)[0]
    across = weights - (weights * embeds).sum(1, keepdim=True) * embeds
    torch.testing.assert_close(grads["through"], across, **CLOSE)
    assert grads["identity"].norm() < 1e-10 * across.norm()  # 30 ** -10 of it, and less
    released = replace(defence, normalised_over="batch").purified(embeds, text)
    assert (released - embeds).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(
        replace(defence, normalised_over="batch").purified(embeds[:1], text), embeds[:1], **CLOSE
    )


def test_an_embedding_along_the_text_stays():
    text = F.normalize(torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=0)
    for over in ("image", "batch"):
        at = torch.stack([2 * text, -text]).requires_grad_()
        found = CLIPure(normalised_over=over).purified(at, text, "through")
        torch.testing.assert_close(found.detach(), torch.stack([text, -text]), **CLOSE)
        assert torch.autograd.grad(found.sum(), at)[0].isfinite().all()


@pytest.mark.parametrize("over", ["image", "batch"])
def test_gradients_are_those_of_autograd(over):
    classifier = make_base()
    images, _, text = parts(classifier)
    defence = CLIPure(num_steps=3, step_size=0.7, normalised_over=over)
    weights = torch.randn(3, len(NAMES), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = {}
    for path in ("through", "identity"):
        at = images.clone().requires_grad_()
        found[path] = torch.autograd.grad((defence.predict(classifier, at, path=path).logits * weights).sum(), at)[0]
        own = images.clone().requires_grad_()
        units = naive(classifier.encode_images(own), text, 3, 0.7, over, exact=path == "through")
        logits = classifier.logit_scale.exp() * units @ classifier.class_embeds.T
        wanted = torch.autograd.grad((logits * weights).sum(), own)[0]
        torch.testing.assert_close(found[path], wanted, rtol=1e-6, atol=1e-7)
    assert (found["through"] - found["identity"]).norm() > 0.1 * found["through"].norm()


def test_the_text_that_names_no_class():
    classifier = make_base().requires_grad_(False)
    ids = classifier.tokenize(["a bc d ."])
    alone = F.normalize(classifier.encode_texts(ids, 1)[0], dim=-1)
    assert TEMPLATE == "a bc d {}."
    torch.testing.assert_close(classifier.blank_embeds(), alone, **CLOSE)
    both = classifier.blank_embeds((TEMPLATE, "ab {} c"))
    torch.testing.assert_close(both[:1], alone, **CLOSE)
    assert both.shape == (2, 12) and classifier.class_names == NAMES and classifier.templates == (TEMPLATE,)
    images = make_images(2)
    other, given = CLIPure(step_size=0.5, templates=["ab {} c"]), CLIPure(step_size=0.5, templates=(TEMPLATE,))
    own = CLIPure(step_size=0.5).predict(classifier, images).logits
    assert torch.equal(given.predict(classifier, images).logits, own)
    assert (other.predict(classifier, images).logits - own).abs().max() > 1e-3
    with torch.no_grad():
        classifier.text_projection.weight.mul_(-1)
    torch.testing.assert_close(classifier.blank_embeds(), -alone, **CLOSE)  # nothing stale is kept
    for wrong in ("{}", "no place", "{}, which is {description}"):
        with pytest.raises(ValueError, match="template"):
            CLIPure(templates=[wrong]).predict(classifier, images)
