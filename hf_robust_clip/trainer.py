"""Adversarial fine-tuning of CLIP: one `Trainer` for every objective."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from .adaptation.defended import DefendedClassifier
from .adaptation.statistics import AlignmentTargets, collect_statistics
from .adaptation.tapt import TAPT
from .attacks.losses import cross_entropy
from .attacks.pgd import PGDSettings, pgd
from .checkpoint_notes import named_base
from .checks import checked_labels
from .hub import without_draft
from .model_card import CardInfo, make_unmeasured_card
from .modeling import PAPER_TEMPLATE, CLIPForZeroShotClassification, without_gradients
from .names import hub_name, is_path, shown_name
from .objectives.apt import APT
from .objectives.base import Batch, Objective
from .objectives.clean import Clean
from .objectives.coop import CoOp
from .objectives.fap import FAP
from .objectives.fare import FARE
from .objectives.pmg_aft import PMGAFT
from .objectives.tecoa import TeCoA
from .objectives.trades import TRADES
from .prompts import ClipPromptConfig, check_prompts
from .pushing import PushingTrainer
from .threat_model import ThreatModel
from .zero_shot_data.augment import RandomResizedCrop
from .zero_shot_data.loading import collate_images

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.utils.data import DataLoader, Dataset


@dataclass
class RobustClipConfig(TrainingArguments):
    """`TrainingArguments` with a threat model, an attack and a choice of what is trained.

    Defaults are those with which PMG-AFT and TeCoA were published, save the warm-up (theirs: `warmup_steps=1000`) and
    the batch (theirs: 256 images), which depend on the size of the run.
    """

    eps: str = field(default="1/255", metadata={"help": "Radius in units of [0, 1]: a fraction or a number."})
    norm: str = field(default="linf", metadata={"help": "linf or l2."})
    attack_steps: int = field(default=2, metadata={"help": "PGD steps in training."})
    attack_step_size: str = field(default="1/255", metadata={"help": "PGD step in units of [0, 1]."})
    attack_random_start: bool = field(default=True, metadata={"help": "Start PGD from a random point of the ball."})
    eval_attack_steps: int = field(default=10, metadata={"help": "PGD steps in evaluate() and predict()."})
    trainable_layers: int | None = field(
        default=None, metadata={"help": "Train the last n layers of the vision encoder; None trains all of it."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum, for optim='sgd'."})
    crop_scale: float = field(
        default=0.08, metadata={"help": "Least share of a whole picture (dataset with augment=True) in a random crop."}
    )
    flip: float = field(default=0.5, metadata={"help": "Probability to mirror such a crop."})

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
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        super().__post_init__()
        self.threat_model()
        self.attack()
        self.augmentation()

    def threat_model(self) -> ThreatModel:
        """The threat model of training and evaluation."""
        return ThreatModel(self.eps, self.norm)  # type: ignore[arg-type]

    def attack(self) -> PGDSettings:
        """The attack of training."""
        return PGDSettings(self.attack_steps, self.attack_step_size, self.attack_random_start)  # type: ignore[arg-type]

    def augmentation(self) -> RandomResizedCrop:
        """What is done to whole pictures."""
        return RandomResizedCrop(scale=(self.crop_scale, 1.0), flip=self.flip)


def robust_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`clean_accuracy` and `robust_accuracy` in [0, 1] from the (clean, adversarial) logits of `RobustClipTrainer`."""
    clean, adv = (logits.argmax(-1) == prediction.label_ids for logits in prediction.predictions)
    return {"clean_accuracy": float(clean.mean()), "robust_accuracy": float((clean & adv).mean())}


