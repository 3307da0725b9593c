import math

import pytest
import torch
from prompted_clip import NAMES, make_base, make_class_wise, make_images

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.c_avp import CAVP

SHARES = [  # of three images, of classes 0, 1, 2: rows are prompts, columns classes
    [[0.5, 0.4, 0.1], [0.55, 0.42, 0.03], [0.3, 0.25, 0.45]],
    [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]],
    [[0.4, 0.3, 0.3], [0.3, 0.6, 0.1], [0.2, 0.1, 0.7]],
]
PLAIN = {"l0": 1.0, "l1": 1.0, "l2": 1.0, "l3": 1.0}


def student(pixels, class_prompts):
    """Logits of an image are its pixels in the row of a prompt."""
    return ZeroShotOutput(logits=pixels[torch.arange(len(pixels)), 0, class_prompts])


def batch_of(shares, labels, classes=3):
    images = torch.tensor(shares, dtype=torch.float64).log()[:, None]
    return Batch((images,), torch.tensor(labels), None, student, num_classes=classes)


def worked_out(shares, labels, tau, temperature=1.0):
    """The four sums of one set of images in plain arithmetic, (L0 of one kind of images, L1, L2, L3)."""

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    def hinge(value):
        return max(value, -tau)

    classes = range(len(shares[0]))
    f = []
    for image in shares:
        powers = [[p ** (1 / temperature) for p in row] for row in image]
        f.append([[p / sum(row) for p in row] for row in powers])
    of = {j: [i for i, y in enumerate(labels) if y == j] for j in classes}
    l0 = l1 = l2 = l3 = 0.0
    for j in classes:
        others = [k for k in classes if k != j]
        l0 += mean([-math.log(shares[i][j][j]) for i in of[j]])
        l1 += mean([hinge(max(f[i][k][k] for k in others) - f[i][j][j]) for i in of[j]])
        l2 += mean([hinge(f[i][j][j] - max(f[i][j][c] for c in others)) for i, y in enumerate(labels) if y != j])
        l3 += mean([hinge(max(f[i][k][j] for k in others) - f[i][j][j]) for i in of[j]])
    return l0, l1, l2, l3


def test_the_worked_example():
    batch = batch_of(SHARES, [0, 1, 2])
    terms = CAVP(**PLAIN)(batch, batch.images)
    found = [terms[name].item() for name in ("ce", "ce_adv", "l1", "l2", "l3")]
    assert found == pytest.approx([1.272966, 1.272966, -0.25, 0.575, -0.15], abs=1e-6)
    assert sum(found[2:]) == pytest.approx(0.175, abs=1e-12)
    weighted = CAVP()(batch, batch.images)
    assert sum(weighted.values()).item() == pytest.approx(2 * 1.272966 + 3 * 0.175, abs=1e-5)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 0, 1], [0, 0, 2, 2, 2, 0], [3] * 6, [1]])
def test_sums_are_those_of_plain_arithmetic_with_classes_that_a_batch_lacks(labels):
    torch.manual_seed(0)
    clean, adv = torch.rand(2, len(labels), 4, 4, dtype=torch.float64).softmax(dim=3)
    batch = batch_of(clean.tolist(), labels, classes=4)
    for settings in ({}, {"tau": 0.01, "temperature": 7.0}, {"tau": 0.0, "l2": 0.5}):
        objective = CAVP(**settings)
        terms = objective(batch, adv.log()[:, None])
        l0, l1, l2, l3 = worked_out(clean.tolist(), labels, objective.tau, objective.temperature)
        wanted = {"ce": l0, "ce_adv": worked_out(adv.tolist(), labels, 0.1)[0]}
        wanted |= {"l1": objective.l1 * l1, "l2": objective.l2 * l2, "l3": objective.l3 * l3}
        assert {name: value.item() for name, value in terms.items()} == pytest.approx(wanted, abs=1e-9)


def test_a_class_without_an_image_has_gradients_by_the_second_hinge_alone():
    torch.manual_seed(1)
    batch = batch_of(torch.rand(3, 3, 3, dtype=torch.float64).softmax(dim=2).tolist(), [0, 1, 1])
    images = batch.images.clone().requires_grad_()
    batch.views = (images,)
    terms = CAVP(tau=2.0)(batch, images)
    for name, moved in (("ce", False), ("l2", True)):
        (grad,) = torch.autograd.grad(terms[name], images, retain_graph=True)
        assert grad.isfinite().all()
        assert grad[:, 0, 2].any() == moved


def test_the_attack_sees_the_prompt_of_the_own_class_alone():
    batch = batch_of(SHARES, [0, 1, 2])
    images = batch.images.clone().requires_grad_()
    loss_B = CAVP().attack_loss(batch)(images)
    assert loss_B.tolist() == pytest.approx([-math.log(p) for p in (0.5, 0.8, 0.7)], abs=1e-12)
    (grad,) = torch.autograd.grad(loss_B.sum(), images)
    rows = grad[:, 0].abs().sum(dim=2) > 0
    assert torch.equal(rows, torch.eye(3, dtype=torch.bool))


def test_gradients_by_the_prompts_are_those_of_finite_differences():
    classifier, images = make_class_wise(), 0.3 + 0.4 * make_images(3)
    batch = Batch((images,), torch.tensor([0, 4, 4]), None, classifier, num_classes=len(NAMES))
    (prompts,) = (p for p in classifier.parameters() if p.requires_grad)
    with torch.no_grad():
        prompts.mul_(0.3)
    objective = CAVP(temperature=20.0)

    def loss():
        return sum(objective(batch, (images + 0.02).clamp(0, 1)).values())

    (grad,) = torch.autograd.grad(loss(), prompts)
    direction = torch.randn(prompts.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rows in (slice(None), slice(0, 1), slice(4, 5)):
        step = torch.zeros_like(direction)
        step[rows] = 1e-6 * direction[rows]
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                prompts.add_(sign * step)
                values.append(loss().item())
            prompts.add_(step)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((grad * step).sum().item() / 1e-6, rel=1e-5)


def test_the_student_needs_class_wise_prompts():
    batch = Batch((make_images(2),), torch.tensor([0, 1]), None, make_base(), num_classes=len(NAMES))
    with pytest.raises(ValueError, match="class_prompts"):
        CAVP()(batch, batch.images)


@pytest.mark.parametrize("wrong", [dict(l0=-1), dict(l3=float("nan")), dict(tau=-0.1), dict(temperature=0)])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CAVP(**wrong)


def test_means_are_those_over_the_images_of_all_processes():
    torch.manual_seed(2)
    clean, labels = torch.rand(6, 3, 3, dtype=torch.float64).softmax(dim=2).tolist(), [0, 1, 1, 1, 2, 0]
    whole = batch_of(clean, labels)
    wanted = CAVP()(whole, whole.images.flip(3))
    second = batch_of(clean[2:], labels[2:])
    told: list[torch.Tensor] = []
    second.gather = lambda rows: told.append(rows) or rows
    CAVP()(second, second.images.flip(3))
    first = batch_of(clean[:2], labels[:2])
    first.gather = lambda rows: torch.cat([rows, told.pop(0)])
    found = CAVP()(first, first.images.flip(3))
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value.item(), abs=1e-12)
