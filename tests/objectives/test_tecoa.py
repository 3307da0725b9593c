import math

import pytest
import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.tecoa import TeCoA


def test_loss_is_the_mean_cross_entropy_of_the_adversarial_images():
    """Logits (0, log 3) for a black image and (log 7, 0) for a white one, worked by hand."""

    def student(images):
        black = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
        white = torch.tensor([math.log(7), 0.0], dtype=torch.float64)
        return ZeroShotOutput(logits=torch.stack([white if image.mean() > 0.5 else black for image in images]))

    clean, adv = torch.zeros(2, 3, 1, 1), torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 1, 1)
    batch = Batch((clean,), torch.tensor([0, 1]), None, student)
    terms = TeCoA()(batch, adv)
    assert list(terms) == ["ce"]
    assert terms["ce"].item() == pytest.approx((math.log(4) + math.log(8)) / 2, rel=1e-12)
    torch.testing.assert_close(
        TeCoA().attack_loss(batch)(adv), torch.tensor([math.log(4), math.log(8)], dtype=torch.float64)
    )
