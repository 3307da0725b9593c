import math

import pytest
import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.fap import FAP


def student(images):
    """Two logits and an embedding of two values per image: the first and the last two of its four values."""
    flat = images.flatten(1)
    return ZeroShotOutput(logits=flat[:, :2], cosine=flat[:, :2] / 100, image_embeds=flat[:, 2:])


def worked_out(clean, adv, label):
    """Cross-entropy of the clean image, and KL(clean || adv) * (cosine + 1), in plain arithmetic."""
    p, q = ([math.exp(v) / sum(map(math.exp, row[:2])) for v in row[:2]] for row in (clean, adv))
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    dot = sum(a * b for a, b in zip(clean[2:], adv[2:], strict=True))
    cosine = dot / math.hypot(*clean[2:]) / math.hypot(*adv[2:])
    return -math.log(p[label]), kl * (cosine + 1)


def test_terms_are_those_worked_out_by_hand():
    clean, adv = [[0.1, 0.9, 0.3, 0.4], [0.5, 0.2, 0.0, 1.0]], [[0.6, 0.2, 0.4, 0.1], [0.3, 0.3, 0.7, 0.7]]
    images, attacked = (torch.tensor(rows, dtype=torch.float64).view(2, 4, 1, 1) for rows in (clean, adv))
    batch = Batch((images,), torch.tensor([1, 0]), None, student)
    found = [worked_out(*rows) for rows in zip(clean, adv, (1, 0), strict=True)]
    for weight in (1.5, 0.0, 2.0):
        terms = FAP(weight)(batch, attacked)
        assert terms["ce"].item() == pytest.approx(sum(ce for ce, _ in found) / 2, abs=1e-12)
        assert terms["kl_cos"].item() == pytest.approx(weight * sum(kl for _, kl in found) / 2, abs=1e-12)


def test_gradients_flow_through_both_images_and_the_factor():
    images = torch.tensor([[0.1, 0.9, 0.3, 0.4]], dtype=torch.float64).view(1, 4, 1, 1).requires_grad_(True)
    adv = torch.tensor([[0.6, 0.2, 0.4, 0.1]], dtype=torch.float64).view(1, 4, 1, 1).requires_grad_(True)
    terms = FAP()(Batch((images,), torch.tensor([1]), None, student), adv)
    for grad in torch.autograd.grad(terms["kl_cos"], (images, adv)):
        assert (grad != 0).all()


def test_attack_maximises_the_divergence_from_the_clean_prediction():
    images = torch.tensor([[0.1, 0.9, 0.3, 0.4]], dtype=torch.float64).view(1, 4, 1, 1)
    loss = FAP().attack_loss(Batch((images,), torch.tensor([1]), None, student))
    p = [math.exp(v) / (math.exp(0.1) + math.exp(0.9)) for v in (0.1, 0.9)]
    wanted = sum(a * math.log(a / 0.5) for a in p)
    assert loss(torch.full_like(images, 0.5)).item() == pytest.approx(wanted, abs=1e-12)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="weight=-1"):
        FAP(-1)
