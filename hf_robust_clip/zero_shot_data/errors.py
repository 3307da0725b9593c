"""What is wrong with a dataset, in one line, wherever it was found."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset, a row of it or a batch can't be used.

    The message is one line, also where a worker of a `DataLoader` raised it: torch makes the exception anew from the
    worker's whole traceback, whose last line is this message.
    """

    def __init__(self, message: object):
        lines = str(message).strip().splitlines() or [""]
        super().__init__(lines[-1].removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


def cut(value: object, length: int = 300) -> str:
    """The text of a value, its end left out where it is long."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]} ..."


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
