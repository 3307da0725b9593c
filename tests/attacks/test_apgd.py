"""Auto-PGD: the authors' own, iterate by iterate, and classifiers whose distances are known."""

import pytest
import torch
from training_script import digits
from victims import Curved, authors_apgd, curved, fallen, linear, recorded

from hf_robust_clip.attacks.apgd import APGDSettings, apgd, apgd_targeted
from hf_robust_clip.attacks.losses import cross_entropy, cw_margin, dlr
from hf_robust_clip.prediction import by_logits
from hf_robust_clip.threat_model import ThreatModel

LOSSES = {"ce": cross_entropy, "dlr": dlr}
RADII = {"linf": ThreatModel(0.01), "l2": ThreatModel(0.1, "l2")}
each_norm = pytest.mark.parametrize("norm", RADII)
each_loss = pytest.mark.parametrize("loss", ["ce", "dlr", "targeted"])


def attack(logits_fn, images, labels, threat_model, *, loss, num_steps=10, num_targets=3, restarts=1, rho=0.75, **own):
    settings = APGDSettings(num_steps, restarts, rho=rho)
    if loss == "targeted":
        return apgd_targeted(logits_fn, images, labels, threat_model, settings, num_targets=num_targets, **own)
    return apgd(logits_fn, images, labels, threat_model, settings, loss=LOSSES[loss], **own)


def compare_with_authors(logits_fn, images, labels, threat_model, **settings):
    """Each image alone: the same images fall, at the same points. Theirs go on after a fall. Returns who fell.

    L2 lengths are rounded in another order: where two losses are equal but for that, an image may take another way.
    Which one does depends on the processor.
    """
    found, parted = [], []
    for i in range(len(images)):
        image, label, ours, theirs = images[i : i + 1], labels[i : i + 1], [], []
        adv = attack(recorded(logits_fn, ours), image, label, threat_model, **settings)
        authors = authors_apgd(recorded(logits_fn, theirs), image, label, threat_model, **settings)
        found.append(bool(fallen(logits_fn, adv, label)))
        assert found[-1] == bool(fallen(logits_fn, authors, label))
        assert len(ours) == len(theirs) if not found[-1] else 0 < len(ours) <= len(theirs)
        apart = (torch.cat(ours) - torch.cat(theirs[: len(ours)])).abs().amax(dim=(1, 2, 3))
        parted.append(bool(apart.max() > 2e-6))
    assert sum(parted) <= (threat_model.norm == "l2")
    return torch.tensor(found)


def float_digits(count):
    """The embedded model in float32 (the authors' code knows no other) and the first test digits."""
    model, data = digits(count)
    model.float().eval().requires_grad_(False)
    examples = [data[i] for i in range(len(data))]
    images = torch.stack([example["pixel_values"] for example in examples]).float()
    labels = torch.tensor([example["labels"] for example in examples])

    def logits(pixels):
        return model(pixels).logits

    return logits, images, labels


@pytest.fixture(scope="module")
def digit_images():
    """A few digits that the model reads correctly."""
    logits, images, labels = float_digits(14)
    right = ~fallen(logits, images, labels)
    return logits, images[right], labels[right]


# ---- the authors' code


@each_norm
@each_loss
def test_digits_fall_where_the_authors_code_fells_them(digit_images, loss, norm):
    logits, images, labels = digit_images
    eps = {"linf": "10/255", "l2": 0.4}[norm]
    steps = {"ce": 14, "dlr": 14, "targeted": 6}[loss]
    found = compare_with_authors(
        logits, images[:7], labels[:7], ThreatModel(eps, norm), loss=loss, num_steps=steps, num_targets=2
    )
    assert 0 < found.sum() < len(found)


@each_norm
@each_loss
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 17])
def test_every_iterate_is_the_authors(loss, norm, num_steps):
    """Step numbers so small that most checkpoint distances are 1."""
    logits, images, labels = curved(size=8, dtype=torch.float32)
    found = compare_with_authors(logits, images, labels, RADII[norm], loss=loss, num_steps=num_steps)
    assert 0 < found.sum() < len(found)


