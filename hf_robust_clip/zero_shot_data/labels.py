"""What a dataset's labels mean: which class name belongs to which of them."""

from __future__ import annotations

import ast
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from ..modeling import check_classes
from . import specs
from .errors import cut, one_line
from .specs import DatasetSpec, plain

logger = logging.getLogger(__name__)

ClassNames = Sequence[str] | Mapping[Any, str] | str | None

WORDNET_ID = r"n\d{8}"
GENERIC = (
    "class|classes|cls|label|labels|id|ids|category|categories|group|type|kind|target|object|obj|item|index|idx|"
    "number|num|cluster|folder|dir|concept|code|tag"
)
HEADINGS = ("class", "classes", "classname", "classnames", "name", "names", "label", "labels", "category",
            "categories", "id", "ids", "wnid", "synset", "index")  # fmt: skip
HASH = r"(?=.*\d)[0-9a-f]{8,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ID = re.compile(
    rf"{WORDNET_ID}|[+-]?\d+(\.\d+)?|({GENERIC})([\W_]*\d+|[\W_]+[a-z])|{HASH}", re.IGNORECASE
)  # on its own
ID_BEFORE_NAME = re.compile(
    rf"({WORDNET_ID}|({GENERIC})[\W_]*\d+|\d+|[a-z](?=\)))([\s,;:.)\]]+\S|[\W_]+[^\W\d_])", re.IGNORECASE
)
COMMENT = re.compile(r"#|//|--|;|%|<|/\*")
SHOWN = 3  # of labels or names, in messages


def read_labels(
    rows: datasets.Dataset, column: str, class_names: ClassNames, name: str, warn: bool = True
) -> tuple[tuple[str, ...], dict[Any, int] | None]:
    """The class names, and the index among them of each of the dataset's labels; None where labels are indices.

    Names given over labels that are named already (class folders, `ClassLabel`, texts) are matched with these by
    letters and digits. Only if all labels are ids, none of the names is among them, and there are equally many, do
    they stand for the labels in their order. A mapping translates the dataset's own labels; one from 0 .. n - 1, none
    of which is a label, is a list; one {name: number} is turned round. Floats without a fraction are whole numbers,
    bytes are texts. Underscores in the names of class folders are spaces. Of a list over whole numbers, a first or
    last class that no row has is warned of.

    Args:
        class_names: a list, a mapping {own label: name}, or a key of `class_names.json`; None takes the dataset's own.
            Ids among them, but for plain numbers, are warned of.
        name: of the dataset, for errors.
        warn: of ids, and of classes at the ends without rows.

    Raises ValueError for a missing label, one that is neither a whole number nor a text, one without a name, names
    that fit the labels only in part, and a dataset whose own labels are only ids.
    """
    feature = rows.features[column]
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        raise ValueError(f"column {column!r} of dataset {name!r} holds no labels but {feature}.")
    stored = _distinct(rows, column, name)
    values = list(stored.values())
    own = getattr(feature, "names", None)
    given = None if class_names is None else _given(class_names, own or values)
    if warn:
        _warn_of_ids(given or ())
    if own is not None:
        names, order = _over_own_labels(own, given, name)
        if given is None and rows.info.builder_name == "imagefolder":
            names, _ = check_classes([text.replace("_", " ") for text in names], "{}")
        _check_range(values, own, column, name)
        return names, None if order == list(range(len(own))) else dict(enumerate(order))
    if given is None:
        texts = [value for value in values if isinstance(value, str)]
        how = f"that hold its labels {texts[:SHOWN]}, in any order" if texts else "in label order"
        raise ValueError(f"dataset {name!r} doesn't name its classes; give class_names {how}.")
    keys, values_of_keys = (list(given), list(given.values())) if isinstance(given, dict) else (given, given)
    checked, _ = check_classes(values_of_keys, "{}")
    if not isinstance(given, dict) and not any(isinstance(value, str) for value in values):
        _check_range(values, checked, column, name)
        if warn and not isinstance(class_names, Mapping):
            _warn_of_absent_ends(values, checked, name)
        return checked, None
    index = _match([str(value) for value in values], keys)
    _check_all_known([str(value) for value in values], index, keys, f"column {column!r} of dataset {name!r}")
    return checked, {value: index[str(label)] for value, label in stored.items()}


