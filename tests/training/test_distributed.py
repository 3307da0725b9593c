import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_script
from safetensors.torch import load_file
from training_script import CASES, SUITES, backdoor_figures, case_trainer, digits_report, state, tapt_trainer

ROOT = Path(__file__).parents[2]


def run(*command, folder):
    """A child process with what it printed, on one thread, and without this process's own rank."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "MASTER", "RANK"))}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command, str(folder)], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two ranks wrote, started with the shipped launch file."""
    folder = tmp_path_factory.mktemp("ranks")
    config = ROOT / "recipes" / "accelerate" / "two_cpu_processes.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    done = run(*launch, training_script.__file__, "ranks", folder=folder)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "Error" in line]

    def read(case, rank):
        place = folder / f"{case}-{rank}"
        return json.loads(Path(f"{place}.json").read_text()), load_file(f"{place}.safetensors")

    read.folder = folder
    return read


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(two_processes, tmp_path, case):
    """Two real processes on half the batch each: bitwise one model, and that of one process on the whole batch."""
    (found, weights), (other, weights_of_other) = two_processes(case, 0), two_processes(case, 1)
    assert found["world"] == other["world"] == 2
    assert all(torch.equal(weights[name], weights_of_other[name]) for name in weights)
    trainer = case_trainer(case, tmp_path, processes=1)
    start = state(trainer.model)
    trainer.train()
    alone = state(trainer.model)
    assert max(float((alone[name] - start[name]).abs().max()) for name in alone) > 1e-4
    for name, tensor in alone.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    metrics = trainer.evaluate()  # seven images on two ranks of two: none lost, none counted twice
    for key in ("eval_clean_accuracy", "eval_robust_accuracy"):
        assert found["metrics"][key] == other["metrics"][key] == metrics[key]
    assert found["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    losses = [log for log in found["logs"] if "loss" in log]
    assert losses
    for log, own in zip(losses, trainer.state.log_history, strict=False):
        assert log == pytest.approx({key: own[key] for key in log}, abs=2e-4)


@pytest.mark.parametrize("suite", SUITES)
def test_two_processes_report_what_one_does(two_processes, suite, tmp_path):
    """And one process that reads what the two wrote down, whole or up to some line, ends with the same report."""
    own = digits_report(suite)
    assert own["num_images"] == 9
    for rank in (0, 1):
        assert two_processes("released", rank)[0]["reports"][suite] == own
    files = sorted((two_processes.folder / f"state {suite}").iterdir())
    assert [file.name for file in files] == ["state-0.jsonl", "state-1.jsonl"]
    for file, kept in zip(files, (10**6, 350), strict=True):
        (tmp_path / file.name).write_text(file.read_text()[:kept])
    assert digits_report(suite, state_dir=tmp_path) == own


def test_two_processes_measure_a_backdoor_as_one_does(two_processes):
    own = backdoor_figures()
    assert 0 < own[1][1] < 1  # some of the nine images answer with the target, some don't
    for rank in (0, 1):
        assert two_processes("released", rank)[0]["backdoor"] == own


def test_two_processes_tune_at_test_time_as_one_does(two_processes, tmp_path):
    """Statistics, accuracies over seven images, and the logits of three images."""
    metrics, predictions, statistics = tapt_trainer(tmp_path, processes=1)
    for rank in (0, 1):
        found, tensors = two_processes("tapt", rank)
        for key in ("clean", "robust"):
            assert found["metrics"][f"eval_{key}_accuracy"] == metrics[f"eval_{key}_accuracy"]
        for name, tensor in statistics.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-9)
        for i, part in enumerate(predictions):
            torch.testing.assert_close(tensors[f"logits{i}"], torch.as_tensor(part), rtol=0, atol=1e-6)
