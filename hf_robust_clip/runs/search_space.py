"""Which settings a hyperparameter search tries: ranges and choices, checked before anything is loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..command_line import nearest
from ..objectives.base import Objective
from ..threat_model import parse_radius
from ..training.config import (
    BY_EVALUATION,
    CHOOSES_BY_EVALUATION,
    FREE,
    REFUSED,
    RobustClipConfig,
    check_arguments,
    check_start_of_attack,
)
from ..training.resuming import OBJECTIVE

LOG_RATIO = 10  # from which a range is on a log scale where nothing says so
FINENESS = 1000  # steps of a range, to which what is drawn is rounded
OF_SCORES = ("eps", "norm", "eval_attack_steps")
OF_CHANCE = ("seed", "data_seed", "full_determinism")
OF_EVALUATION = ("eval_attack_steps", "per_device_eval_batch_size")
OF_LENGTH = ("max_steps", "num_train_epochs")
OF_HARDWARE = ("bf16", "fp16", "tf32", "attack_bf16", "torch_compile", "torch_compile_backend", "torch_compile_mode")
WHOLE_FROM_ONE = ("warmup_steps",)  # a share below, updates from there on


@dataclass(frozen=True)
class Dimension:
    """A setting with what it may be: numbers from `low` to `high`, or `choices`.

    Args:
        name: a field of `RobustClipConfig`, or `objective.NAME`.
        log: whether numbers are drawn on a log scale.
        whole: whether they are whole.
        fraction: whether the setting is a text such as 4/255, of which these are the numerators.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    log: bool = False
    whole: bool = False
    fraction: bool = False

    def suggested(self, trial: Any) -> Any:
        """The value for a trial of Optuna, as a setting."""
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return self.setting(trial.suggest_float(self.name, self.low, self.high, log=self.log))

    def setting(self, number: float) -> Any:
        """A number that was drawn, rounded: three digits on a log scale, else to a thousandth of the range."""
        if self.whole:
            return int(number)
        if self.log:
            rounded = float(f"{number:.3g}")
        else:
            rounded = round(number, math.ceil(math.log10(FINENESS / (self.high - self.low))))
        rounded = min(max(rounded, self.low), self.high)
        return f"{rounded:.6g}/255" if self.fraction else rounded

    def tried(self) -> list[Any]:
        """Settings by which the whole range is checked."""
        if self.choices:
            return list(self.choices)
        return [self.setting(number) for number in (self.low, self.high, (self.low + self.high) / 2)]

    def __str__(self) -> str:
        if self.choices:
            return f"{self.name} of {', '.join(map(str, self.choices))}"
        shown = " to ".join(f"{number:g}{'/255' * self.fraction}" for number in (self.low, self.high))
        return f"{self.name} {shown}{' (log)' * self.log}"


def read_space(
    space: Mapping[str, Any], training: RobustClipConfig, objective: Objective, check: Any = None
) -> tuple[Dimension, ...]:
    """The dimensions of a search, in their order.

    Args:
        space: ranges by settings, as `arguments.TuneArguments` describes them.
        training, objective: what the trials begin from.
        check: a function of arguments and objective that raises ValueError for what doesn't go together.

    Raises ValueError for a setting that there isn't, or that can't be searched, and for a range that is none or of
    which one end, or the middle, can't be used.
    """
    found = []
    for name, told in space.items():
        dimension = _dimension(name, told, training, objective)
        for value in dimension.tried():
            try:
                args, own = with_settings(training, objective, {name: value})
                if check is not None:
                    check(args, own)
            except (TypeError, ValueError) as error:
                raise ValueError(f"tune.space.{name}: {error}") from None
        found.append(dimension)
    return tuple(found)


def with_settings(
    training: RobustClipConfig, objective: Objective, values: Mapping[str, Any]
) -> tuple[RobustClipConfig, Objective]:
    """Arguments and objective with other settings, checked; those given stay as they are."""
    args = copy.copy(training)
    own = {name.removeprefix(OBJECTIVE): value for name, value in values.items() if name.startswith(OBJECTIVE)}
    for name, value in values.items():
        if not name.startswith(OBJECTIVE):
            before = getattr(args, name)
            setattr(args, name, value if before is None else type(before)(value))  # as transformers does for a trial
    objective = replace(objective, **own)
    check_arguments(args)
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) in BY_EVALUATION:
        raise ValueError(f"lr_scheduler_type={args.lr_scheduler_type!r}: trials are not evaluated while they run.")
    check_start_of_attack(args, objective)
    return args, objective


