"""AGFT against values worked out by hand."""

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


def test_a_student_that_says_what_its_target_says_has_its_entropy_as_loss():
    batch, adv = made_batch({"cosine": [[0.4 * value for value in row] for row in FROZEN["cosine"]]}, on_clean=FROZEN)
    assert AGFT()(batch, adv)["soft_ce"].item() == pytest.approx(ENTROPY, abs=1e-9)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"sharpness": -1.0}, {"sharpness": float("nan")}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AGFT(**wrong)
