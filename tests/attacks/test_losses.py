import math

import pytest
import torch

from hf_robust_clip.attacks.losses import cross_entropy, cw_margin, dlr, dlr_targeted, embedding_l2, kl_divergence

LOGITS = torch.tensor([[3.0, 1.0, -1.0, 0.5], [2.0, 2.5, 0.0, -4.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0])


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]], dtype=torch.float64)
    losses = cross_entropy(logits, torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([math.log(4), math.log(5 / 4)], rel=1e-12)


def test_cw_margin_is_best_wrong_minus_own():
    assert cw_margin(LOGITS, LABELS).tolist() == [-2.0, 0.5]
    assert cw_margin(LOGITS[:, :2], torch.tensor([1, 1])).tolist() == [2.0, -0.5]


def test_cw_margin_changes_two_logits_only():
    logits = LOGITS.clone().requires_grad_()
    cw_margin(logits, LABELS).sum().backward()
    assert logits.grad.tolist() == [[-1, 1, 0, 0], [-1, 1, 0, 0]]


def test_dlr_divides_the_margin_by_first_minus_third():
    assert dlr(LOGITS, LABELS).tolist() == pytest.approx([-2 / 2.5, 0.5 / 2.5], rel=1e-10)


def test_targeted_dlr_divides_by_first_minus_mean_of_third_and_fourth():
    expected = [(0.5 - 3) / (3 + 0.25), (-4 - 2) / (2.5 + 2)]
    assert dlr_targeted(LOGITS, LABELS, torch.tensor([3, 3])).tolist() == pytest.approx(expected, rel=1e-10)


def test_dlr_ignores_shift_and_scale():
    targets = torch.tensor([1, 2])
    scaled, plain = (dlr_targeted(logits, LABELS, targets) for logits in (7 * LOGITS - 3, LOGITS))
    torch.testing.assert_close(scaled, plain, rtol=1e-10, atol=0)
    torch.testing.assert_close(dlr(7 * LOGITS - 3, LABELS), dlr(LOGITS, LABELS), rtol=1e-10, atol=0)


def test_dlr_of_equal_logits_is_finite():
    logits = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    losses = dlr(logits, LABELS)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.tolist() == [0, 0]
    assert grad.isfinite().all()


@pytest.mark.parametrize(("loss", "classes", "least"), [(dlr, 2, 3), (dlr, 1, 3), (cw_margin, 1, 2)])
def test_too_few_classes_are_refused(loss, classes, least):
    with pytest.raises(ValueError, match=f"at least {least} classes, got {classes}; use cross_entropy"):
        loss(torch.zeros(2, classes), LABELS)


def test_targeted_dlr_refuses_three_classes():
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        dlr_targeted(torch.zeros(2, 3), LABELS, LABELS + 1)


def test_embedding_l2_by_hand():
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[3.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
    assert embedding_l2(a, b).tolist() == [13.0, 0.25]


def test_kl_equals_the_sum_formula():
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    expected = [0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.5 * math.log(5 / 9) + 0.5 * math.log(5)]
    shift = torch.tensor([[5.0], [-40.0]], dtype=torch.float64)  # softmax takes away what is common to a row
    assert kl_divergence(p.log() + shift, q.log()).tolist() == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(q.log(), q.log() + shift).tolist() == pytest.approx([0, 0], abs=1e-13)


def test_kl_is_finite_where_a_probability_underflows():
    p = torch.tensor([[0.0, -2000.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[-2000.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = kl_divergence(p, q)
    grads = torch.autograd.grad(value.sum(), (p, q))
    assert value.item() == pytest.approx(2000)
    assert all(grad.isfinite().all() for grad in grads)
