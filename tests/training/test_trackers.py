"""What trackers get: figures by the Trainer's own callbacks, and pictures of attacked images."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_script import arguments, tiny_data, tiny_model
from transformers.integrations.integration_utils import DVCLiveCallback, TrackioCallback, WandbCallback, WandbLogModel

from hf_robust_clip import TTC, CLIPForZeroShotClassification, TeCoATrainer, digits_clip_path, load_image_dataset
from hf_robust_clip.defences.base import Prediction
from hf_robust_clip.training import trackers
from hf_robust_clip.training.config import on_its_own
from hf_robust_clip.training.trackers import AttackedPictures, pictures_of

TERMS = {"train/loss", "train/ce", "eval/loss", "eval/clean_accuracy", "eval/robust_accuracy"}


def data(size=12):
    return [{**row, "pixel_values": row["pixel_values"].float()} for row in tiny_data(size)]


def trainer(folder, callbacks=(), *, evaluated=None, **changes):
    every_step = dict(
        eval_strategy="steps", eval_steps=1, max_steps=2, per_device_eval_batch_size=8, learning_rate=0.1
    )
    args = arguments(folder, **{**every_step, **changes})
    return TeCoATrainer(tiny_model(torch.float32), args, None, data(16), evaluated or data(8), callbacks=[*callbacks])


class Image:
    def __init__(self, picture, caption=None):
        self.picture, self.caption = picture, caption


def stand_in(kind):
    """The Trainer's callback for Trackio or wandb with a module that keeps what is logged, and that list."""
    logged, callback = [], object.__new__(kind)
    module = SimpleNamespace(Image=Image, log=logged.append, run=SimpleNamespace(summary={}), finish=lambda: None)
    callback.__dict__ |= {"_trackio": module, "_wandb": module, "_initialized": True, "_space_id": None}
    callback._log_model = WandbLogModel.FALSE
    return callback, logged


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn, without matplotlib's second for each."""
    found = []

    def note(path, *parts):
        found.append(parts)
        from PIL import Image as Pictures

        Pictures.new("RGB", (4, 3), (255, 0, 0)).save(path)

    monkeypatch.setattr(trackers, "plot_examples", note)
    return found


@pytest.mark.parametrize("kind", [TrackioCallback, WandbCallback])
def test_loss_terms_accuracies_and_pictures_of_each_evaluation(kind, drawn, tmp_path):
    callback, logged = stand_in(kind)
    made = trainer(tmp_path, [callback])
    made.train()
    assert set().union(*logged) >= {*TERMS, "eval/attacked"}
    pictures = [row for row in logged if "eval/attacked" in row]
    assert [(row["train/global_step"], row["eval/attacked"].picture.size) for row in pictures] == [
        (1, (4, 3)),
        (2, (4, 3)),
    ]
    assert pictures[1]["eval/attacked"].caption == "PGD-2 on the first images, step 2"
    figures = [row for row in logged if "eval/robust_accuracy" in row]
    told = [row for row in made.state.log_history if "eval_robust_accuracy" in row]
    assert [row["eval/robust_accuracy"] for row in figures] == [row["eval_robust_accuracy"] for row in told]


def test_the_pictures_are_those_that_the_accuracies_count(drawn, tmp_path):
    callback, _ = stand_in(TrackioCallback)
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    digits = load_image_dataset("digits", "test", model.processor).first(24)
    model.set_classes(digits.class_names)
    args = arguments(tmp_path, eps="24/255", attack_step_size="6/255", eval_attack_steps=5)
    args.per_device_eval_batch_size = 24
    made = TeCoATrainer(model, args, None, digits, digits, callbacks=[callback, AttackedPictures(num_images=24)])
    found = made.evaluate()
    assert len(pictures_of(made.callback_handler)) == 1
    (images, adversarials, truth, before, after, title) = drawn[-1]
    assert torch.equal(images, torch.stack([row["pixel_values"] for row in digits]))
    assert title == "PGD-5 on the first images, step 0"
    assert 0 < (adversarials - images).abs().max() <= 24 / 255 + 1e-6
    assert list(truth) == [digits.class_names[row["labels"]] for row in digits]
    right = [(one == name, one == name == other) for name, one, other in zip(truth, before, after, strict=True)]
    assert np.mean(right, axis=0).tolist() == [found["eval_clean_accuracy"], found["eval_robust_accuracy"]]
    assert found["eval_robust_accuracy"] < found["eval_clean_accuracy"]


