"""Settings that would do nothing where they stand: refused in one line each, with what would act.

Each check looks at the plain values of a section as they were given. A key that is null, or at its default, asks for
nothing and passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .digits_clip import EMBEDDED_MODEL
from .names import is_path, same_place, titles

Values = Mapping[str, Any] | None
VISION, TEXT = ("num_vision_tokens", "vision_depth"), ("num_text_tokens", "text_depth", "context_init",
                                                       "context_token_ids")  # fmt: skip
USED_BY_DESIGN = {
    "V": (*VISION, "init_std"),
    "VLI": (*VISION, *TEXT, "init_std"),
    "VLJ": (*VISION, *TEXT, "init_std", "coupling"),
    "T": (*TEXT, "init_std"),
    "pixel": ("pixel_region", "border_width"),
}
USED_BY_ALL = ("design", "modules_to_save")
EVALUATIONS = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_do_concat_batches",
               "eval_use_gather_object", "eval_accumulation_steps", "eval_attack_steps", "include_for_metrics",
               "batch_eval_metrics", "prediction_loss_only", "load_best_model_at_end", "metric_for_best_model",
               "greater_is_better", "do_train", "do_eval", "do_predict")  # fmt: skip
PUSHES = ("hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")
ALIGNMENT = ("gamma", "align_layers", "align_reduction", "unbiased")


def asked(values: Values, key: str, default: Any = None) -> bool:
    """Whether a section asks for something by a key: it is there, not null, and not the default."""
    value = values.get(key) if isinstance(values, Mapping) else None
    return value is not None and value != default and str(value) != str(default)


def idle(section: str, values: Values, key: str, mend: str, default: Any = None) -> None:
    """Raise ValueError if a section asks for something by a key that does nothing there."""
    if asked(values, key, default):
        raise ValueError(f"{section}.{key}={values[key]!r} does nothing {mend}.")  # type: ignore[index]


def check_model(values: Values, *, trained: bool) -> None:
    """The section model: `revision` is of the Hub's repositories, `lora_alpha` of LoRA, LoRA of a training.

    Raises ValueError for a rank below 1, too.
    """
    name = str((values or {}).get("name") or EMBEDDED_MODEL)
    if name == EMBEDDED_MODEL or is_path(name):
        idle("model", values, "revision", f"for {name!r}, which is not read from the Hub")
    if not trained:
        for key, default in (("lora_rank", None), ("lora_alpha", 16)):
            idle("model", values, key, "in an evaluation, which trains nothing", default)
    elif not asked(values, "lora_rank"):
        idle("model", values, "lora_alpha", "without model.lora_rank", 16)
    elif values["lora_rank"] < 1:  # type: ignore[index]
        raise ValueError(f"model.lora_rank={values['lora_rank']!r} must be at least 1, or null.")  # type: ignore[index]


def check_data(section: str, values: Values, *, task: bool) -> None:
    """The section data, or a task: `shots_seed` is of shots, `name` of tables, `data_root` of sets that are read."""
    if (values or {}).get("dataset") == "digits":
        idle(section, values, "data_root", "for digits, which come with scikit-learn")
    if not asked(values, "shots"):
        idle(section, values, "shots_seed", f"without {section}.shots", 0)
    if not task:
        idle(section, values, "name", "in training; tables take the names of tasks")


def unused_by_design(design: str, values: Values) -> list[str]:
    """The keys of the section prompts that prompts of a design have no use for."""
    used = {*USED_BY_ALL, *USED_BY_DESIGN.get(design, ())}
    if design == "pixel" and (values or {}).get("pixel_region") == "full":
        used -= {"border_width"}
    return [key for key in values or () if key not in used]


def check_prompts_section(values: Values, config: Any) -> None:
    """The section prompts, against the settings that came of it. Defaults of the design may stand there."""
    if not isinstance(values, Mapping):
        return
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    for key in unused_by_design(config.design, values):
        region = " with pixel_region='full'" if config.pixel_region == "full" else ""
        idle("prompts", values, key, f"for prompts of design {config.design!r}{region}", defaults.get(key))
    if config.design == "T" and config.text_depth <= 1 and config.context_init is not None:
        idle("prompts", values, "init_std", "for one layer of text prompts, which begin from prompts.context_init",
             defaults.get("init_std"))  # fmt: skip
    if config.has_text and not (config.num_text_tokens and config.text_depth):
        idle("prompts", values, "context_init", "without text prompts", defaults.get("context_init"))


def check_training(values: Values, defaults: Mapping[str, Any], *, collects: bool, device: str) -> None:
    """The section training of a recipe, which evaluates, resumes and chooses folder and device by other sections.

    Args:
        defaults: of all `RobustClipConfig`'s fields.
        collects: whether statistics are collected, in batches of `per_device_eval_batch_size`.
    """
    for key in EVALUATIONS:
        idle("training", values, key, "in a recipe, which evaluates by its section evaluation", defaults.get(key))
    if not collects:
        idle("training", values, "per_device_eval_batch_size", "in this recipe; set evaluation.batch_size",
             defaults.get("per_device_eval_batch_size"))  # fmt: skip
    for key, mend in (
        ("output_dir", "; set run.output_dir"),
        ("use_cpu", f" beside run.device={device!r}; set run.device"),
        ("resume_from_checkpoint", "; set run.resume"),
    ):
        idle("training", values, key, f"in a recipe{mend}", defaults.get(key))


def check_push_settings(values: Values, run_repo: str | None, defaults: Mapping[str, Any]) -> None:
    """What the section training says of pushes, beside `run.push_to_hub`."""
    during = asked(values, "push_to_hub", False)
    own = (values or {}).get("hub_model_id")
    if run_repo is not None and own is not None and own != run_repo:
        raise ValueError(
            f"run.push_to_hub={run_repo!r} and training.hub_model_id={own!r} differ; name one repository."
        )
    for key in PUSHES:
        trackio = key == "hub_private_repo" and "trackio" in str((values or {}).get("report_to"))
        if not during and run_repo is None and not trackio:
            idle("training", values, key, "without run.push_to_hub or training.push_to_hub", defaults.get(key))
        if not during and key in ("hub_strategy", "hub_always_push"):
            idle("training", values, key, "without training.push_to_hub", defaults.get(key))


def check_training_evaluation(values: Values) -> None:
    """The section evaluation of a recipe that trains: its reports are white box, without a defence."""
    attack = str((values or {}).get("attack", "")).lower()
    if asked(values, "target", "static") or attack.startswith("worst"):
        raise ValueError(
            f"evaluation.target={(values or {}).get('target')!r} with attack={attack!r} attacks a defence, and this "
            "section evaluates models without one; tapt's defence is attacked by the section defence_evaluation."
        )
    idle("evaluation", values, "eot", "without a defence; tapt has defence_evaluation.eot", 1)


def check_attacks(values: Values) -> None:
    """The section evaluation of an evaluation: `attack` for one, or `attacks` for several."""
    if asked(values, "attack") and asked(values, "attacks"):
        raise ValueError(
            f"evaluation.attack={values['attack']!r} does nothing beside "  # type: ignore[index]
            f"evaluation.attacks={values['attacks']!r}; name all of them in evaluation.attacks."  # type: ignore[index]
        )


def check_evaluation(values: Values, evaluations: Sequence[Any], through: Sequence[str]) -> None:
    """The section evaluation of an evaluation, against the settings that came of it.

    Args:
        through: targets whose gradients go through the defence.
    """
    if not any(how.target in through for how in evaluations):
        targets = " or ".join(repr(how.target) for how in evaluations)
        idle("evaluation", values, "eot", f"with the target {targets}, which takes no gradient through a defence", 1)
    if all(how.target == "adaptive_worst" for how in evaluations):
        idle("evaluation", values, "target", "with the attack worst, which has its own", "adaptive_worst")
        idle("evaluation", values, "step_size", "with the attack worst, which has its own")


def check_defence_evaluation(values: Values, preset: str | None, worst: Any) -> None:
    """The section defence_evaluation: `eot` is of gradients through the defence; a preset stands once."""
    if not (worst.pgd_steps or worst.apgd_steps):
        idle("defence_evaluation", values, "eot", f"with worst={(values or {}).get('worst')!r}, without gradients", 1)
    presets = list((values or {}).get("presets") or ())
    for name in presets:
        if name == preset or presets.count(name) > 1:
            raise ValueError(f"defence_evaluation.presets={presets!r} names {name!r}, which is evaluated already.")


def check_adapter(section: str, values: Values, adapter: Any) -> None:
    """The settings of a defence, against the defence that came of them."""
    defaults = {f.name: f.default for f in fields(adapter) if f.default is not MISSING}
    if getattr(adapter, "align_weight", 1) == 0:
        for key in ALIGNMENT:
            idle(section, values, key, f"with {section}.align_weight=0", defaults.get(key))
    if getattr(adapter, "reset_to", "random") == "trained":
        idle(section, values, "random_seed", f"without {section}.reset_to=random", defaults.get("random_seed"))


def check_compared(model: str, compare: Sequence[str]) -> None:
    """The checkpoints that are compared: none of them twice, and none the one in question."""
    for i, name in enumerate(compare):
        if same_place(name, model):
            raise ValueError(f"compare={list(compare)!r} names {name!r}, the model in question; name others.")
        if any(same_place(name, other) for other in compare[:i]):
            raise ValueError(f"compare={list(compare)!r} names {name!r} twice; name it once.")
    titles([model, *compare])


def check_methods(method: str, compare: Sequence[str], *, lora: bool, with_prompts: Sequence[str]) -> None:
    """The methods that are compared: none of them twice, none the recipe's own, and none that LoRA would displace."""
    for i, name in enumerate(compare):
        if name == method or name in compare[:i]:
            raise ValueError(f"compare={list(compare)!r} names {name!r}, which is trained already; name others.")
        if lora and name in with_prompts:
            raise ValueError(f"compare={list(compare)!r}: {name} trains prompts, which don't go with model.lora_rank.")


def check_run(output_dir: str, overwrite: bool, resume: bool, model: str) -> None:
    """The section run: one of overwrite and resume, and a folder that isn't the model's own.

    Raises OSError for that folder.
    """
    if overwrite and resume:
        raise ValueError("run.overwrite=true deletes what run.resume=true would go on from; choose one.")
    if Path(model).is_dir() and same_place(output_dir, model):
        raise OSError(f"output_dir={output_dir!r} is the folder of the model itself; name another folder.")
