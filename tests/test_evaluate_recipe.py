"""recipes/evaluate.py as a user starts it: alone, by two processes, killed and resumed."""

import csv
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from datasets import load_dataset
from PIL import Image
from reports import make_report

from hf_robust_clip.cli import main, run
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs.evaluate import other_sizes, read
from hf_robust_clip.runs.shared import load_data, load_model

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "recipes/evaluate.py")
TWO = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/two_cpu_processes.yaml"),
       "--main_process_port", "0"]  # fmt: skip
WORDS = ["--dataset_name", "digits", "--max_images", "16", "--evaluation.attacks", "[pgd-5, apgd-ce]",
         "--evaluation.radii", "[8/255, 16/255]",
         "--evaluation.batch_size", "4", "--reference", "digits-clip", "--save_adversarial", "uint8"]  # fmt: skip


def start(*words: str) -> subprocess.Popen:
    skip = ("ACCELERATE", "MASTER", "RANK", "WORLD_SIZE", "LOCAL_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(skip)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-2000:]
    return out


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "out"
    return folder, finish(start(*TWO, SCRIPT, *WORDS, "--output_dir", str(folder)))


def test_two_processes_write_report_table_and_plots(by_two):
    folder, printed = by_two
    own, others = load_reports(folder / "report.json")
    assert [(r.attack, r.num_images, r.task) for r in own] == [
        ("PGD-5", 16, "digits"),
        ("APGD-CE", 16, "digits"),
    ]
    assert others == []
    for report in own:
        assert report.clean_accuracy > 0.9
        assert report.robust_accuracy[8 / 255] > 0.1
        assert report.robust_accuracy[16 / 255] < 0.6
    pgd, apgd = own
    assert all(apgd.robust_accuracy[radius] <= pgd.robust_accuracy[radius] for radius in pgd.robust_accuracy)
    assert list(apgd.after_each[8 / 255]) == ["apgd-ce"]
    assert {"accuracy.png", "examples.png", "report.csv", "recipe.yaml"} <= {path.name for path in folder.iterdir()}
    assert Image.open(folder / "examples.png").height > 400
    with (folder / "report.csv").open() as file:
        assert {(row["attack"], float(row["eps"])) for row in csv.DictReader(file)} == {
            (attack, eps) for attack in ("PGD-5", apgd.attack) for eps in (0.0, 8 / 255, 16 / 255)
        }
    assert "self-check" in printed
    assert "PGD-5" in printed


def test_killed_and_resumed_by_one_process_ends_with_the_same_report(by_two, tmp_path, capsys):
    process = start(SCRIPT, *WORDS, "--output_dir", str(tmp_path / "out"))
    state = tmp_path / "out" / "state"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if sum(file.read_text().count("\n") for file in state.glob("*/*.jsonl")) >= 8:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "report.json").exists()
    done = {file: file.read_text() for file in state.glob("*/*.jsonl")}
    assert done
    AcceleratorState._reset_state(reset_partial_state=True)
    run(
        "evaluate",
        ROOT / "recipes/configs/evaluate.yaml",
        "",
        [*WORDS, "--output_dir", str(tmp_path / "out"), "--resume"],
    )
    for file, text in done.items():
        assert file.read_text().startswith(text.rpartition("\n")[0])  # nothing finished was done again
    assert load_reports(tmp_path / "out" / "report.json") == load_reports(by_two[0] / "report.json")
    own, other = (folder / "adversarial/digits" for folder in (tmp_path / "out", by_two[0]))
    for attack, split in itertools.product(("PGD-5", "APGD-CE"), ("linf_8_255", "linf_16_255")):
        rows = [load_dataset(str(folder / attack), split=split).remove_columns("image") for folder in (own, other)]
        assert rows[0].to_dict() == rows[1].to_dict() and len(rows[0]) == 16
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--dataset_name", str(own / "APGD-CE"), "--dataset_test_split", "linf_16_255"]
    words += ["--evaluation.attack", "none", "--output_dir", str(tmp_path / "again")]
    run("evaluate", ROOT / "recipes/configs/evaluate.yaml", "", words)
    ((again,), _), ((_, first), _) = (load_reports(tmp_path / name / "report.json") for name in ("again", "out"))
    saved = {row.eps: row.value for row in first.measurements if row.metric == "robust_accuracy_as_uint8"}
    assert again.clean_accuracy == saved[16 / 255] and again.robust_accuracy == {}
    assert "adversarial already" in capsys.readouterr().out


def test_the_folder_of_a_checkpoint_is_not_written_to(tmp_path, capsys):
    """Training left a report and a card there."""
    (tmp_path / "config.json").write_text("{}")
    words = ["--config", str(ROOT / "recipes/configs/evaluate.yaml"), "--output_dir", str(tmp_path), "--overwrite"]
    with pytest.raises(SystemExit):
        main(["evaluate", *words])
    assert "name another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_stream_is_read_no_further_than_asked(tmp_path):
    """A folder of pictures that its owner never named to this package, read as a stream."""
    for name in ("zero", "one"):
        (tmp_path / "pictures/test" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (40 * i, 80, 120)).save(tmp_path / "pictures/test" / name / f"{i}.png")
    words = ["--dataset_name", str(tmp_path / "pictures"), "--max_images", "4", "--streaming", "true"]
    run = read([*words, "--output_dir", str(tmp_path / "out")], ROOT / "recipes/configs/evaluate.yaml")
    data = load_data(run.tasks[0], load_model(run.model.model_name_or_path))
    assert (len(data), data.class_names) == (4, ("one", "zero"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "no/such-model"], "can't load 'no/such-model'"),
        (["--dataset_name", "no/such-data"], "can't load dataset"),
        (["--dataset_name", "digits", "--class_names", "no-such-file"], "no-such-file"),
        (["--evaluation.attacks", "pdg-3"], "attack='pdg-3'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--config", str(ROOT / "recipes/configs/evaluate.yaml"), *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_models_that_were_attacked_at_several_sizes_are_no_comparison():
    own, large = make_report(), make_report(name="Large", attack_resolution=32)
    assert other_sizes([own, make_report(name="Other")]) is None
    assert other_sizes([own, make_report(name="Large", attack_resolution=32, robust_accuracy={})]) is None
    told = other_sizes([own, large])
    assert "TeCoA at 8 px, Large at 32 px" in told and told.endswith("attack_resolution: 8.")
