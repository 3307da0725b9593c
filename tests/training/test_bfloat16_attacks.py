"""Attacks of a training in bfloat16: what the attack sees, and what losses and updates don't."""

from __future__ import annotations

import pytest
import torch
from training_script import arguments, state, tiny_data, tiny_model

from hf_robust_clip import FARE, PMGAFT, TRADES, RobustClipTrainer
from hf_robust_clip.training.summary import training_settings


def data():
    return tiny_data(12, torch.float32)


def trainer_for(folder, objective, **changes):
    args = arguments(folder, **changes)
    return RobustClipTrainer(tiny_model(torch.float32), args, objective, train_dataset=data())


def attacked_batch(folder, objective, **changes):
    """A trainer, its batch after the attack, and the adversarial images."""
    trainer = trainer_for(folder, objective, **changes)
    inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in data()[:6]]) for name in data()[0]}
    batch = trainer.make_batch(inputs, trainer.model)
    return trainer, batch, trainer._attacked(batch, trainer.model)


@pytest.mark.parametrize("objective", [PMGAFT.released_preset(), FARE(), TRADES()], ids=lambda own: type(own).__name__)
def test_only_the_student_under_attack_is_in_bfloat16(objective, tmp_path):
    trainer, exact, adv = attacked_batch(tmp_path, objective)
    _, batch, rough = attacked_batch(tmp_path, objective, attack_bf16=True)
    assert not torch.equal(adv, rough), "gradients in bfloat16 turn a sign here and there"
    assert float((adv - rough).abs().max()) <= 2 * trainer.threat_model.eps + 1e-6
    assert float((adv == rough).double().mean()) > 0.8
    if "teacher" in objective.needs:
        assert torch.equal(batch.teacher_on_clean.image_embeds, exact.teacher_on_clean.image_embeds)
    wanted, terms = objective(exact, adv), objective(batch, adv)
    for name, term in wanted.items():
        assert torch.equal(terms[name], term), f"{name} is made in float32"


def test_a_training_with_attacks_in_bfloat16_goes_almost_the_same_way(tmp_path):
    ends = []
    for attack_bf16 in (False, True):
        trainer = trainer_for(tmp_path / str(attack_bf16), PMGAFT.released_preset(), attack_bf16=attack_bf16)
        trainer.train()
        weights = [tensor for tensor in state(trainer.model).values() if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in weights} == {torch.float32}
        ends.append(torch.cat([tensor.flatten() for tensor in weights]))
    assert not torch.equal(*ends)
    torch.testing.assert_close(*ends, rtol=0, atol=5e-3)


def test_reports_say_so(tmp_path):
    trainer = trainer_for(tmp_path, PMGAFT(), attack_bf16=True)
    assert training_settings(trainer)["precision"] == "float32, attack in bfloat16"


def test_weights_that_autocast_leaves_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="attack_bf16"):
        RobustClipTrainer(tiny_model(), arguments(tmp_path, attack_bf16=True), PMGAFT(), train_dataset=tiny_data())


def test_beside_mixed_precision_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="attack_bf16"):
        arguments(tmp_path, bf16=True, attack_bf16=True)
