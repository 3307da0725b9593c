"""Pieces of work that several processes share: in order, each once, told as they end."""

from __future__ import annotations

import csv
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from socket import gethostname
from threading import Thread

from filelock import FileLock, Timeout

from ..environment import hardware
from ..secrets import without_tokens
from .shared import quiet_loading

PAUSE = 1.0  # seconds until what another process holds is tried again
MENDABLE = (ValueError, TypeError, OSError, FloatingPointError)  # told in a line; others with where they came from


@dataclass(frozen=True)
class Cell:
    """A piece of work. `act` and `finished` go to other processes, so they must be picklable.

    Args:
        name: what lines call it.
        folder: what it writes; a lock and a log lie beside it.
        act: does it.
        finished: whether it is done, by the same settings.
        needs: names of cells that must be finished before.
    """

    name: str
    folder: Path
    act: Callable[[], object]
    finished: Callable[[], bool]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Args:
        seconds: that it took; None where nothing was done.
        error: why it failed, in one line.
        spoilt: whether the process may be unable to go on.
        held_by: who is at work on it.
    """

    seconds: float | None = None
    error: str | None = None
    spoilt: bool = False
    held_by: str | None = None


class Held(Exception):
    """Another process is at work there."""


def check_cells(cells: Sequence[Cell]) -> None:
    """Raise ValueError where two cells would write into the same folder."""
    places: dict[Path, str] = {}
    for cell in cells:
        if (other := places.setdefault(cell.folder.absolute(), cell.name)) != cell.name or cell.name in cell.needs:
            raise ValueError(f"{other!r} and {cell.name!r} would both write {str(cell.folder)!r}; rename one.")
    if len(places) < len(cells):
        names = [cell.name for cell in cells]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice; rename one.")


def finished_cells(cells: Sequence[Cell]) -> set[str]:
    """The names of cells that are finished, and all that they need. Needs stand before what needs them."""
    found: set[str] = set()
    for cell in cells:
        if found.issuperset(cell.needs) and cell.finished():
            found.add(cell.name)
    return found


def run_cells(cells: Sequence[Cell], times: Path, jobs: int = 1, keep_going: bool = False) -> dict[str, str]:
    """Run what isn't finished: whoever is free takes the first cell that has all it needs.

    One process runs here; several are started anew, each with its share of the processor's cores, on one GPU (the next
    for the next process, where there are several), and what their cells print goes to `<folder>.log`. They end with
    this process, however it ends. What another run is at work on is left to it and waited for.

    Args:
        cells: in order; needs stand before what needs them.
        times: a CSV file, to which a line is added for each cell: its name, seconds, device, and how many processes
            shared the work.
        jobs: processes.
        keep_going: whether other cells are begun when one has failed. Those that are running come to their end anyway.

    Returns why cells failed, in a line, by their names; cells that were not begun aren't told.
    Raises ValueError for cells that would write into one folder.
    """
    check_cells(cells)
    grid = Grid(cells, jobs)
    with workers(jobs, times) as processes:
        while True:
            if keep_going or not grid.failed:
                grid.begin(processes)
            if not grid.running and not grid.held:
                break
            grid.hear(processes)
            if grid.failed and not keep_going and not grid.running:
                break
    if left := [cell.name for cell in cells if cell.name not in grid.done and cell.name not in grid.failed]:
        say(f"not begun: {left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else ""))
    return grid.failed


@dataclass
class Grid:
    """Where the work stands.

    Args:
        begun: names of cells that run or ran, or were finished.
        held: when cells that others are at work on are tried again, by name.
    """

    cells: Sequence[Cell]
    jobs: int
    begun: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    running: dict[Future[Outcome], tuple[int, Cell]] = field(default_factory=dict)

    def begin(self, processes: Workers) -> None:
        """Give each free process a cell."""
        free = [number for number in range(self.jobs) if number not in {own for own, _ in self.running.values()}]
        for cell in self.cells:
            if not free:
                return
            ready = cell.name not in self.begun and self.done.issuperset(cell.needs)
            if not ready or self.held.get(cell.name, 0) > time.monotonic():
                continue
            self.held.pop(cell.name, None)
            self.begun.add(cell.name)
            finished = False
            with suppress(*MENDABLE):  # it fails where it is run
                finished = cell.finished()
            if finished:
                self.done.add(cell.name)
            else:
                number = free.pop(0)
                self.running[processes.submit(number, cell)] = (number, cell)

    def hear(self, processes: Workers) -> None:
        """Wait for the first cells that end, or until one that others hold is to be tried again."""
        if not self.running:
            time.sleep(PAUSE)
        ended, _ = wait(self.running, PAUSE if self.held else None, FIRST_COMPLETED)
        for future in ended:
            number, cell = self.running.pop(future)
            try:
                outcome = future.result()
            except BrokenProcessPool:
                outcome = Outcome(error="its process was killed (of too little memory?)", spoilt=True)
            if outcome.spoilt:
                processes.replace(number)
            self.take(cell, outcome)

    def take(self, cell: Cell, outcome: Outcome) -> None:
        """Note how a cell ended, and tell it."""
        if outcome.held_by is not None:
            self.begun.remove(cell.name)
            self.held[cell.name] = time.monotonic() + PAUSE
            if cell.name not in self.told:
                self.told.add(cell.name)
                say(f"{cell.name} is left to {outcome.held_by}, which is at work on it")
            return
        if outcome.error is not None:
            self.failed[cell.name] = outcome.error
        else:
            self.done.add(cell.name)
        count = f"[{len(self.done) + len(self.failed)}/{len(self.cells)}]"
        if outcome.error is not None:
            say(f"{count} {cell.name} FAILED: {outcome.error}")
        elif outcome.seconds is not None:
            say(f"{count} {cell.name}: {outcome.seconds:.0f} s")


def say(line: str) -> None:
    """Print a line beside results."""
    print(line, file=sys.stderr, flush=True)


def add_line(path: Path, **values: object) -> None:
    """Add a line to a CSV file, which has a head."""
    with held(path, patient=True), path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(values)
        writer.writerow(values.values())


class Workers:
    """Processes by number, each started when it gets its first cell; one alone is this process."""

    def __init__(self, jobs: int, times: Path):
        self.jobs, self.times = jobs, times
        self.pools: dict[int, ProcessPoolExecutor] = {}

    def submit(self, number: int, cell: Cell) -> Future[Outcome]:
        """Let a process run a cell."""
        if self.jobs == 1:
            future: Future[Outcome] = Future()
            future.set_result(run_cell(cell, self.times, self.jobs))
            return future
        if number not in self.pools:
            self.pools[number] = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=begin_worker, initargs=(number, self.jobs, visible_gpus())
            )
        return self.pools[number].submit(run_cell, cell, self.times, self.jobs)

    def replace(self, number: int) -> None:
        """End a process; another begins in its place."""
        if number in self.pools:
            self.pools.pop(number).shutdown()


@contextmanager
def workers(jobs: int, times: Path) -> Iterator[Workers]:
    """Processes that are killed if this one is interrupted, and end with it however it ends."""
    found, before = Workers(jobs, times), active_children()
    try:
        yield found
    except BaseException:
        for process in active_children():
            if process not in before:
                process.kill()
        raise
    finally:
        for number in list(found.pools):
            found.replace(number)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs here."""
    import torch

    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if asked is None else asked.split(",")