def test_every_iterate_of_a_hundred_is_the_authors():
    """All checkpoint distances, from 22 steps to 6."""
    logits, images, labels = curved(size=8, dtype=torch.float32)
    compare_with_authors(logits, images, labels, RADII["linf"], loss="ce", num_steps=100)


@each_norm
@pytest.mark.parametrize(("loss", "rho", "restarts"), [("ce", 1.0, 1), ("dlr", 0.3, 3), ("targeted", 0.75, 2)])
def test_restarts_and_rho_are_the_authors(loss, rho, restarts, norm):
    logits, images, labels = curved(size=6, dtype=torch.float32, seed=5)
    compare_with_authors(logits, images, labels, RADII[norm], loss=loss, num_steps=20, rho=rho, restarts=restarts)


@pytest.mark.slow
@each_norm
@each_loss
def test_robust_accuracy_of_500_digits_is_the_authors(loss, norm, monkeypatch):
    """With our noise (that of a batch of one, for every image) the authors' code fells the same images.

    With its own noise, which differs from image to image of a batch, it may differ by what noise does.
    """
    logits, images, labels = float_digits(500)

    def alone(draw):
        return lambda shape: draw([1, *shape[1:]]).expand(*shape)

    for eps in {"linf": ("6/255", "12/255"), "l2": (0.25, 0.5)}[norm]:
        arguments = (logits, images, labels, ThreatModel(eps, norm))
        settings = dict(loss=loss, num_steps=100)
        ours = ~fallen(logits, attack(*arguments, **settings), labels)
        with monkeypatch.context() as patch:
            for name in ("rand", "randn"):
                patch.setattr(torch, name, alone(getattr(torch, name)))
            same_noise = ~fallen(logits, authors_apgd(*arguments, **settings), labels)
        own_noise = ~fallen(logits, authors_apgd(*arguments, **settings), labels)
        figures = [100 * float(stands.double().mean()) for stands in (ours, same_noise, own_noise)]
        differ = int((ours != same_noise).sum())
        print(
            f"APGD {loss}, {arguments[3]}: ours {figures[0]:.1f} %, the authors' with our noise {figures[1]:.1f} % "
            f"({differ} images differ), with their own {figures[2]:.1f} %"
        )
        assert abs(figures[0] - figures[1]) <= 0.5
        assert differ <= 2
        assert abs(figures[0] - figures[2]) <= 1.5


# ---- known distances


@each_norm
@pytest.mark.parametrize(("loss", "classes"), [("targeted", 10), ("targeted", 4), ("dlr", 3), ("ce", 2)])
def test_linear_classifiers_fall_just_beyond_their_distance(loss, classes, norm):
    logits, images, labels, distances = linear(classes, size=3)
    for i, distance in enumerate(distances[norm].tolist()):
        image, label = images[i : i + 1], labels[i : i + 1]
        settings = dict(loss=loss, num_steps=40, num_targets=classes - 1)
        beyond = attack(logits, image, label, ThreatModel(1.01 * distance, norm), **settings)
        assert fallen(logits, beyond, label).all()
        within = attack(logits, image, label, ThreatModel(0.99 * distance, norm), **settings)
        assert not fallen(logits, within, label).any()


# ---- images and their batch


@each_norm
@each_loss
def test_an_image_does_not_depend_on_its_batch(loss, norm):
    """Neighbours fall at different steps, or are wrong from the start, and take nothing of an image with them."""
    logits, images, labels = curved()
    labels[3] = (labels[3] + 1) % 10
    together = attack(logits, images, labels, RADII[norm], loss=loss, num_steps=6, restarts=2)
    alone = [
        attack(logits, images[i : i + 1], labels[i : i + 1], RADII[norm], loss=loss, num_steps=6, restarts=2)
        for i in range(len(images))
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-12)
    assert torch.equal(together[3], images[3])
    broken = fallen(logits, together, labels)
    assert torch.equal(broken, fallen(logits, torch.cat(alone), labels))
    assert 1 < broken.sum() < len(images)
    assert (RADII[norm].distance(together, images) <= RADII[norm].eps * (1 + 1e-12)).all()
    assert together.min() >= 0 and together.max() <= 1


