"""A moving average of the weights over updates: what it is, where it acts, and that a training goes on with it."""

import shutil

import pytest
import torch
from training_script import arguments, state, tiny_data, tiny_model
from transformers import TrainerCallback

from hf_robust_clip import TeCoATrainer

DECAY = 0.75


class Watch(TrainerCallback):
    """The trained weights after each update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **events):
        self.seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])


def trainer_of(folder, watch=None, **changes):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, ema_decay=DECAY)
    args = arguments(folder, **{**settings, **changes})
    callbacks = [] if watch is None else [watch]
    return TeCoATrainer(tiny_model(), args, None, tiny_data(), tiny_data(7), callbacks=callbacks)


def test_the_model_ends_as_the_average_and_is_trained_without_it(tmp_path):
    watch, plain = Watch(), Watch()
    trainer = trainer_of(tmp_path / "a", watch)
    trainer.train()
    average = watch.seen[0]
    for weights in watch.seen[1:]:
        average = [DECAY * a + (1 - DECAY) * w for a, w in zip(average, weights, strict=True)]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for value, expected in zip(trained, average, strict=True):
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-12)
    assert max(float((a - w).abs().max()) for a, w in zip(average, watch.seen[-1], strict=True)) > 1e-3
    trainer_of(tmp_path / "b", plain, ema_decay=0.0).train()
    assert all(map(torch.equal, watch.seen[-1], plain.seen[-1]))


def test_a_resumed_training_is_bitwise_that_without_a_break(tmp_path):
    def train(resume=None):
        trainer = trainer_of(tmp_path)
        trainer.train(resume)
        return state(trainer.model)

    expected = train()
    for checkpoint in ("checkpoint-4", None):  # from the one before, and from the last, where nothing is left
        if checkpoint:
            shutil.rmtree(tmp_path / checkpoint)
        found = train(resume=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="ema_decay"):
        trainer_of(tmp_path, ema_decay=0.5).train(resume_from_checkpoint=True)


def test_evaluations_are_of_the_average_and_leave_the_weights(tmp_path):
    """The last one of the training is that of the model that comes out of it."""
    watch, plain = Watch(), Watch()
    every = dict(eval_strategy="steps", eval_steps=1, learning_rate=0.05)
    trainer = trainer_of(tmp_path / "a", watch, **every)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[-1] == trainer.evaluate()["eval_loss"]
    other = trainer_of(tmp_path / "b", plain, **every, ema_decay=0.0)
    other.train()
    assert all(map(torch.equal, watch.seen[-1], plain.seen[-1]))
    losses_without = [log["eval_loss"] for log in other.state.log_history if "eval_loss" in log]
    assert losses[0] == losses_without[0] and losses[-1] != losses_without[-1]


def test_the_card_says_it_of_what_is_kept_at_the_end(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.settings()["weights"] == "moving average over the updates"
    assert "moving average" in str(trainer.unmeasured_card("me/clip"))
    trainer.is_in_train = True
    assert "weights" not in trainer.settings(), "a checkpoint has the weights of its update"
    assert "weights" not in trainer_of(tmp_path, ema_decay=0.0).settings()


def test_an_average_that_is_mostly_the_first_update_is_told(tmp_path, caplog):
    trainer_of(tmp_path, max_steps=2, ema_decay=0.99).train()
    assert any("of 2 updates the first weighs 99 %" in text for text in caplog.messages)
    caplog.clear()
    trainer_of(tmp_path / "b", max_steps=2, ema_decay=0.05).train()
    assert not any("ema_decay" in text for text in caplog.messages)


def test_weights_in_half_precision_are_refused(tmp_path):
    args = arguments(tmp_path, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"ema_decay=0\.9"):
        TeCoATrainer(tiny_model(torch.bfloat16), args, None, tiny_data(8, torch.bfloat16)).train()
