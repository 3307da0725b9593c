"""What a checkpoint's own files say of it: the prompt it was trained with, and what it was made from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .digits_clip import EMBEDDED_MODEL, digits_clip_path
from .modeling import DESCRIPTION, PAPER_TEMPLATE, chosen, descriptions_digest, read_descriptions
from .names import hub_name, is_path
from .report import quoted, with_descriptions
from .storage import read_json, write_text
from .typed_settings import parse_yaml, read_text

DESCRIPTIONS = "descriptions.json"  # beside a checkpoint, those that it was trained with
CHECKPOINT = re.compile(r"checkpoint-\d+")  # of a Trainer, inside the folder of its run


def trained_templates(name: str, revision: str | None = None) -> tuple[str, ...]:
    """The templates that a checkpoint was trained with, as its recipe.yaml, report.json, provenance.json or
    adaptation.json says, in a folder or on the Hub; none if none of them says it.

    Raises OSError if the Hub can't be asked, ValueError for a file that says it in a way that can't be read.
    """
    recipe = _content(name, "recipe.yaml", revision)
    if recipe is not None and recipe.get("template") is not None:
        return _templates(recipe["template"], name, "recipe.yaml")
    report = _content(name, "report.json", revision)
    if report is not None and isinstance(report.get("card"), dict) and report["card"].get("template"):
        return _templates(report["card"]["template"], name, "report.json")
    if recipe is not None and "objective" in recipe:  # a recipe that leaves it out trains with this one
        return (PAPER_TEMPLATE,)
    converted = _content(name, "provenance.json", revision)
    if converted is not None and converted.get("template"):
        return _templates(converted["template"], name, "provenance.json")
    if converted is not None and converted.get("gives") == "adapter":
        raise ValueError(
            f"{name!r} was converted from a file that doesn't tell the texts its prompts were learned with; give "
            f"template, such as 'a photo of a {{}}.'."
        )
    defence = _content(name, "adaptation.json", revision)
    return () if defence is None else _templates(defence.get("templates") or [], name, "adaptation.json")


def load_descriptions(
    source: str | Path, class_names: Sequence[str] | None = None, revision: str | None = None
) -> dict[str, Sequence[str]]:
    """Texts of classes, {name: [text, ...]}, for `set_classes`.

    Args:
        source: a JSON file of them, or a checkpoint that was trained with some: a folder or an id on the Hub, which
            holds them as descriptions.json, or in the adaptation.json of a defence.
        class_names: of these classes alone; None gives all that are there.
        revision: of a Hub id.

    Raises OSError if there are none, ValueError for a file of another kind, a class that is there twice, and one of
    `class_names` that isn't there.
    """
    path = Path(source) if Path(source).is_file() else _found(str(source), DESCRIPTIONS, revision)
    defence = _content(str(source), "adaptation.json", revision) if path is None else None
    found = (defence or {}).get("descriptions") or read_descriptions(source if path is None else path)
    return dict(found if class_names is None else chosen(found, class_names) or {})


def save_descriptions(folder: str | Path, descriptions: Mapping[str, Sequence[str]]) -> None:
    """Write descriptions.json beside a checkpoint."""
    text = json.dumps(dict(descriptions), indent=1, ensure_ascii=False) + "\n"
    write_text(Path(folder, DESCRIPTIONS), text)


def trained_descriptions(
    name: str, templates: Sequence[str], revision: str | None = None
) -> dict[str, Sequence[str]] | None:
    """What a checkpoint's own `templates` took, as `load_descriptions` finds it; None where they take none.

    Raises OSError if they take some and there are none.
    """
    if not any(DESCRIPTION in text for text in templates):
        return None
    try:
        return load_descriptions(name, None, revision)
    except OSError as error:
        raise OSError(
            f"{name!r} was trained with {quoted(templates)}, but has no {DESCRIPTIONS}; give descriptions."
        ) from error


def holds_defence(name: str, revision: str | None = None) -> bool:
    """Whether a test-time defence was saved in a folder or on the Hub. Raises OSError if the Hub can't be asked."""
    return _content(name, "adaptation.json", revision) is not None


def method_of_defence(name: str, revision: str | None = None) -> str | None:
    """By what name the class of a test-time defence that was saved there is found; None where there is none, or nobody
    can be asked.
    """
    try:
        defence = None if name == EMBEDDED_MODEL else _content(name, "adaptation.json", revision)
    except (OSError, ValueError):
        return None
    method = (defence or {}).get("method")
    return method if isinstance(method, str) else None


def holds_defence_alone(name: str, revision: str | None = None) -> bool:
    """Whether a defence is all that was saved there: neither weights nor prompts of its own, so that its base model is
    what it defends. False where nobody can be asked.
    """
    try:
        defence = None if name == EMBEDDED_MODEL else _content(name, "adaptation.json", revision)
        if not defence or defence.get("prompts"):
            return False
        weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json")
        return not any(_found(name, file, revision) for file in weights)
    except (OSError, ValueError):
        return False


