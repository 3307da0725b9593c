"""Settings of a training, and what becomes of each of the Trainer's own here."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import trainer_log_levels

from ..attacks.pgd import PGDSettings
from ..crops import RandomResizedCrop
from ..distortions import Augmentation, ColourDistortion, RandomErasing
from ..environment import multiplies_bfloat16, tell_float32
from ..processes import join_processes
from ..threat_model import ThreatModel

if TYPE_CHECKING:
    from ..objectives.base import Objective


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Every field of `RobustClipConfig` that is in neither group changes what is trained: a training goes on with those
# that it began with. These change what is shown, written or pushed, and how fast: a training may go on with others.
FREE = _names("""
    output_dir logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_on_start per_device_eval_batch_size prediction_loss_only eval_accumulation_steps
    include_for_metrics save_only_model save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    restore_callback_states_from_checkpoint resume_from_checkpoint do_train do_eval do_predict
    use_cpu local_rank
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context torch_empty_cache_steps debug skip_memory_metrics
""")

# These would do nothing here, or harm: what they may be, and why nothing else.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0,), "the objective has a loss of its own"),
    "neftune_noise_alpha": ((None,), "the embeddings of CLIP take no noise"),
    "use_liger_kernel": ((False,), "it has no kernels for CLIP"),
    "liger_kernel_config": ((None,), "it has no kernels for CLIP"),
    "use_cache": ((False,), "CLIP has no cache"),
    "average_tokens_across_devices": ((True,), "images are counted over all devices in any case"),
    "include_num_input_tokens_seen": (("no", False), "images have no tokens to count"),
    "auto_find_batch_size": ((False,), "a smaller batch would make other updates, from half-trained weights"),
    "fp16_full_eval": ((False,), "it rounds the weights that are trained; evaluation follows fp16"),
    "bf16_full_eval": ((False,), "it rounds the weights that are trained; evaluation follows bf16"),
    "logging_nan_inf_filter": ((False,), "it hides losses that are not finite"),
    "batch_eval_metrics": ((False,), "accuracies are those of all images together"),
    "eval_do_concat_batches": ((True,), "accuracies are those of all images together"),
    "eval_use_gather_object": ((False,), "images that fill up a last batch would be counted"),
    "ignore_data_skip": ((False,), "a resumed training would see its first images again"),
    "dataloader_in_order": ((True,), "the order of images would follow the speed of the workers"),
    "remove_unused_columns": ((False,), "it takes away pictures and labels"),
    "label_names": ((["labels"], None), "labels are called 'labels'"),
    "length_column_name": (("length",), "images have no length"),
    "accelerator_config": ((), "it changes which images make an update; only non_blocking may be set"),
    "fsdp": ((None, False, "", []), "it is not supported; use DDP"),
    "fsdp_config": ((None, {}), "FSDP is not supported; use DDP"),
    "parallelism_config": ((None,), "it is not supported; use DDP"),
    "ddp_static_graph": ((None, False), "accumulated batches fail with it"),
    "deepspeed": ((None,), "it is not supported; use DDP"),
}
CHOOSES_BY_EVALUATION = _names("""
    metric_for_best_model greater_is_better eval_strategy eval_steps eval_delay eval_attack_steps
    save_strategy save_steps early_stopping_patience
