import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_script import arguments, state, tiny_data, tiny_model

from hf_robust_clip import TeCoA, TeCoATrainer
from hf_robust_clip.training_checkpoints import check_checkpoint, first_not_finite, newest_whole_checkpoint


@dataclass(frozen=True)
class Poison(TeCoA):
    """A loss that is finite and whose gradient is not."""

    def __call__(self, batch, adv_BCHW):
        terms = super().__call__(batch, adv_BCHW)
        return {**terms, "root": (batch.student(adv_BCHW).logits * 0).sum().sqrt()}


def test_last_update_that_ends_in_nan_is_an_error_and_saves_nothing(tmp_path):
    args = arguments(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    trainer = TeCoATrainer(tiny_model(), args, Poison(), tiny_data())
    with pytest.raises(FloatingPointError, match=r"step 1: the trained parameter 'vision_model\."):
        trainer.train()
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_training_without_checkpoints_ends_in_the_same_error(clipping, tmp_path):
    args = arguments(tmp_path, max_steps=1, max_grad_norm=clipping)
    with pytest.raises(FloatingPointError, match="step 1"):
        TeCoATrainer(tiny_model(), args, Poison(), tiny_data()).train()


def test_first_parameter_that_is_not_finite_is_named():
    model = tiny_model()
    assert first_not_finite(model) is None
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = torch.inf
        model.text_projection.weight[0, 0] = torch.nan
    model.text_projection.requires_grad_(False)
    assert first_not_finite(model) == "visual_projection.weight"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = TeCoATrainer(tiny_model(), args, None, tiny_data())
    trainer.train()
    return folder, state(trainer.model)


def poison(folder):
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_optimizer(folder):
    (folder / "optimizer.pt").unlink()


def without_schedule(folder):
    (folder / "scheduler.pt").unlink()


@pytest.mark.parametrize("damage", [poison, without_optimizer, without_schedule])
def test_a_damaged_newest_checkpoint_is_passed_over(damage, finished, tmp_path):
    """And training goes on from the one before to the same end."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    damage(folder / "checkpoint-4")
    with pytest.raises(OSError, match="checkpoint-4"):
        check_checkpoint(folder / "checkpoint-4")
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-2"
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = TeCoATrainer(tiny_model(), args, None, tiny_data())
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, finished[1][name]) for name, tensor in state(trainer.model).items())
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-4"


def test_a_training_that_never_steps_is_an_error(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=64, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="train_dataset gave no update"):
        TeCoATrainer(tiny_model(), args, None, tiny_data()).train()


def test_updates_that_overflowed_are_not_counted(tmp_path, monkeypatch):
    """As the scaler of fp16 leaves them out: the first two of three, then all."""
    from accelerate import Accelerator

    for overflows, updates in ((2, 1), (3, 0)):
        trainer = TeCoATrainer(tiny_model(), arguments(tmp_path), None, tiny_data())
        skipped = property(lambda self, n=overflows, t=trainer: t.state.global_step < n)
        monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", skipped)
        if updates:
            trainer.train()
            assert (trainer.settings()["updates"], trainer.settings()["skipped_updates"]) == (updates, overflows)
        else:
            with pytest.raises(FloatingPointError, match="no update"):
                trainer.train()
