"""Full disks, folders that go, plots that fail, interruptions: what was computed is shown and kept, and one line says
what is left and how to go on.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from command_words import last_of_each
from test_evaluate_recipe import SCRIPT, TWO, start

from hf_robust_clip import EvaluationSettings, cli, report
from hf_robust_clip.arguments import Images
from hf_robust_clip.evaluation import loop
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs import evaluate, shared
from hf_robust_clip.runs.shared import load_data, load_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CONFIGS = Path(__file__).parents[1] / "recipes/configs"
EVALUATION = ["evaluate", "--config", str(CONFIGS / "evaluate.yaml"), "--dataset_name", "digits", "--max_images", "4",
              "--evaluation.attacks", "pgd-1", "--evaluation.radii", "[1/255]", "--use_cpu"]  # fmt: skip
TRAINING = ["train", "--config", str(CONFIGS / "digits-clip/pmg_aft.yaml"), "--max_images", "8",
            "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu",
            "--save_strategy", "steps", "--save_steps", "1",
            "--evaluation.attack", "pgd-1", "--evaluation.radii", "[1/255]",
            "--tasks", "[{name: own, dataset: digits, split: test, max_images: 4}]"]  # fmt: skip
WRITTEN = {
    "evaluate": {"report.json", "report.csv", "recipe.yaml", "accuracy.png", "examples.png"},
    "train": {"report.json", "README.md", "recipe.yaml", "accuracy.png", "model.safetensors", "config.json"},
}


def run(words, *more) -> int:
    """The status that a command line ends with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        cli.main([words[0], *last_of_each(*words[1:], "--output_dir", "out", *more)])
    except SystemExit as end:
        return end.code
    return 0


def names(folder="out") -> set[str]:
    return {path.name for path in Path(folder).iterdir()} - {"state"}


def error_line(capsys) -> str:
    """The one line of an error, after all bars."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


# ---- full disks


class Disk:
    """A disk that is full from the n-th file that is moved to its place, for so many files."""

    def __init__(self, monkeypatch, full_from: int, files: float = float("inf")):
        self.moved, self.full = 0, range(full_from, 10**6 if files == float("inf") else full_from + int(files))
        self.real = os.replace
        monkeypatch.setattr(os, "replace", self.replace)

    def replace(self, source, target):
        self.moved += 1
        if self.moved - 1 in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(source, target)


def check_full_evaluation(monkeypatch, capsys, full_from: int) -> bool:
    """Evaluate on a disk that is full from a file on: the table is shown, and one line tells what is saved. Returns
    whether all files fitted.
    """
    shutil.rmtree("out", ignore_errors=True)
    with monkeypatch.context() as patch:
        disk = Disk(patch, full_from)
        status = run(EVALUATION)
    captured = capsys.readouterr()
    assert "PGD-1" in captured.out and "digits" in captured.out  # the table
    assert not list(Path("out").glob(".writing-*"))
    results = {"report.json", "report.csv", "recipe.yaml"}
    if status == 0:
        assert names() >= results and ("WARNING" in captured.out) == (names() != WRITTEN["evaluate"])
        return full_from >= disk.moved
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert status == 2 and "No space" in line and "--resume" in line
    saved, missing = line.split("not saved:")
    for name in results:
        assert (name in saved.partition("Saved in")[2]) == (name in names()) == (name not in missing)
    return False


@pytest.mark.parametrize("full_from", [0, 2, 4])
def test_a_disk_that_fills_while_results_are_written(full_from, monkeypatch, capsys):
    assert not check_full_evaluation(monkeypatch, capsys, full_from)


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_file_on(monkeypatch, capsys):
    assert next(n for n in range(100) if check_full_evaluation(monkeypatch, capsys, n)) == len(WRITTEN["evaluate"])


def test_what_did_not_fit_is_tried_once_more(monkeypatch, capsys):
    Disk(monkeypatch, 0, files=1)
    assert run(EVALUATION) == 0
    assert "WARNING: report.json" in capsys.readouterr().out
    assert names() == WRITTEN["evaluate"]


@pytest.mark.parametrize("full_from", [0, 6])
def test_a_training_on_a_disk_that_fills(full_from, monkeypatch, capsys):
    """Weights that don't fit at first are kept, and written once there is space."""
    Disk(monkeypatch, full_from, files=1)
    assert run(TRAINING, "--save_strategy", "no") == 0
    assert names() >= WRITTEN["train"]
    assert "WARNING" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_on_a_disk_that_is_full_from_any_file_on(monkeypatch, capsys):
    for full_from in range(100):
        shutil.rmtree("out", ignore_errors=True)
        with monkeypatch.context() as patch:
            disk = Disk(patch, full_from)
            status = run(TRAINING, "--save_strategy", "no")
        if full_from >= disk.moved:
            break
        captured = capsys.readouterr()
        assert "exactly-zero" in captured.out
        assert not list(Path("out").glob(".writing-*"))
        line = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert (status, len(line)) in ((2, 1), (0, 0))
        if "report.json" in names():  # figures never stand beside no weights of theirs
            assert "model.safetensors" in names() or "the weights" in line[0]
    assert full_from > 5 and names() >= WRITTEN["train"]


