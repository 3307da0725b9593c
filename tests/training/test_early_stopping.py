"""Stopping where held-out robust accuracy no longer rises, with the best weights, and going on exactly."""

import re
import shutil

import pytest
import torch
from training_script import arguments, state, tiny_data, tiny_model
from transformers import TrainerCallback

from hf_robust_clip import TeCoATrainer
from hf_robust_clip.training.resuming import Patience

ROBUST = {1: 0.2, 2: 0.4, 3: 0.4, 4: 0.3, 5: 0.4, 6: 0.9}  # by step: stopped at 4, with patience 2 after the best, 2


def trainer(folder, callbacks=None, **changes):
    best = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=6,
                load_best_model_at_end=True, metric_for_best_model="robust_accuracy")  # fmt: skip
    args = arguments(folder, **{**best, "early_stopping_patience": 2, **changes})
    made = TeCoATrainer(
        tiny_model(), args, None, tiny_data(), tiny_data(5), callbacks=callbacks,
        compute_metrics=lambda prediction: {"robust_accuracy": ROBUST[made.state.global_step]},
    )  # fmt: skip
    return made


def same(one, other):
    return all(torch.equal(tensor, state(other.model)[name]) for name, tensor in state(one.model).items())


def test_the_best_weights_are_kept_and_the_training_ends_when_patience_does(tmp_path):
    stopped, whole = trainer(tmp_path / "stopped"), trainer(tmp_path / "whole", early_stopping_patience=None)
    alone = trainer(tmp_path / "alone", max_steps=2, lr_scheduler_type="constant")
    for made in (stopped, whole, alone):
        made.train()
    assert (stopped.state.global_step, whole.state.global_step) == (4, 6)
    assert stopped.state.best_model_checkpoint == str(tmp_path / "stopped/checkpoint-2")
    assert stopped.settings()["weights_of_update"] == 2 and stopped.settings()["updates"] == 4
    assert same(stopped, alone) and not same(whole, alone)
    again = trainer(tmp_path / "stopped")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and same(again, stopped), "a training that was stopped stays so"
    stopped.train()
    assert stopped.state.global_step == 4, "patience begins anew with each training"
    assert sum(isinstance(own, Patience) for own in stopped.callback_handler.callbacks) == 1


def test_a_training_that_goes_on_has_the_patience_that_was_left(tmp_path):
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state_, control, **kwargs):
            if state_.global_step == 3:
                raise Killed

    whole, killed = trainer(tmp_path / "whole"), trainer(tmp_path / "killed", [Kill()])
    whole.train()
    with pytest.raises(Killed):
        killed.train()
    shutil.copytree(tmp_path / "killed", tmp_path / "elsewhere")
    again = trainer(tmp_path / "elsewhere")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and same(again, whole)
    with pytest.raises(ValueError, match="early_stopping_patience was 2, is 3"):
        trainer(tmp_path / "killed", early_stopping_patience=3).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"early_stopping_patience": 0}, "early_stopping_patience=0"),
        ({"early_stopping_patience": 1.5}, "early_stopping_patience=1.5"),
        ({"load_best_model_at_end": False}, "early_stopping_patience=2 load_best_model_at_end"),
        ({"save_steps": 2}, "save_steps=2 eval_steps=1"),
    ],
)
def test_what_would_not_stop_or_not_keep_the_best_is_refused(changes, named, tmp_path):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, named.split(" ")))):
        trainer(tmp_path, **changes)
