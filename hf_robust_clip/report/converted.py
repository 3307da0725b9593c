"""The card of weights that were converted: a pure function of `provenance.json`, which lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..names import is_repo_id
from ..storage import read_json, write_text
from .card import _code, _rendered, _span, card_state
from .metadata import LIBRARY, title_of

PROVENANCE = "provenance.json"


def make_converted_card(provenance: Mapping[str, Any], repo_id: str) -> ModelCard:
    """The card of a folder that `runs.convert` wrote. It claims nothing of accuracy, and guesses no licence.

    Args:
        provenance: what `provenance.json` holds.
        repo_id: Hub id, or the folder where there is none yet.
    """
    base, adapter = provenance["base"], provenance["gives"] == "adapter"
    published = base["name"] if is_repo_id(base["name"]) and base["published"] else None
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=published,
        tags=[LIBRARY, "clip", "converted", *(["adapter"] if adapter else [])],
        **({"base_model_relation": "adapter"} if adapter and published else {}),
    )
    source = provenance["source"]
    return _rendered(
        data,
        "converted.md.jinja",
        title=title_of(repo_id),
        repo_code=_code(repo_id),
        base_code=_code(base["name"]),
        adapter=adapter,
        template=_code(provenance["template"]) if provenance.get("template") else None,
        source=_span(source["name"]) + (f" at {_span(source['commit'])}" if source["commit"] else ""),
        base=_span(base["name"]) + (f" at {_span(base['commit'])}" if base["commit"] else ""),
        base_weights=base["weights"],
        files=[(_span(own["file"]), own["sha256"], f"{own['bytes']:,}") for own in source["files"]],
        layout=f"{provenance['about']} ({_span(provenance['layout'])})",
        visual=provenance["gives"] == "visual",
        dtypes=", ".join(source["dtypes"]),
        activation=provenance["activation"],
        normalisation=provenance["normalisation"],
        version=provenance["versions"][LIBRARY],
    )


def name_converted(folder: str | Path, repo_id: str) -> None:
    """Let the card of a converted folder name the repository that it is pushed to; others stay as they are."""
    provenance, card = Path(folder, PROVENANCE), Path(folder, "README.md")
    if provenance.is_file() and card_state(card) == "unmeasured":
        write_text(card, str(make_converted_card(read_json(provenance), repo_id)))