def _given(class_names: Sequence[str] | Mapping[Any, str] | str, labels: Sequence[Any]) -> list[str] | dict[str, str]:
    """Names as a list, or as a mapping from texts; a list becomes one where the labels are the texts 0 .. n - 1."""
    texts = [label for label in labels if isinstance(label, str)]
    if isinstance(class_names, str | Path):
        if isinstance(class_names, Path) or class_names not in specs.class_name_keys():
            raise ValueError(
                f"class_names={str(class_names)!r} is one text; give a list of names, a mapping {{label: name}}, "
                f"read_class_names(path) of a file, or one of {specs.class_name_keys()}."
            )
        return specs.class_names(class_names)
    if isinstance(class_names, Mapping):
        mapping = {str(label): name for label, name in class_names.items()}
        if len(mapping) < len(class_names):
            raise ValueError("class_names has a label twice, as a number and as a text; keep one.")
        upright = _upright(mapping)
        order = [str(i) for i in range(len(upright))]
        if isinstance(upright, list) or upright.keys() != set(order) or _match(texts, order):
            return upright
        return [upright[label] for label in order]
    if isinstance(class_names, set | frozenset):
        raise ValueError("class_names is a set, which has no order; give a list, or a mapping {label: name}.")
    names = list(class_names)
    spelled = {int(label): label for label in texts if label.isdecimal()}
    if spelled.keys() == set(range(len(names))) and len(spelled) == len(texts) and not set(texts) & set(names):
        return {spelled[i]: name for i, name in enumerate(names)}
    return names


def _upright(mapping: Mapping[str, Any]) -> dict[str, Any] | list[str]:
    """A mapping {label: name}; one that is the other way round, {name: number}, is turned: a list if these are 0 ..
    n - 1.

    Raises ValueError for one from names to ids.
    """
    values = [str(value) for value in mapping.values() if type(value) in (int, str)]
    ids = sum(ID.fullmatch(value.strip()) is not None for value in values)
    if not mapping or ids < len(mapping) or all(ID.fullmatch(label.strip()) for label in mapping):
        return dict(mapping)
    numbers = {int(value): label for value, label in zip(values, mapping, strict=True) if value.strip().isdecimal()}
    if len(numbers) < len(mapping):
        label, value = next(iter(mapping.items()))
        raise ValueError(f"class_names has the id {value!r} as name of {label!r}; turn it round to {{label: name}}.")
    turned = {str(number): numbers[number].strip() for number in sorted(numbers)}
    logger.warning("class_names is taken as {name: number}: %s is %r, ...", *next(iter(turned.items())))
    return list(turned.values()) if numbers.keys() == set(range(len(numbers))) else turned


def _warn_of_ids(given: Sequence[str] | Mapping[str, str]) -> None:
    names = given.values() if isinstance(given, Mapping) else given
    ids = [name for name in names if isinstance(name, str) and ID.fullmatch(name.strip()) and not name.isdecimal()]
    if ids:
        logger.warning("class_names has %r, an id, which prompts will say as it is; give names.", ids[0])


def names_of_spec(spec: DatasetSpec, feature: Any, class_names: ClassNames) -> ClassNames:
    """The names of a known dataset for its labels as they are stored, where none are given; as a mapping from labels
    wherever these have names or are not 0, 1, ...; names given over plain labels are taken in the order of our own.
    """
    own, keys = getattr(feature, "names", None), spec.label_keys()
    if class_names is None and own is not None:
        return dict(zip(own, spec.names_in_label_order(own) or own, strict=True))
    if class_names is None:
        names = specs.class_names(spec.class_names) if spec.class_names else None
        whole = "int" in getattr(feature, "dtype", "")
        return dict(enumerate(names)) if isinstance(names, list) and whole else names
    if (
        own is None
        and keys is not None
        and not isinstance(class_names, str | Mapping)
        and len(class_names) == len(keys)
    ):
        return dict(zip(keys, class_names, strict=True))
    return class_names


def _distinct(rows: datasets.Dataset, column: str, name: str) -> dict[Any, Any]:
    """Every label that occurs, once: as it is stored, and as the whole number or the text that it means."""
    values = rows.select_columns([column]).with_format("arrow")[:][column].unique().to_pylist()
    if any(value is None or value != value for value in values):
        row = next(
            i for i, value in enumerate(rows.select_columns([column])[column]) if value is None or value != value
        )
        raise ValueError(f"row {row} of dataset {name!r} has no label in column {column!r}; leave such rows out.")
    labels = [_label(value) for value in values]
    odd = [label for label in labels if not isinstance(label, int | str)]
    if odd:
        raise ValueError(f"column {column!r} of dataset {name!r} holds {odd[0]!r}, no label; choose label_column.")
    return dict(zip(values, labels, strict=True))


