"""The classifier of a checkpoint's family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoints import adapter_config, base_of, check_family, read_config
from .clip import CLIPForZeroShotClassification
from .pretrained import WHERE, PretrainedClassifier, checked_source
from .siglip import SiglipForZeroShotClassification

FAMILIES: dict[str, type[PretrainedClassifier]] = {
    "clip": CLIPForZeroShotClassification,
    "siglip": SiglipForZeroShotClassification,
}


class AutoModelForZeroShotClassification:
    """Loads a checkpoint as the classifier of its family, by the `model_type` in its config.json.

        model = AutoModelForZeroShotClassification.from_pretrained("google/siglip2-base-patch16-224")

    | model_type | classifier | checkpoints |
    |---|---|---|
    | `clip` | `CLIPForZeroShotClassification` | OpenAI's, LAION's, DataComp's, MetaCLIP's |
    | `siglip` | `SiglipForZeroShotClassification` | SigLIP, SigLIP2 of fixed resolution |
    """

    def __init__(self) -> None:
        raise OSError("AutoModelForZeroShotClassification is made by from_pretrained(name), not by itself.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a whole model, an adapter on its base model, or `"digits-clip"`. Arguments and errors are those of
        `PretrainedClassifier.from_pretrained`; OSError, too, for a checkpoint of no known family.
        """
        where = {name: kwargs[name] for name in WHERE if name in kwargs}
        family = family_of(pretrained_model_name_or_path, where)
        return family.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def family_of(name: str | Path, where: dict[str, Any]) -> type[PretrainedClassifier]:
    """The classifier that a checkpoint is loaded as, of an adapter that of its base model.

    Args:
        where: `revision`, `token` and their like, for a checkpoint on the Hub.

    Raises OSError if there is no such checkpoint, or it is of no known family.
    """
    source = checked_source(name, where.get("subfolder", ""))
    adapter = adapter_config(source, where.get("revision"), where)
    if adapter is not None:
        base, revision = base_of(source, adapter, where)
        elsewhere = {key: value for key, value in where.items() if key != "subfolder"}
        return family_of(base, {**elsewhere, "revision": revision})
    config = read_config(source, where)
    check_family(source, config.get("model_type") or "", config)
    found = config.get("model_type")
    if found not in FAMILIES:
        raise OSError(
            f"model_type={found!r} in config.json of {source!r} is no family that is known here: "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[found]
