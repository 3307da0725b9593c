"""Where a method comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Paper:
    """Where a method comes from, for docstrings and cards. What is nowhere published has its name alone."""

    method: str
    title: str = ""
    venue: str = ""
    arxiv: str = ""
    bibtex: str = ""

    @classmethod
    def cited(cls, method: str, key: str, arxiv: str) -> Paper:
        """A paper by its key in `papers.bib`, whose entries name title, place and year."""
        bibtex = _entries()[key]
        told = dict(re.findall(r"(\w+) = \{(.*?)\}(?=,|\s*\}$)", bibtex, re.DOTALL))
        title = " ".join(told["title"].translate({ord(brace): None for brace in "{}"}).split())
        return cls(method, title, f"{told.get('booktitle') or told['journal']} {told['year']}", arxiv, bibtex)


class Unpublished:
    """What a class has for a paper where it names none: one that says the class's name and nothing else."""

    def __get__(self, method: Any, cls: type) -> Paper:
        return Paper(cls.__name__)


@cache
def _entries() -> dict[str, str]:
    text = (files(__package__) / "papers.bib").read_text(encoding="utf-8")
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in text.strip().split("\n\n")}
