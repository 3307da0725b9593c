import math

import pytest
import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.clean import Clean


def test_loss_looks_at_the_clean_images_alone():
    """Class 1 has the logit log(9) * brightness: CE of a white image labelled 1 is log(10/9), of a black one log 2."""

    def student(images):
        bright = images.double().mean(dim=(1, 2, 3))
        return ZeroShotOutput(logits=torch.stack([torch.zeros_like(bright), math.log(9) * bright], dim=1))

    images = torch.tensor([1.0, 0.0])[:, None, None, None].expand(2, 3, 2, 2)
    batch = Batch((images,), torch.tensor([1, 1]), None, student)
    terms = Clean()(batch, torch.full_like(images, torch.nan))
    assert list(terms) == ["ce"]
    assert terms["ce"].item() == pytest.approx((math.log(10 / 9) + math.log(2)) / 2, rel=1e-12)
    assert not Clean.attacked