""")
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # schedules
_NO_WARMUP = ("constant", *BY_EVALUATION)
_NO_SCHEDULE_SETTINGS = ("constant", "constant_with_warmup")
_OF_CROPS = ("crop_scale", "flip", "jitter", "greyscale", "erasing")
_OF_JITTER = ("brightness", "contrast", "saturation", "hue")
_OF_OPTIMIZERS = ("momentum", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules")


@dataclass(repr=False)  # the parent's own, which hides tokens
class RobustClipConfig(TrainingArguments):
    """`TrainingArguments` with a threat model, an attack and a choice of what is trained.

    Defaults are those with which PMG-AFT and TeCoA were published, save the warm-up (theirs: `warmup_steps=1000`) and
    the batch (theirs: 256 images), which depend on the size of the run.

    Raises TypeError/ValueError for numbers out of range, and for a setting that would do nothing or harm here
    (`REFUSED`), or that does nothing beside the others: `momentum` without `optim="sgd"`, a warm-up of a constant
    learning rate.
    """

    eps: str = field(default="1/255", metadata={"help": "Radius in units of [0, 1]: a fraction or a number."})
    norm: str = field(default="linf", metadata={"help": "linf or l2."})
    attack_steps: int = field(default=2, metadata={"help": "PGD steps in training."})
    attack_step_size: str = field(default="1/255", metadata={"help": "PGD step in units of [0, 1]."})
    attack_random_start: bool = field(default=True, metadata={"help": "Start PGD from a random point of the ball."})
    attack_bf16: bool = field(
        default=False,
        metadata={"help": "Gradients of the training's attack in bfloat16; losses and updates stay in float32."},
    )
    eval_attack_steps: int = field(default=10, metadata={"help": "PGD steps in evaluate() and predict()."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a new best; with load_best_model_at_end."},
    )
    trainable_layers: int | None = field(
        default=None, metadata={"help": "Train the last n layers of the vision encoder; None trains all of it."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum, for optim='sgd'."})
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of a moving average of the weights, which is kept at the end; 0 is off."}
    )
    crop_scale: float = field(
        default=0.08, metadata={"help": "Least share of a whole picture (dataset with augment=True) in a random crop."}
    )
    flip: float = field(default=0.5, metadata={"help": "Probability to mirror such a crop."})
    jitter: float = field(default=0.0, metadata={"help": "Probability to change the colours of such a crop."})
    brightness: float = field(default=0.4, metadata={"help": "By how much its brightness changes, with jitter."})
    contrast: float = field(default=0.4, metadata={"help": "By how much its contrast changes, with jitter."})
    saturation: float = field(default=0.4, metadata={"help": "By how much its saturation changes, with jitter."})
    hue: float = field(default=0.1, metadata={"help": "By how much its hue changes, with jitter; at most 0.5."})
    greyscale: float = field(default=0.0, metadata={"help": "Probability to take away the colours of such a crop."})
    erasing: float = field(default=0.0, metadata={"help": "Probability to blacken a random box of such a crop."})

    optim: str = field(default="sgd", metadata={"help": "Optimizer."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 is off, as published."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Off: a non-finite loss stops the run."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Off: the objective needs the columns."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Label columns."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All trained ones are used."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Buffers don't change."})

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_refused(self, ("deepspeed", "fsdp", "fsdp_config"))  # before transformers looks for its package
        for name in ("log_level", "log_level_replica"):
            if getattr(self, name) not in trainer_log_levels:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(trainer_log_levels)}.")
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        if (
            str(getattr(self, "trackio_static_space_id", None)).lower() == "false"
        ):  # as flags and YAML give it; no Space of that name
            self.trackio_static_space_id = False
        join_processes(self.use_cpu, self.ddp_timeout, self.ddp_backend)
        super().__post_init__()
        check_arguments(self)
        _take_float32(self)

    def threat_model(self) -> ThreatModel:
        """The threat model of training and evaluation."""
        return ThreatModel(self.eps, self.norm)  # type: ignore[arg-type]

    def attack(self) -> PGDSettings:
        """The attack of training."""
        return PGDSettings(self.attack_steps, self.attack_step_size, self.attack_random_start)  # type: ignore[arg-type]

    def augmentation(self) -> Augmentation:
        """What is done to whole pictures."""
        return Augmentation(
            RandomResizedCrop(scale=(self.crop_scale, 1.0), flip=self.flip),
            ColourDistortion(self.jitter, self.brightness, self.contrast, self.saturation, self.hue, self.greyscale),
            RandomErasing(self.erasing),
        )


def _take_float32(args: RobustClipConfig) -> None:
    """Instead of bfloat16, on a processor that would take ten times as long in it."""
    asked = args.mixed_precision == "bf16" or args.attack_bf16
    if not asked or multiplies_bfloat16(args.device.type):
        return
    if args.should_log:
        tell_float32("attack_bf16=True" if args.attack_bf16 else "bf16=True")
    args.bf16, args.mixed_precision, args.attack_bf16 = False, "no", False


def check_arguments(args: RobustClipConfig) -> None:
    """Raise TypeError/ValueError unless every setting is in range and acts. Asked again where a training starts, since
    settings can be changed by then.
    """
    _check_numbers(args)
    args.threat_model()
    args.attack()
    args.augmentation()
    for name in _OF_JITTER:
        if not args.jitter and getattr(args, name) != default_of(name):
            raise ValueError(f"{name}={getattr(args, name)!r} does nothing without jitter.")
    _check_refused(args, [name for name in REFUSED if name != "accelerator_config"])
    _check_accelerator(args)
    _check_trackers(args)
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(f"train_sampling_strategy={args.train_sampling_strategy!r} must be random or sequential.")
    if "inputs" in args.include_for_metrics:
        raise ValueError("include_for_metrics=['inputs'] can't be used: images are not kept; take ['loss'].")
    if args.load_best_model_at_end and str(_plain(args.eval_strategy)) == "no":
        raise ValueError("load_best_model_at_end=True does nothing without evaluations; set eval_strategy.")
    if args.load_best_model_at_end and args.ema_decay:
        raise ValueError(f"ema_decay={args.ema_decay!r} averages until the end; drop load_best_model_at_end=True.")
    if (
        args.load_best_model_at_end
        and str(_plain(args.save_strategy)) == "steps"
        and args.save_steps != args.eval_steps
    ):
        raise ValueError(
            f"save_steps={args.save_steps!r} with eval_steps={args.eval_steps!r}: the best weights of "
            "load_best_model_at_end might not be saved; make both equal."
        )
    if args.early_stopping_patience is not None:
        _check_number("early_stopping_patience", args.early_stopping_patience, least=1, whole=True)
        if not args.load_best_model_at_end:
            raise ValueError(
                f"early_stopping_patience={args.early_stopping_patience!r} does nothing without a best model; set "
                "load_best_model_at_end and eval_strategy."
            )
    _check_schedule(args)
    _check_optimizer(args)


def check_augmentation(args: RobustClipConfig, whole_pictures: bool) -> None:
    """Raise ValueError for a choice of crops where none are made, since the dataset gives finished pictures."""
    for name in (*_OF_CROPS, *_OF_JITTER):
        if not whole_pictures and getattr(args, name) != default_of(name):
            raise ValueError(f"{name}={getattr(args, name)!r} does nothing without whole pictures (augment=True).")


def check_views(objective: Objective, whole_pictures: bool) -> None:
    """Raise ValueError for an objective of several views where no random crops are made."""
    if objective.num_views > 1 and not whole_pictures:
        raise ValueError(f"{type(objective).__name__} takes {objective.num_views} views; give pictures, augment=True.")


def check_images_together(args: RobustClipConfig, objective: Objective, dataset: Any) -> None:
    """Raise ValueError where forward batches, over all processes, would hold less images than the objective's least;
    of a dataset that can't be counted the last batch is not looked at.
    """
    images = len(dataset) if isinstance(dataset, Sized) else None
    name, least, together = type(objective).__name__, objective.least_images, args.train_batch_size * args.world_size
    if together < least:
        raise ValueError(f"per_device_train_batch_size={args.per_device_train_batch_size!r}: {name} contrasts images; "
                         f"give it at least {least} together.")  # fmt: skip
    left = 0 if images is None or args.dataloader_drop_last else images % together
    if 0 < left < least:
        raise ValueError(f"dataloader_drop_last=False leaves {left} image to a last batch, and {name} contrasts "
                         f"images; set it, or train on other than {images} images.")  # fmt: skip


def check_trained_part(args: RobustClipConfig, adapter: bool) -> None:
    """Raise ValueError for a choice of layers where an adapter is trained alone."""
    if adapter and args.trainable_layers is not None:
        raise ValueError(f"trainable_layers={args.trainable_layers!r} does nothing with an adapter (peft_config).")


def check_start_of_attack(args: RobustClipConfig, objective: Objective) -> None:
    """Raise ValueError where an attack would begin without a gradient."""
    if objective.needs_random_start and not args.attack_random_start:
        raise ValueError(f"attack_random_start=False: the attack of {type(objective).__name__} has no gradient there.")


def check_attack_precision(args: RobustClipConfig, dtype: torch.dtype) -> None:
    """Raise ValueError where attacks in bfloat16 would not be: autocast leaves weights of other types alone."""
    if args.attack_bf16 and dtype != torch.float32:
        raise ValueError(f"attack_bf16=True is for weights in float32, these are in {dtype}; leave it out.")


def on_its_own(args: RobustClipConfig, folder: Path | None = None) -> RobustClipConfig:
    """The same settings for a run that evaluates, tracks and pushes nothing, and saves checkpoints only where it has a
    folder of its own.
    """
    quiet = copy.copy(args)
    if folder is None or args.save_strategy == SaveStrategy.BEST:  # which needs evaluations
        quiet.set_save("no")
    else:
        quiet.output_dir = str(folder)
    quiet.set_evaluate("no")
    quiet.load_best_model_at_end = quiet.push_to_hub = False
    quiet.resume_from_checkpoint = quiet.early_stopping_patience = None
    quiet.report_to = []  # under the name of the run its figures would stand among the run's own
    return quiet


def gives_whole_pictures(dataset: Dataset | None) -> bool | None:
    """Whether random crops are taken of a dataset's pictures; None where only its examples can tell."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "augment", None)


