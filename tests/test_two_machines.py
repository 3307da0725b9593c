"""Two machines with folders of their own, each started by `accelerate launch`, train and evaluate together."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digit_folders import write_digits
from safetensors.torch import load_file

from hf_robust_clip.report import load_reports

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TRAIN = ["--objective", "TeCoA", "--max_steps", "3", "--learning_rate", "1e-3", "--optim", "sgd", "--save_steps", "2",
         "--warmup_steps", "0", "--save_on_each_node", "true", "--evaluation.attack", "pgd-2"]  # fmt: skip
RADII = ["--evaluation.radii", "[16/255]", "--use_cpu", "true"]


def start(words, home, launcher=()):
    """A process with a home, a Hub cache and a working folder of its own."""
    skip = ("ACCELERATE", "MASTER", "RANK", "WORLD_SIZE", "LOCAL_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(skip)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "cache")}
    home.mkdir(exist_ok=True)
    with (home / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, *map(str, words)], env=environment, cwd=home, stdout=log, stderr=log
        )


def on_two(folder, script, words):
    """Status of two machines, the first lines of whose errors are returned as well; `{home}` in words is their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = []
    for rank in (0, 1):
        config = ROOT / "recipes/accelerate/two_cpu_processes.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_machines", "2",
                    "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                    "--main_process_port", port]  # fmt: skip
        home = folder / str(rank)
        own = [word.replace("{home}", str(home)) for word in words]
        both.append(start([ROOT / "recipes" / script, *own], home, launcher))
    try:
        ended = [process.wait(timeout=400) for process in both]
    finally:
        for process in both:
            process.terminate()
    printed = [(folder / f"{rank}/log").read_text() for rank in (0, 1)]
    return ended, [next((line for line in text.splitlines() if line.startswith("error: ")), text) for text in printed]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each machine has pictures and results in its own folder."""
    folder = tmp_path_factory.mktemp("two")
    for rank in (0, 1):
        write_digits(folder / f"{rank}/pictures", 4)
    words = ["--model_name_or_path", "digits-clip", "--dataset_name", "{home}/pictures", "--output_dir", "out",
             "--tasks", "[{name: mine, dataset: '{home}/pictures', split: test}]", *TRAIN, *RADII]  # fmt: skip
    ended, told = on_two(folder, "train.py", [*words, "--per_device_train_batch_size", "4"])
    assert ended == [0, 0], told
    return folder, words


def test_two_machines_train_what_one_does(trained):
    """With the same images in an update; the first machine has the model, each has the whole checkpoint."""
    folder, words = trained
    alone = [word.replace("{home}", str(folder / "0")) for word in words]
    alone[alone.index("out")] = str(folder / "alone")
    process = start([ROOT / "recipes/train.py", *alone, "--per_device_train_batch_size", "8"], folder / "home")
    assert process.wait(timeout=300) == 0, (folder / "home/log").read_text()
    expected, found = (load_file(place / "model.safetensors") for place in (folder / "alone", folder / "0/out"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
    reports = [load_reports(place / "report.json")[0][0] for place in (folder / "alone", folder / "0/out")]
    assert reports[0].robust_accuracy == reports[1].robust_accuracy
    assert {path.name for path in (folder / "1/out").iterdir()} == {"checkpoint-3"}
    for rank in (0, 1):
        assert (folder / f"{rank}/out/checkpoint-3/model.safetensors").is_file()
        assert (folder / f"{rank}/out/checkpoint-3/rng_state_{rank}.pth").is_file()


def test_two_machines_evaluate_what_one_does(trained):
    folder, _ = trained
    shutil.copytree(folder / "0/out", folder / "1/out", dirs_exist_ok=True)
    words = ["--model_name_or_path", "out", "--dataset_name", "{home}/pictures", "--output_dir", "figures",
             "--evaluation.attacks", "[pgd-2]", *RADII]  # fmt: skip
    ended, told = on_two(folder, "evaluate.py", words)
    assert ended == [0, 0], told
    (report,), _ = load_reports(folder / "0/figures/report.json")
    assert not (folder / "1/figures/report.json").exists()
    (measured,), _ = load_reports(folder / "0/out/report.json")
    assert report.num_images == measured.num_images
    assert report.robust_accuracy == measured.robust_accuracy


def test_other_pictures_on_one_machine_are_refused_by_both(trained):
    folder, words = trained
    picture = min((folder / "1/pictures/test").rglob("*.png"))
    shutil.copy(max((folder / "1/pictures/test").rglob("*.png")), picture)
    ended, told = on_two(folder, "train.py", [*words, "--per_device_train_batch_size", "4", "--overwrite"])
    assert 0 not in ended
    assert all(line.startswith("error: process 1 was started with another dataset than process 0") for line in told)
