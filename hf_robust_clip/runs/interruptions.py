"""How a run ends that can't come to its end: one line, and a status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any, NoReturn

from ..secrets import without_tokens
from ..storage import NotWritten


@contextmanager
def one_line_errors(left: Callable[[], str] = lambda: "nothing was begun.") -> Iterator[None]:
    """What a user can mend ends the program with one line and status 2; an interruption, with one line and status 130.

    Args:
        left: what can be gone on from, for an interruption and a disk that is full.
    """
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    heard = before not in (signal.SIG_IGN, None) and current_thread() is main_thread()

    def interrupt(*signals: Any) -> None:
        asked.append(signal.SIGINT)
        raise KeyboardInterrupt

    try:
        if heard:
            signal.signal(signal.SIGINT, interrupt)
        yield
    except BaseException as error:
        if asked or isinstance(error, KeyboardInterrupt):  # workers that were interrupted too bring up other errors
            if os.environ.get("RANK", "0") == "0":
                print(f"\ninterrupted: {left()}", file=sys.stderr)
            raise SystemExit(130) from None
        if isinstance(error, NotWritten):
            fail(NotWritten(f"{error} {left()}"))
        if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)):
            fail(error)
        raise
    finally:
        if heard:
            signal.signal(signal.SIGINT, before)


def fail(error: Exception) -> NoReturn:
    """Print an error in one line and exit with status 2; HF_ROBUST_CLIP_TRACEBACK=1 shows where it came from.

    Neither holds an access token.
    """
    if os.environ.get("HF_ROBUST_CLIP_TRACEBACK") == "1":
        whole = "".join(traceback.format_exception(error))
        if without_tokens(whole) == whole:
            raise error
        print(without_tokens(whole), file=sys.stderr)
        raise SystemExit(2)
    line = " ".join(part.strip() for part in without_tokens(str(error)).splitlines()) or type(error).__name__
    after_bar = isinstance(error, FloatingPointError | NotWritten)
    print(f"\nerror: {line}" if after_bar else f"error: {line}", file=sys.stderr)
    raise SystemExit(2)
