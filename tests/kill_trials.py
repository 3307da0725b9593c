"""Trainings and evaluations that are killed at many points, and must end as if they had not been.

python tests/kill_trials.py FOLDER --trainings 30 --evaluations 20

Each trial is a process that SIGKILL ends: after a share of the time that a whole run takes, or where it opens its n-th
file to write, most of them in a checkpoint, and of some the newest file loses its second half, as when the power goes.
Another process goes on from what is left. Prints how many ended bit-equal.
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

from training_script import digits_report, long_run, state

from hf_robust_clip.training_checkpoints import RUN_FILE, NothingToResume


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
        if i % 2 and opened > count // 2:
            ended, _ = child(lambda place=place, at=1 + int(part * opened): run(place, at))
            if i % 4 == 1:
                files = [file for file in place.rglob("*") if file.is_file()]
                if files:
                    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
                    os.truncate(newest, newest.stat().st_size // 2)
        else:
            ended, _ = child(lambda place=place: run(place), kill_after=part * seconds)
        killed += not ended
        inside += any(not (checkpoint / RUN_FILE).is_file() for checkpoint in place.glob("checkpoint-*"))
        child(lambda place=place, result=result: run(place, result=result))
        equal += result.read_bytes() == expected.read_bytes()
        shutil.rmtree(place)
    return {"tried": count, "killed": killed, "inside a checkpoint": inside, "bit-equal": equal}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trainings", type=int, default=30)
    parser.add_argument("--evaluations", type=int, default=20)
    words = parser.parse_args()
    print(json.dumps({"trainings": trials(train, words.folder / "trainings", words.trainings),
                      "evaluations": trials(evaluate, words.folder / "evaluations", words.evaluations)}))  # fmt: skip
