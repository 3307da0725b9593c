"""TGA-ZSR against values worked out by hand."""

import pytest
import torch
from made_outputs import made_batch, made_output
from made_tokens import ATTACKED, CLEAN, FROZEN, LABELS, of

from hf_robust_clip.objectives.tga_zsr import TGAZSR


@pytest.mark.parametrize(
    ("map_norm", "frozen", "adv", "clean", "weighted"),
    [
        ("token_axis", [0, 1 / 7, 1, 4 / 7], 1.2773309113, 0.7294165177, 0.1386572988),
        ("cosine", [0, 0.3007921071, 1, 0.8167937678], 1.7827656801, 1.2047090799, 0.2028567084),
    ],
)
def test_maps_and_terms_are_the_worked_ones(map_norm, frozen, adv, clean, weighted):
    objective = TGAZSR(map_norm=map_norm)
    small = objective.attention(made_output(**of(FROZEN)), LABELS, 2)
    assert small.flatten().tolist() == pytest.approx(frozen, abs=1e-9)
    batch, attacked = made_batch(of(ATTACKED), of(CLEAN), on_clean=of(FROZEN), labels=[1], side=4)
    terms = {name: value.item() for name, value in objective(batch, attacked).items()}
    scale = 224 / 4
    assert terms["attention_adv"] / 0.08 / scale == pytest.approx(adv, abs=1e-9)
    assert terms["attention_clean"] / 0.05 / scale == pytest.approx(clean, abs=1e-9)
    assert (terms["attention_adv"] + terms["attention_clean"]) / scale == pytest.approx(weighted, abs=1e-9)
    assert terms["ce"] == pytest.approx(0.6931471806, abs=1e-9)


def test_a_map_that_is_the_same_all_over_is_zero_and_has_a_gradient():
    output = made_output(**of([[1.0, 1, 1]] * 5))
    output.patch_embeds.requires_grad_()
    found = TGAZSR(map_norm="none").attention(output, LABELS, 4)
    assert not found.any()
    assert torch.autograd.grad(found.sum(), output.patch_embeds)[0].isfinite().all()


def test_patches_that_make_no_square_and_wrong_settings_are_named():
    with pytest.raises(ValueError, match="patch_embeds"):
        TGAZSR().attention(made_output(**of(FROZEN[:4])), LABELS, 4)
    with pytest.raises(ValueError, match="alpha"):
        TGAZSR(alpha=-1)
    with pytest.raises(ValueError, match="map_norm"):
        TGAZSR(map_norm="max")