def compared_arguments(args: RobustClipConfig) -> dict[str, Any]:
    """Of the settings those that made the training what it is, a setting unknown to the groups included.

    Left out are those that don't act beside the others, and how the images of an update are divided (their number is
    what counts).
    """
    left_out = {"per_device_train_batch_size", "gradient_accumulation_steps", *FREE, *REFUSED}
    if args.max_steps > 0:
        left_out.add("num_train_epochs")
    if not chooses_by_evaluation(args):
        left_out |= CHOOSES_BY_EVALUATION
    found = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in left_out}
    return {**found, "mixed_precision": args.mixed_precision}


def chooses_by_evaluation(args: RobustClipConfig) -> bool:
    """Whether evaluations during the training decide over its learning rate or which weights are kept."""
    return bool(args.load_best_model_at_end) or str(_plain(args.lr_scheduler_type)) in BY_EVALUATION


def images_per_update(args: RobustClipConfig) -> int:
    """Images that an update sees, over all processes and accumulated batches, where the data suffice."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def optimizer_and_arguments(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
    """The class of the optimizer and what it is made with: SGD has `args.momentum`, others are the Trainer's own."""
    if _plain(args.optim) == "sgd" and isinstance(args, RobustClipConfig):
        return torch.optim.SGD, {"lr": args.learning_rate, "momentum": args.momentum}
    return Trainer.get_optimizer_cls_and_kwargs(args, model)


