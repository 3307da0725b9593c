"""PGD where the best point of the ball is known exactly, and what it refuses."""

import pytest
import torch

from hf_robust_clip.attacks.pgd import input_gradient, pgd
from hf_robust_clip.threat_model import ThreatModel


@pytest.fixture
def weights():
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def images():
    values = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (1.4 * values - 0.2).clamp(0, 1)


def linear(weights):
    return lambda images: (images * weights).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("random_start", [True, False])
def test_linf_reaches_the_best_corner_of_a_linear_loss(weights, images, random_start):
    adv = pgd(linear(weights), images, ThreatModel("8/255"), num_steps=8, step_size="2/255", random_start=random_start)
    assert torch.equal(adv, (images + 8 / 255 * weights.sign()).clamp(0, 1))


def test_l2_reaches_the_best_point_of_a_linear_loss(weights, images):
    """On grey images the bounds play no part, and the best point is x + eps * w / ||w||."""
    grey = 0.4 + 0.2 * images
    best = grey + 0.3 * weights / weights.square().sum().sqrt()
    adv = pgd(linear(weights), grey, ThreatModel(0.3, "l2"), num_steps=1, step_size=0.5, random_start=False)
    torch.testing.assert_close(adv, best, rtol=0, atol=1e-14)
    adv = pgd(linear(weights), grey, ThreatModel(0.3, "l2"), num_steps=60, step_size=0.2)
    torch.testing.assert_close(adv, best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_short_step_has_the_asked_length(weights, norm):
    """A step of 0.01 well inside the ball: every value by 0.01 for L-inf, the whole image by 0.01 for L2."""
    grey = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    change = pgd(linear(weights), grey, ThreatModel(0.2, norm), num_steps=1, step_size=0.01, random_start=False) - grey
    length = change.abs() if norm == "linf" else change.square().sum(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(length, torch.full_like(length, 0.01), rtol=1e-12, atol=0)


def test_values_without_gradient_stand_still(weights, images):
    mask = torch.zeros_like(weights)
    mask[0] = 1
    adv = pgd(linear(weights * mask), images, ThreatModel(0.1), num_steps=3, step_size=0.05, random_start=False)
    assert torch.equal(adv[:, 1:], images[:, 1:])
    assert not torch.equal(adv[:, 0], images[:, 0])


def test_keep_best_keeps_the_start_where_steps_only_harm(images):
    """At its peak every step lowers the loss; the peak itself is kept for those images, image by image."""
    peak = images.clone()
    peak[3:] = (images[3:] + 0.1).clamp(0, 1)
    settings = dict(threat_model=ThreatModel(0.2), num_steps=1, step_size=0.15, random_start=False, keep_best=True)
    adv = pgd(lambda x: -(x - peak).abs().sum(dim=(1, 2, 3)), images, **settings)
    assert torch.equal(adv[:3], images[:3])
    assert not torch.equal(adv[3:], images[3:])


def test_on_gradient_sees_every_gradient(weights, images):
    seen = []
    pgd(linear(weights), images, ThreatModel(0.1), num_steps=4, step_size=0.05, on_gradient=seen.append)
    assert len(seen) == 4
    assert all(torch.equal(grad, weights.expand_as(images)) for grad in seen)


def test_input_gradient_returns_losses_and_their_gradient(weights, images):
    losses, grad = input_gradient(lambda x: (x * weights).square().sum(dim=(1, 2, 3)), images)
    torch.testing.assert_close(losses, (images * weights).square().sum(dim=(1, 2, 3)))
    torch.testing.assert_close(grad, 2 * images * weights.square())
    assert not losses.requires_grad
    assert not images.requires_grad


def test_a_batch_mean_is_refused(weights, images):
    with pytest.raises(ValueError, match=r"one loss per image, shape \(6,\), got \(\).*reduction='none'"):
        pgd(lambda x: (x * weights).mean(), images, ThreatModel(0.1), num_steps=1, step_size=0.1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_steps=2.0), "num_steps=2.0"),
        (dict(step_size=0), "step_size=0 never moves"),
        (dict(step_size="x"), "step_size='x'"),
        (dict(step_size=-0.1), "step_size=-0.1"),
    ],
)
def test_bad_settings_are_named(weights, images, settings, text):
    with pytest.raises(ValueError, match=text):
        pgd(linear(weights), images, ThreatModel(0.1), **{"num_steps": 1, "step_size": 0.1, **settings})


def test_normalised_images_are_refused_with_the_likely_cause(weights, images):
    with pytest.raises(ValueError, match="Did you normalise"):
        pgd(linear(weights), (images - 0.5) / 0.25, ThreatModel(0.1), num_steps=1, step_size=0.1)


def test_an_empty_batch_stays_empty(weights, images):
    assert pgd(linear(weights), images[:0], ThreatModel(0.1), num_steps=1, step_size=0.1).shape == (0, 3, 4, 4)
