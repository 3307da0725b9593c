"""SAFT against values worked out by hand."""

import math

import pytest
from made_outputs import made_batch, made_output
from made_tokens import ATTACKED, CLEAN, FROZEN, of

from hf_robust_clip.objectives.saft import SAFT
from hf_robust_clip.objectives.tga_zsr import TGAZSR

TEXTS = [[[0, 0, 1], [0.6, 0.8, 0]], [[0, 1, 0], [1, 0, 0]]]  # two of each of two classes


def with_texts(tokens):
    return {**of(tokens), "text_embeds": TEXTS, "logit_scale": 10.0}


def test_the_cross_entropy_is_the_mean_over_texts():
    """u = (1, 1, 1) / sqrt(3): cosines (1, 1.4) and (1, 1) over sqrt(3), times 10."""
    first, second = math.log1p(math.exp(-4 / math.sqrt(3))), math.log(2)
    batch, attacked = made_batch(
        with_texts(ATTACKED), with_texts(CLEAN), on_clean=with_texts(FROZEN), labels=[1], side=4
    )
    assert SAFT().attack_loss(batch)(attacked).item() == pytest.approx((first + second) / 2, abs=1e-9)
    terms, usual = SAFT()(batch, attacked), TGAZSR()(batch, attacked)
    assert terms["ce"].item() == pytest.approx((first + second) / 2, abs=1e-9)
    for name in ("attention_adv", "attention_clean"):
        assert terms[name].item() == usual[name].item()


def test_texts_are_needed():
    assert "texts" in SAFT().needs
    output = made_output(**of(FROZEN), logit_scale=10.0)
    with pytest.raises(ValueError, match="several texts"):
        SAFT().cross_entropy(output, None)
