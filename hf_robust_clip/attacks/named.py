"""Short names of attacks, as flags and configs have them."""

from __future__ import annotations

import re
from typing import get_args

from .auto_attack import AttackName, AutoAttack
from .losses import cross_entropy, cw_margin
from .suites import PGD, NoAttack, Suite


def suite_named(name: str, step_size: float | str | None = None) -> Suite:
    """The attacks of a name: pgd-N, cw-N, apgd, autoattack, autoattack-rand, one member of AutoAttack, or none.

    Args:
        step_size: of PGD and CW.

    Raises ValueError for an unknown name, and for a step size of another attack.
    """
    match = re.fullmatch(r"(pgd|cw)-(\d+)", name.lower())
    if match:
        return PGD(int(match[2]), step_size, cw_margin if match[1] == "cw" else cross_entropy)
    suites = _suites()
    if name.lower() not in suites:
        raise ValueError(f"attack={name!r} is unknown; known: {', '.join(short_names())}, or a class by its path.")
    if step_size is not None:
        raise ValueError(f"evaluation.step_size={step_size!r} goes with pgd-N and cw-N, not with {name!r}.")
    return suites[name.lower()]


def short_names() -> tuple[str, ...]:
    """All names that `suite_named` knows, those that end in a number of steps with 20."""
    return ("pgd-20", "cw-20", *_suites())


def _suites() -> dict[str, Suite]:
    return {
        "autoattack": AutoAttack(),
        "autoattack-rand": AutoAttack.rand(),
        "apgd": AutoAttack(("apgd-ce", "apgd-t")),
        **{member: AutoAttack((member,)) for member in get_args(AttackName)},
        "none": NoAttack(),
    }
