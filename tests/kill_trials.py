"""Trainings and evaluations that are killed at many points, and must end as if they had not been.

python tests/kill_trials.py FOLDER --trainings 30 --evaluations 20 --recipes 20 --overwrites 20

Each trial is a process that SIGKILL ends: after a share of the time that a whole run takes, or where it opens its n-th
file to write, most of them in a checkpoint, and of some the newest file loses its second half, as when the power goes.
Another process goes on from what is left. Prints how many ended bit-equal, and of recipes that were killed over a
finished folder, how often weights and figures in it were both the old, both the new, or one of them missing.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("support")))

import test_recipes
import test_tapt_recipe
from command_words import last_of_each
from safetensors import SafetensorError
from safetensors.torch import load_file
from training_script import digits_report, long_run, state

from hf_robust_clip.cli import run as run_command
from hf_robust_clip.digests import digest
from hf_robust_clip.report import read_report_file
from hf_robust_clip.training.checkpoints import RUN_FILE, NothingToResume

RECIPES = {
    "pmg_aft": (test_recipes.DEFAULT, [*test_recipes.SMALL, "--save_steps", "1"]),
    "tapt": (
        test_tapt_recipe.CONFIGS / "digits-clip/tapt.yaml",
        [*test_tapt_recipe.SMALL, "--save_steps", "1"],
    ),
}
FEW = 10  # files, at which alone killing would leave most of a run out


def child(work, kill_after=None):
    """Do some work in a process of its own; whether it came to its end, and the seconds that it took."""
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a process failed in {Path.cwd()}"
    return status == 0, time.monotonic() - start


def watch_files(folder, at=None):
    """Count the files of a folder that are opened to write, in `<folder>.opened`; end this process at one of them."""
    count, log = 0, Path(f"{folder}.opened")

    def look(event, args):
        nonlocal count
        place = str(args[0]) if event in ("open", "os.rename") else ""
        if str(folder) not in place or place == str(log):
            return
        if event == "os.rename" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            log.write_text(str(count))

    sys.addaudithook(look)


def train(folder, at=None, result=None):
    watch_files(folder, at)
    trainer = long_run(folder)
    try:
        trainer.train(resume_from_checkpoint=True)
    except NothingToResume:
        trainer.train()
    if result is not None:
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        weights = {name: tensor.numpy().tobytes().hex() for name, tensor in state(trainer.model).items()}
        result.write_text(json.dumps([trainer.state.global_step, losses, weights]))


def evaluate(folder, at=None, result=None):
    watch_files(folder, at)
    found = [digits_report(suite, state_dir=folder / suite) for suite in ("PGD", "defence")]
    if result is not None:
        result.write_text(json.dumps(found))


def recipe(folder, at=None, result=None, method="pmg_aft", words=("--resume_from_checkpoint", "true")):
    """A training script; what is kept of it are all weights and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # from where a card names the output folder
    watch_files(folder, at)
    default, small = RECIPES[method]
    run_command("train", default, "", last_of_each(*small, "--output_dir", folder / "out", *words))
    if result is not None:
        result.write_text(json.dumps(weights_and_figures(folder / "out")))


def tapt_recipe(folder, at=None, result=None):
    recipe(folder, at, result, "tapt")


def weights_and_figures(folder):
    """Digests of all tensors in a folder, and what report.json tells; None for what isn't there, or isn't read."""
    weights = {file.name: tensor_digests(file) for file in sorted(folder.glob("*.safetensors"))}
    try:
        told = read_report_file(folder / "report.json")
    except (OSError, ValueError):
        return weights or None, None
    for row in told["reports"] + told["compared"]:
        if row.get("defence"):
            row["defence"].pop("ms_per_image", None)
    return weights or None, [told["reports"], told["compared"]]


def tensor_digests(file):
    """Of the tensors alone: safetensors writes what is told beside them in any order."""
    try:
        return {name: digest(tensor.numpy().tobytes()) for name, tensor in sorted(load_file(file).items())}
    except SafetensorError:
        return "cut short"


def overwrites(folder, count):
    """Kill a script at `count` points while it trains over a finished folder, and look what lies there."""
    folder.mkdir(parents=True)
    more = ("--max_steps", "3", "--overwrite")
    child(lambda: recipe(folder / "old"))
    shutil.copytree(folder / "old", folder / "new")
    child(lambda: recipe(folder / "new", words=more))
    old, new = (weights_and_figures(folder / name / "out") for name in ("old", "new"))
    opened = int(Path(f"{folder / 'new'}.opened").read_text())
    found = {"tried": count, "old": 0, "new": 0, "one is missing": 0, "of others": 0}
    for i in range(count):
        place = folder / f"{i}"
        shutil.copytree(folder / "old", place)
        child(lambda place=place, at=1 + i * opened // count: recipe(place, at, words=more))
        left = weights_and_figures(place / "out")
        kind = "old" if left == old else "new" if left == new else "one is missing" if None in left else "of others"
        found[kind] += 1
        assert (place / "out/README.md").is_file() <= (None not in left), f"a card without weights or figures: {place}"
        shutil.rmtree(place)
    return found


def trials(run, folder, count):
    """Kill `run` at `count` points, by turns in time and at files: how many were killed, how many of them in writing
    a checkpoint, and how many ended bit-equal.
    """
    folder.mkdir(parents=True)
    expected = folder / "expected.json"
    _, seconds = child(lambda: run(folder / "whole", result=expected))
    opened = int(Path(f"{folder / 'whole'}.opened").read_text())
    killed = inside = equal = 0
    for i in range(count):
        place, result = folder / f"{i}", folder / f"{i}.json"
        part = (i + 0.5) / count
        if i % 2 and opened > FEW:
            ended, _ = child(lambda place=place, at=1 + int(part * opened): run(place, at))
            if i % 4 == 1:
                files = [file for file in place.rglob("*") if file.is_file()]
                if files:
                    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
                    os.truncate(newest, newest.stat().st_size // 2)
        else:
            ended, _ = child(lambda place=place: run(place), kill_after=part * seconds)
        killed += not ended
        inside += any(not (checkpoint / RUN_FILE).is_file() for checkpoint in place.rglob("checkpoint-*"))
        child(lambda place=place, result=result: run(place, result=result))
        equal += result.read_bytes() == expected.read_bytes()
        shutil.rmtree(place)
    return {"tried": count, "killed": killed, "inside a checkpoint": inside, "bit-equal": equal}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=lambda name: Path(name).absolute())
    parser.add_argument("--trainings", type=int, default=30)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--recipes", type=int, default=20)
    parser.add_argument("--overwrites", type=int, default=20)
    words = parser.parse_args()
    for name, run, count in (
        ("trainings", train, words.trainings),
        ("evaluations", evaluate, words.evaluations),
        ("recipes", recipe, words.recipes),
        ("recipes of TAPT", tapt_recipe, words.recipes),
    ):
        print("FOUND", name, json.dumps(trials(run, words.folder / name, count)), flush=True)
    print("FOUND overwrites", json.dumps(overwrites(words.folder / "overwrites", words.overwrites)))