@contextmanager
def files_up_to(size: int):
    """Writing more than so many bytes into a file fails, in the middle of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_that_do_not_fit_take_nothing_with_them(capsys):
    with files_up_to(1_200_000):
        assert run(TRAINING, "--save_strategy", "no") == 2
    captured = capsys.readouterr()
    assert "\nown under " in captured.out and "\n  PMG-AFT " in captured.out
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "not saved: the weights" in error and "report.json" in error.partition("Saved in")[2]
    assert {"report.json", "README.md", "recipe.yaml"} <= names() and "model.safetensors" not in names()
    assert not list(Path("out").glob(".writing-*"))


def test_a_checkpoint_that_does_not_fit_ends_the_training_in_one_line(capsys):
    with files_up_to(1_200_000):
        assert run(TRAINING) == 2
    assert "checkpoint" in error_line(capsys)
    assert not list(Path("out").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("words", [EVALUATION, TRAINING], ids=["evaluate", "train"])
@pytest.mark.parametrize("size", ["1200k", "2m", "4m", "7m"])
def test_a_small_disk(words, size, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code = "import sys; from hf_robust_clip.cli import main; main(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--output_dir", str(disk / "out")],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert (done.returncode, len(error)) in ((0, 0), (2, 1)), done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        if error:
            assert any(told in error[0] for told in ("No space", "full", "are free"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("words", [EVALUATION, TRAINING], ids=["evaluate", "train"])
def test_a_folder_that_can_not_be_written_is_found_before_any_work(words, monkeypatch, capsys):
    monkeypatch.setattr(shared, "load_model", lambda *settings: pytest.fail("work was begun"))
    Path("out").symlink_to("/proc/nowhere")
    assert run(words) == 2
    assert "output_dir='out'" in error_line(capsys)


@pytest.mark.parametrize("words", [EVALUATION, TRAINING], ids=["evaluate", "train"])
def test_a_folder_that_is_deleted_meanwhile_is_made_again(words, monkeypatch):
    real = loop.evaluate_robustness

    def evaluate_robustness(*arguments, **more):
        found = real(*arguments, **more)
        shutil.rmtree("out")
        return found

    monkeypatch.setattr(loop, "evaluate_robustness", evaluate_robustness)
    more = [] if words is EVALUATION else ["--save_strategy", "no"]
    Path("out").mkdir()
    assert run(words, *more) == 0
    assert names() >= {"report.json", "recipe.yaml"}


# ---- plots and names


@pytest.mark.parametrize("words", [EVALUATION, TRAINING], ids=["evaluate", "train"])
def test_a_plot_that_fails_takes_nothing_with_it(words, monkeypatch, capsys):
    def fail(*arguments, **more):
        raise RuntimeError("no\nfonts")

    for module in (report, report.plots):
        monkeypatch.setattr(module, "plot_accuracy", fail)
    assert run(words) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "WARNING" in line] == [
        "WARNING: accuracy.png could not be made (no fonts)"
    ]
    assert names() >= WRITTEN[words[0]] - {"accuracy.png"}
    if words is TRAINING:
        assert "accuracy.png" not in Path("out/README.md").read_text()


def test_names_that_look_like_formulas_are_shown_as_they_are(capsys):
    names_of_tasks = ["$x^{_a$", "a_b $\\frac$", "[red]x[/red]"]
    tasks = json.dumps([{"name": n, "dataset": "digits", "split": "test", "max_images": 2} for n in names_of_tasks])
    assert run(TRAINING, "--tasks", tasks, "--save_strategy", "no") == 0
    out = capsys.readouterr().out
    assert "WARNING" not in out and all(f"{name} under PGD" in out for name in names_of_tasks)
    assert names() >= WRITTEN["train"]
    assert [own.task for own in load_reports("out/report.json")[0]] == names_of_tasks


def test_a_model_in_the_current_folder_is_evaluated(monkeypatch):
    load_model("digits-clip").save_pretrained("here")
    monkeypatch.chdir("here")
    assert run(EVALUATION, "--model_name_or_path", ".") == 0
    assert load_reports("out/report.json")[0][0].name == "here"


@pytest.mark.parametrize("name", ["", " ", "a\nb"])
def test_a_name_that_can_not_be_shown_is_found_before_any_image(name, monkeypatch, tmp_path):
    model = load_model("digits-clip")
    data = load_data(Images("digits", "test"), model).first(2)
    model.set_classes(data.class_names)
    monkeypatch.setattr(loop, "_Evaluation", lambda *a, **k: pytest.fail("work was begun"))
    for argument in ("name", "task", "model_id"):
        given = {"name": "a", "task": "a", "model_id": "a", argument: name}
        with pytest.raises(ValueError, match=f"{argument}="):
            loop.evaluate_robustness(model, data, EvaluationSettings(["1/255"]), **given)


# ---- cards


def test_a_card_with_half_a_character_keeps_the_old_one(monkeypatch, capsys):
    assert run(TRAINING, "--save_strategy", "no") == 0
    before = Path("out/README.md").read_text()
    file = Path("out/report.json")
    file.write_text(file.read_text().replace('"limits": "', '"limits": "\\ud800 '))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["card", "out"])
    assert "README.md" in error_line(capsys) and Path("out/README.md").read_text() == before


def test_words_of_ones_own_are_not_replaced_by_a_card(monkeypatch, capsys):
    monkeypatch.setattr(shared, "load_model", lambda *settings: pytest.fail("work was begun"))
    Path("out").mkdir()
    Path("out/README.md").write_text("my own words")
    assert run(TRAINING, "--overwrite") == 2
    assert "README.md" in error_line(capsys) and Path("out/README.md").read_text() == "my own words"


# ---- interruptions


@pytest.fixture(autouse=True)
def interruptions_are_heard():
    """Also where the tests were begun by a shell that keeps them from a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("brought", [KeyboardInterrupt(), None], ids=["alone", "workers"])
