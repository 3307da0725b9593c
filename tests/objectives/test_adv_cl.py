"""AdvCL against values worked out by hand."""

import math

import pytest
import torch
from made_outputs import tensor, views_as_embeddings

from hf_robust_clip.objectives import adv_cl
from hf_robust_clip.objectives.adv_cl import AdvCL, high_pass
from hf_robust_clip.objectives.contrast import contrast_of_views

ATTACKED, FIRST, SECOND = [[1, 0, 0.5], [0, 1, 0.5]], [[1, 0, 0], [0, 1, 0]], [[1, 1, 0], [0, 1, 1]]
HIGH = [[0.5, 0, 1], [0.5, 1, 1]]
PICTURE = tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8], [9, 7, 9, 3]]) / 10


def test_the_contrast_of_four_views_is_the_worked_one():
    found = contrast_of_views(tensor([ATTACKED, FIRST, SECOND, HIGH]), 0.5).mean().item()
    assert found == pytest.approx(1.6721539210, abs=1e-9)
    assert found * 0.5 / 0.07 == pytest.approx(11.9439565784, abs=1e-9)
    order = tensor([SECOND, HIGH, ATTACKED, FIRST])
    assert contrast_of_views(order, 0.5).mean().item() == pytest.approx(found, abs=1e-12)


def test_terms_and_attack_are_the_worked_ones(monkeypatch):
    """Logits [[2, 0], [.5, 1]] for the attacked images, class 0 by the frozen model for both clean ones."""
    monkeypatch.setattr(adv_cl, "high_pass", lambda images, radius: tensor(HIGH)[:, :, None, None])
    views = [[[0, 1, 0], [0.3, 1, 0]], SECOND, FIRST]  # the frozen model's logits are the student's, turned round
    batch, adv = views_as_embeddings(views, [ATTACKED, SECOND, FIRST], logits=[[2, 0], [0.5, 1]])
    terms = AdvCL()(batch, adv)
    assert terms["contrast"].item() == pytest.approx(11.9439565784, abs=1e-9)
    assert terms["pseudo_ce"].item() == pytest.approx(0.2 * 0.5505024976, abs=1e-10)
    assert sum(terms.values()).item() == pytest.approx(12.0540570779, abs=1e-9)
    rows = AdvCL().attacked_rows(6)
    losses = AdvCL().attack_loss(batch.rows(rows))(adv[rows])
    assert losses.tolist() == pytest.approx([12.0540570779] * 2, abs=1e-9)
    other = AdvCL(0.2, base_temperature=1.0, ce_weight=3.0)(batch, adv)
    expected = 0.2 * contrast_of_views(tensor([ATTACKED, FIRST, SECOND, HIGH]), 0.2).mean().item()
    assert other["contrast"].item() == pytest.approx(expected, abs=1e-12)
    assert other["pseudo_ce"].item() == pytest.approx(3 * 0.5505024976, abs=1e-9)


def test_the_high_pass_is_the_worked_one():
    images = torch.stack([PICTURE, PICTURE.T])[None]
    without_mean = high_pass(images, 1.0)
    torch.testing.assert_close(without_mean, images - images.mean(dim=(2, 3), keepdim=True), rtol=0, atol=1e-12)
    found = high_pass(images, 1.5)
    assert found[0, 0, 0].tolist() == pytest.approx([-0.05, -0.4, 0.05, -0.1], abs=1e-12)
    torch.testing.assert_close(found[0, 1], found[0, 0].T, rtol=0, atol=1e-12)


def test_frequencies_are_counted_from_the_mean_of_odd_sizes_too():
    """A wave of two periods in 7 columns is kept by a radius of 2, and taken away by one above."""
    wave = torch.cos(2 * math.pi * 2 * torch.arange(7).double() / 7).expand(1, 1, 5, 7)
    torch.testing.assert_close(high_pass(wave + 0.5, 2.0), wave.clone(), rtol=0, atol=1e-12)
    assert high_pass(wave + 0.5, 2.01).abs().max() < 1e-12


def test_the_radius_is_a_share_of_the_side(monkeypatch):
    seen = []
    monkeypatch.setattr(adv_cl, "high_pass", lambda images, radius: seen.append(radius) or images)
    images = torch.zeros(1, 3, 32, 32)
    AdvCL()._high(images)
    AdvCL(high_pass=0.125)._high(images)
    assert seen == [8, 4]


def test_a_batch_of_one_image_is_refused():
    batch, adv = views_as_embeddings([ATTACKED[:1], FIRST[:1], SECOND[:1]], [ATTACKED[:1], FIRST[:1], SECOND[:1]])
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        AdvCL()(batch, adv)


@pytest.mark.parametrize("name", ["temperature", "base_temperature", "high_pass", "ce_weight"])
def test_wrong_settings_are_named(name):
    with pytest.raises(ValueError, match=name):
        AdvCL(**{name: -1})
