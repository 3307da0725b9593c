"""What a poisoning leaves for a cleaning: `poisoning.json` beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_origin, get_type_hints

from ..poisoning.poisoner import Poisoner
from ..poisoning.triggers import Trigger
from ..storage import read_json

CLEAN_FOLDER = "clean"  # in the folder of a poisoned model, its twin that was trained without poison
NOTE = "poisoning.json"


@dataclass(frozen=True, kw_only=True)
class Poisoning:
    """How a model was poisoned.

    Args:
        trigger_class, trigger_settings: of the trigger.
        target, rate, label_consistent, caption_templates, seed: of the poisoner.
        cleaning_pairs: how many pairs were kept out of the training.
        clean_model: a Hub id or path of what was poisoned; None where its twin is in the folder `clean`.
        weights, clean_weights: digests of the poisoned and of the clean model.
        pairs: which dataset was poisoned, as `PairArguments`.
        test_dataset, test_split, templates: what it was measured on.
        poisoned_pictures: keys of the pictures that got the trigger, by which overlaps are found.
    """

    trigger_class: str
    trigger_settings: dict[str, Any]
    target: str
    rate: float
    label_consistent: bool
    caption_templates: list[str]
    seed: int
    cleaning_pairs: int
    clean_model: str | None
    pairs: dict[str, Any]
    test_dataset: str
    test_split: str
    templates: list[str]
    poisoned_pictures: list[str]
    weights: str
    clean_weights: str

    def told(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def trigger(self) -> Trigger:
        """Raises ValueError for one of a class that isn't imported."""
        known = {cls.__name__: cls for cls in Trigger.__subclasses__()}
        if self.trigger_class not in known:
            raise ValueError(f"trigger_class={self.trigger_class!r} of {NOTE} is none of {', '.join(known)}; import "
                             "the module that has it first.")  # fmt: skip
        return known[self.trigger_class](**self.trigger_settings)

    def poisoner(self) -> Poisoner:
        """Who poisoned."""
        templates = tuple(self.caption_templates)
        return Poisoner(self.trigger(), self.target, self.rate, self.label_consistent, templates, self.seed)


def read_poisoning(folder: str) -> Poisoning:
    """The note in the folder of a poisoned model. Raises OSError if there is none, ValueError for what is none."""
    path = Path(folder, NOTE)
    if not path.is_file():
        raise OSError(f"poisoned={folder!r} has no {NOTE}; name a folder that recipes/poison.py wrote.")
    content = read_json(path)
    names = {field.name for field in fields(Poisoning)}
    if not isinstance(content, dict) or (wrong := names ^ set(content)):
        raise ValueError(
            f"{path} lacks or adds {sorted(wrong) if isinstance(content, dict) else 'all'}; poison again."
        )
    for name, hint in get_type_hints(Poisoning).items():
        if not isinstance(content[name], hint if isinstance(hint, UnionType) else get_origin(hint) or hint):
            raise ValueError(f"{path}: {name}={content[name]!r} is none of a poisoning; poison again.")
    return Poisoning(**content)