@each_norm
@each_loss
def test_iterates_of_an_image_go_on_unchanged_when_others_leave(loss, norm):
    logits, images, labels = curved()
    standing = ~fallen(logits, attack(logits, images, labels, RADII[norm], loss=loss, num_steps=20), labels)
    order = standing.int().sort(stable=True).indices  # a standing image is last, so the last row of every batch
    images, labels, together, alone = images[order], labels[order], [], []
    attack(recorded(logits, together), images, labels, RADII[norm], loss=loss, num_steps=20)
    attack(recorded(logits, alone), images[-1:], labels[-1:], RADII[norm], loss=loss, num_steps=20)
    assert len(together[0]) > len(together[-1])
    last = torch.stack([points[-1] for points in together])
    torch.testing.assert_close(last, torch.cat(alone), rtol=0, atol=1e-9)


@each_norm
@each_loss
def test_an_image_leaves_at_its_first_misclassified_iterate(loss, norm):
    logits, images, labels = curved(size=1, seed=3)
    points, large = [], ThreatModel({"linf": 0.3, "l2": 4.0}[norm], norm)
    adv = attack(recorded(logits, points), images, labels, large, loss=loss)
    broken = [bool(fallen(logits, point, labels)) for point in points]
    assert broken.index(True) == len(points) - 1
    assert torch.equal(adv, points[-1])


def test_without_success_the_iterate_of_highest_loss_is_returned():
    """One long step over a peak: the loss is highest at the start."""
    points = []

    def peaked(pixels):
        rise = -(pixels - 0.5).sum(dim=(1, 2, 3)).abs()
        return torch.stack([torch.zeros_like(rise), rise - 1], dim=1)

    images, labels = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0])
    adv = attack(recorded(peaked, points), images, labels, ThreatModel(0.1), loss="ce", num_steps=1)
    losses = [float(cross_entropy(peaked(point), labels)) for point in points]
    assert losses[0] > losses[1]
    assert torch.equal(adv, points[0])


# ---- settings


def test_gradients_taken_are_steps_and_one_for_every_run():
    logits, images, labels = curved(size=1)
    for settings, runs in ((APGDSettings(7), 1), (APGDSettings(7, 2), 2), (APGDSettings(7, eot=3), 3)):
        seen = []
        apgd(logits, images, labels, ThreatModel(0.001), settings, on_gradient=seen.append)
        assert len(seen) == 8 * runs
        seen.clear()
        apgd_targeted(logits, images, labels, ThreatModel(0.001), settings, num_targets=4, on_gradient=seen.append)
        assert len(seen) == 4 * 8 * runs


def test_eot_moves_along_the_average_gradient():
    """Draws of slope 3 and -1 in turn: the last alone leads down, the average up."""
    calls = []

    def logits(images):
        slope = 1.0
        if images.requires_grad:
            calls.append(1)
            slope = (3.0, -1.0)[(len(calls) - 1) % 2]
        rise = slope * (images - 0.5).sum(dim=(1, 2, 3))
        return torch.stack([1e6 + 0 * rise, rise], dim=1)

    images, labels = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0])
    points = []
    apgd(recorded(logits, points), images, labels, ThreatModel(0.1), APGDSettings(1, eot=2), loss=cw_margin)
    torch.testing.assert_close(points[-1], images + 0.1, rtol=0, atol=1e-12)


def test_restarts_only_add_broken_images():
    logits, images, labels = curved(size=60, seed=2)
    once, thrice = (
        fallen(logits, apgd(logits, images, labels, ThreatModel(0.03), APGDSettings(1, restarts)), labels)
        for restarts in (1, 3)
    )
    assert (thrice | ~once).all()
    assert thrice.sum() > once.sum()


