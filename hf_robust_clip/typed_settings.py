"""Settings as they were typed, in a YAML file or on a command line: what a field of text gets is the text itself."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from .secrets import without_tokens

LARGEST_FILE = 2**20  # bytes
MOST_VALUES = 100_000  # with those that aliases stand for
TEXT, NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
COLLECTIONS = (list, dict, tuple, Sequence, Mapping)
PLAIN_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


class OneMeaning(yaml.SafeLoader):
    """Refuses what YAML 1.1 reads in its own way: of a key that stands twice the last, 010 as 8, 12:30 as 750."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number in decimal digits."""
        whole = node.tag.endswith(":int")
        if ":" in node.value or (whole and not PLAIN_INTEGER.fullmatch(node.value)):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value!r} is no number here", node.start_mark)
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    OneMeaning.add_constructor(f"tag:yaml.org,2002:{_kind}", OneMeaning.construct_number)


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises ValueError for any other, and for one above 1 MB."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has more than 1 MB; put long lists into files of their own (class_names takes one).")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text.") from error


def typed_value(text: str, what: str, hint: Any = None) -> Any:
    """The value of an option: for a field of text as it was typed, but for null and, where the field takes them too,
    lists and mappings; for all others what YAML says. Raises as `parse_yaml`.
    """
    options = _options(hint)
    collections = text[:1] in ("[", "{") and any((get_origin(o) or o) in COLLECTIONS for o in options)
    if _is_text(options) and text != "null" and not collections:
        return text
    return parse_yaml(text, what, hint)


def parse_yaml(text: str, what: str, hint: Any = None) -> Any:
    """What a YAML text says.

    Args:
        hint: the type of what it says, for a mapping in a dict those of its keys, for a list in a list that of its
            elements. What stands where a text belongs is read as it was typed.

    Raises ValueError in one line, without the text, if it is none, and for more than 100,000 values.
    """
    try:
        loader = OneMeaning(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, {}) > MOST_VALUES:
            problem = f"it has more than {MOST_VALUES} values, those of its aliases included"
            raise yaml.constructor.ConstructorError(None, None, problem, root.start_mark)
        _keep_texts(root, hint)
        return loader.construct_document(root)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply.") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(without_tokens(f"{what} is not YAML: {' '.join(problem.split())}{place}")) from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values in a node, with those behind its aliases; of one that holds itself more than is allowed."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _keep_texts(node: yaml.Node, hint: Any) -> None:
    """Let the scalars that stand where a text belongs be read as they were typed; null says nothing there too."""
    options = _options(hint)
    if isinstance(node, yaml.ScalarNode) and _is_text(options) and node.tag != NULL:
        node.tag = TEXT
    elif isinstance(node, yaml.SequenceNode):
        inside = hint[0] if isinstance(hint, list) else _inside(options, Sequence, 0)
        for part in node.value:
            _keep_texts(part, inside)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(hint, dict):
                _keep_texts(value, hint if key.value == "<<" else hint.get(str(key.value)))
            else:
                _keep_texts(key, _inside(options, Mapping, 0))
                _keep_texts(value, _inside(options, Mapping, 1))


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_text(options: Sequence[Any]) -> bool:
    """Whether a field takes texts and no numbers or truth values, which are read as YAML reads them."""
    return str in options and not {bool, int, float} & {option for option in options if isinstance(option, type)}


def _inside(options: Sequence[Any], kind: type, place: int) -> Any:
    """The type of what stands in the lists, or mappings, that a field takes."""
    found = (get_args(o) for o in options if isinstance(get_origin(o), type) and issubclass(get_origin(o), kind))
    return next((arguments[place] for arguments in found if len(arguments) > place), None)
