"""ACL, and the contrast of views, against values worked out by hand."""

import math

import pytest
import torch
from made_outputs import tensor, views_as_embeddings

from hf_robust_clip.objectives.acl import ACL
from hf_robust_clip.objectives.agft import AGFT
from hf_robust_clip.objectives.contrast import contrast_of_views

CLEAN = [[[1, 0, 0], [0, 1, 0]], [[1, 1, 0], [0, 1, 1]]]
ADV = [[[1, 0.5, 0], [0, 1, 0.5]], [[1, 1, 0.5], [0, 0.5, 1]]]
ANCHORS = [0.3962450462, 0.8078662981, 0.9786493042, 0.6439446127]


def nt(first, second, temperature=0.5):
    """NT-Xent pair by pair."""
    rows = [[value / math.hypot(*row) for value in row] for row in (*first, *second)]
    near = [[math.exp(sum(a * b for a, b in zip(x, y, strict=True)) / temperature) for y in rows] for x in rows]
    half, total = len(first), 0.0
    for i in range(2 * half):
        others = sum(near[i][j] for j in range(2 * half) if j != i)
        total -= math.log(near[i][(i + half) % (2 * half)] / others)
    return total / (2 * half)


def test_anchors_are_the_worked_ones():
    found = contrast_of_views(tensor(CLEAN), 0.5)
    assert found.flatten().tolist() == pytest.approx(ANCHORS, abs=1e-9)
    assert found.mean().item() == pytest.approx(0.7066763153, abs=1e-9) == nt(*CLEAN)
    assert contrast_of_views(tensor(ADV), 0.5).mean().item() == pytest.approx(0.7105147400, abs=1e-9)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("DS", {"nt_clean": 0.7066763153 / 2, "nt_adv": 0.7105147400 / 2}),
        ("A2A", {"nt_adv": 0.7105147400}),
        ("A2S", {"nt_adv": nt(ADV[0], CLEAN[1])}),
    ],
)
def test_modes_contrast_what_they_say(mode, expected):
    objective = ACL(mode, "none")
    batch, adv = views_as_embeddings(CLEAN, [ADV[0], CLEAN[1]] if mode == "A2S" else ADV)
    terms = {name: term.item() for name, term in objective(batch, adv).items()}
    assert terms == pytest.approx(expected, abs=1e-9)
    if mode == "DS":
        assert sum(terms.values()) == pytest.approx(0.7085955277, abs=1e-9)
    rows = objective.attacked_rows(4)
    losses = objective.attack_loss(batch.rows(rows))(adv[rows])
    whole = expected["nt_adv"] * (2 if mode == "DS" else 1)
    assert losses.tolist() == pytest.approx([whole] * len(adv[rows]), abs=1e-9)


def test_anchors_of_classes_are_means_over_attacked_views():
    """Logits are ten times an embedding's first two numbers; cosines of the frozen model a tenth, turned round."""
    labels = [1, 0]
    for mode, views in (("DS", ADV), ("A2S", [ADV[0], CLEAN[1]])):
        batch, adv = views_as_embeddings(CLEAN, views, labels)
        attacked, count = tensor(views[0] + views[1])[: 4 if mode == "DS" else 2, :2], 4 if mode == "DS" else 2
        clean = tensor(CLEAN[0] + CLEAN[1])[:count, :2]
        logits, own = 10 * attacked, torch.tensor((labels * 2)[:count])
        expected = -(logits.log_softmax(1)[torch.arange(count), own]).mean()
        found = ACL(mode, "tecoa", anchor_weight=3)(batch, adv)["anchor"]
        assert found.item() == pytest.approx(3 * expected.item(), abs=1e-12)
        targets = (0.4 * 180 * clean.flip(1) / 10).softmax(1)
        expected = -(targets * (180 * attacked / 10).log_softmax(1)).sum(1).mean()
        found = ACL(mode, "agft")(batch, adv)["anchor"]
        assert found.item() == pytest.approx(expected.item(), abs=1e-9)
    assert ACL().needs == {"labels"} and ACL(anchor="agft").needs == AGFT.needs and not ACL(anchor="none").needs


def test_gradients_are_those_of_finite_differences():
    features = torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contrast_of_views(x, 0.3), features)


def test_equal_views_of_equal_images_give_the_logarithm_of_the_others():
    assert contrast_of_views(torch.ones(2, 5, 3), 0.5).flatten().tolist() == pytest.approx([math.log(9)] * 10)


def test_half_precision_around_it_costs_no_digits():
    features = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast_of_views(features, 0.05)
        assert contrast_of_views(features.bfloat16(), 0.05).dtype == torch.float32
    torch.testing.assert_close(found, contrast_of_views(features.double(), 0.05).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [ACL(), ACL("A2S", "none")])
def test_a_batch_of_one_image_is_refused(objective):
    batch, adv = views_as_embeddings([CLEAN[0][:1], CLEAN[1][:1]], [ADV[0][:1], ADV[1][:1]], [0])
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        objective(batch, adv)
    rows = objective.attacked_rows(2)
    attack_loss = objective.attack_loss(batch.rows(rows))
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        attack_loss(adv[rows])


@pytest.mark.parametrize(
    "wrong", [{"mode": "S2S"}, {"anchor": "fare"}, {"temperature": 0}, {"anchor_weight": -1},
              {"anchor_weight": 2.0, "anchor": "none"}]
)  # fmt: skip
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ACL(**wrong)
