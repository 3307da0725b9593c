"""What comes in from outside: images, labels, logits."""

import numpy as np
import pytest
import torch

from hf_robust_clip.attacks.auto_attack import AutoAttack, auto_attack
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.pgd import input_gradient, pgd, pgd_until_misclassified
from hf_robust_clip.checks import check_logits, checked_images, checked_labels
from hf_robust_clip.prediction import by_logits, withstood
from hf_robust_clip.threat_model import ThreatModel
from hf_robust_clip.zero_shot_data.loading import collate_images

WEIGHTS = torch.linspace(-1, 1, 12 * 5).view(12, 5)
IMAGES = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def linear(images):
    return images.flatten(1).to(WEIGHTS) @ WEIGHTS


# ---- images


def test_rounding_is_brought_back_and_more_is_refused():
    images = torch.tensor([-2.98e-8, 1 + 5e-7, 0.5]).view(1, 3, 1, 1)
    assert checked_images(images).flatten().tolist() == [0, 1, 0.5]
    for value in (-2e-6, 1 + 2e-6):
        with pytest.raises(ValueError, match="images"):
            checked_images(torch.full((1, 3, 1, 1), value))


def test_images_inside_are_given_back_as_they_are():
    assert checked_images(IMAGES) is IMAGES


def test_attacks_and_batches_accept_rounding():
    """An image that is a hair below 0 is attacked like 0; what comes back lies in the range."""
    images, labels = IMAGES.clone(), torch.zeros(4, dtype=torch.long)
    images[0] = 0
    off = images.clone()
    off[0] = -2.98e-8
    suite = AutoAttack(("apgd-ce",), num_steps=5)
    for attack in (
        lambda x: pgd_until_misclassified(
            linear, x, labels, ThreatModel("8/255"), loss=cross_entropy, num_steps=3, step_size=0.01
        ),
        lambda x: auto_attack(linear, x, labels, ThreatModel("8/255"), version=suite)[0],
    ):
        assert torch.equal(attack(off), attack(images))
    assert collate_images([{"pixel_values": off[0]}])["pixel_values"].min() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_too_coarse_for_a_step_are_refused(dtype):
    with pytest.raises(TypeError, match="images"):
        pgd(lambda x: linear(x).sum(1), IMAGES.to(dtype), ThreatModel("1/255"), num_steps=1, step_size="1/255")


def test_an_l2_ball_that_holds_every_image_is_refused():
    """sqrt(12) is the longest distance between two images of twelve values."""
    assert ThreatModel(3.46, "l2").checked(IMAGES) is IMAGES
    for radius in (12**0.5, 1e30):
        with pytest.raises(ValueError, match="eps"):
            ThreatModel(radius, "l2").checked(IMAGES)


def test_a_radius_below_a_grey_level_is_named_as_it_is():
    assert str(ThreatModel(1e-9)) == "L-inf eps=1e-09"
    assert str(ThreatModel(0)) == "L-inf eps=0/255"
    assert str(ThreatModel("4/255")) == "L-inf eps=4/255"
    assert str(ThreatModel(0.015686274509)) == "L-inf eps=4/255"


# ---- labels

KINDS = {
    "int32": torch.tensor([1, 0, 2], dtype=torch.int32),
    "uint8": torch.tensor([1, 0, 2], dtype=torch.uint8),
    "column": torch.tensor([[1], [0], [2]]),
    "whole floats": torch.tensor([1.0, 0.0, 2.0]),
    "array": np.array([1, 0, 2], dtype=np.int16),
    "whole floats in an array": np.array([1.0, 0.0, 2.0]),
    "list": [1, 0, 2],
    "list of numbers of numpy": [np.int64(1), np.int32(0), np.uint8(2)],
}


@pytest.mark.parametrize("labels", list(KINDS.values()), ids=list(KINDS))
def test_labels_in_which_nothing_is_lost(labels):
    found = checked_labels(labels, 3, 3)
    assert (found.tolist(), found.dtype, found.shape) == ([1, 0, 2], torch.int64, (3,))


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        ([1, 2.7, 0], ValueError),
        (torch.tensor([1.0, torch.nan, 0.0]), ValueError),
        (torch.tensor([1.0, torch.inf, 0.0]), ValueError),
        ([1, -1, 0], ValueError),
        ([1, 3, 0], ValueError),
        ([1, 0], ValueError),
        (torch.eye(3), ValueError),
        (["one", "two", "three"], TypeError),
        ([None, 1, 2], TypeError),
        (torch.tensor([1j, 0, 0]), TypeError),
    ],
)
def test_labels_that_are_refused(labels, error):
    with pytest.raises(error, match="labels"):
        checked_labels(labels, 3, 3)


@pytest.mark.parametrize("labels", [[0, 1, 2, 7], [0, 1, 2, -1], [0, 1, 2, 2.5], torch.eye(4), [0, 1]])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_attacks_refuse_labels_that_name_no_class(labels, name):
    with pytest.raises(ValueError, match="labels"):
        auto_attack(linear, IMAGES, labels, ThreatModel("8/255"), version=AutoAttack((name,), num_steps=2))


def test_attacks_take_every_kind_of_whole_labels():
    labels = torch.tensor([0, 1, 2, 3])
    suite = AutoAttack(("apgd-ce", "square"), num_steps=3, num_queries=5)
    wanted = auto_attack(linear, IMAGES, labels, ThreatModel("8/255"), version=suite)
    for kind in (labels.int(), labels[:, None], labels.numpy(), labels.tolist(), labels.double()):
        found = auto_attack(linear, IMAGES, kind, ThreatModel("8/255"), version=suite)
        assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


def test_a_fraction_is_no_label_in_a_batch():
    with pytest.raises(ValueError, match="labels"):
        collate_images([{"pixel_values": IMAGES[0], "labels": 2.7}])


# ---- logits


def test_logits_that_are_not_finite_name_no_class():
    logits = torch.zeros(3, 5)
    check_logits(logits)
    for value in (torch.nan, torch.inf, -torch.inf):
        logits[1, 2] = value
        with pytest.raises(FloatingPointError, match="1 of 3"):
            check_logits(logits)
        with pytest.raises(FloatingPointError):
            withstood(by_logits(lambda _: logits), IMAGES[:3], torch.zeros(3))


def test_a_model_without_a_gradient_by_the_pixels():
    for loss_fn in (lambda x: linear(x).sum(1).detach(), lambda x: (WEIGHTS.clone().requires_grad_()[:4]).sum(1)):
        with pytest.raises(ValueError, match="gradient"):
            input_gradient(loss_fn, IMAGES)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_finite_moves_only_where_it_has_a_sign(norm):
    images = torch.full((1, 3, 2, 2), 0.5)
    grad = torch.zeros_like(images)
    grad[0, 0, 0, 0], grad[0, 1, 1, 1] = torch.nan, torch.inf
    moved = ThreatModel(0.1, norm).ascend(images, grad, images, 0.05) - images
    assert moved[0, 1, 1, 1] > 0.04 and moved.count_nonzero() == 1
