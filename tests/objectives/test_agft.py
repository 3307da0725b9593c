"""AGFT against values worked out by hand."""

import math

import pytest
import torch
from made_outputs import made_batch, tensor

from hf_robust_clip.objectives.agft import AGFT

FROZEN = {"cosine": [[0.30, 0.25, 0.20], [0.22, 0.24, 0.21]]}
ATTACKED = {"cosine": [[0.27, 0.26, 0.19], [0.23, 0.22, 0.24]]}
ENTROPY = 0.4334392659


def test_terms_and_attack_are_the_worked_ones():
    batch, adv = made_batch(ATTACKED, on_clean=FROZEN)
    expected = tensor([0.2112752068, 3.1537560811])
    torch.testing.assert_close(AGFT().attack_loss(batch)(adv), expected, rtol=0, atol=1e-9)
    assert AGFT()(batch, adv)["soft_ce"].item() == pytest.approx(1.6825156440, abs=1e-9)
    assert AGFT(100.0, 1.0)(batch, adv)["soft_ce"].item() == pytest.approx(1.2649754173, abs=1e-9)


def test_its_target_is_the_worked_one():
    """With one logit at -180 beside two at 0 the loss is log 2 + 180 times the target of that class."""
    target = [0.9726961201, 0.0265776788, 0.0007262011]
    for c, share in enumerate(target):
        far = [[-1.0 if k == c else 0.0 for k in range(3)]]
        batch, adv = made_batch({"cosine": far}, on_clean={"cosine": FROZEN["cosine"][:1]})
        found = AGFT().attack_loss(batch)(adv).item()
        assert (found - math.log(2)) / 180 == pytest.approx(share, abs=1e-9)


def test_a_student_that_says_what_its_target_says_has_its_entropy_as_loss():
    batch, adv = made_batch({"cosine": [[0.4 * value for value in row] for row in FROZEN["cosine"]]}, on_clean=FROZEN)
    assert AGFT()(batch, adv)["soft_ce"].item() == pytest.approx(ENTROPY, abs=1e-9)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"sharpness": -1.0}, {"sharpness": float("nan")}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AGFT(**wrong)
