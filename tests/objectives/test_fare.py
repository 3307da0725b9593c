import pytest
import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.fare import FARE


def test_loss_is_the_summed_square_to_the_teachers_clean_embedding():
    """Student embeds (2m, m, 0), teacher (m, m, 1) for brightness m: no normalisation, sum over D, mean over B."""

    def student(images):
        m = images.double().mean(dim=(1, 2, 3))
        return ZeroShotOutput(image_embeds=torch.stack([2 * m, m, 0 * m], dim=1))

    def teacher(images):
        m = images.double().mean(dim=(1, 2, 3))
        return ZeroShotOutput(image_embeds=torch.stack([m, m, 0 * m + 1], dim=1))

    clean = torch.tensor([0.5, 1.0])[:, None, None, None].expand(2, 3, 2, 2)
    adv = torch.tensor([1.0, 0.5])[:, None, None, None].expand(2, 3, 2, 2)
    batch = Batch((clean,), None, None, student, teacher)
    expected = [1.5**2 + 0.5**2 + 1, 0 + 0.5**2 + 1]
    assert FARE().attack_loss(batch)(adv).tolist() == pytest.approx(expected, rel=1e-12)
    terms = FARE()(batch, adv)
    assert list(terms) == ["embedding_l2"]
    assert terms["embedding_l2"].item() == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert FARE.needs == {"teacher"}


def test_teacher_is_asked_once_and_without_a_graph(tiny_clip, tiny_batch):
    images, _ = tiny_batch()
    student, teacher = tiny_clip(), tiny_clip(seed=1)
    calls = []

    def asked(images):
        calls.append(torch.is_grad_enabled())
        return teacher(images)

    batch = Batch((images,), None, None, student, asked)
    objective = FARE()
    attack_loss = objective.attack_loss(batch)
    attack_loss(images), attack_loss(images)
    objective(batch, images)["embedding_l2"].backward()
    assert calls == [False]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.vision_parameters())