def _label(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():  # what a join makes of whole numbers
        return int(value)
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _warn_of_absent_ends(values: Sequence[int], names: Sequence[str], name: str) -> None:
    """Warn of a first or last class that no row has: a line too many in a list, or labels from 1, shift them all."""
    absent = [i for i in dict.fromkeys((0, len(names) - 1)) if i not in values]
    if absent:
        classes = " and ".join(f"class {i} ({names[i]!r})" for i in absent)
        logger.warning(
            "dataset %r has no row of %s: its labels run from %d to %d, and class_names count from 0; check that the "
            "list fits, or give a mapping {label: name}.", name, classes, min(values), max(values),
        )  # fmt: skip


def _check_range(values: Sequence[int], names: Sequence[str], column: str, name: str) -> None:
    low, high = min(values), max(values)
    if low < 0 or high >= len(names):
        mend = "give one name per label, also for numbers that no picture has, and leave out rows without a label"
        if (low, high) == (1, len(names)):
            mend = f"give a mapping {{1: {names[0]!r}, ...}} for numbers from 1"
        raise ValueError(
            f"labels in column {column!r} of dataset {name!r} run from {int(low)} to {int(high)} ({len(values)} "
            f"different), but there are {len(names)} class names, for 0 .. {len(names) - 1}; {mend}."
        )


def _over_own_labels(
    own: Sequence[str], given: list[str] | dict[str, str] | None, name: str
) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and the index among them of each label of a dataset that names its labels."""
    in_order = list(range(len(own)))
    if given is None:
        _check_readable(own, name)
        return check_classes(own, "{}")[0], in_order
    where = f"dataset {name!r}"
    if isinstance(given, dict):
        index = _match(own, list(given))
        _check_all_known(own, index, list(given), where)
        values = list(given.values())
        return check_classes([values[index[label]] for label in own], "{}")[0], in_order
    names, _ = check_classes(given, "{}")
    index = _match(own, names)
    if not index:
        _check_in_order(own, names, name)
        return names, in_order
    _check_all_known(own, index, names, where)
    if len(names) > len(own):
        logger.info("%d of the %d class_names are no labels of dataset %r.", len(names) - len(own), len(names), name)
    return names, [index[label] for label in own]


def _match(labels: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """The index among names of each label that is there: by its spelling, else by letters and digits.

    Raises ValueError where labels that mean different things would get one name.
    """
    exact = {name: i for i, name in enumerate(names)}
    alike = {_key(name): i for name, i in exact.items()}
    if len(alike) < len(exact):
        alike = {}  # some differ in case or signs only: then the spelling counts
    places = {label: exact.get(label, alike.get(_key(label))) for label in labels}
    index = {label: place for label, place in places.items() if place is not None}
    first: dict[int, str] = {}
    for label, place in index.items():
        other = first.setdefault(place, label)
        if _words(other) != _words(label):
            raise ValueError(f"labels {other!r} and {label!r} would both be class {names[place]!r}; give a mapping.")
    return index


def _key(label: str) -> tuple[Any, ...]:
    """What two spellings of a name share: letters and digits, and where numbers end. Without letters all counts."""
    letters = plain(label)
    return (letters, *re.findall(r"\d+", label)) if re.search(r"[^\W\d_]", label) else (label.strip(),)


def _words(label: str) -> list[str]:
    return re.split(r"[\s_\-]+", label.casefold().strip())


def _check_all_known(labels: Sequence[str], index: Mapping[str, int], names: Sequence[str], where: str) -> None:
    """Raise ValueError, naming labels, if some are not among the names."""
    unknown = [label for label in labels if label not in index]
    if unknown:
        shown = ", ".join(map(repr, unknown[:SHOWN])) + (", ..." if len(unknown) > SHOWN else "")
        what = f"labels {shown}, which are" if len(unknown) > 1 else f"label {shown}, which is"
        raise ValueError(
            f"{where} has the {what} none of the {len(names)} class names ({', '.join(names[:SHOWN])}, ...); give "
            "class_names that hold all labels, or a mapping {label: name}."
        )


def _check_in_order(own: Sequence[str], names: Sequence[str], name: str) -> None:
    """Raise ValueError unless names that are none of the labels can stand for these one by one, as they are ids in the
    order of their numbers; say how they do.
    """
    if len(names) != len(own):
        more, less = (names, own) if len(names) > len(own) else (own, names)
        odd = "name" if more is names else "label"
        raise ValueError(
            f"class_names has {len(names)} names, but dataset {name!r} has {len(own)} labels, {list(own[:SHOWN])} "
            f"..., none of which is among them; the first {odd} too many is {more[len(less)]!r}."
        )
    if not _in_natural_order(own):
        raise ValueError(
            f"labels of dataset {name!r} aren't sorted as numbers ({', '.join(own[:SHOWN])}); map class_names."
        )
    if not all(ID.fullmatch(label.strip()) for label in own) and len({_without_numbers(label) for label in own}) > 1:
        lines = ", ".join(f"{label!r}: '...'" for label in own[:2])
        raise ValueError(
            f"none of the labels of dataset {name!r} is among class_names, whose order may be another; give "
            f"a mapping {{label: name}}: {{{lines}, ...}}."
        )
    pairs = ", ".join(f"{label!r} is {given!r}" for label, given in zip(own[:SHOWN], names, strict=False))
    logger.warning("class_names are taken in the order of the labels of dataset %r: %s, ...", name, pairs)


def _in_natural_order(labels: Sequence[str]) -> bool:
    """Whether numbers rise among labels that begin alike: `class_2` before `class_10`."""
    highest: dict[str, list[Any]] = {}
    for label in labels:
        prefix, *parts = re.split(r"(\d+)", label)
        number = [int(part) if i % 2 == 0 else part for i, part in enumerate(parts)]
        if number and number < highest.get(prefix, number):
            return False
        highest[prefix] = number or highest.get(prefix, number)
    return True


def _check_readable(labels: Sequence[str], name: str) -> None:
    """Raise ValueError if labels are ids, of which a text encoder knows nothing."""
    bare = {_without_numbers(label) for label in labels}
    numbered = all(re.match(r"\d+[\s_.\-]+[^\W\d_]", label) for label in labels)
    ids = [label for label in labels if ID.fullmatch(label.strip()) or re.match(rf"{WORDNET_ID}[\W_]", label.strip())]
    if not ids and (len(labels) < 2 or not (len(bare) == 1 or numbered)):
        return
    tables = [
        key
        for key in specs.class_name_keys()
        if isinstance(table := specs.class_names(key), dict)
        and all(re.fullmatch(WORDNET_ID, label) and label in table for label in labels)
    ]
    ours = "".join(f", or class_names={key!r}, which knows these ids" for key in tables)
    raise ValueError(
        f"dataset {name!r} names a class {(ids or labels)[0]!r}, which is an id and no name; give class_names: a "
        f"mapping {{label: name}}, or a list in label order{ours}."
    )


def _without_numbers(label: str) -> str:
    return re.sub(r"[\s\d_\-.,:;/#()]+", "", label).casefold()


def class_names_of(text: str) -> list[str] | dict[str, str]:
    """The names of a file, or of a key of `class_names.json`. Raises ValueError if both are there, OSError if none."""
    known = text in specs.class_name_keys()
    if Path(text).is_file():
        if known:
            raise ValueError(f"class_names={text!r} is a known set of names and a file; give './{text}' for the file.")
        return read_class_names(text)
    if known:
        return specs.class_names(text)
    raise OSError(f"class_names={text!r} is no file, and none of the known sets {specs.class_name_keys()}.")


def read_class_names(path: str | Path) -> list[str] | dict[str, str]:
    """Class names of a UTF-8 file: one name per line, or a JSON or Python list; or a mapping from labels.

    A JSON or Python dict of texts gives a list if its keys are 0 .. n - 1, or its values (as {name: number}), else the
    mapping {label: name}.

    Raises OSError if the file can't be read, ValueError for one that holds no names, a blank or a repeated name, and
    for lines that hold more than a name: ids, columns, quotation marks, signs of a list.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it has zero bytes")
        names = _parsed(text)
        if isinstance(names, dict):
            names = _upright(names)
        if names is None:
            names = [line.strip() for line in text.rstrip().splitlines()]
            _check_lines(names)
        for place, value in names.items() if isinstance(names, dict) else enumerate(names):
            if not isinstance(value, str):
                raise ValueError(f"class_names[{place!r}]={value!r} is not a name but of type {type(value).__name__}")
        check_classes(list(names.values()) if isinstance(names, dict) else names, "{}")
    except UnicodeDecodeError as error:
        raise ValueError(f"class names in {str(path)!r} are not in UTF-8 ({error.reason}); save them so.") from error
    except ValueError as error:
        raise ValueError(f"class names in {str(path)!r}: {cut(error)} (the first is class_names[0])") from error
    return {label: name.strip() for label, name in names.items()} if isinstance(names, dict) else names


def _parsed(text: str) -> list[Any] | dict[str, Any] | None:
    """What a text that looks like a JSON or Python list or dict holds; None for any other."""
    start = text.lstrip()[:1]
    if start not in ("[", "{", "("):
        return None
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as of_json:
        try:
            value = _literal(text)
        except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
            if start == "(":
                return None
            kind = "dict" if start == "{" else "list"
            raise ValueError(f"they begin like a JSON {kind} but are none: {one_line(of_json)}") from error
    if isinstance(value, tuple | list):
        return [name.strip() if isinstance(name, str) else name for name in value]
    if not isinstance(value, dict):
        raise ValueError(f"they are a {type(value).__name__}, which has no order; write a list or a dict")
    mapping = {str(label): name for label, name in value.items()}
    pairs = [pair for pair in mapping.values() if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) == len(mapping) and all(re.fullmatch(WORDNET_ID, str(pair[0])) for pair in pairs):
        mapping = {label: pair[1] for label, pair in mapping.items()}  # imagenet_class_index.json
    if len(mapping) < len(value):
        raise ValueError("a label is there twice, as a number and as a text")
    order = [str(i) for i in range(len(mapping))]
    if set(order) == mapping.keys():
        return [mapping[label].strip() if isinstance(mapping[label], str) else mapping[label] for label in order]
    return mapping


def _literal(text: str) -> Any:
    """A Python literal; of a dict only if no key is there twice."""
    tree = ast.parse(text.strip(), mode="eval").body
    try:
        value = ast.literal_eval(tree)
    except ValueError as error:  # code
        raise SyntaxError("no literal") from error
    if isinstance(tree, ast.Dict) and len(tree.keys) > len(value):
        raise ValueError("a label is there twice")
    return value


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a label is there twice")
    return dict(pairs)


def _check_lines(lines: Sequence[str]) -> None:
    """Raise ValueError for lines that hold more than one name each."""
    first = lines[0] if lines else ""
    odd = (first.isdecimal() or first.endswith(":")) and not any(x.isdecimal() or x[-1:] == ":" for x in lines[1:])
    if plain(first) in HEADINGS or re.match(r"\w+\s*=\s*[\[{(]", first) or (odd and len(lines) > 1):
        raise ValueError(f"their first line {first!r} is no name; leave the names alone, one per line")
    comment = next((line for line in lines if COMMENT.match(line)), None)
    if comment is not None:
        raise ValueError(f"their line {comment!r} is a comment and no name; leave the names alone, one per line")
    mend = "leave the names alone, one per line, or write a JSON list or dict"
    counts = [{line.count(sign) for line in lines} for sign in "\t,;|=:#"]
    if any(len(count) == 1 and 0 not in count for count in counts) or any("\t" in line for line in lines):
        raise ValueError(f"their lines are columns, such as {first!r}; {mend}")
    if len(lines) < 2:
        return
    if all(ID.fullmatch(line) for line in lines) and not all(line.isdecimal() for line in lines):
        raise ValueError(f"their lines are ids, such as {first!r}, and no names; write names, or a dict {{id: name}}")
    if all(ID_BEFORE_NAME.match(line) for line in lines):
        raise ValueError(f"their lines begin with ids, such as {first!r}; {mend}")
    last = [re.search(r"[\W_](\d+)$", line) for line in lines]
    numbers = [int(match[1]) for match in last if match]
    if sorted(numbers) in ([*range(len(lines))], [*range(1, len(lines) + 1)]):
        raise ValueError(f"their lines end with their numbers, such as {first!r}; {mend}")
    for end in (0, -1):
        signs = {line[end : end + 1 or None] for line in lines}
        sign = next(iter(signs))
        if len(signs) == 1 and sign and unicodedata.category(sign)[0] in "PS":
            raise ValueError(f"their lines all {'end' if end else 'begin'} with {sign!r}; {mend}")
