"""Runs that were killed, on one machine or several, and what is left of them."""

import json
import os
import re
import socket
import subprocess
import sys

import kill_trials
import pytest
import training_script
from accelerate import PartialState

from hf_robust_clip import RobustClipConfig
from hf_robust_clip.processes import join_processes, what_runs


def start(rank, words, port, log):
    """One of two processes, as if each were on a machine of its own; what it prints goes into a file."""
    skip = ("ACCELERATE", "MASTER", "RANK", "WORLD_SIZE", "LOCAL_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(skip)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *words], env=environment, stdout=file, stderr=file)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """What each of two machines found, and what the first one printed."""
    folder, port = tmp_path_factory.mktemp("machines"), free_port()
    words = [training_script.__file__, "machines", str(folder)]
    both = [start(rank, words, port, folder / f"{rank}.log") for rank in (0, 1)]
    try:
        ended = [process.wait(timeout=300) for process in both]
        assert ended == [0, 0], [(folder / f"{rank}.log").read_text()[-1500:] for rank in (0, 1)]
    finally:
        for process in both:
            process.kill()
    return [json.loads((folder / f"{rank}/found.json").read_text()) for rank in (0, 1)], (folder / "0.log").read_text()


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("alone", "OSError: others can go on from checkpoint-4, process 1 can't: .*training_run.json is missing"),
        ("wishes", r"ValueError: resume_from_checkpoint is \[True, False\]"),
        ("settings", "ValueError: process 1 .*arguments.seed was 0, is 1 now"),
        ("best", "OSError: output_dir=.* is another folder for process 1"),
        ("damaged", r"ValueError: process 1: .*state-1\.jsonl, line 3 is damaged .*delete this line"),
        ("shared", "ValueError: process 0: save_on_each_node=True, but output_dir='.*shared' is one folder"),
        ("data", "ValueError: process 1 was started with another data than process 0: .*25.* not .*24"),
        ("eval_data", "ValueError: process 1 was started with another eval_data than process 0"),
        ("pictures", "ValueError: process 1 was started with another dataset than process 0: .*10 images"),
        ("statistics", "ValueError: process 1 was started with another dataset than process 0: '5 images"),
        ("seed", "ValueError: process 1 was started with another seed than process 0: 1, not 0"),
        ("max_images", "ValueError: process 1 was started with another max_images than process 0: 5, not 4"),
        ("no model", "OSError: process 1: can't load '.*trained'"),
        ("another", "ValueError: process 1 was started with another attack than process 0"),
    ],
)
def test_machines_that_cannot_go_on_together_say_so_on_each(case, error, machines):
    for found in machines[0]:
        assert re.match(error, str(found[case])), found[case]


def test_machines_go_on_from_the_newest_that_each_has_whole(machines):
    for found in machines[0]:
        assert found["each"] == [["checkpoint-2", 4, True], ["checkpoint-4", 4, True]]
    assert re.search("checkpoint-4 is passed over by process 1: optimizer.pt is cut short", machines[1])


def test_states_of_machines_are_put_together(machines):
    assert [found["evaluation"] for found in machines[0]] == [True, True]


def test_commands_write_on_the_first_machine_and_leave_no_old_figures_on_others(machines):
    first, second = machines[0]
    assert {"model.safetensors", "report.json", "README.md"} <= set(first["trained"])
    assert second["trained"] == []
    assert first["report"] == second["report"]
    assert first["report"][0] == 6
    assert (first["evaluated"], second["evaluated"]) == ([4], [4])
    assert (first["written"], second["written"]) == (True, False)


def test_what_is_waited_for_and_what_machines_do_not_share_is_said(machines):
    assert re.search(r"waiting for all 2 processes to join at 127\.0\.0\.1:\d+, at most 1800 s\n", machines[1])
    assert "another folder for process 1: a training can't go on from checkpoints there" in machines[1]


def test_a_machine_that_never_comes_is_an_error_in_finite_time(tmp_path):
    code = "from hf_robust_clip.processes import join_processes; join_processes(True, timeout=1)"
    assert start(0, ["-c", code], free_port(), tmp_path / "log").wait(timeout=60) == 1
    printed = (tmp_path / "log").read_text()
    assert re.search(r"waiting for all 2 processes to join at \S+, at most 1 s", printed)
    assert "OSError: not all of 2 processes joined" in printed


@pytest.mark.parametrize("by", ["launch file", "settings"])
def test_fsdp_is_refused(by, tmp_path, monkeypatch):
    settings = {"fsdp": True} if by == "settings" else {}
    if by == "launch file":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP|fsdp"):
        RobustClipConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_what_runs_is_said():
    assert what_runs(PartialState(cpu=True)) == "one process on cpu"


def test_a_process_that_accelerate_started_alone_in_place_of_several_is_refused(tmp_path, monkeypatch):
    """As it does for --cpu and MULTI_CPU, on every machine."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    RobustClipConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="several processes were launched, but 1 joined"):
        RobustClipConfig(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_FSDP"])
def test_a_launch_file_of_what_is_not_supported_is_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=r"DeepSpeed|Megatron|FSDP"):
        join_processes(True)


def test_killed_runs_end_bit_equal(tmp_path):
    for run, count in ((kill_trials.train, 3), (kill_trials.evaluate, 2)):
        found = kill_trials.trials(run, tmp_path / run.__name__, count)
        assert found["bit-equal"] == count
        assert found["killed"]  # how many follows the clock


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "count"),
    [
        (kill_trials.train, 40),
        (kill_trials.evaluate, 20),
        (kill_trials.recipe, 16),
        (kill_trials.tapt_recipe, 16),
    ],
)
def test_runs_killed_at_many_points_end_bit_equal(run, count, tmp_path):
    found = kill_trials.trials(run, tmp_path / "trials", count)
    assert found["bit-equal"] == count
    assert found["killed"] > 0.8 * count


@pytest.mark.slow
def test_a_folder_that_is_written_over_never_tells_figures_of_other_weights(tmp_path):
    found = kill_trials.overwrites(tmp_path / "trials", 30)
    assert found["of others"] == 0
    assert found["old"] and found["one is missing"] and found["new"]
