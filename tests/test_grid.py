"""`runs/grid.py`: cells are run in order, each once, whoever else is at work; killed runs go on to the same table."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from test_benchmark import RECIPES, SMALL

from hf_robust_clip.runs import grid
from hf_robust_clip.runs.grid import Cell, check_cells, finished_cells, held, run_cells

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Work:
    """Cells that note when they run, and are finished then."""

    def __init__(self, **errors):
        self.ran, self.errors = [], errors

    def cell(self, name, *needs):
        return Cell(name, Path("out", name), partial(self.act, name), lambda: name in self.ran, needs)

    def act(self, name):
        if name in self.errors:
            raise self.errors[name]
        self.ran.append(name)


def seconds(path="seconds.csv"):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_cells_run_in_order_as_soon_as_they_can():
    work = Work()
    cells = [work.cell("try"), work.cell("train", "try"), work.cell("other"), work.cell("measure", "train", "other")]
    work.ran.append("other")
    assert finished_cells(cells) == {"other"}
    assert run_cells(cells, Path("seconds.csv")) == {}
    assert work.ran == ["other", "try", "train", "measure"], "what was finished is not repeated"
    assert [row["cell"] for row in seconds()] == ["try", "train", "measure"]
    assert finished_cells(cells) == {"try", "train", "other", "measure"}
    work.ran.remove("try")
    assert finished_cells(cells) == {"other"}, "what needs an unfinished cell is none either"


def test_a_cell_that_fails_stops_the_others_or_not(capsys):
    def cells(work):
        return [work.cell("a"), work.cell("b"), work.cell("of b", "b"), work.cell("c")]

    stopped, going = Work(b=ValueError("b=1 is\nwrong.")), Work(b=RuntimeError("out of memory"))
    assert run_cells(cells(stopped), Path("seconds.csv")) == {"b": "b=1 is wrong."}
    assert stopped.ran == ["a"]
    assert "not begun: of b and 1 more" in capsys.readouterr().err
    failed = run_cells(cells(going), Path("seconds.csv"), keep_going=True)
    assert failed == {"b": "RuntimeError: out of memory"} and going.ran == ["a", "c"]
    told = capsys.readouterr().err
    assert "[3/4] c: 0 s" in told and "Traceback" in told and "not begun: of b\n" in told


def test_what_another_holds_is_left_to_it(monkeypatch, capsys):
    monkeypatch.setattr(grid, "PAUSE", 0.01)
    work = Work()
    cells = [work.cell("a"), work.cell("b"), work.cell("of a", "a")]
    other = held(Path("out/a"))
    other.__enter__()

    def finish_elsewhere():
        work.ran.append("b")
        work.ran.append("a")
        other.__exit__(None, None, None)

    cells[1] = Cell("b", Path("out/b"), finish_elsewhere, lambda: "b" in work.ran)
    assert run_cells(cells, Path("seconds.csv")) == {}
    assert work.ran == ["b", "a", "of a"], "a was done by the other alone"
    assert f"a is left to process {os.getpid()} on " in capsys.readouterr().err


def test_every_cell_finds_a_fresh_process():
    drawn = []

    def act():
        drawn.append((random.random(), dict(os.environ)))
        os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16", "HOME": "elsewhere"}

    cells = [Cell(name, Path(name), act, lambda: False) for name in ("a", "b")]
    run_cells(cells, Path("seconds.csv"))
    assert drawn[0] == drawn[1] and "ACCELERATE_MIXED_PRECISION" not in drawn[0][1]


def test_cells_with_one_folder_are_refused():
    work = Work()
    with pytest.raises(ValueError, match="'b' would both write"):
        check_cells([work.cell("a"), Cell("b", Path("out/a"), print, bool)])


def start(output, *words):
    script = [sys.executable, str(RECIPES / "benchmark.py"), "--config", "own.yaml", "--output_dir", output]
    return subprocess.Popen(
        [*script, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=Path(f"{output}.err").open("a"),
    )  # fmt: skip


def ended(process, output):
    assert process.wait(300) == 0, Path(f"{output}.err").read_text()
    return [Path(output, "cards/small", name).read_bytes() for name in ("table.md", "report.csv")]


def is_running(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_several_processes_make_the_same_table_though_they_are_killed():
    small = json.loads(json.dumps(SMALL).replace('"tecoa"', '"digits-clip/tecoa"'))
    trained = small["models"][1]
    trained["flags"]["max_steps"] = 2
    small["models"].append({"name": "fare", "title": "FARE", "config": "digits-clip/fare", "flags": trained["flags"]})
    small |= {"seeds": [3, 4], "flags": {"save_strategy": "no"}}
    Path("own.yaml").write_text(json.dumps(small))
    alone = ended(start("alone"), "alone")
    for lines in (1, 4, 8):
        process = start("killed", "--jobs", "2")
        told = Path("killed.err")
        while f"[{lines}/" not in told.read_text():
            assert process.poll() is None, told.read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1)
        assert len(children) >= 2 and not any(map(is_running, children))
    assert ended(start("killed", "--jobs", "2"), "killed") == alone
    assert "TeCoA: 8 images" in Path("killed/te_coa-seed3.log").read_text()
    first, second = start("shared"), start("shared")
    ended(first, "shared")
    assert ended(second, "shared") == alone
    cells = [row["cell"] for row in seconds("shared/seconds.csv")]
    assert len(cells) == len(set(cells)) == 11, "none was done twice"
