"""Sim-CLIP against values worked out by hand, and what its gradients pass through."""

import pytest
import torch
from made_outputs import made_batch, tensor

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.sim_clip import SimCLIP

ATTACKED = {"image_embeds": [[2, 1, 2], [4, 0, 3]]}
CLEAN = {"image_embeds": [[1, 2, 2], [3, 0, 4]]}


@pytest.mark.parametrize("clean_by", ["teacher", "student"])
def test_term_and_attack_are_the_worked_ones(clean_by):
    of_student, of_teacher = (None, CLEAN) if clean_by == "teacher" else (CLEAN, None)
    batch, adv = made_batch(ATTACKED, of_student, on_clean=of_teacher)
    assert SimCLIP(clean_by)(batch, adv)["cosine"].item() == pytest.approx(-0.9244444444, abs=1e-9)
    assert SimCLIP(clean_by).attack_loss(batch)(adv).tolist() == [2.0, 2.0]


def test_half_the_gradient_comes_through_the_attacked_image_and_half_through_the_students_clean_one():
    """With f(x) = w * x and w shared, both halves of a siamese pair pull at it; of a frozen one, half."""

    def gradient(clean_by):
        weight = tensor([1.0, 2.0, 0.5]).requires_grad_()

        def student(pixels):
            return ZeroShotOutput(image_embeds=pixels[:, :, 0, 0] * weight)

        def teacher(pixels):
            return ZeroShotOutput(image_embeds=pixels[:, :, 0, 0] * weight.detach())

        images = tensor([[0.2, 0.4, 0.9], [0.5, 0.1, 0.3]])[:, :, None, None]
        batch = Batch((images,), None, None, student, teacher)
        loss = SimCLIP(clean_by)(batch, (images + 0.1).clamp(0, 1))["cosine"]
        return torch.autograd.grad(loss, weight)[0], student(images).image_embeds, student(images + 0.1).image_embeds

    frozen, clean, adv = gradient("teacher")
    siamese, _, _ = gradient("student")
    weight = tensor([1.0, 2.0, 0.5]).requires_grad_()
    inputs = adv.detach() / tensor([1.0, 2.0, 0.5])
    whole = -torch.cosine_similarity(inputs * weight, clean.detach(), dim=1).mean()
    torch.testing.assert_close(frozen, torch.autograd.grad(whole, weight)[0] / 2)
    weight = tensor([1.0, 2.0, 0.5]).requires_grad_()
    inputs = clean.detach() / tensor([1.0, 2.0, 0.5])
    back = -torch.cosine_similarity(inputs * weight, adv.detach(), dim=1).mean()
    torch.testing.assert_close(siamese, frozen + torch.autograd.grad(back, weight)[0] / 2)


def test_a_teacher_is_asked_for_only_where_it_embeds():
    assert SimCLIP().needs == {"teacher"}
    assert SimCLIP("student").needs == frozenset()
    with pytest.raises(ValueError, match="clean_by"):
        SimCLIP("nobody")