def known_templates(name: str, revision: str | None = None) -> tuple[str, ...]:
    """`trained_templates`, for a remark alone: none where nobody can be asked."""
    try:
        return trained_templates(name, revision)
    except (OSError, ValueError):
        return ()


def trained_method(name: str, revision: str | None = None) -> str | None:
    """By which method a checkpoint was trained, as its report.json or recipe.yaml says; None where neither says it, or
    nobody can be asked.
    """
    try:
        report, recipe = (_content(name, file, revision) or {} for file in ("report.json", "recipe.yaml"))
    except (OSError, ValueError):
        return None
    card = report.get("card")
    paper = card.get("paper") if isinstance(card, dict) else None
    told = paper.get("method") if isinstance(paper, dict) else None
    objective = recipe.get("objective")
    told = told or (objective.get("class_path") if isinstance(objective, dict) else objective)
    return told.rpartition(".")[2] if isinstance(told, str) and told else None


def trained_setting(name: str, revision: str | None = None) -> tuple[str | None, str | float | None]:
    """On which dataset, and at which eps, a checkpoint was trained, as its recipe.yaml says; None where it doesn't."""
    try:
        recipe = _content(name, "recipe.yaml", revision) or {}
    except (OSError, ValueError):
        return None, None
    dataset, eps = recipe.get("dataset_name"), recipe.get("eps")
    return dataset if isinstance(dataset, str) else None, eps if isinstance(eps, str | int | float) else None


def known_descriptions(
    name: str, templates: Sequence[str], class_names: Sequence[str], revision: str | None = None
) -> str | None:
    """The digest of `trained_descriptions` of these classes, for a remark alone: none where nobody can be asked."""
    try:
        found = trained_descriptions(name, templates, revision) or {}
        return descriptions_digest({own: found[own] for own in class_names if own in found})
    except (OSError, ValueError):
        return None


def other_prompt(
    title: str,
    trained: Sequence[str],
    used: Sequence[str],
    digests: tuple[str | None, str | None] = (None, None),
) -> str | None:
    """A remark on a model that is evaluated with another prompt than it was trained with; None for the same.

    Args:
        digests: of the descriptions that it was trained and is evaluated with.
    """
    if not trained or (tuple(trained) == tuple(used) and digests[0] == digests[1]):
        return None
    before, after = (quoted(own) + with_descriptions(of) for own, of in zip((trained, used), digests, strict=True))
    return f"NOTE: {title} was trained with the prompt {before}, and is evaluated with {after}."


def named_base(folder: str | Path) -> str | None:
    """The Hub id that a folder's own card, or its adapter's settings, name as what it was made from; else None."""
    from huggingface_hub import ModelCard

    if not str(folder):
        return None
    card = Path(folder, "README.md")
    named: Any = None
    if card.is_file():
        try:
            named = ModelCard.load(card).data.get("base_model")
        except (ValueError, yaml.YAMLError):  # somebody's notes without metadata that can be read
            named = None
    if named is None and Path(folder, "adapter_config.json").is_file():
        named = (_content(str(folder), "adapter_config.json", None) or {}).get("base_model_name_or_path")
    named = named[0] if isinstance(named, list) and named else named
    return hub_name(named) if isinstance(named, str) else None


def _templates(value: Any, name: str, file: str) -> tuple[str, ...]:
    templates = (value,) if isinstance(value, str) else value
    if not isinstance(templates, list | tuple) or not all(map(_is_template, templates)):
        raise ValueError(f"{file} of {name!r} names the template {value!r}, which has no '{{}}'; give template.")
    return tuple(templates)


def _is_template(text: Any) -> bool:
    return isinstance(text, str) and ("{}" in text or DESCRIPTION in text)


def _content(name: str, file: str, revision: str | None) -> dict[str, Any] | None:
    """A file beside a checkpoint, as plain values; None if there is none."""
    path = _found(name, file, revision)
    if path is None:
        return None
    try:
        content = read_json(path) if file.endswith(".json") else parse_yaml(read_text(path), file)
    except ValueError as error:
        raise ValueError(f"{file} of {name!r} is damaged; mend it, or give template.") from error
    return content if isinstance(content, dict) else {}


def _found(name: str, file: str, revision: str | None) -> Path | None:
    if is_path(name) or name == EMBEDDED_MODEL:
        folder = Path(digits_clip_path() if name == EMBEDDED_MODEL else name)
        places = [folder, *([folder.resolve().parent] if CHECKPOINT.fullmatch(folder.resolve().name) else [])]
        places = places[::-1] if file == DESCRIPTIONS else places  # a run's own are of all classes that it evaluated
        return next((place / file for place in places if (place / file).is_file()), None)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (EntryNotFoundError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise OSError(f"can't ask the Hub which prompt {name!r} was trained with; give template.") from error
