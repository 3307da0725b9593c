"""Test-time defences, one file per method on the base in `base.py`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Defence

DEFENCES = {  # what settings and saved folders call them (`paper.method`): module and class
    "tapt": ("tapt", "TAPT"),
    "tpt": ("tpt", "TPT"),
    "prompt_align": ("prompt_align", "PromptAlign"),
    "r_tpt": ("r_tpt", "RTPT"),
    "ttc": ("ttc", "TTC"),
    "ensemble": ("ensemble", "Ensemble"),
}


def defence_class(key: str) -> type[Defence]:
    """The class behind a name. Raises ValueError for an unknown one."""
    if key not in DEFENCES:
        raise ValueError(f"unknown test-time defence {key!r}; known: {', '.join(DEFENCES)}.")
    module, name = DEFENCES[key]
    return getattr(import_module(f".{module}", __name__), name)


def defence_key(adapter: Defence) -> str:
    """The name of an adapter's class. Raises ValueError for a class that isn't in the package."""
    key = adapter.paper.method
    if key not in DEFENCES or defence_class(key) is not type(adapter):
        raise ValueError(
            f"{type(adapter).__name__} is not one of the package's defences ({', '.join(DEFENCES)}); only these can "
            "be saved."
        )
    return key
