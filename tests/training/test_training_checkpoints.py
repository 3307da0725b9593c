import math
import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_script import arguments, state, tiny_data, tiny_model, tiny_prompts
from transformers import TrainerCallback

from hf_robust_clip import TeCoA, TeCoATrainer
from hf_robust_clip.training.checkpoints import (
    RUN_FILE,
    NothingToResume,
    check_checkpoint,
    drop_old_checkpoints,
    first_not_finite,
    newest_whole_checkpoint,
    note_checkpoint,
    read_note,
)


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


def run_again(folder, **changes):
    args = arguments(folder, **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes})
    return TeCoATrainer(tiny_model(), args, None, tiny_data())


def poison(folder):
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def missing(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 5)


def flipped(name):
    def flip(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)

    return flip


def emptied(name):
    return lambda folder: (folder / name).write_text("{}")


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", RUN_FILE)
DAMAGES = [(damage(name), name) for damage in (missing, cut, flipped, emptied) for name in FILES]
DAMAGES.append((poison, "model.safetensors"))


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(damage, named, finished, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    damage(folder / "checkpoint-4")
    with pytest.raises(OSError, match=f"checkpoint-4' is not whole: {named}"):
        check_checkpoint(folder / "checkpoint-4")
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-2"
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint-4 is passed over: {named} is ")


def prefixed(weights):
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def without_one(weights):
    return dict(list(weights.items())[1:])


def with_one_more(weights):
    return weights | {"more": torch.zeros(1)}


def of_another_shape(weights):
    return {name: tensor.flatten()[:-1] if tensor.ndim == 2 else tensor for name, tensor in weights.items()}


def rewrite(folder, file, change):
    """Change weights, and note the checkpoint as if they had been saved so."""
    run = read_note(folder)["run"]
    save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})
    note_checkpoint(folder, run, 1)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("change", [prefixed, without_one, with_one_more, of_another_shape])
def test_whole_files_of_another_model_are_not_loaded_in_part(change, adapter, tmp_path):
    """The Trainer would take what fits, and go on with the rest as it is."""

    def make():
        args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        return TeCoATrainer(tiny_model(), args, None, tiny_data(), peft_config=tiny_prompts() if adapter else None)

    make().train()
    rewrite(tmp_path / "checkpoint-2", "adapter_model.safetensors" if adapter else "model.safetensors", change)
    check_checkpoint(tmp_path / "checkpoint-2")
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(OSError, match=r"checkpoint-2' is not whole: \S+ in its weights is .*delete it"):
            make().train(resume_from_checkpoint=resume)


def test_training_goes_on_from_the_one_before_to_the_same_end(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = run_again(folder)
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, finished[1][name]) for name, tensor in state(trainer.model).items())
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-4"


def test_weights_alone_are_nothing_to_go_on_from(tmp_path, caplog):
    run_again(tmp_path, save_only_model=True).train()
    with pytest.raises(NothingToResume):
        run_again(tmp_path).train(resume_from_checkpoint=True)
    assert "save_only_model=True" in caplog.messages[0]


def test_an_older_checkpoint_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    """A kill before the last file is written leaves one to go on from, also where one is kept."""

    def kill(folder, *more):
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        note_checkpoint(folder, *more)

    monkeypatch.setattr("hf_robust_clip.training.resuming.note_checkpoint", kill)
    with pytest.raises(KeyboardInterrupt):
        run_again(tmp_path, save_total_limit=1).train()
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_only_whole_checkpoints_are_counted_and_nothing_else_is_deleted(tmp_path):
    """What others keep under such names stays; a newer date of a damaged one saves it from nothing."""
    others = [
        tmp_path / name / "thesis.txt" for name in ("checkpoint-of-my-life", "checkpoint-500", "checkpoint-9-notes")
    ]
    for file in others:
        file.parent.mkdir()
        file.write_text("mine")
    run_again(tmp_path, save_total_limit=1).train()
    assert [note.parent.name for note in tmp_path.glob(f"*/{RUN_FILE}")] == ["checkpoint-4"]
    assert not (tmp_path / "checkpoint-2").exists()
    (tmp_path / "checkpoint-4" / "notes.txt").write_text("mine")
    os.utime(tmp_path / "checkpoint-4" / RUN_FILE, (2**32, 2**32))
    drop_old_checkpoints(shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"), 1, None)
    assert all(file.read_text() == "mine" for file in others)
    assert [path.name for path in (tmp_path / "checkpoint-4").iterdir()] == ["notes.txt"]
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


@pytest.mark.parametrize("schedule", [{}, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20}])
def test_from_the_last_checkpoint_nothing_is_trained(schedule, tmp_path):
    """Of steps that are no whole number of epochs (three updates each), also in an unfinished warm-up."""
    trainer = run_again(tmp_path, **schedule)
    trainer.train()
    expected, told = state(trainer.model), trainer.settings()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for _ in range(2):
        again = run_again(tmp_path, **schedule)
        random_state = torch.get_rng_state()
        result = again.train(resume_from_checkpoint=True)
        assert not torch.equal(torch.get_rng_state(), random_state)
        assert again.state.global_step == result.global_step == 4
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state(again.model).items())
        assert again.settings() == told
        assert math.isnan(result.training_loss) and "train_loss" not in result.metrics
        assert [log["loss"] for log in again.state.log_history if "loss" in log] == [
            log["loss"] for log in trainer.state.log_history if "loss" in log
        ]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def test_from_the_last_checkpoint_the_best_weights_come_back(tmp_path):
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False, learning_rate=0.1,
                eval_strategy="steps", eval_steps=2)  # fmt: skip

    def make():
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **best)
        return TeCoATrainer(tiny_model(), args, None, tiny_data(), tiny_data(7))

    trainer = make()
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    again = make()
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, state(trainer.model)[name]) for name, tensor in state(again.model).items())
    assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert again.settings() == trainer.settings()


def test_a_damaged_best_checkpoint_is_not_loaded_in_the_end(tmp_path):
    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step == 4:
                flipped("model.safetensors")(tmp_path / "checkpoint-2")

    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False, learning_rate=0.1,
                eval_strategy="steps", eval_steps=2)  # fmt: skip
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **best)
    trainer = TeCoATrainer(tiny_model(), args, None, tiny_data(), tiny_data(7), callbacks=[Damage()])
    with pytest.raises(OSError, match=r"checkpoint-2.* model\.safetensors is cut short or changed"):
        trainer.train()


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
