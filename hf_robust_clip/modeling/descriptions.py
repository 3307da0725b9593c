"""Several texts for each class, such as language models write them: read, checked, and put into templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..names import check_shown
from ..storage import read_json
from .texts import DESCRIPTION, PAPER_TEMPLATE

Descriptions = Mapping[str, Sequence[str]]


def default_template(descriptions: Descriptions | None) -> str:
    """What texts are put into where nobody says it: descriptions into nothing, class names into PMG-AFT's."""
    return PAPER_TEMPLATE if descriptions is None else DESCRIPTION


def check_descriptions(descriptions: Any, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The texts of each class, in the order of the classes.

    Raises ValueError, with the place, for classes without texts, unknown ones, and texts that are empty, no texts, or
    there twice.
    """
    if not isinstance(descriptions, Mapping):
        raise ValueError(f"descriptions is a {type(descriptions).__name__}; give {{class name: [texts]}}.")
    if unknown := [name for name in descriptions if name not in set(class_names)]:
        raise ValueError(f"descriptions has texts for {unknown[0]!r}, which is none of class_names; leave them out.")
    return {name: _checked_texts(descriptions.get(name), name) for name in class_names}


def _checked_texts(texts: Any, name: str) -> tuple[str, ...]:
    if texts is None:
        raise ValueError(f"descriptions has no texts for the class {name!r}; give every class some.")
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"descriptions[{name!r}]={texts!r} must be a list of texts.")
    if not texts:
        raise ValueError(f"descriptions[{name!r}] is empty; give at least one text.")
    for i, text in enumerate(texts):
        check_shown(text, f"descriptions[{name!r}][{i}]")
        if DESCRIPTION in text:
            raise ValueError(f"descriptions[{name!r}][{i}]={text!r} holds {DESCRIPTION!r}, which is for templates.")
        if (first := texts.index(text)) != i:
            raise ValueError(
                f"descriptions[{name!r}][{i}]={text!r} repeats descriptions[{name!r}][{first}]; remove it."
            )
    return tuple(texts)


def texts_of(name: str, templates: Sequence[str], descriptions: Descriptions) -> list[tuple[str, str]]:
    """All texts of a class, each after the template that it comes from: one for each description in a template that
    holds `{description}`, one in a template that doesn't.
    """
    return [
        (template, template.replace(DESCRIPTION, text).replace("{}", name))
        for template in templates
        for text in (descriptions[name] if DESCRIPTION in template else ("",))
    ]


def before_the_class(template: str) -> str:
    """The words of a template before class name and description."""
    return template.split("{}")[0].split(DESCRIPTION)[0].strip()


def chosen(descriptions: Descriptions | None, class_names: Sequence[str]) -> dict[str, Sequence[str]] | None:
    """The texts of these classes alone, of descriptions that may know more; None of None.

    Raises ValueError for a class that they don't know.
    """
    if descriptions is None:
        return None
    if missing := [name for name in class_names if name not in descriptions]:
        raise ValueError(
            f"descriptions has no texts for {len(missing)} of {len(class_names)} classes, among them {missing[0]!r}; "
            "class names must be those of the dataset."
        )
    return {name: descriptions[name] for name in class_names}


def read_descriptions(path: str | Path) -> dict[str, Sequence[str]]:
    """A JSON file {class name: [texts]}. Raises ValueError for another one, OSError if there is none."""
    if not Path(path).is_file():
        raise OSError(f"descriptions={str(path)!r} is no file; name a JSON file of {{class name: [texts]}}.")
    content = read_json(path, once=True)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"descriptions={str(path)!r} must hold {{class name: [texts]}}.")
    return content


def descriptions_digest(descriptions: Descriptions) -> str | None:
    """16 hexadecimal digits that change with any text, class or order; None where there are no descriptions."""
    if not descriptions:
        return None
    text = json.dumps([[name, list(texts)] for name, texts in descriptions.items()], ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
