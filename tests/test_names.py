"""What models, datasets and folders are called where others read it."""

from pathlib import Path

import pytest

from hf_robust_clip.digits_clip import digits_clip_path
from hf_robust_clip.names import (
    cached_revision,
    check_embedded,
    hub_name,
    is_repo_id,
    last_part,
    paths_in,
    same_place,
    shown_folder,
    shown_name,
    task_titles,
    titles,
    without_paths,
)

CACHED = "/home/somebody/.cache/huggingface/hub/models--openai--clip-vit/snapshots/" + "3d74" * 10


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    for folder in ("a/robust", "b/robust", "data/pictures"):
        (tmp_path / "place" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "place")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/robust", "org/robust"),
        ("digits-clip", "digits-clip"),
        (digits_clip_path(), "digits-clip"),
        (CACHED, "openai/clip-vit"),
        ("data/pictures", None),  # a folder here, whatever else it could be
        ("./org/robust", None),
        ("/home/me/robust", None),
        ("C:\\Users\\me\\robust", None),
        ("~/robust", None),
        ("", None),
    ],
)
def test_the_hubs_name_of_a_model(name, expected):
    assert hub_name(name) == expected


def test_a_folder_of_the_cache_tells_its_commit():
    assert cached_revision(CACHED) == "3d74" * 10
    assert cached_revision("openai/clip-vit") is None


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "a/b", "me/my_model.v2"])
def test_repositories(name):
    assert is_repo_id(name)


@pytest.mark.parametrize("name", ["digits", "/a/b", "./a", "a/b/c", "~/a", "a b/c", "a/", "a/.b"])
def test_what_is_no_repository(name):
    assert not is_repo_id(name)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/me/pictures/", "pictures"),
        ("data/pictures/.", "pictures"),
        ("data/../data/pictures", "pictures"),
        (".", "place"),
        ("C:\\data\\pictures", "pictures"),
        ("file:/home/me/pictures", "pictures"),
    ],
)
def test_the_last_part_of_a_path(path, expected):
    assert last_part(path) == expected


def test_reports_show_no_path():
    assert shown_name("data/pictures") == "pictures"
    assert shown_name("uoft-cs/cifar10") == "uoft-cs/cifar10"
    assert shown_folder("out/pmgaft") == "out/pmgaft"
    assert shown_folder(str(Path("out/pmgaft").absolute())) == "out/pmgaft"
    assert shown_folder("/scratch/me/pmgaft") == "pmgaft"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["out/pmgaft"], ["pmgaft"]),
        (["a/robust", "b/robust"], ["a/robust", "b/robust"]),
        (["a/robust/", "b/../b/robust/."], ["a/robust", "b/robust"]),
        (["org/robust", "other/robust"], ["org/robust", "other/robust"]),
        (["org/robust", "a/robust"], ["org/robust", "a/robust"]),
        ([".", "a"], ["place", "a"]),
        (["./a/robust", "digits-clip"], ["robust", "digits-clip"]),
        (["a", "a/robust"], ["a", "robust"]),
    ],
)
def test_titles_tell_models_apart(names, expected):
    assert list(titles(names).values()) == expected


@pytest.mark.parametrize("names", [["a/robust", "./a/robust/"], ["a/robust", "b/../a/robust"]])
def test_one_model_under_two_names_is_refused(names):
    with pytest.raises(ValueError, match="the same"):
        titles(names)
    assert same_place(*names)


def test_titles_of_tasks():
    assert task_titles([(None, "uoft-cs/cifar10"), ("mine", "data/pictures"), (None, "digits")]) == [
        *("uoft-cs/cifar10", "mine", "digits"),
    ]
    assert task_titles([(None, "data/pictures"), (None, "a/robust"), (None, "b/robust")]) == [
        *("pictures", "a/robust", "b/robust"),
    ]
    with pytest.raises(ValueError, match="'pictures'"):
        task_titles([(None, "data/pictures"), ("pictures", "digits")])


def test_settings_without_paths():
    settings = {
        "model": {"name": "/home/me/base"},
        "data": {"dataset": "data/pictures", "class_names": "/home/me/names.txt", "classes": ["/m/01g317"]},
        "tasks": [{"dataset": "~/pictures", "max_images": 3}],
        "prompt": {"template": "a photo of a {}."},
    }
    assert without_paths(settings) == {
        "model": {"name": "base"},
        "data": {"dataset": "data/pictures", "class_names": "names.txt", "classes": ["/m/01g317"]},
        "tasks": [{"dataset": "pictures", "max_images": 3}],
        "prompt": {"template": "a photo of a {}."},
    }


def test_paths_in_a_text(tmp_path):
    text = (
        f'model="{tmp_path}/place/new"; [PEFT](https://huggingface.co/docs/peft), 8/255 / 16/255, /m/01/02, and/or/not'
    )
    assert paths_in(text) == [f"{tmp_path}/place/new"]
    assert paths_in(f"file://{tmp_path}") == [str(tmp_path)]


def test_a_folder_with_the_embedded_models_name_is_a_clash(tmp_path):
    check_embedded("digits-clip")
    Path("digits-clip").mkdir()
    check_embedded("digits-clip")
    Path("digits-clip/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"\./digits-clip"):
        check_embedded("digits-clip")
    check_embedded("./digits-clip")
