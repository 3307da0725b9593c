import math

import pytest
import torch

from hf_robust_clip.modeling import ZeroShotOutput
from hf_robust_clip.objectives.apt import APT
from hf_robust_clip.objectives.base import Batch
from hf_robust_clip.objectives.trades import TRADES


def student(images):
    """Three logits per image: its first three values."""
    logits = images.flatten(1)[:, :3]
    return ZeroShotOutput(logits=logits, cosine=logits / 100, image_embeds=logits)


def batch_of(count=4):
    images = torch.tensor([[0.0, 0.5, 1.0]] * count, dtype=torch.float64).view(count, 3, 1, 1)
    return Batch((images,), torch.tensor([0, 1, 2, 0][:count]), None, student)


def plain_cross_entropy(rows, labels):
    return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(rows, labels, strict=True)) / len(
        rows
    )


@pytest.mark.parametrize("mix", ["adv_half", "adv_full"])
def test_loss_is_the_cross_entropy_of_what_it_is_given(mix):
    batch = batch_of()
    adv = batch.images + torch.tensor([0.0, 0.0, 0.25, 0.5], dtype=torch.float64).view(4, 1, 1, 1) * batch.images
    wanted = plain_cross_entropy(adv.flatten(1).tolist(), [0, 1, 2, 0])
    terms = APT(mix)(batch, adv)
    assert set(terms) == {"ce"}
    assert terms["ce"].item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("count", "clean"), [(4, 2), (5, 2), (1, 0), (2, 1)])
def test_the_second_half_is_attacked_the_larger_one_of_an_odd_number(count, clean):
    rows = list(range(count))
    assert rows[APT("adv_half").attacked_rows(count)] == rows[clean:]
    assert rows[APT("adv_full").attacked_rows(count)] == rows
    assert rows[APT("trades").attacked_rows(count)] == rows


def test_only_the_clean_control_is_not_attacked():
    assert [APT(mix).attacked for mix in ("adv_half", "adv_full", "trades", "clean")] == [True, True, True, False]


def test_trades_variant_is_trades():
    batch, adv = batch_of(), batch_of().images.flip(1)
    for beta in (6.0, 0.5):
        assert APT("trades", beta)(batch, adv) == TRADES(beta)(batch, adv)
    torch.testing.assert_close(APT("trades").attack_loss(batch)(adv), TRADES().attack_loss(batch)(adv))
    assert (APT("trades").attack_loss(batch)(batch.images) == 0).all()
    assert (APT("adv_half").attack_loss(batch)(batch.images) > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"), [({"batch_mix": "half"}, "choose one of adv_half"), ({"beta": -1}, "beta=-1")]
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        APT(**settings)


@pytest.mark.parametrize("batch_mix", ["adv_half", "adv_full", "clean"])
def test_weight_of_a_term_that_the_mix_lacks_is_refused(batch_mix):
    with pytest.raises(ValueError, match=rf"beta=3\.0 .*batch_mix='{batch_mix}'"):
        APT(batch_mix, beta=3.0)
    assert APT("trades", beta=3.0).beta == 3.0
