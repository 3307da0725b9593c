"""Comp-TGA against maps worked out one by one."""

import pytest
import torch
from made_outputs import made_batch, made_output
from made_tokens import ATTACKED, CLEAN, FROZEN, LABELS, of

from hf_robust_clip.objectives.comp_tga import CompTGA
from hf_robust_clip.objectives.tga_zsr import TGAZSR

DENYING = [[[1, 0, 0], [0, 0, 1]]]


def denied(tokens, side):
    """A_not_y: the map of the text that denies, in the place of the class's own."""
    own = {**of(tokens), "class_embeds": DENYING[0]}
    return TGAZSR().attention(made_output(**own), LABELS, side)


def with_text(tokens):
    return {**of(tokens), "text_embeds": DENYING}


def test_maps_are_products_of_enlarged_ones():
    output = made_output(**with_text(FROZEN))
    small = CompTGA().attention(output, LABELS, 2)
    # patches over their norms: third channel [1, 1, 0, 1] / 2 of tokens [0, 1, 1, 0, 1], denied [1, 1, 0, 1]
    assert denied(FROZEN, 2).flatten().tolist() == pytest.approx([1, 1, 0, 1], abs=1e-9)
    assert small.flatten().tolist() == pytest.approx([0, 0, 1, 0], abs=1e-9)
    large = CompTGA().attention(output, LABELS, 4)
    expected = TGAZSR().attention(output, LABELS, 4) * (1 - denied(FROZEN, 4))
    assert torch.equal(large, expected)
    enlarged = torch.nn.functional.interpolate(small[:, None], (4, 4), mode="bilinear")[:, 0]
    assert (large - enlarged).abs().max() > 0.05, "each map is enlarged before the product"


def test_terms_are_weighed_distances_of_these_maps():
    batch, attacked = made_batch(with_text(ATTACKED), with_text(CLEAN), on_clean=with_text(FROZEN), labels=[1], side=4)
    terms = CompTGA()(batch, attacked)
    maps = [
        TGAZSR().attention(made_output(**of(t)), LABELS, 4) * (1 - denied(t, 4)) for t in (ATTACKED, CLEAN, FROZEN)
    ]
    adv, clean = ((own - maps[2]).norm().item() * 224 / 4 for own in maps[:2])
    assert terms["attention_adv"].item() == pytest.approx(0.1 * adv, abs=1e-9)
    assert terms["attention_clean"].item() == pytest.approx(0.07 * clean, abs=1e-9)
    assert terms["ce"].item() == pytest.approx(0.6931471806, abs=1e-9)


def test_its_text_is_asked_for_and_wrong_ones_are_named():
    assert CompTGA(negative_template="no {}").templates == ("no {}",)
    with pytest.raises(ValueError, match="negative_template"):
        CompTGA(negative_template="background")
    with pytest.raises(ValueError, match="texts that deny"):
        CompTGA().attention(made_output(**of(FROZEN)), LABELS, 4)
