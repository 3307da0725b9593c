"""Settings as they were typed, in a YAML file or on a command line: texts, which take the type of their field.

YAML 1.1 reads `no` as False, 010 as 8 and 12:30 as 750. Here every scalar stays the text that it is, save null, and
the field that it is for decides what it means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .secrets import without_tokens

LARGEST_FILE = 2**20  # bytes
MOST_VALUES = 100_000  # with those that aliases stand for
PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.[0-9]+([eE][-+]?[0-9]+)?")


class OneMeaning(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class Texts(OneMeaning):
    """Leaves scalars as the texts that they are."""

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """A scalar as it was written."""
        return str(node.value)


for _kind in ("bool", "int", "float", "timestamp", "binary"):
    Texts.add_constructor(f"tag:yaml.org,2002:{_kind}", Texts.construct_text)


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises ValueError for any other, and for one above 1 MB."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has more than 1 MB; put long lists into files of their own (class_names takes one).")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text.") from error


def parse_yaml(text: str, what: str, loader_cls: type[OneMeaning] = Texts) -> Any:
    """What a YAML text says: lists and mappings of texts, and None.

    Args:
        what: the text's name, for messages.
        loader_cls: `OneMeaning` for numbers and truth values as YAML has them.

    Raises ValueError in one line, without the text, if it is none, and for more than 100,000 values.
    """
    try:
        loader = loader_cls(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, {}) > MOST_VALUES:
            problem = f"it has more than {MOST_VALUES} values, those of its aliases included"
            raise yaml.constructor.ConstructorError(None, None, problem, root.start_mark)
        return loader.construct_document(root)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply.") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(without_tokens(f"{what} is not YAML: {' '.join(problem.split())}{place}")) from None


def typed_text(text: str) -> Any:
    """A value of the command line: lists and mappings as YAML writes them, all else the text as it was typed."""
    return parse_yaml(text, "the value") if text[:1] in ("[", "{") else text


def plain_value(value: Any) -> Any:
    """Texts as what they look like, for fields that take anything: numbers, truth values, and texts."""
    if isinstance(value, Mapping):
        return {key: plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value in ("true", "false"):
        return value == "true"
    if not PLAIN_NUMBER.fullmatch(value):
        return value
    return int(value) if re.fullmatch(r"[-+]?[0-9]+", value) else float(value)


def check_numbers(written: Any, read: Any, name: str) -> None:
    """Raise ValueError where a text was read as a number that isn't written in decimal digits, such as 010 or 12:30.

    Args:
        written: nested settings as texts.
        read: the same settings, typed.
    """
    if isinstance(written, Mapping) and isinstance(read, Mapping):
        for key, text in written.items():
            check_numbers(text, read.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(written, list) and isinstance(read, list | tuple):
        for number, (text, value) in enumerate(zip(written, read, strict=False)):
            check_numbers(text, value, f"{name}[{number}]")
    elif (
        isinstance(written, str)
        and isinstance(read, int | float)
        and not isinstance(read, bool)
        and not PLAIN_NUMBER.fullmatch(written)
    ):
        raise ValueError(f"{name}={written!r} is no number here; write it in decimal digits.")


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values in a node, with those behind its aliases; of one that holds itself more than is allowed."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