def test_an_interruption_is_one_line_with_the_way_on(brought, monkeypatch, capsys):
    """Workers that were interrupted too may bring up an error of their own first."""
    real = loop.evaluate_robustness

    def evaluate_robustness(*arguments, **more):
        real(*arguments, **more)
        if brought is not None:
            raise brought
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly") from None

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_robustness", evaluate_robustness)
        before = signal.getsignal(signal.SIGINT)
        assert run(EVALUATION) == 130
        assert signal.getsignal(signal.SIGINT) == before
    error = capsys.readouterr().err.replace("\r", "\n")
    (line,) = [line for line in error.splitlines() if line.startswith("interrupted: ")]
    assert "'out/state'" in line and "--resume" in line and "Traceback" not in error
    assert run(EVALUATION, "--resume") == 0 and names() == WRITTEN["evaluate"]


def test_a_training_that_is_interrupted_names_its_checkpoint(monkeypatch, capsys):
    from hf_robust_clip.training.trainer import RobustClipTrainer

    real = RobustClipTrainer.training_step

    def training_step(self, *arguments, **more):
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(RobustClipTrainer, "training_step", training_step)
        assert run(TRAINING) == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted: ")]
    assert "'out/checkpoint-1'" in line and "--resume" in line
    assert run(TRAINING, "--resume_from_checkpoint", "true") == 0 and names() >= WRITTEN["train"]


def test_an_interruption_before_any_work(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "read", interrupt)
    assert run(EVALUATION) == 130
    assert "nothing was begun" in capsys.readouterr().err


EVALUATE = [SCRIPT, "--dataset_name", "digits", "--max_images", "400", "--evaluation.attacks", "pgd-200",
            "--evaluation.radii", "[8/255]",
            "--evaluation.batch_size", "8"]  # fmt: skip
TRAIN = [str(CONFIGS.parent / "pmgaft.py"), "--max_steps", "3000", "--evaluation.attack", "pgd-1",
         "--dataloader_num_workers", "2", "--save_strategy", "steps",
         "--save_steps", "1"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], TWO], ids=["one process", "two processes"])
@pytest.mark.parametrize(("words", "begun", "left"), [(EVALUATE, "state/*/state-*.jsonl", "out/state"),
                                                      (TRAIN, "checkpoint-2/trainer_state.json", "out/checkpoint-")],
                         ids=["evaluate", "train with workers"])  # fmt: skip
def test_ctrl_c_at_the_terminal(words, begun, left, launcher, tmp_path):
    """The whole group of processes hears it. The launcher has words of its own."""
    process = start(*launcher, *words, "--use_cpu", "--output_dir", "out")
    deadline = time.monotonic() + 200
    while not any(file.stat().st_size > 500 for file in tmp_path.glob(f"out/{begun}")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("interrupted: ")]
    assert len(lines) == 1 and "--resume" in lines[0] and f"'{left}" in lines[0], error
    if not launcher:
        assert process.returncode == 130 and "Traceback" not in error
