"""Test-time defences, one file per method on the base in `base.py`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Defence


def defence_classes() -> dict[str, type[Defence]]:
    """The package's defences by what settings and saved folders call them, `paper.method`."""
    return {key: cls for key, cls in _classes().items() if _is_own(cls)}


def defence_class(key: str) -> type[Defence]:
    """The class behind a name: `paper.method` of the package's, `module.Class` of others.

    Names may come from files of strangers, so nothing is imported for their sake: a class of another package is found
    only where the caller has imported it. Raises ValueError for an unknown one.
    """
    found = _classes()
    if key not in found:
        mend = f"; import {key.rpartition('.')[0]} first, if it is yours" if "." in key else ""
        own = defence_classes()
        further = f", and {len(found) - len(own)} of other modules" if len(found) > len(own) else ""
        raise ValueError(f"unknown test-time defence {key!r}{mend}; known: {', '.join(own)}{further}.")
    return found[key]


def judging(defence: Defence | None, judged_by: str | None) -> Defence | None:
    """The defence that was chosen, or where none was the one that an objective can't do without, by its name.

    Raises ValueError for another than that.
    """
    if judged_by is None:
        return defence
    needed = defence_class(judged_by)
    if defence is None:
        return needed()
    if not isinstance(defence, needed):
        raise ValueError(f"defence={defence.name!r} can't predict by what this objective trains; take {judged_by!r}.")
    return defence


def defence_key(defence: Defence) -> str:
    """By what name the defence's class is found again. Raises ValueError for a class that would not be."""
    key = _key(type(defence))
    if _classes().get(key) is not type(defence):
        raise ValueError(f"the class {key} stands inside a function or twice; define it in a module, to save it.")
    return key


def _classes() -> dict[str, type[Defence]]:
    from .base import Defence

    for module in iter_modules(__path__):
        import_module(f".{module.name}", __name__)
    found: dict[str, type[Defence]] = {}
    left: list[Any] = [Defence]
    while left:
        cls = left.pop(0)
        left += cls.__subclasses__()
        if cls.defends and not cls.__abstractmethods__:
            found[_key(cls)] = cls
    return dict(sorted(found.items(), key=lambda entry: (not _is_own(entry[1]), entry[0])))


def _key(cls: type[Defence]) -> str:
    return cls.paper.method if _is_own(cls) else f"{cls.__module__}.{cls.__qualname__}"


def _is_own(cls: type[Defence]) -> bool:
    return cls.__module__.startswith(f"{__name__}.")