def into_recipe(source: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run with those found in a search, without the search and what acted in it alone."""
    searched = ("tune",) if source.get("held_out_images") is not None else ("tune", *OF_EVALUATION)
    found = copy.deepcopy({name: value for name, value in source.items() if name not in searched})
    for name, value in values.items():
        if name.startswith(OBJECTIVE):
            found["objective"].setdefault("init_args", {})[name.removeprefix(OBJECTIVE)] = value
        else:
            found[name] = value
    return found


def _dimension(name: str, told: Any, training: RobustClipConfig, objective: Objective) -> Dimension:
    kinds, current = _kinds(name, training, objective)
    if isinstance(told, Mapping):
        if unknown := [key for key in told if key not in ("low", "high", "log", "choices")]:
            raise ValueError(f"tune.space.{name}.{unknown[0]} is unknown; known: low, high, log, choices.")
        if "choices" in told:
            if len(told) > 1:
                raise ValueError(f"tune.space.{name}={told!r}: choices stand alone.")
            return _choices(name, told["choices"], kinds)
        if not {"low", "high"} <= told.keys():
            raise ValueError(f"tune.space.{name}={told!r} needs low and high, or choices.")
        return _numbers(name, (told["low"], told["high"]), told.get("log"), kinds, current)
    if not isinstance(told, list | tuple) or len(told) < 2:
        raise ValueError(f"tune.space.{name}={told!r} must be [low, high], or several choices.")
    return _numbers(name, told, None, kinds, current) if len(told) == 2 else _choices(name, told, kinds)


def _kinds(name: str, training: RobustClipConfig, objective: Objective) -> tuple[set[Any], Any]:
    """The types of a setting, and what it is without a search. Raises ValueError for one that can't be searched."""
    if name.startswith(OBJECTIVE):
        holder: Any = objective
    else:
        holder = training
        _check_searchable(name)
    inner = name.removeprefix(OBJECTIVE)
    known = [field.name for field in fields(holder) if field.init]
    if inner not in known:
        prefix = OBJECTIVE if holder is objective else ""
        more = [] if prefix else [OBJECTIVE + field.name for field in fields(objective) if field.init]
        hint = nearest(name, [*(prefix + own for own in known), *more], f"known: {', '.join(known)}.")
        raise ValueError(f"tune.space: {name!r} is no setting of {type(holder).__name__}; {hint}")
    hint = get_type_hints(type(holder))[inner]
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    return kinds, getattr(holder, inner)


def _check_searchable(name: str) -> None:
    reasons = {
        "scores of trials could not be compared": OF_SCORES,
        "it would be a choice of the luckiest trial": OF_CHANCE,
        "trials are of one length, that of tune.max_steps": OF_LENGTH,
        "it is settled before the first trial": OF_HARDWARE,
    }
    for reason, names in reasons.items():
        if name in names:
            raise ValueError(f"tune.space: {name!r} can't be searched: {reason}.")
    if name in FREE or name in REFUSED or name in CHOOSES_BY_EVALUATION or name == "load_best_model_at_end":
        raise ValueError(f"tune.space: {name!r} can't be searched: it changes nothing in a trial.")


def _choices(name: str, values: Any, kinds: set[Any]) -> Dimension:
    if not isinstance(values, list | tuple) or len(values) < 2:
        raise ValueError(f"tune.space.{name}={values!r} must give at least two choices.")
    plain = [value for value in values if isinstance(value, str | int | float)]
    if len(plain) < len(values) or len({str(value) for value in values}) < len(values):
        raise ValueError(f"tune.space.{name}={values!r} must be different numbers, texts or truth values.")
    own = tuple(_typed(name, value, kinds) for value in plain)
    return Dimension(name, choices=own)


def _typed(name: str, value: Any, kinds: set[Any]) -> Any:
    """A choice as its setting takes it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and int in kinds and float not in kinds and value != int(value):
        raise ValueError(f"tune.space.{name}: {value!r} must be a whole number.")
    if number and not kinds & {int, float}:
        if str not in kinds:
            raise ValueError(f"tune.space.{name}: {value!r} is a number, which the setting doesn't take.")
        return str(value)
    if isinstance(value, bool) and bool not in kinds:
        raise ValueError(f"tune.space.{name}: {value!r} is a truth value, which the setting doesn't take.")
    if isinstance(value, str) and kinds <= {int, float, bool, type(None)}:
        raise ValueError(f"tune.space.{name}: {value!r} is a text, which the setting doesn't take.")
    return float(value) if number and int not in kinds else value


def _numbers(name: str, ends: Any, log: Any, kinds: set[Any], current: Any) -> Dimension:
    """A range, on a log scale where its ends are far apart and nothing says otherwise."""
    fraction = isinstance(current, str) and not kinds & {int, float} and _is_radius(current)
    if not fraction and not kinds & {int, float}:
        raise ValueError(f"tune.space.{name}={list(ends)!r}: the setting is no number; give {{choices: [...]}}.")
    try:
        low, high = (255 * parse_radius(end) if fraction else _number(end) for end in ends)
    except ValueError as error:
        raise ValueError(f"tune.space.{name}={list(ends)!r}: {error}") from None
    if not low < high:
        raise ValueError(f"tune.space.{name}={list(ends)!r} must be [low, high] with low below high.")
    if log not in (None, True, False):
        raise ValueError(f"tune.space.{name}.log={log!r} must be true or false.")
    if log and low <= 0:
        raise ValueError(f"tune.space.{name}={list(ends)!r}: a log scale has no 0; give a low above it.")
    whole = not kinds & {float} or (name in WHOLE_FROM_ONE and high > 1)
    if whole and not fraction and (low != int(low) or high != int(high)):
        raise ValueError(f"tune.space.{name}={list(ends)!r} must be whole numbers.")
    if log is None:
        log = low > 0 and high / low >= LOG_RATIO
    return Dimension(name, low, high, log=log, whole=whole and not fraction, fraction=fraction)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number.")
    return float(value)


def _is_radius(text: str) -> bool:
    try:
        parse_radius(text)
    except ValueError:
        return False
    return True