def test_the_seed_chooses_the_noise():
    logits, images, labels = curved()
    first, again, other = (attack(logits, images, labels, ThreatModel(0.002), loss="ce", seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@each_loss
def test_a_fast_classifier_that_is_wrong_stops_nothing(loss):
    """It calls every image broken; the exact one decides, so that every step is taken and real breaks are kept."""
    logits, images, labels = curved()
    seen = []

    def wrong(pixels):
        return logits(pixels) - 1e3 * torch.nn.functional.one_hot(labels[:1], 10)

    attack(
        wrong,
        images[:1],
        labels[:1],
        ThreatModel(0.001),
        loss=loss,
        confirm=by_logits(logits),
        on_gradient=seen.append,
    )
    assert len(seen) == 11 * (3 if loss == "targeted" else 1)

    def biased(pixels):  # constant: the same gradients
        return logits(pixels) - torch.linspace(0, 30, 10, dtype=torch.float64)

    plain = attack(logits, images, labels, RADII["linf"], loss="ce", num_steps=20)
    found = attack(biased, images, labels, RADII["linf"], loss="ce", num_steps=20, confirm=by_logits(logits))
    assert fallen(biased, images, labels).any()
    assert 0 < fallen(logits, found, labels).sum() <= fallen(logits, plain, labels).sum() + 3


def test_targets_are_other_classes_even_if_the_fast_classifier_ranks_the_own_one_second():
    logits, images, labels = curved(size=1)
    rival = int(logits(images).sort(dim=1).indices[0, -2])
    lift = 50 * torch.nn.functional.one_hot(torch.tensor([rival]), 10)
    seen = []
    settings = APGDSettings(3)
    apgd_targeted(lambda pixels: logits(pixels) + lift, images, labels, ThreatModel(0.001), settings, num_targets=1,
                  confirm=by_logits(logits), on_gradient=seen.append)  # fmt: skip
    assert all(grad.abs().sum() > 0 for grad in seen)


# ---- what is left alone, and what is refused


@each_norm
@each_loss
def test_nothing_but_the_result_changes(loss, norm):
    model, images, labels = Curved(), *curved()[1:]
    before, state = images.clone(), torch.get_rng_state()
    with torch.no_grad():
        adv = attack(model, images, labels, RADII[norm], loss=loss)
    assert not adv.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@each_loss
def test_nothing_to_do_returns_copies(loss):
    logits, images, labels = curved()
    for own, radius in ((images[:0], 0.1), (images, 0)):
        adv = attack(logits, own, labels[: len(own)], ThreatModel(radius), loss=loss)
        assert torch.equal(adv, own)
    wrong = (labels + 1) % 10
    adv = attack(logits, images, wrong, ThreatModel(0.1), loss=loss)
    assert torch.equal(adv, images)
    assert adv.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_steps=1.5), r"num_steps=1\.5"),
        (dict(num_restarts=0), "num_restarts=0"),
        (dict(eot=0), "eot=0"),
        (dict(rho=0), "rho=0"),
        (dict(rho=1.01), r"rho=1\.01"),
    ],
)
def test_bad_settings_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        APGDSettings(**settings)


@each_loss
def test_unusable_images_and_classes_are_refused(loss):
    logits, images, labels = curved()
    with pytest.raises(ValueError, match="Did you normalise"):
        attack(logits, (images - 0.5) / 0.25, labels, ThreatModel(0.1), loss=loss)
    with pytest.raises(TypeError, match="floating-point"):
        attack(logits, (255 * images).to(torch.uint8), labels, ThreatModel(0.1), loss=loss)


def test_too_many_targets_and_too_few_classes_are_refused():
    logits, images, labels = curved()
    for count in (0, 10):
        with pytest.raises(ValueError, match=rf"num_targets={count} must be in 1 \.\. 9"):
            apgd_targeted(logits, images, labels, ThreatModel(0.1), num_targets=count)
    logits, images, labels = curved(classes=3)
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        apgd_targeted(logits, images, labels, ThreatModel(0.1), num_targets=2)
    logits, images, labels = curved(classes=2)
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        apgd(logits, images, labels, ThreatModel(0.1), loss=dlr)
