import math

import pytest
import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.trades import TRADES


def student(images):
    """Logits (0, log 3 * brightness): (1/4, 3/4) for a white image, (1/2, 1/2) for a black one."""
    bright = images.double().mean(dim=(1, 2, 3))
    zeros = torch.zeros_like(bright)
    logits = torch.stack([zeros, math.log(3) * bright], dim=1)
    return ZeroShotOutput(logits=logits, cosine=logits, image_embeds=logits)


@pytest.fixture
def white_attacked_to_black():
    white = torch.ones(1, 3, 2, 2)
    return Batch((white,), torch.tensor([1]), None, student), torch.zeros_like(white)


def test_loss_is_clean_cross_entropy_plus_weighted_divergence(white_attacked_to_black):
    batch, adv = white_attacked_to_black
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # clean first
    assert TRADES().attack_loss(batch)(adv).tolist() == pytest.approx([kl], rel=1e-12)
    terms = TRADES(beta=2.5)(batch, adv)
    assert terms["ce"].item() == pytest.approx(-math.log(0.75), rel=1e-12)
    assert terms["kl"].item() == pytest.approx(2.5 * kl, rel=1e-12)
    assert TRADES().beta == 6


@pytest.mark.parametrize("beta", [-1.0, math.nan])
def test_bad_weight_is_named(beta):
    with pytest.raises(ValueError, match="beta="):
        TRADES(beta=beta)
