"""ASCL against values worked out by hand, and what it compares."""

import pytest
import torch
from made_outputs import made_batch, tensor
from torch.nn import functional as F

from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.objectives.ascl import ASCL

CLEAN, ATTACKED = [[1, 0, 0], [1, 1, 0], [0, 1, 1]], [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
LABELS, PREDICTED = torch.tensor([0, 0, 1, 0, 0, 1]), torch.tensor([0, 1, 1, 1, 0, 1])
WORKED = {
    "cosine": {"all": 1.7725362549, "hard": 1.4324133329, "soft": 1.5713599682, "leaked": 0.5915983488},
    "linf": {"all": 1.5421199685, "hard": 1.1562579037, "soft": 1.3202278154, "leaked": 0.6337174909},
}


@pytest.mark.parametrize("distance", WORKED)
def test_contrast_is_the_worked_one(distance):
    features = tensor(CLEAN + ATTACKED)
    for mode, expected in WORKED[distance].items():
        found = ASCL(mode, distance).contrast(features, LABELS, PREDICTED)
        assert found.item() == pytest.approx(expected, abs=1e-9), mode
        order = torch.tensor([3, 0, 5, 2, 1, 4])
        shuffled = ASCL(mode, distance).contrast(features[order], LABELS[order], PREDICTED[order])
        assert shuffled.item() == pytest.approx(expected, abs=1e-9), mode


def test_merge_compares_with_negatives_of_both_kinds():
    """Written out for three classes, of which some negatives are of one kind alone."""
    features = F.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).double(), dim=1)
    labels, predicted = [0, 0, 1, 1, 2, 2, 0, 1], [0, 1, 1, 2, 2, 0, 2, 0]
    total = 0.0
    for i in range(8):
        others = [j for j in range(8) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        negatives = [
            j for j in others if labels[j] != labels[i] and predicted[j] in (labels[i], predicted[i])
        ]  # hard: predicted as this one's label; soft: as this one is
        shares = {j: torch.exp(features[i] @ features[j] / 0.2) for j in positives + negatives}
        total -= sum(torch.log(shares[j] / sum(shares.values())) for j in positives) / len(positives)
    found = ASCL("merge").contrast(features, torch.tensor(labels), torch.tensor(predicted))
    assert found.item() == pytest.approx(total.item() / 8, abs=1e-12)


def test_with_texts_alone_it_is_the_cross_entropy():
    """Of a single image no other is a positive or a negative."""
    generator = torch.Generator().manual_seed(0)
    image, texts = torch.randn(1, 5, generator=generator).double(), torch.randn(4, 5, generator=generator).double()
    texts, label = F.normalize(texts, dim=1), torch.tensor([2])
    found = ASCL(tau=0.1, text_anchors=True).contrast(image, label, label, texts)
    expected = cross_entropy(F.normalize(image, dim=1) @ texts.T / 0.1, label)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_images_without_any_pair_have_a_finite_gradient():
    features = tensor([[1, 0.5], [0.2, 1]]).requires_grad_()
    for distance in ("cosine", "linf"):
        loss = ASCL(distance=distance).contrast(features, torch.tensor([0, 1]), torch.tensor([0, 1]))
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, features)[0].any()


def test_terms_have_their_weights():
    clean = dict(image_embeds=CLEAN, logits=[[2, 1], [0, 1], [0, 3]], class_embeds=[[1, 0, 0], [0, 1, 0]])
    adv = dict(image_embeds=ATTACKED, logits=[[1, 2], [2, 1], [1, 2]], class_embeds=[[1, 0, 0], [0, 1, 0]])
    batch, images = made_batch(adv, clean, labels=[0, 0, 1])
    terms = ASCL(weight=3, kl=0.5)(batch, images)
    assert terms["ascl"].item() == pytest.approx(3 * 0.5915983488, abs=1e-9)
    assert terms["ce"].item() == pytest.approx(cross_entropy(tensor(adv["logits"]), batch.labels).mean().item())
    p, q = tensor(clean["logits"]).softmax(1), tensor(adv["logits"]).softmax(1)
    assert terms["kl"].item() == pytest.approx(0.5 * (p * (p / q).log()).sum().item() / 3, abs=1e-12)
    assert ASCL.released_preset(10).kl == 0.2


@pytest.mark.parametrize("wrong", [{"mode": "some"}, {"distance": "l2"}, {"tau": 0}, {"weight": -1}, {"kl": -1}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ASCL(**wrong)
