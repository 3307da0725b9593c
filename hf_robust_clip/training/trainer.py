"""Adversarial fine-tuning of CLIP: one `Trainer` for every objective."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainingArguments, enable_full_determinism, set_seed
from transformers.trainer_utils import HPSearchBackend, SaveStrategy, TrainOutput

from ..attacks.losses import cross_entropy
from ..attacks.pgd import PGDSettings, pgd
from ..checkpoint_notes import named_base
from ..checks import Blindness, check_logits, checked_labels
from ..defences.alignment import AlignmentTargets
from ..defences.defended import DefendedClassifier
from ..defences.fit import collect_statistics
from ..defences.tapt import TAPT
from ..modeling import PAPER_TEMPLATE, CLIPForZeroShotClassification, without_gradients
from ..modeling.untrusted import ADAPTER
from ..names import hub_name, is_path, shown_name
from ..normalisation import carry_normalisation, has_adapter
from ..objectives.apt import APT
from ..objectives.base import Batch, Objective
from ..objectives.clean import Clean
from ..objectives.coop import CoOp
from ..objectives.fap import FAP
from ..objectives.fare import FARE
from ..objectives.pmg_aft import PMGAFT
from ..objectives.tecoa import TeCoA
from ..objectives.trades import TRADES
from ..processes import together
from ..prompts import ClipPromptConfig, check_prompts
from ..report.card import CardInfo, make_unmeasured_card
from ..storage import check_writable, written_whole
from ..threat_model import ThreatModel
from ..zero_shot_data.loading import collate_images
from .batches import OWN_IMAGES, count_images, own_images_of_last_batch, share_of_update, without_fill
from .checkpoints import (
    NothingToResume,
    best_beside,
    check_files,
    check_fit,
    check_seen,
    checkpoint_to_resume,
    drop_old_checkpoints,
    first_not_finite,
    note_checkpoint,
    step_of,
)
from .config import (
    RobustClipConfig,
    check_arguments,
    check_augmentation,
    check_start_of_attack,
    check_trained_part,
    gives_whole_pictures,
    images_per_update,
    optimizer_and_arguments,
)
from .identity import (
    check_same_everywhere,
    check_same_run,
    data_identity,
    model_identity,
    plain,
    training_identity,
)
from .pushing import PushingTrainer

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)


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
    The gradient of an update is that of the mean over all its images (over processes and accumulated batches, a short
    last batch included; images that fill up the last batches of several processes count for nothing), and the crop and
    the random start of an image depend on the seed, the step and the image alone. So the result depends neither on how
    an update is divided nor on an interruption, up to rounding, save for three things: an objective that
    `couples_images` looks at forward batches (APT's adv_half attacks half of each), dropout in an adapter is drawn
    anew in each process, and an iterable dataset may give the last images of several processes twice. While an attack
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
        model_init: makes the model, in place of `model`: for `hyperparameter_search`, where each trial begins with a
            new one.

    The text tower's weights and logit_scale stay frozen. Checkpoints hold the student alone: of an adapter, the
    adapter. Each says of which training it is (`run_identity`), and another training doesn't go on from it.
    Raises TypeError/ValueError for a model of another class, a teacher of another architecture, and bad settings.
    """

    objective_cls: ClassVar[type[Objective]]
    loss_is_scaled_for_ga = True  # by images, in compute_loss

    def __init__(
        self,
        model: CLIPForZeroShotClassification | PeftModel | None,
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
        model_init: Callable[..., CLIPForZeroShotClassification | PeftModel] | None = None,
    ):
        if not isinstance(args, RobustClipConfig):
            raise TypeError(f"args is a {type(args).__name__}; give a RobustClipConfig.")
        if (model is None) == (model_init is None):
            raise ValueError("model and model_init: give one of them.")
        if objective is None:
            if not hasattr(self, "objective_cls"):
                raise ValueError("objective is missing; give one, or use a subclass such as PMGAFTTrainer.")
            objective = self.objective_cls()
        check_start_of_attack(args, objective)
        if gives_whole_pictures(train_dataset) is not None:
            check_augmentation(args, bool(gives_whole_pictures(train_dataset)))
        self.training_objective = objective
        self.teacher: CLIPForZeroShotClassification | None = None
        self._given_teacher, self._adapter, self._given_optimizers = teacher, peft_config, optimizers
        self._teacher_is_given, self._adapter_is_new = teacher is not None, False
        self._beginning: dict[str, Any] | None = None  # what the training starts from
        self._run: dict[str, Any] = {}
        self._resumed_from: Path | None = None
        self._checkpoints_seen = False  # whether it is known which processes see them
        self._data: dict[str, Any] | None = None  # which images it has, found out when first asked for
        self._args_before_trials: dict[str, Any] | None = None
        self._terms: dict[str, Tensor] = {}
        self._updates = 0
        self._blindness = Blindness()
        settled = ("bf16", "fp16", *(("trainable_layers",) if model_init is None else ()))
        self._settled = {name: getattr(args, name) for name in settled}
        super().__init__(
            model=None if model is None else self._prepared(model, args),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # the Trainer need not count labels
        if model_init is None:
            self._given_teacher = None  # `teacher` is a copy

    @property
    def threat_model(self) -> ThreatModel:
        """That of training and evaluation, as `args` say now."""
        return self.args.threat_model()

    @property
    def attack(self) -> PGDSettings:
        """The attack of training, as `args` say now."""
        return self.args.attack()

    def _prepared(self, model: nn.Module, args: RobustClipConfig) -> nn.Module:
        """The model as it is trained: with classes, the objective's normalisation, frozen parts, adapter; its teacher
        is kept in `teacher`.
        """
        student, core, objective, peft_config = model, classifier_in(model), self.training_objective, self._adapter
        if not core.class_names:
            if objective.needs_labels:
                raise ValueError("model has no classes; call model.set_classes(class_names) first.")
            core.set_classes(["image"])  # such objectives never look at the logits
        if objective.normalisation is not None:
            core.set_normalisation(*objective.normalisation)
        check_adapters(student, core)
        if student is not core:
            for name, value in (("peft_config", peft_config), ("trainable_layers", args.trainable_layers)):
                if value is not None:
                    raise ValueError(f"{name}={value!r} goes with a plain model; this one has its adapter already.")
        else:
            check_trained_part(args, adapter=peft_config is not None)
            if peft_config is None and args.trainable_layers is None:
                peft_config = self.default_peft_config()
            select_trainable(core, args.trainable_layers)
        self._beginning, self._adapter_is_new = None, peft_config is not None
        with torch.random.fork_rng([core.device] if core.device.type == "cuda" else []):
            torch.manual_seed(args.seed)  # what an adapter begins from follows the seed, not what ran before
            if isinstance(peft_config, ClipPromptConfig):
                check_prompts(core, peft_config)
                student = get_peft_model(core, copy.deepcopy(peft_config))
            self.teacher = self._make_teacher(student, self._given_teacher) if objective.needs_teacher else None
            if peft_config is not None and student is core:  # after the teacher, which shares the text tower
                student = self._add_adapter(core, peft_config)
        if self.teacher is not None:
            self.teacher.to(args.device)
        return student

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model from `model_init`, prepared as a given one is."""
        return self._prepared(super().call_model_init(trial), self.args)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Optimizer class and arguments, as `args` say now; SGD has `args.momentum`."""
        return optimizer_and_arguments(args, model)

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

    def make_batch(self, inputs: dict[str, Tensor], student: nn.Module, images_per_update: int = 0) -> Batch:
        """What the objective sees of a batch, with `student` behind its images."""
        images, teacher = inputs["pixel_values"], self.teacher
        return Batch(
            images=images,
            labels=inputs.get("labels"),  # type: ignore[arg-type]  # checked: objectives that need them have them
            student=lambda pixels: student(pixel_values=pixels),
            teacher=None if teacher is None else lambda pixels: teacher(pixel_values=pixels),
            images_per_update=images_per_update,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int | None]:
        """The batches of an update, and the number of its images over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._updates += 1
        processes, data = self.accelerator.num_processes, self.train_dataset
        if processes == 1:
            return batches, sum(count_images(batch) for batch in batches)
        filled = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        if filled and isinstance(data, Sized):
            own = own_images_of_last_batch(len(data), self._train_batch_size, processes, self.args.process_index)
            if own < count_images(batches[-1]):
                batches[-1] = without_fill(batches[-1], own)
        images = torch.tensor(sum(count_images(batch) for batch in batches), device=device)
        return batches, int(self.accelerator.reduce(images, reduction="sum"))

    def attackable(self, model: nn.Module) -> nn.Module:
        """The module that attacks differentiate: without distributed wrapper, unless its parameters are sharded."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return model
        return self.accelerator.unwrap_model(model)

    def perturb(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        loss_fn: Callable[[Tensor], Tensor] | None,
        num_steps: int,
        seed: int,
        on_gradient: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Adversarial images for a batch; `loss_fn` None attacks the objective's own loss."""
        core = self.attackable(model)
        # eager autograd skips weight gradients nobody asked for; a compiled backward computes all it was traced for
        frozen = without_gradients(core) if self.args.torch_compile else nullcontext()
        sharded = core is model and self.accelerator.distributed_type == DistributedType.FSDP
        fixed = nullcontext() if sharded else self.classifier().fixed_class_embeds()
        with self.accelerator.autocast(), fixed, frozen, torch.enable_grad():
            if loss_fn is None:
                loss_fn = self.training_objective.attack_loss(self.make_batch(inputs, core))
            return pgd(
                loss_fn,
                inputs["pixel_values"],
                self.threat_model,
                num_steps=num_steps,
                step_size=self.attack.step_size,
                random_start=self.attack.random_start,
                seed=seed,
                on_gradient=on_gradient,
            )

    def seed_of_step(self) -> int:
        """From which the crops and random starts of the next update are drawn."""
        return (self.args.seed << 32) + self.state.global_step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective's loss on freshly attacked images, weighed so that gradients add up to those of the mean over
        all images of the update. Raises FloatingPointError if a term is not finite.

        Args:
            num_items_in_batch: images of the update over all processes; None takes this batch, on each process.
        """
        objective, processes = self.training_objective, self.accelerator.num_processes
        images = count_images(inputs)
        inputs = {name: values for name, values in inputs.items() if name != OWN_IMAGES}
        self._check_batch(inputs, objective.needs_labels)
        in_update = int(num_items_in_batch) if num_items_in_batch else images * processes
        adv = inputs["pixel_values"]
        if objective.attacked:
            rows = objective.attacked_rows(len(adv))
            some = {name: values[rows] for name, values in inputs.items()}
            part = self.perturb(model, some, None, self.attack.num_steps, self.seed_of_step())
            adv = adv.index_copy(0, torch.arange(len(adv), device=adv.device)[rows], part)
        core = self.classifier()
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        fixed = nullcontext() if sharded or core.text_is_trainable() else core.fixed_class_embeds()
        with self.accelerator.autocast(), fixed:
            terms = objective(self.make_batch(inputs, model, in_update), adv)
        finite = torch.stack([term.detach() for term in terms.values()]).isfinite()
        if not finite.all():
            name = list(terms)[int((~finite).int().argmax())]
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss term {name!r} is {terms[name].item()}; "
                "lower the learning rate or eps, or train in float32. Nothing of this step was saved."
            )
        share = share_of_update(images, in_update, processes)
        if model.training:
            for name, term in terms.items():
                self._terms[name] = self._terms.get(name, 0) + share * term.detach()
        return share * torch.stack(list(terms.values())).sum()

    def classifier(self) -> CLIPForZeroShotClassification:
        """The model that is trained, without wrappers; adapters are inside."""
        return classifier_in(self.accelerator.unwrap_model(self.model))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; of whole pictures (`"pictures"`, a list) random crops, `"pixel_values"`."""
        inputs = super()._prepare_inputs(inputs)
        if "pictures" in inputs:
            if not self.model.training:
                raise ValueError("eval_dataset gives whole pictures (augment=True); evaluate them as they are.")
            crops = self.args.augmentation()(inputs["pictures"], self.classifier().input_size, self.seed_of_step())
            inputs = {**{name: v for name, v in inputs.items() if name != "pictures"}, "pixel_values": crops}
        elif self.model.training:
            check_augmentation(self.args, whole_pictures=False)
        return inputs

    def _check_batch(self, inputs: dict[str, Tensor], needs_labels: bool) -> None:
        core, pixels = self.classifier(), inputs["pixel_values"]
        objective = self.training_objective
        attacked = objective.attacked_rows(len(pixels)) if objective.attacked else slice(0)
        core.check_pixels(pixels, values=len(pixels[attacked]) < len(pixels))  # pgd checks what it attacks
        if needs_labels:
            if inputs.get("labels") is None:
                user = type(objective).__name__ if self.model.training else "evaluation"
                raise ValueError(f"{user} needs labels, but the dataset gives no 'labels'.")
            inputs["labels"] = checked_labels(inputs["labels"], len(pixels), len(core.class_names))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """Robust loss, logits of `classify` and labels: PGD with `eval_attack_steps` on cross-entropy.

        The random starts follow `args.seed` alone: one model has one accuracy, whenever it is asked for.
        Raises FloatingPointError for logits that are not finite.
        """
        inputs = self._prepare_inputs(inputs)
        self._check_batch(inputs, needs_labels=True)
        images, labels = inputs["pixel_values"], inputs["labels"]
        core = self.attackable(model)

        def attack_loss(adv_BCHW: Tensor) -> Tensor:
            return cross_entropy(core(pixel_values=adv_BCHW).logits, labels)

        steps, seed = self.args.eval_attack_steps, self.args.seed << 32
        adv = self.perturb(model, inputs, attack_loss, steps, seed, self._blindness)
        logits = self.classify(core, images, adv)
        for part in logits:
            check_logits(part, "the model")
        loss = cross_entropy(logits[1], labels).mean()
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def classify(self, core: nn.Module, images_BCHW: Tensor, adv_BCHW: Tensor) -> tuple[Tensor, ...]:
        """What `predict` gives of a batch: clean and adversarial logits."""
        with torch.no_grad(), self.accelerator.autocast():
            return tuple(core(pixel_values=pixels).logits.float() for pixels in (images_BCHW, adv_BCHW))

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Batches of all images: `dataloader_drop_last` is for training."""
        with self._last_batches_too():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._last_batches_too():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _last_batches_too(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        """The Trainer's own loop; the loss is the mean over all images, each once, on any number of processes.

        Images of a resolution of their own are enlarged inside the model. Raises ValueError for a dataset whose
        classes are not the model's, in their order.
        """
        self._blindness = Blindness()
        with self.classifier().prepared_for(dataloader.dataset, training=None):
            found = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._blindness.warn(f"the attack of {description.lower()}")
        if found.predictions is not None and found.label_ids is not None:
            adv_logits, labels = torch.as_tensor(found.predictions[1]), torch.as_tensor(found.label_ids)
            found.metrics[f"{metric_key_prefix}_loss"] = cross_entropy(adv_logits, labels).mean().item()
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term over all images since the last log, each update weighing the same."""
        if "loss" in logs and self._terms:
            means = torch.stack(list(self._terms.values())) / self._updates
            means = self.accelerator.reduce(means, reduction="mean")
            logs = {**logs, **dict(zip(self._terms, means.tolist(), strict=True))}
            self._terms, self._updates = {}, 0
        super().log(without_loss(logs) if self.is_in_train and self._nothing_was_left() else logs, start_time)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        """Train. `resume_from_checkpoint=True` goes on from the newest checkpoint that is whole in every process (a
        kill may cut one short); None takes `args.resume_from_checkpoint`. From the last one nothing is trained.

        Raises OSError if a named checkpoint is cut short or missing, ValueError if there is none to go on from or if
        it is of another training; FloatingPointError for trained weights that are not finite.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self._resumed_from = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, self.accelerator)
        self._terms, self._updates = {}, 0
        try:
            if trial is not None:
                self._begin_trial(trial)
            (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
            resumed_from = None if self._resumed_from is None else str(self._resumed_from)
            result = super().train(resumed_from, trial, ignore_keys_for_eval)
        finally:
            self.is_in_train = False
        self._check_trained()
        if self._nothing_was_left():
            return TrainOutput(result.global_step, math.nan, without_loss(result.metrics))
        return result

    def _nothing_was_left(self) -> bool:
        """Whether `train` went on from the last step, so that there is no loss of its own."""
        return self.state.global_step == self._initial_global_step > 0

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ):
        """As in `transformers.Trainer`, with `model_init`. Any setting of `RobustClipConfig` may be searched, `eps`
        and seeds included; each trial starts from the settings as they were given, and so does what comes after.
        """
        self._args_before_trials = dict(vars(self.args))
        try:
            return super().hyperparameter_search(
                hp_space, compute_objective, n_trials, direction, backend, hp_name, **kwargs
            )
        finally:
            self.args.__dict__.update(self._args_before_trials)
            self._args_before_trials = None

    def _begin_trial(self, trial: Any) -> None:
        """Set `args` as a trial says, before its model is made."""
        self.args.__dict__.update(self._args_before_trials or {})
        if self.hp_search_backend == HPSearchBackend.OPTUNA:
            for name in self.hp_space(trial):
                if not hasattr(self.args, name):
                    raise ValueError(f"hp_space gives {name!r}, which is no setting of RobustClipConfig.")
        super()._hp_search_setup(trial)

    def _hp_search_setup(self, trial: Any) -> None:
        """Called by `train` when settings and model are there and no checkpoint is loaded yet."""
        super()._hp_search_setup(trial)
        check_arguments(self.args)
        for name, value in self._settled.items():
            if getattr(self.args, name) != value:
                raise ValueError(
                    f"{name}={getattr(self.args, name)!r} was set after the trainer was made with {value!r}, when it "
                    "no longer acts; make another trainer."
                )
        if self.args.should_save:
            kept = self.model.parameters()
            saved = (p for p in kept if p.requires_grad) if isinstance(self.model, PeftModel) else kept
            check_writable(self.args.output_dir, room=sum(p.nbytes for p in saved))
        self._train_batch_size = self.args.train_batch_size
        self.accelerator.dataloader_config.data_seed = self.args.data_seed
        if self.training_objective.couples_images and images_per_update(self.args) > self.args.train_batch_size:
            logger.info(
                "%s looks at forward batches, of %d images here: divided otherwise, the training is another one",
                type(self.training_objective).__name__, self.args.train_batch_size,
            )  # fmt: skip
        if self._beginning is None or self._resumed_from is None:
            student = self.accelerator.unwrap_model(self.model)
            teacher = self.teacher if self._teacher_is_given else None
            self._beginning = model_identity(student, classifier_in(student), teacher, self._adapter_is_new)
        self._adapter_is_new = False
        how = training_identity(self.args, self.training_objective, self.data_collator, self._given_optimizers)
        self._run, self._data = {**how, **self._beginning}, None
        check_same_everywhere(self._run, self.accelerator)
        if self._resumed_from is not None:
            self._check_same_run(self._resumed_from)

    def _whole_run(self) -> dict[str, Any]:
        """Which training this is, with its data."""
        if self._data is None:
            self._data = data_identity(self.train_dataset, self.eval_dataset, self.args)
        return {**self._run, **self._data}

    def _check_same_run(self, folder: Path) -> None:
        """Raise on every process unless a checkpoint is of this training, with its data, as the main one sees it, and
        its weights fit the model.
        """
        main = self.accelerator.is_main_process
        together(lambda: check_same_run(folder, self._whole_run()) if main else None, self.accelerator)
        if not self.is_fsdp_enabled:  # which loads all or nothing
            core = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            together(lambda: check_fit(folder, core), self.accelerator)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:  # the Trainer's own signature
        """Its loop, with the model prepared for the training images."""
        core, labels = self.classifier(), self.training_objective.needs_labels
        with ExitStack() as prepared:
            if self.teacher is not None:
                check_teacher(self.teacher, core)
                prepared.enter_context(self.teacher.prepared_for(self.train_dataset, labels=labels))
            prepared.enter_context(core.prepared_for(self.train_dataset, training=None, labels=labels))
            return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:  # the Trainer's own signature
        """Its epoch, unless all steps are done."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
            return
        self._load_rng_state(None if self._resumed_from is None else str(self._resumed_from))
        self.control.should_training_stop = True

    def _check_trained(self) -> None:
        """Raise unless something was trained, and its weights are finite."""
        if self.state.global_step == 0:
            raise ValueError(
                "train_dataset gave no update: it has no images, or too few for a whole batch (dataloader_drop_last)."
            )
        if self.updates() == 0:
            raise FloatingPointError("no update was made: every gradient overflowed; train in bf16 or float32.")
        self._check_weights()

    def _check_weights(self) -> None:
        name = first_not_finite(self.accelerator.unwrap_model(self.model))
        if self.is_fsdp_enabled:  # each process knows its own part
            damaged = torch.tensor(int(name is not None), device=self.args.device)
            name = name or ("of another process" if int(self.accelerator.reduce(damaged, reduction="sum")) else None)
        if name is not None:
            raise FloatingPointError(
                f"step {self.state.global_step}: the trained parameter {name!r} is not finite; lower the learning "
                "rate or eps, or train in float32. Nothing was saved."
            )

    def updates(self) -> int:
        """Updates that changed weights: those whose gradient overflowed in fp16 were left out."""
        if self._created_lr_scheduler and isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
            return int(self.lr_scheduler.last_epoch)  # it steps with the optimizer alone, and checkpoints hold it
        return self.state.global_step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter. Raises FloatingPointError, before anything is written, if they are not finite."""
        self._check_weights()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Its own; older ones are deleted when every process has written its part and the whole is noted."""
        checkpoint = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            note_checkpoint(checkpoint, plain(self._whole_run()), self.accelerator.num_processes)
            drop_old_checkpoints(checkpoint, limit, self.state.best_model_checkpoint)
        if not self._checkpoints_seen:
            check_seen(checkpoint, needed=self.args.load_best_model_at_end, processes=self.accelerator)
            self._checkpoints_seen = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.load_best_model_at_end:
            best = together(lambda: best_beside(checkpoint), self.accelerator)
            if best is not None:
                self._check_same_run(best)
                self.state.best_model_checkpoint = str(best)

    def _load_best_model(self) -> None:
        """Its own. Raises OSError on every process where one of them hasn't the whole best checkpoint."""
        together(lambda: check_files(self.state.best_model_checkpoint), self.accelerator)
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # no pickled arguments beside the weights
            core = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            folder = output_dir or self.args.output_dir
            if isinstance(core, PeftModel):  # embedding layers are frozen: no need to look for them on the Hub
                save_adapter(core, folder, state_dict)
            else:
                if self.args.save_on_each_node:  # transformers would write weights on the first machine alone
                    core.should_save_on_this_rank = bool
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
            paper=self.training_objective.paper,
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
        args, objective = self.args, self.training_objective
        core = self.accelerator.unwrap_model(self.model)
        skipped = self.state.global_step - self.updates()
        best = self.state.best_model_checkpoint if args.load_best_model_at_end and not self.is_in_train else None
        return {
            "method": objective.paper.method,
            "objective": asdict(objective),
            "threat_model": str(self.threat_model),
            "attack": asdict(self.attack) if objective.attacked else None,
            **self._adapter_settings(core),
            "trainable_parameters": sum(p.numel() for p in core.parameters() if p.requires_grad),
            **optimisation_settings(args, *self._given_optimizers),
            "images_per_update": images_per_update(args),
            **(
                {"couples_images": f"within forward batches of {args.train_batch_size}"}
                if objective.couples_images
                else {}
            ),
            "updates": self.updates(),
            **({"skipped_updates": skipped} if skipped else {}),
            **({"weights_of_update": step_of(best)} if best else {}),
            "precision": precision_of(core, self.accelerator.mixed_precision),
            "seed": args.seed,
        }

    @staticmethod
    def _adapter_settings(core: nn.Module) -> dict[str, Any]:
        """Of prompts, or another adapter, what was chosen, as one entry."""
        config = core.active_peft_config if isinstance(core, PeftModel) else None
        if config is None or isinstance(config, ClipPromptConfig):
            if config is None:
                return {}
            return {"prompts": config.summary(), "text_tokens": config.num_text_tokens if config.has_text else 0}
        rank = f" of rank {config.r}, alpha {config.lora_alpha}" if isinstance(config, LoraConfig) else ""
        return {"adapter": f"{config.peft_type.value}{rank}"}


def save_adapter(model: PeftModel, folder: str | Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write an adapter, and beside it the image processor, whose normalisation it was trained with."""
    classifier = classifier_in(model)
    with written_whole(folder) as draft:
        classifier.require_processor().image_processor.save_pretrained(draft)
        # embedding layers are frozen: no need to look for them on the Hub
        model.save_pretrained(str(draft), state_dict=state_dict, save_embedding_layers=False)
        (draft / "README.md").unlink(missing_ok=True)  # a draft of a card, by PEFT
        for name, config in model.peft_config.items():
            if not isinstance(config, ClipPromptConfig):
                carry_normalisation(classifier, draft / ("" if name == "default" else name) / ADAPTER)


def check_adapters(student: nn.Module, core: CLIPForZeroShotClassification) -> None:
    """Raise ValueError for adapters that a training would not train, or not save as they are."""
    if student is core:
        if has_adapter(core):
            raise ValueError(
                "the model has an adapter inside; give its PeftModel (PeftModel.from_pretrained(base, adapter, "
                "is_trainable=True)), or merge it into the weights first (merge_and_unload)."
            )
        return
    if list(student.peft_config) != ["default"]:  # type: ignore[arg-type]
        raise ValueError(
            f"the model has the adapters {list(student.peft_config)}; one is trained and saved, named 'default'."  # type: ignore[arg-type]
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("the adapter is not trainable; load it with is_trainable=True.")


def check_teacher(teacher: CLIPForZeroShotClassification, core: CLIPForZeroShotClassification) -> None:
    """Raise ValueError where the teacher has other classes or another normalisation: its logits would be of other
    things than the student's.
    """
    told_apart = [(teacher.class_names, core.class_names), (teacher.templates, core.templates)]
    same_pixels = all(
        torch.equal(a.cpu(), b.cpu())
        for a, b in ((teacher.image_mean, core.image_mean), (teacher.image_std, core.image_std))
    )
    if any(a != b for a, b in told_apart) or not same_pixels:
        raise ValueError(
            "model got other classes, templates or another normalisation after the trainer was made, and the teacher "
            "has the old ones; make the trainer when the model is ready."
        )


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
        model: CLIPForZeroShotClassification | PeftModel | None,
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
        model_init: Callable[..., CLIPForZeroShotClassification | PeftModel] | None = None,
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
            model_init=model_init,
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
            state_dir: a folder for what is done already; see `statistics.collect_statistics`. The training of clean
                prompts leaves checkpoints there, where `args` say that checkpoints are saved.

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
            classifiers["clean"] = self._train_clean(None if state_dir is None else Path(state_dir) / "clean training")
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

    def _train_clean(self, folder: Path | None = None) -> CLIPForZeroShotClassification:
        """Prompts of the same kind in the same frozen model, trained by the same settings without an attack; where it
        was killed, it goes on from its checkpoint in `folder`.
        """
        core = self.accelerator.unwrap_model(self.model)
        if self.train_dataset is None or not isinstance(core, PeftModel):
            raise ValueError("clean_model is missing, and there is no train_dataset to train clean prompts on.")
        shared = [p for p in core.parameters() if not p.requires_grad]
        shared_by_id: dict[int, Any] = {id(part): part for part in (*shared, self.classifier().processor)}
        base = copy.deepcopy(core.base_model, shared_by_id).unload()
        peft_config = copy.deepcopy(core.active_peft_config)
        peft_config.inference_mode, peft_config.base_model_name_or_path = False, None
        objective = self.training_objective if isinstance(self.training_objective, APT) else APT()
        trainer = APTTrainer(
            base,
            on_its_own(self.args, folder),
            replace(objective, batch_mix="clean", beta=APT.beta),
            self.train_dataset,
            peft_config=peft_config,
            data_collator=self.data_collator,
        )
        try:
            trainer.train(resume_from_checkpoint=folder is not None)
        except NothingToResume:
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
            return *(defended.predict(pixels).logits.float() for pixels in (images_BCHW, adv_BCHW)), *static

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


def on_its_own(args: RobustClipConfig, folder: Path | None = None) -> RobustClipConfig:
    """The same settings for a run that evaluates and pushes nothing, and saves checkpoints only where it has a folder
    of its own.
    """
    quiet = copy.copy(args)
    if folder is None or args.save_strategy == SaveStrategy.BEST:  # which needs evaluations
        quiet.set_save("no")
    else:
        quiet.output_dir = str(folder)
    quiet.set_evaluate("no")
    quiet.load_best_model_at_end = quiet.push_to_hub = False
    quiet.resume_from_checkpoint = None
    return quiet


def without_loss(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of a training without its mean loss."""
    return {name: value for name, value in metrics.items() if name != "train_loss"}


def optimisation_settings(args: RobustClipConfig, optimizer: Any, schedule: Any) -> dict[str, Any]:
    """What the weights were trained by, as plain values: what `args` say, or the optimizer and schedule given."""
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