def begin_worker(number: int, jobs: int, gpus: Sequence[str]) -> None:
    """What a process does before its first cell, and before anything has looked for a GPU."""
    Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it, and ends all
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // jobs)))
    quiet_loading()


def end_with_parent() -> None:
    """End at once when the process is gone that started this one: nobody else would keep it from writing."""
    parent = parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def run_cell(cell: Cell, times: Path, jobs: int) -> Outcome:
    """Run a cell in this process, unless it is finished; add a line to `times`.

    Args:
        jobs: processes that share the work. What several print goes to files beside folders.
    """
    log = jobs > 1
    try:
        with held(cell.folder), as_if_first():
            if cell.finished():
                return Outcome()
            began = time.monotonic()
            with output_to(beside(cell.folder, f"{cell.folder.name}.log")) if log else nullcontext():
                try:
                    cell.act()
                except Exception as error:
                    if log or not isinstance(error, MENDABLE) or os.environ.get("HF_ROBUST_CLIP_TRACEBACK") == "1":
                        print(without_tokens(traceback.format_exc()), file=sys.stderr)
                    raise
            seconds = time.monotonic() - began
            add_line(times, cell=cell.name, seconds=f"{seconds:.1f}", device=hardware(), jobs=jobs)
            return Outcome(seconds)
    except Held as error:
        return Outcome(held_by=str(error))
    except Exception as error:
        mendable = isinstance(error, MENDABLE)
        line = " ".join(without_tokens(str(error)).split())
        kind = "" if mendable and line else type(error).__name__
        return Outcome(error=": ".join(filter(None, [kind, line])), spoilt=not mendable)


@contextmanager
def held(folder: Path, patient: bool = False) -> Iterator[None]:
    """A folder that nobody else who asks in this way writes meanwhile. The system lets go of it with the process.

    Args:
        patient: whether to wait for whoever has it.

    Raises Held, with who has it.
    """
    path = beside(folder, f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=-1 if patient else 0)
    try:
        lock.acquire()
    except Timeout:
        raise Held(path.read_text(encoding="utf-8") or "another process") from None
    try:
        path.write_text(f"process {os.getpid()} on {gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


@contextmanager
def as_if_first() -> Iterator[None]:
    """What runs inside finds a process in which nothing ran before: so its figures don't depend on which cells did."""
    import torch
    from accelerate.state import AcceleratorState
    from transformers import set_seed

    before = dict(os.environ)  # a training leaves its precision there
    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(0)
    try:
        yield
    finally:
        for name in {*os.environ} - {*before}:
            del os.environ[name]
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # others share the GPU


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Everything that is printed goes to a file, from libraries in C too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    streams, numbers = (sys.stdout, sys.stderr), (1, 2)
    kept = [os.dup(number) for number in numbers]
    with path.open("wb") as file:
        for stream, number in zip(streams, numbers, strict=True):
            stream.flush()
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream, number, old in zip(streams, numbers, kept, strict=True):
            stream.flush()
            os.dup2(old, number)
            os.close(old)


def beside(folder: Path, name: str) -> Path:
    """A file in the same folder as another."""
    return folder.parent / name