def defended_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracies in [0, 1] from the four logits of `TAPTTrainer`; of two logits those of `robust_accuracy`.

    As everywhere, an image counts under attack only if it is classified right without it too.
    """
    if len(prediction.predictions) == 2:
        return robust_accuracy(prediction)
    clean, blind, static_clean, static = (part.argmax(-1) == prediction.label_ids for part in prediction.predictions)
    return {
        "clean_accuracy": float(clean.mean()),
        "blind_accuracy": float((clean & blind).mean()),
        "static_clean_accuracy": float(static_clean.mean()),
        "static_robust_accuracy": float((static_clean & static).mean()),
    }


class RobustClipTrainer(PushingTrainer):
    """Trains a `CLIPForZeroShotClassification`, or prompts in it, on adversarial examples, by any `Objective`.

    In each step: random crops, if the dataset gives whole pictures; adversarial images by PGD on
    `objective.attack_loss` (through the module without its distributed wrapper, differentiating the images alone);
    then `sum(objective(batch, adv).values())` through the wrapped model.
    The crop and the random start of an image depend on the seed, the step and the image alone, so the result depends
    neither on how a batch is split over processes and accumulated batches, nor on an interruption. While an attack
    runs, the class embeddings stand still: they are computed once for all of its steps.

    Args:
        model: with its classes set, in label order of the data (objectives without labels need none). A `PeftModel`
            around one is trained as it is: its adapter alone.
        args: training settings, attack, and which layers are trained.
        objective: default `objective_cls()`. Its normalisation, if it prescribes one, is given to the model.
        train_dataset, eval_dataset: examples `{"pixel_values": (3, H, W) in [0, 1], "labels": int}`; for training
            also `{"picture": (3, H, W) uint8, "labels": int}`, of which random crops are taken.
        teacher: frozen reference of objectives that need one; default the model as it is now. Same architecture.
        peft_config: train an adapter instead: prompts (`ClipPromptConfig`), or LoRA, say, which is kept out of the
            text tower. None takes `default_peft_config()` where the method has one (APT, FAP and CoOp: prompts) and
            `trainable_layers` is not set.
        data_collator, compute_metrics, callbacks, optimizers: as in `transformers.Trainer`; metrics default to clean
            and robust accuracy.

    The text tower's weights and logit_scale stay frozen. Checkpoints hold the student alone: of an adapter, the
    adapter.
    Raises TypeError/ValueError for a model of another class, a teacher of another architecture, and bad settings.
    """

    objective_cls: ClassVar[type[Objective]]
    loss_is_scaled_for_ga = False  # a batch mean: the Trainer must divide it by the accumulated batches

    def __init__(
        self,
        model: CLIPForZeroShotClassification | PeftModel,
        args: RobustClipConfig,
        objective: Objective | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        teacher: CLIPForZeroShotClassification | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]] = collate_images,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] = robust_accuracy,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        student: nn.Module = model
        core = classifier_in(model)
        if not isinstance(args, RobustClipConfig):
            raise TypeError(f"args is a {type(args).__name__}; give a RobustClipConfig.")
        if objective is None:
            if not hasattr(self, "objective_cls"):
                raise ValueError("objective is missing; give one, or use a subclass such as PMGAFTTrainer.")
            objective = self.objective_cls()
        self.objective = objective
        self.threat_model, self.attack = args.threat_model(), args.attack()
        if not core.class_names:
            if objective.needs_labels:
                raise ValueError("model has no classes; call model.set_classes(class_names) first.")
            core.set_classes(["image"])  # such objectives never look at the logits
        if objective.normalisation is not None:
            core.set_normalisation(*objective.normalisation)
        if student is not core:
            for name, value in (("peft_config", peft_config), ("trainable_layers", args.trainable_layers)):
                if value is not None:
                    raise ValueError(f"{name}={value!r} goes with a plain model; this one has its adapter already.")
        else:
            if peft_config is None and args.trainable_layers is None:
                peft_config = self.default_peft_config()
            select_trainable(core, args.trainable_layers)
        with torch.random.fork_rng([core.device] if core.device.type == "cuda" else []):
            torch.manual_seed(args.seed)  # what an adapter begins from follows the seed, not what ran before
            if isinstance(peft_config, ClipPromptConfig):
                check_prompts(core, peft_config)
                student = get_peft_model(core, copy.deepcopy(peft_config))
            self.teacher = self._make_teacher(student, teacher) if objective.needs_teacher else None
            if peft_config is not None and student is core:  # after the teacher, which shares the text tower
                student = self._add_adapter(core, peft_config)
        sgd = (torch.optim.SGD, {"lr": args.learning_rate, "momentum": args.momentum})
        self._terms: dict[str, list[Tensor]] = {}
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=sgd if args.optim == "sgd" and optimizers[0] is None else None,
        )
        if self.teacher is not None:
            self.teacher.to(self.args.device)

    @classmethod
    def default_peft_config(cls) -> PeftConfig | None:
        """The adapter that is trained where none is given; None trains the image encoder itself."""
        return None

    @staticmethod
    def _add_adapter(model: CLIPForZeroShotClassification, peft_config: PeftConfig) -> PeftModel:
        """The model with a new adapter in it that stays out of the text tower."""
        if getattr(peft_config, "exclude_modules", "") is None:
            peft_config = copy.deepcopy(peft_config)
            peft_config.exclude_modules = r".*text_(model|projection).*"
        student = get_peft_model(model, peft_config)
        if model.text_is_trainable():
            raise ValueError("peft_config reaches the text tower; restrict target_modules to the vision encoder.")
        return student

    @staticmethod
    def _make_teacher(
        model: nn.Module, teacher: CLIPForZeroShotClassification | None
    ) -> CLIPForZeroShotClassification:
        """A frozen copy of the model without adapters (its frozen text tower shared), or the given one, comparable."""
        if isinstance(model, PeftModel) and teacher is None:
            return copy.deepcopy(model).unload().eval().requires_grad_(False)
        model = classifier_in(model)
        if teacher is None:
            frozen = () if model.text_is_trainable() else (model.text_model, model.text_projection)
            shared = (*frozen, model.processor)
            teacher = copy.deepcopy(model, {id(part): part for part in shared})
        else:
            if not isinstance(teacher, CLIPForZeroShotClassification):
                raise TypeError(
                    f"teacher is a {type(teacher).__name__}; give a CLIPForZeroShotClassification, as for model."
                )
            for name in ("hidden_size", "num_hidden_layers", "patch_size", "image_size"):
                own, other = (getattr(m.config.vision_config, name) for m in (model, teacher))
                if own != other:
                    raise ValueError(
                        f"teacher has another architecture: its vision {name} is {other}, the model's is {own}; "
                        "give the checkpoint that the model starts from."
                    )
            if model.config.projection_dim != teacher.config.projection_dim:
                raise ValueError(
                    f"teacher has another architecture: projection_dim {teacher.config.projection_dim}, "
                    f"the model's is {model.config.projection_dim}; give the checkpoint that the model starts from."
                )
            teacher = copy.deepcopy(teacher)
            teacher.set_normalisation(model.image_mean.flatten().tolist(), model.image_std.flatten().tolist())
            teacher.set_classes(model.class_names, model.templates)
        return teacher.eval().requires_grad_(False)

    def make_batch(self, inputs: dict[str, Tensor], student: nn.Module) -> Batch:
        """What the objective sees of a batch, with `student` behind its images."""
        accumulated = getattr(self, "current_gradient_accumulation_steps", 1) if student.training else 1
        images, teacher = inputs["pixel_values"], self.teacher
        return Batch(
            images=images,
            labels=inputs.get("labels"),  # type: ignore[arg-type]  # checked: objectives that need them have them
            student=lambda pixels: student(pixel_values=pixels),
            teacher=None if teacher is None else lambda pixels: teacher(pixel_values=pixels),
            images_per_update=len(images) * accumulated * self.accelerator.num_processes,
        )

    def attackable(self, model: nn.Module) -> nn.Module:
        """The module that attacks differentiate: without distributed wrapper, unless its parameters are sharded."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return model
        return self.accelerator.unwrap_model(model)

    def perturb(
        self, model: nn.Module, inputs: dict[str, Tensor], loss_fn: Callable[[Tensor], Tensor] | None, num_steps: int
    ) -> Tensor:
        """Adversarial images for a batch; `loss_fn` None attacks the objective's own loss."""
        core = self.attackable(model)
        # eager autograd skips weight gradients nobody asked for; a compiled backward computes all it was traced for
        frozen = without_gradients(core) if self.args.torch_compile else nullcontext()
        sharded = core is model and self.accelerator.distributed_type == DistributedType.FSDP
        fixed = nullcontext() if sharded else self.classifier().fixed_class_embeds()
        with self.accelerator.autocast(), fixed, frozen, torch.enable_grad():
            if loss_fn is None:
                loss_fn = self.objective.attack_loss(self.make_batch(inputs, core))
            return pgd(
                loss_fn,
                inputs["pixel_values"],
                self.threat_model,
                num_steps=num_steps,
                step_size=self.attack.step_size,
                random_start=self.attack.random_start,
                seed=(self.args.seed << 32) + self.state.global_step,
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective's loss on freshly attacked images. Raises FloatingPointError if a term is not finite."""
        self._check_batch(inputs, self.objective.needs_labels)
        adv = inputs["pixel_values"]
        if self.objective.attacked:
            rows = self.objective.attacked_rows(len(adv))
            part = self.perturb(model, {k: v[rows] for k, v in inputs.items()}, None, self.attack.num_steps)
            adv = adv.index_copy(0, torch.arange(len(adv), device=adv.device)[rows], part)
        with self.accelerator.autocast():
            terms = self.objective(self.make_batch(inputs, model), adv)
        finite = torch.stack([term.detach() for term in terms.values()]).isfinite()
        if not finite.all():
            name = list(terms)[int((~finite).int().argmax())]
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss term {name!r} is {terms[name].item()}; "
                "lower the learning rate or eps, or train in float32. Nothing of this step was saved."
            )
        if model.training:
            for name, term in terms.items():
                self._terms.setdefault(name, []).append(term.detach())
        return torch.stack(list(terms.values())).sum()

    def classifier(self) -> CLIPForZeroShotClassification:
        """The model that is trained, without wrappers; adapters are inside."""
        return classifier_in(self.accelerator.unwrap_model(self.model))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; of whole pictures (`"pictures"`, a list) random crops, `"pixel_values"`."""
        inputs = super()._prepare_inputs(inputs)
        if "pictures" in inputs:
            if not self.model.training:
                raise ValueError("eval_dataset gives whole pictures (augment=True); evaluate them as they are.")
            seed = (self.args.seed << 32) + self.state.global_step
            side = self.classifier().input_size
            inputs = {**inputs, "pixel_values": self.args.augmentation()(inputs["pictures"], side, seed)}
            del inputs["pictures"]
        return inputs

    def _check_batch(self, inputs: dict[str, Tensor], needs_labels: bool) -> None:
        core, pixels = self.classifier(), inputs["pixel_values"]
        attacked = self.objective.attacked_rows(len(pixels)) if self.objective.attacked else slice(0)
        core.check_pixels(pixels, values=len(pixels[attacked]) < len(pixels))  # pgd checks what it attacks
        if needs_labels:
            if inputs.get("labels") is None:
                user = type(self.objective).__name__ if self.model.training else "evaluation"
                raise ValueError(f"{user} needs labels, but the dataset gives no 'labels'.")
            inputs["labels"] = checked_labels(inputs["labels"], len(pixels), len(core.class_names))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """Robust loss, logits of `classify` and labels: PGD with `eval_attack_steps` on cross-entropy."""
        inputs = self._prepare_inputs(inputs)
        self._check_batch(inputs, needs_labels=True)
        images, labels = inputs["pixel_values"], inputs["labels"]
        core = self.attackable(model)

        def attack_loss(adv_BCHW: Tensor) -> Tensor:
            return cross_entropy(core(pixel_values=adv_BCHW).logits, labels)

        adv = self.perturb(model, inputs, attack_loss, self.args.eval_attack_steps)
        logits = self.classify(core, images, adv)
        loss = cross_entropy(logits[1], labels).mean()
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def classify(self, core: nn.Module, images_BCHW: Tensor, adv_BCHW: Tensor) -> tuple[Tensor, ...]:
        """What `predict` gives of a batch: clean and adversarial logits."""
        with torch.no_grad(), self.accelerator.autocast():
            return tuple(core(pixel_values=pixels).logits.float() for pixels in (images_BCHW, adv_BCHW))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term since the last log, over all processes."""
        if "loss" in logs and self._terms:
            means = torch.stack([torch.stack(values).mean() for values in self._terms.values()])
            means = self.accelerator.reduce(means, reduction="mean")
            logs = {**logs, **dict(zip(self._terms, means.tolist(), strict=True))}
            self._terms = {}
        super().log(logs, start_time)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        """Train. `resume_from_checkpoint=True` goes on from the newest whole checkpoint (a kill may cut one short).

        Raises OSError if a named checkpoint is cut short or missing, ValueError if there is none to go on from.
        """
        if resume_from_checkpoint is True:
            newest = newest_whole_checkpoint(self.args.output_dir)
            if newest is None:
                raise ValueError(
                    f"no whole checkpoint in {self.args.output_dir!r} to resume from; start without resume."
                )
            resume_from_checkpoint = str(newest)
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        self._terms = {}
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # no pickled arguments beside the weights
            core = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            folder = output_dir or self.args.output_dir
            if isinstance(core, PeftModel):  # embedding layers are frozen: no need to look for them on the Hub
                with without_draft(folder):
                    core.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
            else:
                core.save_pretrained(folder, state_dict=state_dict)

    def adapter_base(self) -> str | None:
        """The name of the model that the trained adapter stands on; None where whole weights are trained."""
        core = self.accelerator.unwrap_model(self.model)
        return (core.active_peft_config.base_model_name_or_path or "") if isinstance(core, PeftModel) else None

    def unmeasured_card(self, repo_id: str) -> ModelCard:
        """The card of the model as it is now, of which nothing was measured."""
        base, core = self.adapter_base(), self.classifier()
        start = str(core.name_or_path) if base is None else base
        published = hub_name(start) or ""
        data = self.train_dataset
        dataset = str(getattr(data, "dataset_id", ""))
        info = CardInfo(
            repo_id=repo_id,
            base_model=published,
            ancestor=None if published else named_base(start),
            training_data=f"{shown_name(dataset)}, split {data.split}, {len(data)} images" if dataset else "",
            datasets=[dataset] if dataset and not is_path(dataset) else [],
            paper=self.objective.paper,
            settings=self.settings(),
            template=core.templates[0] if core.templates else PAPER_TEMPLATE,
            class_names=core.class_names,
            limits="",
        )
        return make_unmeasured_card(info, "model" if base is None else "adapter", loads_defence=self._saves_defence())

    def _saves_defence(self) -> bool:
        """Whether `_save` writes a test-time defence beside the adapter."""
        return False

    def settings(self) -> dict[str, Any]:
        """Method, objective, attack and optimisation, as plain values, for cards and reports."""
        args = self.args
        core = self.accelerator.unwrap_model(self.model)
        return {
            "method": self.objective.paper.method,
            "objective": asdict(self.objective),
            "threat_model": str(self.threat_model),
            "attack": asdict(self.attack) if self.objective.attacked else None,
            **self._adapter_settings(core),
            "trainable_parameters": sum(p.numel() for p in core.parameters() if p.requires_grad),
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            **({"momentum": args.momentum} if args.optim == "sgd" else {}),
            "warmup_steps": int(args.warmup_steps) if args.warmup_steps >= 1 else args.warmup_steps,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "images_per_update": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "updates": self.state.global_step,
            "precision": {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
            "seed": args.seed,
        }

    @staticmethod
    def _adapter_settings(core: nn.Module) -> dict[str, Any]:
        """Of prompts, or another adapter, what was chosen, as one entry."""
        config = core.active_peft_config if isinstance(core, PeftModel) else None
        if config is None or isinstance(config, ClipPromptConfig):
            return {} if config is None else {"prompts": config.summary()}
        rank = f" of rank {config.r}, alpha {config.lora_alpha}" if isinstance(config, LoraConfig) else ""
        return {"adapter": f"{config.peft_type.value}{rank}"}


class CleanTrainer(RobustClipTrainer):
    """Fine-tuning without an attack, the control. See `objectives.clean.Clean`."""

    objective_cls = Clean


class TeCoATrainer(RobustClipTrainer):
    """TeCoA (ICLR 2023). See `objectives.tecoa.TeCoA`."""

    objective_cls = TeCoA


class FARETrainer(RobustClipTrainer):
    """FARE (ICML 2024). See `objectives.fare.FARE`."""

    objective_cls = FARE


class TRADESTrainer(RobustClipTrainer):
    """TRADES (ICML 2019). See `objectives.trades.TRADES`."""

    objective_cls = TRADES


class PMGAFTTrainer(RobustClipTrainer):
    """PMG-AFT (CVPR 2024). See `objectives.pmg_aft.PMGAFT`."""

    objective_cls = PMGAFT


class APTTrainer(RobustClipTrainer):
    """Adversarial training of prompts, by default of design VLI (TAPT, CVPR 2025). See `objectives.apt.APT`."""

    objective_cls = APT

    @classmethod
    def default_peft_config(cls) -> ClipPromptConfig:
        """Two prompts in nine layers of each tower."""
        return ClipPromptConfig(design="VLI")


class TAPTTrainer(APTTrainer):
    """TAPT (CVPR 2025): prompts that are tuned on every test image. See `adaptation.tapt.TAPT`.

        trainer = TAPTTrainer(model, args, train_dataset=train, eval_dataset=test)
        trainer.train()                # adversarial prompts, as APTTrainer
        trainer.collect_statistics()   # of the training images, under these prompts and under clean-trained ones
        trainer.evaluate()             # tunes on every test image, clean and attacked
        trainer.save_model("out")      # TAPT.from_pretrained("out") restores prompts, statistics and settings

    `predict` gives four logits: defended on clean images, defended under the blind attack, and the same two without
    the defence (static). The attack is PGD with `eval_attack_steps` on the static prompts, which knows nothing of the
    defence: it overrates it (see `evaluate_robustness` for attacks that do). While `train()` runs, evaluations are
    static.

    Args:
        adaptation: settings of the defence; its `targets` may be None until they are collected.
        All others are those of `RobustClipTrainer`.
    """

    def __init__(
        self,
        model: CLIPForZeroShotClassification | PeftModel,
        args: RobustClipConfig,
        objective: Objective | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        adaptation: TAPT | None = None,
        data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]] = collate_images,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] = defended_accuracy,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        self.adaptation = TAPT() if adaptation is None else adaptation
        if not isinstance(self.adaptation, TAPT):
            raise TypeError(f"adaptation is a {type(adaptation).__name__}; give a TAPT.")
        super().__init__(
            model,
            args,
            objective,
            train_dataset,
            eval_dataset,
            peft_config=peft_config,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def collect_statistics(
        self,
        dataset: Dataset | None = None,
        clean_model: CLIPForZeroShotClassification | PeftModel | None = None,
        state_dir: str | Path | None = None,
    ) -> AlignmentTargets:
        """Statistics of clean training images, with which views are aligned; kept in `adaptation.targets`.

        Args:
            dataset: default the training images, whole pictures prepared as for an evaluation.
            clean_model: the same model with clean-trained prompts. None trains them here, on the same data with the
                same settings but without an attack; where `adaptation.gamma` is 1 none are needed.
            state_dir: a folder for what is done already; see `statistics.collect_statistics`.

        Returns the statistics. Raises ValueError without any images.
        """
        if dataset is None:
            dataset = self.train_dataset
        if dataset is None:
            raise ValueError("dataset is missing; give collect_statistics a dataset, or the trainer a train_dataset.")
        if getattr(dataset, "augment", False):
            dataset = replace(dataset, augment=False)  # type: ignore[type-var]
        classifiers = {"adversarial": self.classifier()}
        if clean_model is not None:
            classifiers["clean"] = classifier_in(clean_model).to(self.args.device)
        elif self.adaptation.gamma < 1:
            classifiers["clean"] = self._train_clean()
        found = {
            kind: collect_statistics(
                classifier,
                dataset,
                batch_size=self.args.eval_batch_size,
                processes=self.accelerator,
                state_dir=None if state_dir is None else Path(state_dir) / kind,
                num_workers=self.args.dataloader_num_workers,
                progress=not self.args.disable_tqdm,
            )
            for kind, classifier in classifiers.items()
        }
        targets = AlignmentTargets(found["adversarial"], found.get("clean"))
        self.adaptation = replace(self.adaptation, targets=targets)
        return targets

    def _train_clean(self) -> CLIPForZeroShotClassification:
        """Prompts of the same kind in the same frozen model, trained by the same settings without an attack."""
        core = self.accelerator.unwrap_model(self.model)
        if self.train_dataset is None or not isinstance(core, PeftModel):
            raise ValueError("clean_model is missing, and there is no train_dataset to train clean prompts on.")
        shared = [p for p in core.parameters() if not p.requires_grad]
        shared_by_id: dict[int, Any] = {id(part): part for part in (*shared, self.classifier().processor)}
        base = copy.deepcopy(core.base_model, shared_by_id).unload()
        peft_config = copy.deepcopy(core.active_peft_config)
        peft_config.inference_mode, peft_config.base_model_name_or_path = False, None
        objective = self.objective if isinstance(self.objective, APT) else APT()
        trainer = APTTrainer(
            base,
            without_checkpoints(self.args),
            replace(objective, batch_mix="clean"),
            self.train_dataset,
            peft_config=peft_config,
            data_collator=self.data_collator,
        )
        trainer.train()
        return trainer.classifier()

    def defended(self) -> DefendedClassifier:
        """The trained classifier behind the defence. Raises ValueError before the statistics are collected."""
        if self.adaptation.targets is None and self.adaptation.align_weight > 0:
            raise ValueError(
                "the statistics are missing: call collect_statistics() after train(), or give "
                "adaptation=TAPT(targets=...)."
            )
        return DefendedClassifier(self.classifier(), self.adaptation, seed=self.args.seed)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        """The Trainer's own loop. Raises ValueError before the statistics are collected."""
        if not self.is_in_train:
            self.defended()
        self._running = torch.zeros(3)
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """Loss under the blind attack, logits of `classify`, labels; shows the accuracy so far of this process."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is not None and not self.is_in_train:
            clean, blind = (part.argmax(-1).eq(labels) for part in logits[:2])  # type: ignore[arg-type]
            self._running += torch.tensor([len(clean), clean.sum(), (clean & blind).sum()])
            count, *right = self._running.tolist()
            for callback in self.callback_handler.callbacks:
                if getattr(callback, "prediction_bar", None) is not None:
                    so_far = {name: f"{n / count:.1%}" for name, n in zip(("clean", "blind"), right, strict=True)}
                    callback.prediction_bar.set_postfix(so_far)
        return loss, logits, labels

    def classify(self, core: nn.Module, images_BCHW: Tensor, adv_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits: defended clean, defended under the blind attack, static clean, static under attack."""
        static = super().classify(core, images_BCHW, adv_BCHW)
        if self.is_in_train:
            return static
        defended = self.defended()
        with self.accelerator.autocast():
            return *(defended.predict(pixels).float() for pixels in (images_BCHW, adv_BCHW)), *static

    def _saves_defence(self) -> bool:
        return self.adaptation.targets is not None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self._saves_defence():
            self.defended().save_pretrained(output_dir or self.args.output_dir)

    def settings(self) -> dict[str, Any]:
        """Those of the training, and of the defence, each as `adaptation.<name>`."""
        own = {f"adaptation.{name}": value for name, value in self.adaptation.parameters().items()}
        if self.adaptation.targets is not None:
            record = self.adaptation.targets.adversarial.record
            source = f"{shown_name(record['dataset'])}, {record['split']}"
            own["adaptation.statistics"] = f"{record['num_images']} images of {source}"
        return {**super().settings(), **own}


class FAPTrainer(RobustClipTrainer):
    """FAP (NeurIPS 2024), by default with prompts from image to text. See `objectives.fap.FAP`."""

    objective_cls = FAP

    @classmethod
    def default_peft_config(cls) -> ClipPromptConfig:
        """Two prompts in nine layers of each tower, those of text made from those of vision."""
        return ClipPromptConfig(design="VLJ", coupling="vision_to_text")


class CoOpTrainer(RobustClipTrainer):
    """CoOp (IJCV 2022), the control that trains text prompts on clean images. See `objectives.coop.CoOp`."""

    objective_cls = CoOp

    @classmethod
    def default_peft_config(cls) -> ClipPromptConfig:
        """Four context tokens that all classes share, at the input alone."""
        return ClipPromptConfig(design="T", num_text_tokens=4, text_depth=1)


def without_checkpoints(args: RobustClipConfig) -> RobustClipConfig:
    """The same settings for a run that saves, evaluates and pushes nothing."""
    quiet = copy.copy(args)
    quiet.set_save("no")
    quiet.set_evaluate("no")
    quiet.load_best_model_at_end = quiet.push_to_hub = False
    return quiet


def classifier_in(model: nn.Module) -> CLIPForZeroShotClassification:
    """The classifier itself, or that inside a `PeftModel`. Raises TypeError for any other model."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(core, CLIPForZeroShotClassification):
        raise TypeError(
            f"model is a {type(core).__name__}; give a CLIPForZeroShotClassification "
            "(from_pretrained(path), or from_clip(model, processor) for a CLIPModel in memory)."
        )
    return core


def select_trainable(model: CLIPForZeroShotClassification, last_layers: int | None = None) -> None:
    """Freeze everything but the vision encoder with its projection, or but its last layers, final norm and projection.

    Raises ValueError if `last_layers` is not in 1 .. the encoder's number of layers.
    """
    layers = model.vision_model.encoder.layers
    if last_layers is not None and not 1 <= last_layers <= len(layers):
        raise ValueError(f"trainable_layers={last_layers!r} must be None or in 1 .. {len(layers)}.")
    model.requires_grad_(False)
    trained: list[nn.Module] = [model.vision_model, model.visual_projection]
    if last_layers is not None:
        trained = [*layers[-last_layers:], model.vision_model.post_layernorm, model.visual_projection]
    for module in trained:
        module.requires_grad_(True)


def check_checkpoint(folder: str | Path) -> None:
    """Raise OSError unless a Trainer checkpoint is whole: state readable, safetensors files of their full length."""
    folder = Path(folder)
    try:
        json.loads((folder / "trainer_state.json").read_text())  # the Trainer writes it last
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise FileNotFoundError("no *.safetensors")
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(
            f"checkpoint {str(folder)!r} is missing or cut short ({error}); resume from an earlier one."
        ) from error


def newest_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The `checkpoint-<step>` folder of the highest step that is whole, or None."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name)]
    for folder in sorted(folders, key=lambda f: int(f.name.split("-")[1]), reverse=True):
        try:
            check_checkpoint(folder)
        except OSError:
            continue
        return folder
    return None
