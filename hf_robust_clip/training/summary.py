"""What cards and reports tell of a training, as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel
from torch import nn

from ..checkpoint_notes import named_base
from ..modeling import DESCRIPTION, PAPER_TEMPLATE, ZeroShotClassifier
from ..names import hub_name, is_path, shown_name
from ..prompts import ClipPromptConfig
from ..report.card import CardInfo
from .checkpoints import step_of
from .config import RobustClipConfig, images_per_update

if TYPE_CHECKING:
    from ..defences.base import Defence
    from .trainer import RobustClipTrainer


def card_info(trainer: RobustClipTrainer, repo_id: str) -> CardInfo:
    """What a card tells of the model as it is now."""
    base, core, data = trainer.adapter_base(), trainer.classifier(), trainer.train_dataset
    start = str(core.name_or_path) if base is None else base
    published, dataset = hub_name(start) or "", str(getattr(data, "dataset_id", ""))
    return CardInfo(
        repo_id=repo_id,
        base_model=published,
        ancestor=None if published else named_base(start),
        training_data=f"{shown_name(dataset)}, split {data.split}, {len(data)} images" if dataset else "",
        datasets=[dataset] if dataset and not is_path(dataset) else [],
        paper=trainer.training_objective.paper,
        settings=trainer.settings(),
        template=shown_template(core),
        class_names=core.class_names,
        limits="",
        family=core.config.model_type,
        described=bool(core.descriptions),
    )


def shown_template(core: ZeroShotClassifier) -> str:
    """The template that a card's example sets: the first that takes descriptions, where there are some."""
    templates = [text for text in core.templates if DESCRIPTION in text] or core.templates or (PAPER_TEMPLATE,)
    return templates[0]


def training_settings(trainer: RobustClipTrainer) -> dict[str, Any]:
    """Method, objective, attack, optimisation and precision."""
    args, objective, updates = trainer.args, trainer.training_objective, trainer.updates()
    core = trainer.accelerator.unwrap_model(trainer.model)
    skipped = trainer.state.global_step - updates
    best = trainer.state.best_model_checkpoint if args.load_best_model_at_end and not trainer.is_in_train else None
    averaged = {"ema_decay": args.ema_decay, "weights": "moving average over the updates"}
    texts = {"texts_of_each_class": trainer.classifier().texts_of_each()} if "texts" in objective.needs else {}
    coupled = {"couples_images": f"within forward batches of {args.train_batch_size}"}
    return {
        "method": objective.paper.method,
        "objective": asdict(objective),
        "threat_model": str(trainer.threat_model),
        "attack": asdict(trainer.attack) if objective.attacked else None,
        **adapter_settings(core),
        "trainable_parameters": sum(p.numel() for p in core.parameters() if p.requires_grad),
        **optimisation_settings(args, *trainer.given_optimizers),
        "images_per_update": images_per_update(args),
        **(coupled if objective.couples_images else {}),
        **texts,
        "updates": updates,
        **({"skipped_updates": skipped} if skipped else {}),
        **({"weights_of_update": step_of(best)} if best else {}),
        **(averaged if args.ema_decay and not trainer.is_in_train else {}),
        "precision": precision_of(core, trainer.accelerator.mixed_precision)
        + (", attack in bfloat16" if args.attack_bf16 and objective.attacked else ""),
        "seed": args.seed,
    }


def defence_settings(defence: Defence) -> dict[str, Any]:
    """Each setting of a test-time defence as `adaptation.<name>`; of statistics, of which images they are."""
    found = dict(defence.parameters())
    for name, value in found.items():
        if isinstance(value, dict) and "num_images" in value:
            found[name] = f"{value['num_images']} images of {shown_name(value['dataset'])}, {value['split']}"
    return {f"adaptation.{name}": value for name, value in found.items()}


def adapter_settings(core: nn.Module) -> dict[str, Any]:
    """Of prompts, or another adapter, what was chosen, as one entry."""
    config = core.active_peft_config if isinstance(core, PeftModel) else None
    if config is None or isinstance(config, ClipPromptConfig):
        if config is None:
            return {}
        units = {"units": "class-wise" if config.per_class else "clipped"} if config.clipped else {}
        return {"prompts": config.summary(), "text_tokens": config.num_text_tokens if config.has_text else 0, **units}
    rank = f" of rank {config.r}, alpha {config.lora_alpha}" if isinstance(config, LoraConfig) else ""
    return {"adapter": f"{config.peft_type.value}{rank}"}


def optimisation_settings(args: RobustClipConfig, optimizer: Any, schedule: Any) -> dict[str, Any]:
    """What the weights were trained by: what `args` say, or the optimizer and schedule given."""
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else args.warmup_steps
    own: dict[str, Any] = {
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        **({"momentum": args.momentum} if args.optim == "sgd" else {}),
    }
    if optimizer is not None:
        group = optimizer.param_groups[0]
        found = {"learning_rate": group.get("initial_lr", group["lr"]), **group}
        names = ("learning_rate", "weight_decay", "momentum")
        own = {"optimizer": type(optimizer).__name__, **{name: found[name] for name in names if name in found}}
    if schedule is not None:
        return {**own, "schedule": type(schedule).__name__}
    return {
        **own,
        "warmup_steps": warmup,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
    }


def precision_of(model: nn.Module, mixed: str) -> str:
    """The arithmetic of a training: of its mixed precision, else of the trained weights."""
    if mixed != "no":
        return mixed
    return str(next(p.dtype for p in model.parameters() if p.requires_grad)).removeprefix("torch.")
