"""Captions in other words: what cleanings contrast a caption with."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..storage import read_json

KEYS = frozenset({"roles", "details", "synonyms"})


class CaptionEditor(ABC):
    """Makes other captions of one, each a function of the caption and a seed alone.

    A new one is a frozen dataclass with these three functions; no caption that they give is empty.
    """

    @abstractmethod
    def varied(self, caption: str, seed: int) -> str:
        """The same in other words."""

    @abstractmethod
    def positive(self, caption: str, seed: int) -> str:
        """A part of it that is still true: what is there and what it does, without details."""

    @abstractmethod
    def negative(self, caption: str, seed: int) -> str:
        """The caption with one word that makes it untrue; `positive` where there is no such word."""


@dataclass(frozen=True)
class Words:
    """What is known of words.

    Args:
        role_of: which words can stand for one another and mean something else, such as colours.
        members: of each role its words.
        details: the roles that a caption is true without.
        synonyms: of a word others of the same meaning.
    """

    role_of: dict[str, str]
    members: dict[str, tuple[str, ...]]
    details: frozenset[str]
    synonyms: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class WordEditor(CaptionEditor):
    """Edits word by word. Captions become lower-case letters alone, as in CleanCLIP's code.

    `varied` is one of four, at random, each done n = max(1, share * words) times: a word becomes a synonym; a synonym
    of a word is put anywhere; two words change places; every word is dropped with probability `share`. Where that
    leaves nothing, or no word has a synonym, the caption stays. `positive` drops the words of roles that are details;
    `negative` puts another word of its role in the place of one word.

    Args:
        words: a table of `caption_words.json`, or a JSON file of one: {"roles": {role: [words]}, "details": [roles],
            "synonyms": {word: [words]}}.
        share: of the words, in (0, 1).

    Raises ValueError for another table, OSError for a file that isn't there.

    Source: Wei and Zou, arXiv 1901.11196, as CleanCLIP's code uses it (synonyms of WordNet there); positive and
    negative captions are a reconstruction of CleanerCLIP's.
    """

    words: str = "english"
    share: float = 0.1
    kind: str = field(init=False, default="words")  # which class it is, where settings are told

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share!r} must be above 0 and below 1.")
        words_of(self.words)

    def varied(self, caption: str, seed: int) -> str:
        draw, words = self._begin("varied", caption, seed)
        count = max(1, int(self.share * len(words)))
        edit = draw.choice([self._replaced, self._with_more, self._swapped, self._with_less])
        return " ".join(edit(words, count, draw)) or caption

    def positive(self, caption: str, seed: int) -> str:
        known = words_of(self.words)
        kept = [word for word in _plain_words(caption) if known.role_of.get(word) not in known.details]
        return " ".join(kept) or caption

    def negative(self, caption: str, seed: int) -> str:
        draw, words = self._begin("negative", caption, seed)
        places = [i for i, word in enumerate(words) if self._others(word)]
        if not places:
            return self.positive(caption, seed)
        place = draw.choice(places)
        words[place] = draw.choice(self._others(words[place]))
        return " ".join(words)

    def _others(self, word: str) -> list[str]:
        known = words_of(self.words)
        return [other for other in known.members.get(known.role_of.get(word, ""), ()) if other != word]

    def _begin(self, use: str, caption: str, seed: int) -> tuple[random.Random, list[str]]:
        return random.Random(f"{use} {seed} {caption}"), _plain_words(caption)

    def _replaced(self, words: list[str], count: int, draw: random.Random) -> list[str]:
        synonyms = words_of(self.words).synonyms
        places = [i for i, word in enumerate(words) if word in synonyms]
        for place in draw.sample(places, min(count, len(places))):
            words[place] = draw.choice(synonyms[words[place]])
        return words

    def _with_more(self, words: list[str], count: int, draw: random.Random) -> list[str]:
        synonyms = words_of(self.words).synonyms
        known = [word for word in words if word in synonyms]
        for _ in range(count if known else 0):
            words.insert(draw.randint(0, len(words)), draw.choice(synonyms[draw.choice(known)]))
        return words

    def _swapped(self, words: list[str], count: int, draw: random.Random) -> list[str]:
        for _ in range(count if len(words) > 1 else 0):
            i, j = draw.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
        return words

    def _with_less(self, words: list[str], count: int, draw: random.Random) -> list[str]:
        return [word for word in words if draw.random() >= self.share]


@dataclass(frozen=True)
class GrammarEditor(WordEditor):
    """Edits sentences of a grammar whose words' roles are all known: those of the coloured digits by default.

    `varied` leaves each detail out with probability one half, and puts synonyms in the places of words with the same;
    the order of words stays, and what isn't a detail too. The others are as `WordEditor`'s.
    """

    words: str = "coloured_digits"
    kind: str = field(init=False, default="grammar")

    def varied(self, caption: str, seed: int) -> str:
        known, (draw, words) = words_of(self.words), self._begin("varied", caption, seed)
        kept = [word for word in words if known.role_of.get(word) not in known.details or draw.random() < 0.5]
        told = [draw.choice((word, *known.synonyms.get(word, ()))) for word in kept]
        return " ".join(told) or caption


@cache
def words_of(name: str) -> Words:
    """A table of `caption_words.json`, or of a JSON file. Raises OSError/ValueError for what is none."""
    tables = read_json(Path(str(files(__package__) / "caption_words.json")))
    if name in tables and not name.startswith("_"):
        return _checked(tables[name], name)
    if not Path(name).is_file():
        known = [table for table in tables if not table.startswith("_")]
        raise OSError(f"words={name!r} is no file, and none of {known}.")
    return _checked(read_json(name, once=True), name)


def _checked(table: Any, name: str) -> Words:
    if not isinstance(table, dict) or not set(table) <= KEYS:
        raise ValueError(f"words={name!r} must hold {sorted(KEYS)} alone.")
    roles, synonyms = table.get("roles", {}), table.get("synonyms", {})
    for part, value in (("roles", roles), ("synonyms", synonyms)):
        if not isinstance(value, dict) or not all(map(_is_words, value.values())):
            raise ValueError(f"words={name!r}: {part} must be {{name: [words]}} in small letters.")
    details = table.get("details", [])
    if not isinstance(details, list) or not set(details) <= set(roles):
        raise ValueError(f"words={name!r}: details={details!r} must be among the roles {list(roles)}.")
    role_of: dict[str, str] = {}
    for role, words in roles.items():
        for word in words:
            if role_of.setdefault(word, role) != role:
                raise ValueError(f"words={name!r}: {word!r} has the roles {role_of[word]!r} and {role!r}; keep one.")
    return Words(
        role_of,
        {k: tuple(v) for k, v in roles.items()},
        frozenset(details),
        {k: tuple(v) for k, v in synonyms.items()},
    )


def _is_words(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(w, str) and _plain_words(w) == [w] for w in value)
    )


def _plain_words(caption: str) -> list[str]:
    """The words of a caption in lower-case letters."""
    return re.findall(r"[^\W\d_]+", caption.lower())