def default_of(name: str) -> Any:
    """The default of a field of `RobustClipConfig` that has a plain one."""
    return next(f.default for f in fields(RobustClipConfig) if f.name == name)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _check_numbers(args: RobustClipConfig) -> None:
    for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"):
        _check_number(name, getattr(args, name), below=3e38)  # where float32 ends
    _check_number("momentum", args.momentum, below=1)
    _check_number("ema_decay", args.ema_decay, below=1)
    if args.warmup_steps >= 1:
        _check_number("warmup_steps", args.warmup_steps, whole=True)
    for name in (
        "gradient_accumulation_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "eval_attack_steps",
        "attack_steps",
    ):
        _check_number(name, getattr(args, name), least=1, whole=True)
    for name, below in (("seed", 2**32), ("data_seed", 2**32), ("dataloader_num_workers", math.inf)):
        if getattr(args, name) is not None:
            _check_number(name, getattr(args, name), below=below, whole=True)
    if args.trainable_layers is not None:
        _check_number("trainable_layers", args.trainable_layers, least=-math.inf, whole=True)
    _check_number("max_steps", args.max_steps, least=-1, whole=True)
    _check_number("num_train_epochs", args.num_train_epochs, least=-math.inf)
    if args.max_steps == 0:
        raise ValueError("max_steps=0 trains nothing; give at least 1, or -1 for num_train_epochs.")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs={args.num_train_epochs!r} must be above 0.")


