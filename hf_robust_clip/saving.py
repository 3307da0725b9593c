"""What a run leaves behind: results that are saved one by one, and, of one that was stopped, where it goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .storage import NotWritten
from .training.checkpoints import newest_whole_checkpoint

T = TypeVar("T")


@dataclass
class Saving:
    """Saves results one by one, so that one that can't be written keeps none of the others from it.

    Args:
        folder: where they are saved, for messages.
        say: prints a line.
    """

    folder: Path
    say: Callable[[str], object]
    saved: dict[str, Callable[[], object]] = field(default_factory=dict)
    failed: dict[str, Callable[[], object]] = field(default_factory=dict)
    reason: str = ""

    def save(self, name: str, write: Callable[[], object]) -> None:
        """Write something, now or in `finish`."""
        if self.saved and not self.folder.is_dir():  # deleted meanwhile: all that was in it comes again
            self.failed |= self.saved
            self.saved = {}
        try:
            write()
        except (OSError, ValueError) as error:
            self.failed[name], self.reason = write, str(error)
            self.warn(f"{name} can't be saved now", error)
        else:
            self.failed.pop(name, None)
            self.saved[name] = write

    def attempt(self, name: str, make: Callable[[], T]) -> T | None:
        """What is nice to have, such as a plot: None, and a warning of one line, if it can't be made."""
        try:
            return make()
        except Exception as error:  # whatever a library brings up
            self.warn(f"{name} could not be made", error)
            return None

    def warn(self, what: str, error: Exception) -> None:
        """Print one line, if anybody still reads."""
        with suppress(OSError, ValueError):
            self.say(f"WARNING: {what} ({' '.join(str(error).split()) or type(error).__name__})")

    def finish(self) -> None:
        """Try once more what failed. Raises NotWritten, with what is saved and what isn't."""
        for name, write in list(self.failed.items()):
            self.save(name, write)
        if self.failed:
            raise NotWritten(
                f"{self.reason} Saved in {str(self.folder)!r}: {', '.join(self.saved) or 'nothing'}; not saved: "
                f"{', '.join(self.failed)}."
            )


def left_by_training(folder: str | Path) -> str:
    """Where a training that was stopped goes on."""
    newest = newest_whole_checkpoint(folder)
    if newest is None and Path(folder, "tuning/journal.log").is_file():
        return (
            f"finished trials are in {str(Path(folder, 'tuning'))!r}: the same command goes on from there with "
            "--resume_from_checkpoint true, without --overwrite."
        )
    if newest is None:
        return f"no checkpoint in {str(folder)!r} is whole, so it would begin anew."
    return (
        f"{str(newest)!r} is whole: the same command goes on from there with "
        "--resume_from_checkpoint true, without --overwrite."
    )


def left_by_evaluation(folder: str | Path) -> str:
    """Where an evaluation that was stopped goes on."""
    state = Path(folder, "state")
    if not any(state.glob("*/state-*.jsonl")):
        return "nothing was evaluated yet."
    return (
        f"what is done is in {str(state)!r}: the same command goes on from there with --resume, without --overwrite."
    )
