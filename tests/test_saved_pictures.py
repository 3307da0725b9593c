"""Where an evaluation puts the adversarial pictures of its tasks and attacks."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_robust_clip import EvaluationSettings
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.runs import saved_pictures
from hf_robust_clip.runs.shared import folder_named


def prepared(folder, **changes):
    run = dict(save_adversarial="float16", model=SimpleNamespace(model_name_or_path="mine"))
    run["evaluations"] = [EvaluationSettings(["1/255"], attack=PGD(steps)) for steps in (2, 3)]
    printed = []
    return SimpleNamespace(
        run=SimpleNamespace(**{**run, **changes}),
        folder=Path(folder),
        tasks={"a set": None, "a-set": None, "digits": None},
        processes=SimpleNamespace(print=printed.append),
        printed=printed,
    )


def data(dataset_id):
    return SimpleNamespace(dataset_id=dataset_id, class_names=["a", "b"])


def test_every_task_and_attack_has_a_folder_of_its_own():
    run = prepared("out")
    place = saved_pictures.place_of(run, "mine", "digits", "PGD-2", data("digits"))
    assert (Path(place.folder).as_posix(), place.pixels) == ("out/adversarial/digits/PGD-2", "float16")
    own = [saved_pictures.place_of(run, "mine", task, "PGD-3", data("digits")).folder for task in ("a set", "a-set")]
    assert len(set(own)) == 2 and all(path.name == "PGD-3" and path.parent.name[:6] == "a-set-" for path in own)
    assert folder_named("Digits", ["digits", "Digits"]) != "Digits"  # where letters of either size are one file
    assert folder_named("???", ["???"]) != ""


def test_other_checkpoints_and_sets_that_must_not_be_passed_on_are_left_out():
    run = prepared("out")
    assert saved_pictures.place_of(run, "other", "digits", "PGD-2", data("digits")) is None and not run.printed
    assert saved_pictures.place_of(run, "mine", "digits", "PGD-2", data("ILSVRC/imagenet-1k")) is None
    assert len(run.printed) == 1 and "ILSVRC/imagenet-1k" in run.printed[0]
    assert (
        saved_pictures.place_of(prepared("out", save_adversarial=None), "mine", "digits", "PGD-2", data("x")) is None
    )


def test_one_task_that_may_be_saved_is_enough():
    tasks = [SimpleNamespace(dataset=name) for name in ("imagenet", "digits")]
    about = SimpleNamespace(save_adversarial="uint8", defence=None)
    saved_pictures.check(about, tasks)
    with pytest.raises(ValueError, match="imagenet"):
        saved_pictures.check(about, tasks[:1])


def test_pictures_of_an_earlier_run_are_deleted_by_their_names(tmp_path):
    place = tmp_path / "adversarial/digits/PGD-2"
    (place / "data").mkdir(parents=True)
    names = ["README.md", "data/linf_1_255-00000-of-00001-0123456789abcdef.parquet", "data/mine.parquet"]
    for name in names:
        (place / name).write_text("")
    assert saved_pictures.written(tmp_path) == ["adversarial/digits/PGD-2"]
    saved_pictures.clear(tmp_path)
    assert [path.name for path in place.rglob("*") if path.is_file()] == ["mine.parquet"]
    assert saved_pictures.written(tmp_path) == []
