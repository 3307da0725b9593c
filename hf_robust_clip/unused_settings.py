"""Settings that would do nothing where they stand: refused in one line each, with what would act.

Each check looks at what was asked for. A key at its default asks for nothing and passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from .names import same_place, titles

if TYPE_CHECKING:
    from .command_line import Given
    from .evaluation.settings import EvaluationSettings

VISION, TEXT = ("num_vision_tokens", "vision_depth"), ("num_text_tokens", "text_depth", "context_init",
                                                       "context_token_ids")  # fmt: skip
USED_BY_DESIGN = {
    "V": (*VISION, "init_std"),
    "VLI": (*VISION, *TEXT, "init_std"),
    "VLJ": (*VISION, *TEXT, "init_std", "coupling"),
    "T": (*TEXT, "init_std"),
    "pixel": ("pixel_region", "border_width", "clipped", "per_class", "prompt_size"),
}
USED_BY_ALL = ("design", "modules_to_save")
PROMPTS = tuple(dict.fromkeys([*USED_BY_ALL, *(key for keys in USED_BY_DESIGN.values() for key in keys)]))
OF_HELD_OUT = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps",
               "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
               "early_stopping_patience")  # fmt: skip
EVALUATIONS = ("eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics", "batch_eval_metrics",
               "prediction_loss_only", "do_train", "do_eval", "do_predict")  # fmt: skip
ATTACKS = ("eps", "norm", "attack_steps", "attack_step_size", "attack_random_start")
PUSHES = ("hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")


def defaults_of(cls: type) -> dict[str, Any]:
    """The plain defaults of a dataclass."""
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


def idle(given: Given, flag: str, mend: str, default: Any = None) -> None:
    """Raise ValueError if something was asked for by a flag that does nothing there."""
    value = given.asked(flag)
    if value is not None and value != default and str(value) != str(default):
        raise ValueError(f"{flag}={value!r} does nothing {mend}.")


def unused_by_design(design: str, values: Mapping[str, Any] | None) -> list[str]:
    """The keys of the section prompts that prompts of a design have no use for."""
    used = {*USED_BY_ALL, *USED_BY_DESIGN.get(design, ())}
    if design == "pixel" and (values or {}).get("pixel_region") == "full":
        used -= {"border_width"}
    return [key for key in values or () if key not in used]


def check_prompts(given: Given, config: Any) -> None:
    """The section prompts, against the settings that came of it. Defaults of the design may stand there."""
    values, defaults = given.asked("prompts"), defaults_of(type(config))
    if not values:
        return
    for key in unused_by_design(config.design, values):
        region = " with pixel_region='full'" if config.pixel_region == "full" else ""
        idle(given, f"prompts.{key}", f"for prompts of design {config.design!r}{region}", defaults.get(key))
    if config.design == "T" and config.text_depth <= 1 and config.context_init is not None:
        idle(given, "prompts.init_std", "for one layer of text prompts, which begin from prompts.context_init",
             defaults["init_std"])  # fmt: skip
    if config.has_text and not (config.num_text_tokens and config.text_depth):
        idle(given, "prompts.context_init", "without text prompts", defaults["context_init"])


def check_training(given: Given, defaults: Mapping[str, Any], *, fits: bool) -> None:
    """Flags of `RobustClipConfig` in a run, which evaluates by its section evaluation, save where training images are
    held out, and pushes what it wrote.

    Args:
        defaults: of these and of `ModelArguments`.
        fits: whether a defence is fitted, in batches of `per_device_eval_batch_size`.
    """
    held_out, tuned = given.asked("held_out_images") is not None, given.asked("tune.trials") is not None
    for key in EVALUATIONS:
        idle(given, key, "in a recipe, which evaluates by its section evaluation", defaults.get(key))
    for key in () if held_out else OF_HELD_OUT:
        idle(given, key, "without held_out_images: nothing is evaluated during the training", defaults.get(key))
    if not held_out and not tuned:
        idle(given, "eval_attack_steps", "without held_out_images or tune.trials; set evaluation.attack",
             defaults.get("eval_attack_steps"))  # fmt: skip
    if not tuned:
        for key, value in (given.asked("tune") or {}).items():
            if key != "trials" and value is not None:
                raise ValueError(f"tune.{key}={value!r} does nothing without tune.trials.")
    if not fits and not held_out and not tuned:
        idle(given, "per_device_eval_batch_size", "in this recipe; set evaluation.batch_size",
             defaults.get("per_device_eval_batch_size"))  # fmt: skip
    if not given.asked("use_peft"):
        for key in ("lora_r", "lora_alpha"):
            idle(given, key, "without use_peft", defaults.get(key))
    if not given.asked("push_to_hub"):
        for key in PUSHES:
            if key != "hub_private_repo" or "trackio" not in str(given.asked("report_to")):
                idle(given, key, "without push_to_hub", defaults.get(key))
    if given.asked("defence") is None and given.asked("defence_evaluation"):
        raise ValueError("defence_evaluation does nothing without a defence; give --defence, or leave it out.")


def check_pairs(given: Given, defaults: Mapping[str, Any], *, attacked: bool) -> None:
    """Flags of `RobustClipConfig` in a training on pairs, which is evaluated at its end alone and never pushed.

    Args:
        attacked: whether the objective has an attack.
    """
    for key in (*EVALUATIONS, *OF_HELD_OUT, "eval_attack_steps"):
        idle(given, key, "in a training on pairs, which is evaluated at its end alone", defaults.get(key))
    for key in () if attacked else ATTACKS:
        idle(given, key, "in a training without an attack", defaults.get(key))
    for key in PUSHES:
        idle(given, key, "without push_to_hub", defaults.get(key))


def check_evaluation(given: Given, evaluations: Sequence[EvaluationSettings]) -> None:
    """The section evaluation of an evaluation, against the settings that came of it."""
    if given.asked("evaluation.attack") is not None and given.asked("evaluation.attacks") is not None:
        idle(given, "evaluation.attack", f"beside evaluation.attacks={given.asked('evaluation.attacks')!r}")
    if not any(how.seen.goes_through for how in evaluations):
        named = " or ".join(repr(how.seen.name) for how in evaluations)
        idle(given, "evaluation.eot", f"with the view {named}, which takes no gradient through a defence", 1)


def check_defence(given: Given, defence: Any) -> None:
    """Settings of a defence that do nothing beside its others."""
    arguments = given.asked("defence.init_args") or {}
    for name, why in defence.idle_settings().items():
        if name in arguments:
            idle(given, f"defence.init_args.{name}", why, defaults_of(type(defence)).get(name))


def check_compared(model: str, compare: Sequence[str]) -> None:
    """The checkpoints that are compared: none of them twice, and none the one in question."""
    for i, name in enumerate(compare):
        if same_place(name, model):
            raise ValueError(f"compare={list(compare)!r} names {name!r}, the model in question; name others.")
        if any(same_place(name, other) for other in compare[:i]):
            raise ValueError(f"compare={list(compare)!r} names {name!r} twice; name it once.")
    titles([model, *compare])
