"""CAW against values worked out by hand."""

import pytest
from made_outputs import made_batch

from hf_robust_clip.objectives.caw import CAW

ATTACKED = {"logits": [[27, 26, 19], [23, 22, 24]], "image_embeds": [[2, 1, 2], [4, 0, 3]]}
FROZEN = {"logits": [[30, 25, 20], [22, 24, 21]], "image_embeds": [[0, 0, 0], [0, 0, 0]]}
FROZEN_ON_ADV = {"logits": [[0, 0, 0], [0, 0, 0]], "image_embeds": [[1, 2, 2], [3, 0, 4]]}


def test_terms_are_the_worked_ones():
    batch, adv = made_batch(ATTACKED, on_adv=FROZEN_ON_ADV, on_clean=FROZEN, labels=[0, 1])
    terms = {name: value.item() for name, value in CAW(alpha=2, beta=3)(batch, adv).items()}
    expected = {"ce": 1.3605564324, "guide": 2 * 0.9327788757, "distance": 3 * 1.4142135624}
    assert terms == pytest.approx(expected, abs=1e-9)
    assert "distance" not in CAW(beta=0)(batch, adv)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="alpha"):
        CAW(alpha=-1)