def test_several_sets_have_a_picture_each_of_the_first_images_alone(drawn, tmp_path):
    callback, logged = stand_in(TrackioCallback)
    trainer(tmp_path, [callback], evaluated={"one": data(8), "two": data(10)[8:]}, max_steps=1).train()
    assert [name for row in logged for name in row if "attacked" in name] == ["eval/one_attacked", "eval/two_attacked"]
    assert [len(parts[0]) for parts in drawn] == [4, 2]


def test_nothing_is_drawn_without_a_tracker_that_takes_it(drawn, tmp_path, caplog):
    made = trainer(tmp_path)
    made.evaluate()
    pictures = AttackedPictures()
    with caplog.at_level(logging.INFO, "hf_robust_clip"):
        for _ in range(2):
            pictures.begin([object.__new__(DVCLiveCallback)], "eval")
    assert [record.message for record in caplog.records] == [
        "report_to='dvclive' gets figures, but no attacked pictures"
    ]
    callback, logged = stand_in(TrackioCallback)
    made = trainer(tmp_path, [callback])
    made.remove_callback(AttackedPictures)
    made.evaluate()
    assert not drawn and not any("eval/attacked" in row for row in logged)


def test_what_a_detector_flags_is_no_picture(drawn, tmp_path, monkeypatch):
    callback, logged = stand_in(TrackioCallback)
    made = trainer(tmp_path, [callback])
    made.defence = TTC()

    def flagging(self, classifier, images, **_):
        return Prediction(classifier(pixel_values=images).logits.detach(), flagged=images[:, 0, 0, 0] > 0.5)

    monkeypatch.setattr(TTC, "predict", flagging)
    assert "eval_robust_accuracy" in made.evaluate()
    assert not drawn and not any("eval/attacked" in row for row in logged)


def test_a_tracker_that_fails_is_told_once_and_the_training_goes_on(drawn, tmp_path, caplog):
    callback, logged = stand_in(TrackioCallback)

    def refuse(*_, **__):
        raise RuntimeError("no pictures today")

    callback._trackio.Image = refuse
    with caplog.at_level(logging.WARNING, "hf_robust_clip"):
        trainer(tmp_path, [callback]).train()
    assert [record.message for record in caplog.records if "pictures today" in record.message] == [
        "TrackioCallback took no picture: RuntimeError: no pictures today"
    ]
    assert sum("eval/robust_accuracy" in row for row in logged) == 2


def test_a_number_of_images_that_shows_nothing_is_refused():
    with pytest.raises(ValueError, match="num_images=0"):
        AttackedPictures(num_images=0)


def test_what_is_trained_beside_a_run_is_not_logged_under_its_name(tmp_path):
    args = arguments(tmp_path, report_to="none")
    args.report_to = ["trackio"]
    assert on_its_own(args).report_to == [] and args.report_to == ["trackio"]


def test_a_space_that_is_not_wanted_is_not_one_of_that_name(tmp_path):
    for told in (False, "false", "False"):
        assert arguments(tmp_path, trackio_static_space_id=told).trackio_static_space_id is False
    assert arguments(tmp_path, trackio_static_space_id="me/logs").trackio_static_space_id == "me/logs"
    assert arguments(tmp_path).trackio_static_space_id is None


def test_tensorboard_as_it_is(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from PIL import Image as Pictures
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, report_to=["tensorboard"]).train()
    (folder,) = (tmp_path / "runs").iterdir()
    read = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert set(read.Tags()["scalars"]) >= TERMS
    shown = read.Images("eval/attacked")
    assert [event.step for event in shown] == [1, 2]
    with Pictures.open(io.BytesIO(shown[0].encoded_image_string)) as picture:
        assert picture.mode == "RGB" and picture.size == (shown[0].width, shown[0].height)


def test_trackio_as_it_is(tmp_path):
    """In a process of its own: Trackio asks for its folder once, on import."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    places = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **places, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert set().union(*rows) >= {*TERMS, "eval/attacked"}
    shown = [row["eval/attacked"] for row in rows if "eval/attacked" in row]
    assert len(shown) == 2
    for row in shown:
        assert (tmp_path / "trackio/media" / row["file_path"]).is_file()


if __name__ == "__main__":
    import sqlite3

    trainer(Path(sys.argv[1]), report_to=["trackio"], project="tried", run_name="run").train()
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"], "tried.db")) as base:
        print()
        print(json.dumps([json.loads(row[0]) for row in base.execute("select metrics from metrics")]))