def _check_number(name: str, value: Any, least: float = 0, below: float = math.inf, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a number.")
    number = float(value)
    if not (least <= number < below and math.isfinite(number)) or (whole and number != int(number)):
        range_ = f"{'a whole number' if whole else 'finite'}, at least {least:g}" + (
            f" and below {below:g}" if below < math.inf else ""
        )
        raise ValueError(f"{name}={value!r} must be {range_}.")


def _check_refused(args: RobustClipConfig, names: Iterable[str]) -> None:
    for name in names:
        accepted, reason = REFUSED[name]
        if hasattr(args, name) and getattr(args, name) not in accepted:
            raise ValueError(f"{name}={getattr(args, name)!r} can't be used: {reason}.")


def _check_trackers(args: RobustClipConfig) -> None:
    there = [*get_available_reporting_integrations(), "flyte"]
    for name in args.report_to:
        if name not in there:
            raise ValueError(f"report_to={name!r} is not installed here; install it, or take none.")


def _check_accelerator(args: RobustClipConfig) -> None:
    default = {**AcceleratorConfig().to_dict(), "non_blocking": args.accelerator_config.non_blocking}
    for name, value in vars(args.accelerator_config).items():
        if value != default[name]:
            raise ValueError(f"accelerator_config {name}={value!r} can't be used: {REFUSED['accelerator_config'][1]}.")
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process can't be used: start one for each by accelerate launch.")
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError("fp16=True does nothing on the CPU; take bf16, or leave it out.")
    if args.attack_bf16 and args.mixed_precision != "no":
        raise ValueError(f"attack_bf16=True is for losses in float32; leave out {args.mixed_precision}=True, or it.")
    if args.mixed_precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision={args.mixed_precision!r} can't be used; take no, fp16 or bf16.")


def _check_schedule(args: RobustClipConfig) -> None:
    schedule = _plain(args.lr_scheduler_type)
    for name, without in (("warmup_steps", _NO_WARMUP), ("lr_scheduler_kwargs", _NO_SCHEDULE_SETTINGS)):
        if getattr(args, name) and schedule in without:
            hint = "; take constant_with_warmup" if (name, schedule) == ("warmup_steps", "constant") else ""
            raise ValueError(f"{name}={getattr(args, name)!r} does nothing with lr_scheduler_type={schedule!r}{hint}.")
    own = dict(args.lr_scheduler_kwargs or {})
    try:
        get_scheduler(schedule, torch.optim.SGD([torch.zeros(1)]), 1, 10, own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_kwargs={own!r} don't suit lr_scheduler_type={schedule!r}: {error}") from error


def _check_optimizer(args: RobustClipConfig) -> None:
    name = str(_plain(args.optim))
    if name.startswith("schedule_free"):
        raise ValueError(f"optim={name!r} can't be used: what is saved would not be the averaged weights.")
    if name.endswith(("lomo", "layerwise")):
        raise ValueError(f"optim={name!r} can't be used: it updates weights before all images of an update are seen.")
    for part in args.optim_args.split(",") if args.optim_args else ():
        if part.count("=") != 1:
            raise ValueError(f"optim_args={args.optim_args!r} must be written 'name=value,name=value'.")
    try:
        optimizer_and_arguments(args)
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) or "install" in str(error) or "import" in str(error):
            raise ValueError(f"optim={name!r} needs a package: {error}") from error
        return  # some look at the model first
    for idle in _idle_arguments(args):
        raise ValueError(f"{idle} does nothing with optim={name!r}.")


def _idle_arguments(args: RobustClipConfig) -> Iterator[str]:
    """The settings of optimizers that are away from their defaults and change nothing of this one."""
    made = optimizer_and_arguments(args)
    for name in _OF_OPTIMIZERS:
        value, default = getattr(args, name), default_of(name)
        if value == default:
            continue
        parts = value.replace(" ", "").split(",") if name == "optim_args" else [value]
        for part in parts:
            without = copy.copy(args)
            rest = ",".join(other for other in parts if other != part) or None if name == "optim_args" else default
            setattr(without, name, rest)
            if optimizer_and_arguments(without) == made:
                yield f"{name}={part!r}"
