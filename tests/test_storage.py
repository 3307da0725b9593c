"""Files are written whole, beside their place, never through a link; nothing of a killed process stays."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_robust_clip.hub import clear_checkpoints, clear_states, files_to_push
from hf_robust_clip.storage import (
    NotWritten,
    check_text,
    check_writable,
    disk_errors,
    read_json,
    whole_file,
    write_text,
    written_whole,
)

KILLED = """
import os, signal, sys
from hf_robust_clip.storage import written_whole
with written_whole(sys.argv[1], "last") as draft:
    (draft / "big").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_text_that_can_not_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "README.md").write_text("old")
    with pytest.raises(ValueError, match=r"README\.md.*ud800"):
        write_text(tmp_path / "README.md", "new \ud800")
    assert everything(tmp_path) == {"README.md": b"old"}
    write_text(tmp_path / "README.md", "né\r\n")
    assert everything(tmp_path) == {"README.md": "né\r\n".encode()}


@pytest.mark.parametrize("value", [{"a": [{"b\udc80": 1}]}, {"a": ("x", "\ud800")}, ["\udfff"]])
def test_half_a_character_anywhere_in_settings_is_found(value):
    with pytest.raises(ValueError, match="settings"):
        check_text(value, "settings")
    check_text({"a": ["é", "日本", "\U0001f600"], "b": 1}, "settings")


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").symlink_to(tmp_path / "theirs")
    write_text(tmp_path / "out/report.json", "new")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "out/report.json").read_text() == "new" and not (tmp_path / "out/report.json").is_symlink()


@pytest.mark.parametrize("place", ["out", "out/deeper"])
def test_an_error_leaves_a_folder_as_it_was(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")
    with pytest.raises(TypeError), written_whole(tmp_path / place, "a") as draft:
        (draft / "a").write_bytes("no bytes")
    assert everything(tmp_path) == {"out/a": b"old"}
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out/a"]


def test_the_last_file_is_missing_while_the_others_change(tmp_path, monkeypatch):
    for name in ("a", "b", "whole"):
        (tmp_path / name).write_text("old")
    moved = []

    def replace(source, target, real=os.replace):
        moved.append((Path(target).name, (tmp_path / "whole").exists()))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with written_whole(tmp_path, "whole") as draft:
        for name in ("whole", "a", "sub/c"):
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text("new")
    assert sorted(moved[:2]) == [("a", False), ("c", False)] and moved[2] == ("whole", False)
    assert everything(tmp_path) == {"a": b"new", "b": b"old", "whole": b"new", "sub/c": b"new"}


def test_what_a_killed_process_left_goes_with_the_next_save(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".writing-") and (left / "big").stat().st_size == 1000
    assert files_to_push(tmp_path) == []
    with whole_file(tmp_path / "a") as draft:
        write_text(tmp_path / "b", "of a process that runs")
        assert draft.parent.is_dir()
        draft.write_text("new")
    assert everything(tmp_path) == {"a": b"new", "b": b"of a process that runs"}


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_tried_and_left_as_it_was(there, tmp_path):
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
    check_writable(folder)
    assert folder.exists() == there and (not there or not list(folder.iterdir()))


def test_room_for_what_will_be_saved_is_asked_for_first(tmp_path):
    check_writable(tmp_path / "out", room=1000)
    with pytest.raises(NotWritten, match=r"output_dir=.*MB"):
        check_writable(tmp_path / "out", room=2**60)


@pytest.mark.parametrize("name", ["file", "file/inside", "link", "/proc/nowhere", "x" * 300])
def test_a_folder_that_can_not_be_written_is_one_line(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/proc/nowhere")
    with pytest.raises(NotWritten, match=r"^[^\n]*output_dir=[^\n]*$"):
        check_writable(tmp_path / name)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1024 vs 918"), "full"),
    ],
)
def test_a_full_disk_is_one_line_with_the_folder(error, reason):
    with pytest.raises(NotWritten, match=rf"folder='here'.*{reason}"), disk_errors("here"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("x"), OSError("says all itself")])
def test_other_errors_come_through_as_they_are(error):
    with pytest.raises(type(error), match=str(error)) as info, disk_errors("here"):
        raise error
    assert info.value is error


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\x00"])
def test_damaged_json_is_one_line_with_its_name(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*a\.json[^\n]*$"):
        read_json(tmp_path / "a.json")


# ---- deleting


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


OURS = ("checkpoint-3/model.safetensors", "checkpoint-3/trainer_state.json", "checkpoint-3/rng_state_1.pth",
        "checkpoint-3/optimizer.pt", "checkpoint-12/training_run.json", "state/digits-clip-0a1b2c3d/state-0.jsonl",
        "state/statistics/adversarial/state-1.safetensors", "state/fit/a-0a1b2c3d/adversarial/state-0.safetensors",
        "state/statistics/prompts/checkpoint-2/scheduler.pt")  # fmt: skip
THEIRS = ("state/thesis.txt", "checkpoint-of-my-life/model.safetensors", "checkpoint-3/notes.txt",
          "checkpoint-x", "state/digits-clip-0a1b2c3d/mine.jsonl", "state/other/state-0.jsonl", "state.txt",
          "mine/state-0.jsonl", "checkpoint-3/mine/photo.jpg", "state/fit/a-0a1b2c3d/notes.txt",
          "state/fit/mine/state-0.safetensors")  # fmt: skip


def test_only_what_a_run_wrote_is_deleted(tmp_path):
    make(tmp_path, *OURS, *THEIRS)
    clear_checkpoints(tmp_path)
    clear_states(tmp_path)
    assert sorted(everything(tmp_path)) == sorted(THEIRS)
    assert not (tmp_path / "checkpoint-12").exists() and not (tmp_path / "state/statistics").exists()


def test_nothing_behind_a_link_is_deleted(tmp_path):
    make(tmp_path / "theirs", *OURS)
    (tmp_path / "out").mkdir()
    for name in ("checkpoint-3", "state"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "theirs" / name)
    (tmp_path / "out/checkpoint-4").mkdir()
    (tmp_path / "out/checkpoint-4/inner").symlink_to(tmp_path / "theirs/checkpoint-3")
    clear_checkpoints(tmp_path / "out")
    clear_states(tmp_path / "out")
    assert sorted(everything(tmp_path / "theirs")) == sorted(OURS)
