"""SimpleAT against values worked out by hand."""

import pytest
from made_outputs import made_batch, tensor

from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.objectives.simple_at import SimpleAT

LOGITS, LABELS = [[1, -0.5, 0.25], [0.2, 0.4, -0.1]], [0, 2]


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        (dict(k=1, target=5, centred=False), 7.0870833333),
        (dict(k=15, target=30, centred=False), 4367.6104166667),
        (dict(k=1, target=1, centred=False), 0.2870833333),
        (dict(k=1, target=5), 7.7363888889),
    ],
)
def test_the_term_is_the_worked_one(settings, mean):
    batch, adv = made_batch({"logits": LOGITS}, labels=LABELS)
    assert SimpleAT(**settings)(batch, adv)["square"].item() == pytest.approx(mean, abs=1e-9)
    assert SimpleAT(**settings).attack_loss(batch)(adv).mean().item() == pytest.approx(mean, abs=1e-9)


def test_each_image_has_its_own_worked_loss():
    batch, adv = made_batch({"logits": LOGITS}, labels=LABELS)
    losses = SimpleAT(k=1, target=5, centred=False).attack_loss(batch)(adv)
    assert losses.tolist() == pytest.approx([5.4375, 8.7366666667], abs=1e-9)


def test_centring_takes_away_what_logits_share():
    shifted = {"logits": [[value + 20 for value in row] for row in LOGITS]}
    here, there = (made_batch(given, labels=LABELS) for given in ({"logits": LOGITS}, shifted))
    assert SimpleAT()(*here)["square"].item() == pytest.approx(SimpleAT()(*there)["square"].item(), rel=1e-12)


def test_the_attack_may_be_by_cross_entropy():
    batch, adv = made_batch({"logits": LOGITS}, labels=LABELS)
    expected = cross_entropy(tensor(LOGITS), batch.labels)
    assert SimpleAT(attack="ce").attack_loss(batch)(adv).tolist() == expected.tolist()


@pytest.mark.parametrize("wrong", [{"k": 0}, {"target": -1.0}, {"attack": "square"}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SimpleAT(**wrong)
