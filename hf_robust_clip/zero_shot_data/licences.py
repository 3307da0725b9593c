"""Under which licence the pictures of a dataset are, as far as anybody says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard

from .specs import find_spec


@dataclass(frozen=True)
class Licence:
    """What is known of a licence.

    Args:
        name: the Hub's short name, such as `"mit"`; None where nobody says.
        forbids_copies: whether changed pictures must not be passed on.
    """

    name: str | None = None
    forbids_copies: bool = False


def licence_of(dataset_id: str) -> Licence:
    """That of a known dataset, by `datasets.json`, or of a folder, by the metadata of its README.md. Licences without
    derivatives (`-nd`) forbid changed pictures.
    """
    spec = find_spec(dataset_id)
    if spec is not None:
        return Licence(spec.license or None, spec.forbids_copies)
    readme = Path(dataset_id) / "README.md"
    try:
        told = DatasetCard.load(readme).data.get("license") if readme.is_file() else None
    except (ValueError, yaml.YAMLError):  # no metadata, or damaged
        told = None
    names = [told] if isinstance(told, str) else [name for name in told or () if isinstance(name, str)]
    name = names[0] if len(names) == 1 and names[0] not in ("unknown", "other") else None
    return Licence(name, any("-nd" in name for name in names))
