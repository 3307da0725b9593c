"""Adversarial fine-tuning of CLIP: one `Trainer` for every objective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from ..attacks.losses import cross_entropy
from ..attacks.pgd import PGDSettings, pgd
from ..checkpoint_notes import save_descriptions
from ..checks import Blindness, check_logits, checked_labels
from ..defences import judging
from ..defences.base import Defence, Prediction
from ..defences.defended import DefendedClassifier
from ..hub import Kind
from ..modeling import ZeroShotClassifier, without_gradients
from ..objectives.base import Batch, Objective
from ..objectives.clean import Clean
from ..prompts.access import without_class_prompts
from ..report.card import make_unmeasured_card
from ..threat_model import ThreatModel
from ..zero_shot_data.loading import collate_images
from .accuracy import robust_accuracy, show_so_far
from .batches import (
    VIEW,
    as_objectives_call,
    count_images,
    gathering,
    in_bfloat16,
    own_images_of_last_batch,
    share_of_update,
    still_texts,
    with_further,
    without_fill,
)
from .checkpoints import NothingToResume
from .config import (
    RobustClipConfig,
    check_attack_precision,
    check_augmentation,
    check_images_together,
    check_start_of_attack,
    check_views,
    gives_whole_pictures,
    images_per_update,
    on_its_own,
    optimizer_and_arguments,
)
from .identity import model_identity, training_identity
from .preparation import check_defence, check_teacher, classifier_in, prepare, twin_of
from .resuming import ResumingTrainer
from .summary import card_info, defence_settings, training_settings
from .trackers import AttackedPictures, pictures_of

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)


class RobustClipTrainer(ResumingTrainer):
    """Trains a `ZeroShotClassifier`, or prompts in it, on adversarial examples, by any `Objective`.

    In each step: random crops, if the dataset gives whole pictures, as many of each as the objective has views;
    adversarial images by PGD on `objective.attack_loss` (through the module without its distributed wrapper,
    differentiating the images alone); then `sum(objective(batch, adv).values())` through the wrapped model.
    The gradient of an update is that of the mean over all its images (over processes and accumulated batches, a short
    last batch included; images that fill up the last batches of several processes count for nothing), and the crop and
    the random start of an image depend on the seed, the step and the image alone. So the result depends neither on how
    an update is divided nor on an interruption, up to rounding, save for three things: an objective that
    `couples_images` looks at forward batches (APT's adv_half attacks half of each), dropout in an adapter is drawn
    anew in each process, and an iterable dataset may give the last images of several processes twice. While an attack
    runs, the class embeddings stand still: they are computed once for all of its steps.

    Args:
        model: with its classes set, in label order of the data (objectives without labels or classes need none). A
            `PeftModel` around one is trained as it is: its adapter alone.
        args: training settings, attack, and which layers are trained.
        objective: default `objective_cls()`, if there is one. Its normalisation, if it prescribes one, is given to the
            model.
        train_dataset, eval_dataset: examples `{"pixel_values": (3, H, W) in [0, 1], "labels": int}`, with
            `"captions": str` where the objective needs them; for training also `{"picture": (3, H, W) uint8, ...}`,
            of which random crops are taken.
        teacher: frozen reference of objectives that need one; default the model as it is now. Same architecture.
        peft_config: train an adapter instead: prompts (`ClipPromptConfig`), or LoRA, say, which is kept out of the
            text tower. None takes `objective.peft_config`, unless `trainable_layers` is set.
        data_collator, compute_metrics, callbacks, optimizers: as in `transformers.Trainer`; metrics default to clean
            and robust accuracy.
        model_init: makes the model, in place of `model`: for `hyperparameter_search`, where each trial begins with a
            new one.
        defence: a test-time defence, by which `evaluate` and `predict` judge and which `save_model` saves beside the
            model; default `defence_cls()`, or that which the objective is `judged_by`. The attack knows nothing of it:
            PGD on the classifier alone, which overrates a defence (`evaluate_robustness` has attacks that don't).
            While `train()` runs, evaluations are those of the classifier, if it has logits of its own. One that must
            be fitted is, after the training, by `fit_defence`.

    The text tower's weights and logit_scale stay frozen, unless the objective needs captions.
    Raises TypeError/ValueError for a model of another class, a teacher of another architecture, and bad settings.
    """

    objective_cls: ClassVar[type[Objective] | None] = None
    defence_cls: ClassVar[type[Defence] | None] = None
    loss_is_scaled_for_ga = True  # by images, in compute_loss

    def __init__(
        self,
        model: ZeroShotClassifier | PeftModel | None,
        args: RobustClipConfig,
        objective: Objective | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        teacher: ZeroShotClassifier | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]] = collate_images,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] = robust_accuracy,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        model_init: Callable[..., ZeroShotClassifier | PeftModel] | None = None,
        defence: Defence | None = None,
    ):
        if not isinstance(args, RobustClipConfig):
            raise TypeError(f"args is a {type(args).__name__}; give a RobustClipConfig.")
        if (model is None) == (model_init is None):
            raise ValueError("model and model_init: give one of them.")
        if objective is None:
            if self.objective_cls is None:
                raise ValueError("objective is missing; give one, or use a subclass such as PMGAFTTrainer.")
            objective = self.objective_cls()
        expected = self.defence_cls or Defence
        if defence is not None and not isinstance(defence, expected):
            raise TypeError(f"defence is a {type(defence).__name__}; give a {expected.__name__}.")
        check_start_of_attack(args, objective)
        whole_pictures = gives_whole_pictures(train_dataset)
        if whole_pictures is not None:
            check_augmentation(args, whole_pictures)
            check_views(objective, whole_pictures)
        self.training_objective = objective
        self.teacher: ZeroShotClassifier | None = None
        defence = self.defence_cls() if defence is None and self.defence_cls is not None else defence
        self.defence = judging(defence, objective.judged_by)
        self.given_optimizers = optimizers
        self._given_teacher, self._adapter, self._teacher_is_given = teacher, peft_config, teacher is not None
        self._terms: dict[str, Tensor] = {}
        self._updates = 0
        self._begin_evaluation()
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
        if not pictures_of(self.callback_handler):
            self.add_callback(AttackedPictures())

    @property
    def threat_model(self) -> ThreatModel:
        """That of training and evaluation, as `args` say now."""
        return self.args.threat_model()

    @property
    def attack(self) -> PGDSettings:
        """The attack of training, as `args` say now."""
        return self.args.attack()

    def classifier(self) -> ZeroShotClassifier:
        """The model that is trained, without wrappers; adapters are inside."""
        return classifier_in(self.accelerator.unwrap_model(self.model))

    def _prepared(self, model: nn.Module, args: RobustClipConfig) -> nn.Module:
        """The model as it is trained; its teacher is kept in `teacher`."""
        found = prepare(model, args, self.training_objective, self._adapter, self._given_teacher)
        self.teacher, self._adapter_is_new, self._beginning = found.teacher, found.adapter_is_new, None
        check_defence(self.defence, found.student, self.training_objective)
        check_attack_precision(args, classifier_in(found.student).dtype)
        return found.student

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model from `model_init`, prepared as a given one is."""
        return self._prepared(super().call_model_init(trial), self.args)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Optimizer class and arguments, as `args` say now; SGD has `args.momentum`."""
        return optimizer_and_arguments(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's own choice without the logit scale, which no weight decay draws to 1."""
        return [name for name in super().get_decay_parameter_names(model) if name.split(".")[-1] != "logit_scale"]

    # ---- a batch

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

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; of whole pictures (`"pictures"`, a list) random crops, `"views"`, the first of which are
        `"pixel_values"`; of captions, their token ids.
        """
        inputs = super()._prepare_inputs(inputs)
        if "pictures" in inputs:
            if not self.model.training:
                raise ValueError("eval_dataset gives whole pictures (augment=True); evaluate them as they are.")
            crop, pictures, side = self.args.augmentation(), inputs["pictures"], self.classifier().input_size
            seeds = [self.seed_of_step() + VIEW * view for view in range(self.training_objective.num_views)]
            views = tuple(crop(pictures, side, seed) for seed in seeds)
            inputs = {name: values for name, values in inputs.items() if name != "pictures"}
            inputs = {**inputs, "views": views, "pixel_values": views[0]}
        elif self.model.training:
            check_augmentation(self.args, whole_pictures=False)
            check_views(self.training_objective, whole_pictures=False)
        if self.model.training:
            inputs = with_further(inputs, self.training_objective, self.seed_of_step(), self.classifier().tokenize)
        return inputs

    def _check_batch(self, inputs: dict[str, Any], needs_labels: bool) -> None:
        core, pixels, objective = self.classifier(), inputs["pixel_values"], self.training_objective
        views = inputs.get("views", (pixels,))
        rows = len(pixels) * len(views)
        attacked = len(range(rows)[objective.attacked_rows(rows)]) if objective.attacked else 0
        for view in views:
            core.check_pixels(view, values=attacked < rows)  # pgd checks what it attacks
        if needs_labels:
            if inputs.get("labels") is None:
                user = type(objective).__name__ if self.model.training else "evaluation"
                raise ValueError(f"{user} needs labels, but the dataset gives no 'labels'.")
            inputs["labels"] = checked_labels(inputs["labels"], len(pixels), len(core.class_names))

    def make_batch(self, inputs: dict[str, Any], student: nn.Module, images_per_update: int = 0) -> Batch:
        """What the objective sees of a batch, with `student` behind its images."""
        several, objective = self.accelerator.num_processes > 1, self.training_objective
        return Batch(
            views=inputs.get("views", (inputs["pixel_values"],)),
            labels=inputs.get("labels"),  # type: ignore[arg-type]  # checked: objectives that need them have them
            captions=inputs.get("captions") if "captions" in objective.needs else None,
            further_captions=inputs.get("further_captions", ()),
            student=as_objectives_call(student, self.classifier(), objective),
            teacher=None if self.teacher is None else as_objectives_call(self.teacher, self.teacher, objective),
            images_per_update=images_per_update,
            gather=gathering(count_images(inputs), self.accelerator) if several else None,
            num_classes=len(self.classifier().class_names),
        )

    # ---- attack and loss

    def attackable(self, model: nn.Module) -> nn.Module:
        """The module that attacks differentiate: without distributed wrapper."""
        return self.accelerator.unwrap_model(model)

    @contextmanager
    def attacking(self, core: nn.Module) -> Iterator[None]:
        """Inside, losses for attacks on `core` are made and differentiated by the images."""
        # eager autograd skips weight gradients nobody asked for; a compiled backward computes all it was traced for
        frozen = without_gradients(core) if self.args.torch_compile else nullcontext()
        with self.accelerator.autocast(), self.classifier().fixed_class_embeds(), frozen, torch.enable_grad():
            yield

    def perturb(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        images: Tensor,
        num_steps: int,
        seed: int,
        on_gradient: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Adversarial images by PGD, as `args` say. Call it while `attacking`."""
        return pgd(
            loss_fn,
            images,
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
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective's loss on freshly attacked images, weighed so that gradients add up to those of the mean over
        all images of the update. Raises FloatingPointError if a term is not finite.

        Args:
            num_items_in_batch: images of the update over all processes; None takes this batch, on each process.
        """
        objective, processes, images = self.training_objective, self.accelerator.num_processes, count_images(inputs)
        inputs = dict(inputs)
        self._check_batch(inputs, "labels" in objective.needs)
        in_update = int(num_items_in_batch) if num_items_in_batch else images * processes
        with still_texts(self.classifier(), self.teacher):
            batch = self.make_batch(inputs, self.attackable(model), in_update)
            adv = self._attacked(batch, self.attackable(model)) if objective.attacked else batch.stacked
            batch.student = as_objectives_call(model, self.classifier(), objective)
            with self.accelerator.autocast():
                terms = objective(batch, adv)
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

    def _attacked(self, batch: Batch, core: nn.Module) -> Tensor:
        """All rows of `batch.stacked`, those that the objective chooses attacked."""
        clean = batch.stacked
        rows = self.training_objective.attacked_rows(len(clean))
        part = batch.rows(rows)
        if self.args.attack_bf16:  # the student alone: what is computed once for attack and loss is the loss's too
            part.student = in_bfloat16(part.student)
        with self.attacking(core):
            loss_fn = self.training_objective.attack_loss(part)
            adv = self.perturb(loss_fn, part.images, self.attack.num_steps, self.seed_of_step())
        return clean.index_copy(0, torch.arange(len(clean), device=clean.device)[rows], adv)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:  # the Trainer's own signature
        """Its loop, with the model prepared for the training images."""
        core, labels = self.classifier(), "labels" in self.training_objective.needs
        check_images_together(self.args, self.training_objective, self.train_dataset)
        self._terms, self._updates = {}, 0
        with ExitStack() as prepared:
            if self.teacher is not None:
                check_teacher(self.teacher, core)
                prepared.enter_context(self.teacher.prepared_for(self.train_dataset, labels=labels))
            prepared.enter_context(core.prepared_for(self.train_dataset, training=None, labels=labels))
            return super()._inner_training_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term over all images since the last log, each update weighing the same."""
        if "loss" in logs and self._terms:
            means = torch.stack(list(self._terms.values())) / self._updates
            means = self.accelerator.reduce(means, reduction="mean")
            logs = {**logs, **dict(zip(self._terms, means.tolist(), strict=True))}
            self._terms, self._updates = {}, 0
        super().log(logs, start_time)

    # ---- evaluation

    def _begin_evaluation(self) -> None:
        self._blindness = Blindness()
        self._streams: dict[str, Any] = {}  # where the defence stands among the clean and the attacked images
        self._right: list[Tensor] = []  # verdicts so far, (B, 2): as they are, under attack

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
        classes are not the model's, in their order; a defence that isn't fitted, and one with a stream state on
        several processes.
        """
        self._begin_evaluation()
        for pictures in pictures_of(self.callback_handler):
            pictures.begin(self.callback_handler.callbacks, metric_key_prefix)
        if self.defence is not None and not self.is_in_train:
            self.defence.check(self.classifier())
            if not self.defence.traits.episodic and self.accelerator.num_processes > 1:
                raise ValueError(f"{self.defence.name} takes images in their order; evaluate it in one process.")
        with self.averaged(), self.classifier().prepared_for(dataloader.dataset, training=None):
            found = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._blindness.warn(f"the attack of {description.lower()}")
        if found.predictions is not None and found.label_ids is not None:
            adv_logits, labels = torch.as_tensor(found.predictions[1]), torch.as_tensor(found.label_ids)
            found.metrics[f"{metric_key_prefix}_loss"] = cross_entropy(adv_logits, labels).mean().item()
        return found

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """Loss under attack, (clean, adversarial) logits and labels: PGD with `eval_attack_steps` on cross-entropy.

        Of a detector, which clean and which adversarial images it flags, too. The random starts follow `args.seed`
        alone: one model has one accuracy, whenever it is asked for.
        Raises FloatingPointError for logits that are not finite.
        """
        inputs = self._prepare_inputs(inputs)
        self._check_batch(inputs, needs_labels=True)
        images, labels, core = inputs["pixel_values"], inputs["labels"], self.attackable(model)

        def attack_loss(adv_BCHW: Tensor) -> Tensor:
            return cross_entropy(core(pixel_values=adv_BCHW).logits, labels)

        steps, seed = self.args.eval_attack_steps, self.args.seed << 32
        with still_texts(self.classifier()):
            with self.attacking(core), without_class_prompts(core):
                adv = self.perturb(attack_loss, images, steps, seed, self._blindness)
            clean, attacked = self._judged(core, images, "clean"), self._judged(core, adv, "attacked")
        for found in (clean, attacked):
            check_logits(found.logits, "the model")
        if self.defence is not None and not self.is_in_train:
            self._show(torch.stack([clean.right(labels), attacked.right(labels, attacked=True)], dim=1))
        for pictures in pictures_of(self.callback_handler):
            pictures.show(self.classifier().class_names, images, adv, labels, clean, attacked)
        loss = cross_entropy(attacked.logits, labels).mean()
        flags = [found.flagged.long() for found in (clean, attacked) if found.flagged is not None]
        return (loss, None, None) if prediction_loss_only else (loss, (clean.logits, attacked.logits, *flags), labels)

    def _judged(self, core: nn.Module, images_BCHW: Tensor, stream: str) -> Prediction:
        """What the defence makes of images, or, in training and without one, the classifier."""
        if self.defence is None or (self.is_in_train and self.training_objective.judged_by is None):
            with torch.no_grad(), self.accelerator.autocast():
                return Prediction(core(pixel_values=images_BCHW).logits.float())
        state = self._streams.get(stream)
        with self.accelerator.autocast():
            found = self.defence.predict(self.classifier(), images_BCHW, state=state, seed=self.args.seed)
        self._streams[stream] = found.state
        return replace(found, logits=found.logits.float())

    def _show(self, right_B2: Tensor) -> None:
        """The accuracy so far of this process beside the bar: a defence takes its time."""
        self._right.append(right_B2.cpu())
        show_so_far(self.callback_handler.callbacks, torch.cat(self._right))

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

    # ---- the defence

    def fit_defence(
        self, dataset: Dataset | None = None, clean_model: nn.Module | None = None, state_dir: str | Path | None = None
    ) -> Defence:
        """The defence with what it learns from training images under the trained model; kept in `defence`.

        Args:
            dataset: default the training images, whole pictures prepared as for an evaluation.
            clean_model: the same model trained without an attack, for defences that need one; None trains its adapter
                here, on the same data with the same settings.
            state_dir: a folder for what is done already. The training of the clean model leaves checkpoints there,
                where `args` say that checkpoints are saved.

        Raises ValueError without a defence, without any images, and where no clean model can be trained.
        """
        dataset = self.train_dataset if dataset is None else dataset
        if self.defence is None:
            raise ValueError("defence is missing; give the trainer one.")
        if dataset is None:
            raise ValueError("dataset is missing; give fit_defence one, or the trainer a train_dataset.")
        if getattr(dataset, "augment", False):
            dataset = replace(dataset, augment=False)  # type: ignore[type-var]
        clean = None
        if clean_model is not None:
            clean = classifier_in(clean_model).to(self.args.device)
        elif "clean_classifier" in self.defence.needs:
            clean = self._train_clean(None if state_dir is None else Path(state_dir) / "clean training")
        self.defence = self.defence.fit(
            self.classifier(),
            dataset,  # type: ignore[arg-type]
            clean_classifier=clean,
            batch_size=self.args.eval_batch_size,
            processes=self.accelerator,
            state_dir=state_dir,
            num_workers=self.args.dataloader_num_workers,
            progress=not self.args.disable_tqdm,
        )
        return self.defence

    def _train_clean(self, folder: Path | None = None) -> ZeroShotClassifier:
        """An adapter of the same kind in the same frozen model, trained by the same settings without an attack; where
        it was killed, it goes on from its checkpoint in `folder`.
        """
        if self.train_dataset is None:
            raise ValueError("clean_model is missing, and there is no train_dataset to train one on.")
        base, peft_config = twin_of(self.accelerator.unwrap_model(self.model), self.classifier())
        args, data = on_its_own(self.args, folder), self.train_dataset
        trainer = RobustClipTrainer(
            base, args, Clean(), data, peft_config=peft_config, data_collator=self.data_collator
        )
        try:
            trainer.train(resume_from_checkpoint=folder is not None)
        except NothingToResume:
            trainer.train()
        return trainer.classifier()

    def defended(self) -> DefendedClassifier:
        """The trained classifier behind the defence. Raises ValueError without one, and before it is fitted."""
        if self.defence is None:
            raise ValueError("defence is missing; give the trainer one.")
        self.defence.check(self.classifier())
        return DefendedClassifier(self.classifier(), self.defence, seed=self.args.seed)

    def _saves_defence(self) -> bool:
        """Whether `_save` writes a test-time defence beside the model: one that is fitted, when training is over."""
        if self.defence is None or self.is_in_train:
            return False
        try:
            self.defence.check(self.classifier())
        except ValueError as error:
            logger.info("%s is not saved: %s", self.defence.name, error)
            return False
        return True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.classifier().descriptions:
            save_descriptions(output_dir or self.args.output_dir, self.classifier().descriptions)
        if self.args.should_save and self._saves_defence():
            folder, defended = output_dir or self.args.output_dir, self.defended()
            if self.adapter_base() is None:  # it stands on the weights beside it
                defended.base_model = str(folder)
            defended.save_pretrained(folder)

    # ---- what is told of it

    def start_identity(self) -> dict[str, Any]:
        """Weights, classes, teacher and adapter that the training starts from."""
        student, teacher = self.accelerator.unwrap_model(self.model), self.teacher if self._teacher_is_given else None
        found = model_identity(student, classifier_in(student), teacher, self._adapter_is_new)
        self._adapter_is_new = False
        return found

    def method_identity(self) -> dict[str, Any]:
        """Objective, settings and optimizer; says where forward batches matter."""
        objective, batch = self.training_objective, self.args.train_batch_size
        if objective.couples_images and images_per_update(self.args) > batch:
            logger.info(
                "%s looks at forward batches, of %d images here: divided otherwise, the training is another one",
                type(objective).__name__, batch,
            )  # fmt: skip
        return training_identity(self.args, objective, self.data_collator, self.given_optimizers)

    def settings(self) -> dict[str, Any]:
        """Method, objective, attack and optimisation, as plain values, for cards and reports; each setting of a
        defence as `adaptation.<name>`.
        """
        return {**training_settings(self), **({} if self.defence is None else defence_settings(self.defence))}

    def adapter_base(self) -> str | None:
        """The name of the model that the trained adapter stands on; None where whole weights are trained."""
        core = self.accelerator.unwrap_model(self.model)
        return (core.active_peft_config.base_model_name_or_path or "") if isinstance(core, PeftModel) else None

    def unmeasured_card(self, repo_id: str) -> ModelCard:
        """The card of the model as it is now, of which nothing was measured."""
        kind: Kind = "model" if self.adapter_base() is None else "adapter"
        return make_unmeasured_card(card_info(self, repo_id), kind, loads_defence=self._saves_defence())
