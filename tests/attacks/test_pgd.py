"""PGD where the best point of the ball is known exactly, PGD until misclassified, and what they refuse."""

import pytest
import torch
from victims import curved, fallen, recorded

from hf_robust_clip.attacks.losses import cross_entropy, cw_margin
from hf_robust_clip.attacks.pgd import have_fallen, input_gradient, pgd, pgd_until_misclassified
from hf_robust_clip.prediction import by_logits, withstood
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
    with pytest.raises(ValueError, match=r"gives \(\), not one loss per image.*reduction='none'"):
        pgd(lambda x: (x * weights).mean(), images, ThreatModel(0.1), num_steps=1, step_size=0.1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_steps=2.0), "num_steps=2.0"),
        (dict(step_size=0), "step_size=0 never moves"),
        (dict(step_size=1e30), r"step_size=1e\+30"),
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


# ---- until misclassified


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize(("norm", "eps", "step_size"), [("linf", 0.015, 0.003), ("l2", 0.15, 0.03)])
def test_until_misclassified_is_a_loop_written_out(norm, eps, step_size, random_start):
    """The first misclassified of the start and all iterates, the last included; else the last."""
    logits, images, labels = curved(size=30)
    labels[4] = (labels[4] + 1) % 10
    threat_model, steps = ThreatModel(eps, norm), 7
    expected, when = images.clone(), []
    for i in range(len(images)):
        image, label = images[i : i + 1], labels[i : i + 1]
        if fallen(logits, image, label):
            when.append(-1)
            continue
        adv = threat_model.random_start(image, 9) if random_start else image
        for k in range(steps + 1):
            if k == steps or fallen(logits, adv, label):
                break
            _, grad = input_gradient(lambda x, label=label: cw_margin(logits(x), label), adv)
            adv = threat_model.ascend(adv, grad, image, step_size)
        expected[i], _ = adv[0], when.append(k)
    found = pgd_until_misclassified(
        logits, images, labels, threat_model, loss=cw_margin, num_steps=steps, step_size=step_size,
        random_start=random_start, seed=9,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert when.count(-1) == 1
    assert len(set(when)) > 4  # they leave at different steps


def test_leaving_early_changes_no_image():
    logits, images, labels = curved(size=20)
    settings = dict(threat_model=ThreatModel(0.01), loss=cross_entropy, num_steps=6, step_size=0.002)
    together = pgd_until_misclassified(logits, images, labels, **settings)
    alone = [
        pgd_until_misclassified(logits, images[i : i + 1], labels[i : i + 1], **settings) for i in range(len(images))
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-12)
    assert 0 < fallen(logits, together, labels).sum() < len(images)


def folded(images):
    """Class 1 rises with every step where the first value is high; elsewhere it peaks at the image's sum of 96."""
    total = images.flatten(1).sum(1)
    climb, peak = 8 * (total - 96) - 1, -(total - 96).abs() - 1
    rise = torch.where(images[:, 0, 0, 0] > 0.5, climb, peak)
    return torch.stack([torch.zeros_like(rise), rise], dim=1)


def test_a_cycle_is_left_and_finds_what_the_whole_walk_finds():
    """Steps of eps around a fold visit two corners in turn; other images of the batch go on, and fall late."""
    images = torch.full((6, 3, 8, 8), 0.5, dtype=torch.float64)
    images += 1e-3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[:, 0, 0, 0] = torch.tensor([0.2, 0.8, 0.2, 0.8, 0.2, 0.8])
    images[1::2] -= 0.04  # they reach class 1 after a few steps
    labels = torch.zeros(6, dtype=torch.long)
    results, taken = [], []
    for deterministic in (True, False):
        points = []
        results.append(
            pgd_until_misclassified(
                recorded(folded, points), images, labels, ThreatModel(0.06), loss=cross_entropy, num_steps=40,
                step_size=0.06 / 4, random_start=False, deterministic=deterministic,
            )
        )  # fmt: skip
        taken.append(sum(map(len, points)))
    broken = [fallen(folded, adv, labels).tolist() for adv in results]
    assert broken[0] == broken[1] == [False, True] * 3
    assert torch.equal(results[0][1::2], results[1][1::2])
    assert taken[1] >= 3 * 40
    assert taken[0] < taken[1] / 2


def test_a_classifier_that_draws_goes_on_where_pixels_repeat():
    """Its logits change from call to call, so that standing still now says nothing of the next step."""
    calls = []

    def alternating(images):
        calls.append(1)
        rise = (images * (0.0 if len(calls) < 6 else 1.0)).flatten(1).sum(1)
        return torch.stack([torch.full_like(rise, 97.0), rise], dim=1)

    image, labels = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    settings = dict(loss=cross_entropy, num_steps=10, step_size=0.01, random_start=False, deterministic=False)
    adv = pgd_until_misclassified(alternating, image, labels, ThreatModel(0.06), **settings)
    assert fallen(alternating, adv, labels).all()


def test_a_fast_classifier_that_is_wrong_breaks_and_stops_nothing():
    logits, images, labels = curved()
    own = torch.nn.functional.one_hot(labels, 10)

    def wrong(pixels):
        return logits(pixels) - 1e3 * own

    settings = dict(loss=cw_margin, num_steps=5, step_size=1e-4)
    seen = []
    adv = pgd_until_misclassified(
        wrong, images, labels, ThreatModel(1e-3), confirm=by_logits(logits), on_gradient=seen.append, **settings
    )
    assert [len(grad) for grad in seen] == [len(images)] * 5
    assert not fallen(logits, adv, labels).any()
    every = wrong(images)
    assert not have_fallen(every, images, labels, by_logits(logits)).any()
    assert have_fallen(every, images, labels, None).all()


def test_a_classifier_that_takes_no_empty_batch_is_given_none():
    """CLIP is one: its attention can't be reshaped."""
    logits, images, labels = curved()

    def strict(pixels):
        assert len(pixels) > 0
        return logits(pixels)

    settings = dict(loss=cross_entropy, num_steps=2, step_size=0.01)
    for own in (labels[:0], (labels + 1) % 10):  # none given; none left
        adv = pgd_until_misclassified(strict, images[: len(own)], own, ThreatModel(0.1), **settings)
        assert torch.equal(adv, images[: len(own)])
    assert withstood(by_logits(strict), images[:0], labels[:0]).tolist() == []


def test_until_misclassified_refuses_what_pgd_refuses():
    logits, images, labels = curved()
    settings = dict(loss=cross_entropy, num_steps=2, step_size=0.01)
    for changes, text in ((dict(num_steps=0), "num_steps=0"), (dict(step_size=0), "never moves")):
        with pytest.raises(ValueError, match=text):
            pgd_until_misclassified(logits, images, labels, ThreatModel(0.1), **{**settings, **changes})
    with pytest.raises(ValueError, match="Did you normalise"):
        pgd_until_misclassified(logits, (images - 0.5) / 0.25, labels, ThreatModel(0.1), **settings)
    with pytest.raises(ValueError, match="one loss per image"):
        pgd_until_misclassified(
            logits, images, labels, ThreatModel(0.1), **{**settings, "loss": lambda z, y: cross_entropy(z, y).mean()}
        )
