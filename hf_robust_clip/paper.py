"""Where a method comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """Where a method comes from, for docstrings and cards."""

    method: str
    title: str
    venue: str
    arxiv: str
    bibtex: str
