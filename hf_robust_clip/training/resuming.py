"""A `transformers.Trainer` that goes on from its own checkpoints alone, and saves nothing that isn't finite."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, enable_full_determinism, set_seed
from transformers.trainer_utils import HPSearchBackend, TrainOutput

from ..digests import plain
from ..environment import same_libraries
from ..processes import check_agreed, together
from ..storage import check_writable
from .averaging import WeightAveraging
from .checkpoints import (
    best_beside,
    check_files,
    check_fit,
    check_own_folder,
    check_seen,
    checkpoint_to_resume,
    drop_old_checkpoints,
    first_not_finite,
    note_checkpoint,
    save_adapter,
)
from .config import check_arguments
from .identity import check_same_everywhere, check_same_run, data_identity, eval_identity
from .pushing import PushingTrainer

if TYPE_CHECKING:
    from ..objectives.base import Objective

logger = logging.getLogger(__name__)
OBJECTIVE = "objective."  # before the names of its settings in a hyperparameter search


class Patience(EarlyStoppingCallback):
    """That of `args.early_stopping_patience`."""


class ResumingTrainer(PushingTrainer):
    """Checkpoints hold the student alone (of an adapter, the adapter), and say of which training they are; another
    training doesn't go on from them. A hyperparameter search begins each trial with the settings as they were given.
    """

    training_objective: Objective
    _settled: dict[str, Any]  # settings that act when the trainer is made alone
    _beginning: dict[str, Any] | None = None  # what the training starts from
    _data: dict[str, Any] | None = None  # which images it has, found out when first asked for
    _resumed_from: Path | None = None
    _checkpoints_seen = False  # whether it is known which processes see them
    _args_before_trials: dict[str, Any] | None = None
    _averaging: WeightAveraging | None = None  # of the weights, while they are trained with `ema_decay`
    _objective_before_trials: Objective | None = None

    @abstractmethod
    def start_identity(self) -> dict[str, Any]:
        """What the training starts from; see `model_identity`."""

    @abstractmethod
    def method_identity(self) -> dict[str, Any]:
        """How it is run; see `training_identity`."""

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
        self._averaging = WeightAveraging(self._resumed_from)
        self.callback_handler.callbacks.insert(0, self._averaging)  # whoever saves at the end saves the average
        try:
            if trial is not None:
                self._begin_trial(trial)
            (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
            self.remove_callback(Patience)
            if self.args.early_stopping_patience is not None:
                self.add_callback(Patience(int(self.args.early_stopping_patience)))
            resumed_from = None if self._resumed_from is None else str(self._resumed_from)
            result = super().train(resumed_from, trial, ignore_keys_for_eval)
        finally:
            self.is_in_train = False
            self.callback_handler.callbacks.remove(self._averaging)
            self._averaging = None
        self._check_trained()
        if self._nothing_was_left():
            return TrainOutput(result.global_step, math.nan, without_loss(result.metrics))
        return result

    def _nothing_was_left(self) -> bool:
        """Whether `train` went on from the last step, so that there is no loss of its own."""
        return self.state.global_step == self._initial_global_step > 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Its own, without a mean loss where nothing was left to train."""
        super().log(without_loss(logs) if self.is_in_train and self._nothing_was_left() else logs, start_time)

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
        and seeds included, and with Optuna, as `objective.NAME`, any of the objective; each trial starts from the
        settings as they were given, and so does what comes after.
        """
        self._args_before_trials, self._objective_before_trials = dict(vars(self.args)), self.training_objective

        def for_arguments(trial: Any) -> dict[str, Any]:
            values = hp_space(trial)  # type: ignore[misc]
            self._set_objective({name: value for name, value in values.items() if name.startswith(OBJECTIVE)})
            return {name: value for name, value in values.items() if not name.startswith(OBJECTIVE)}

        try:
            return super().hyperparameter_search(
                hp_space and for_arguments, compute_objective, n_trials, direction, backend, hp_name, **kwargs
            )
        finally:
            self.args.__dict__.update(self._args_before_trials)
            self.training_objective = self._objective_before_trials
            self._args_before_trials = self._objective_before_trials = None

    def _set_objective(self, values: Mapping[str, Any]) -> None:
        """The objective of a trial: as it was given, with these settings, `objective.NAME`, in place of its own."""
        objective = self._objective_before_trials or self.training_objective
        known = [field.name for field in fields(objective) if field.init]
        own = {name.removeprefix(OBJECTIVE): value for name, value in values.items()}
        for name in own:
            if name not in known:
                raise ValueError(
                    f"hp_space gives {OBJECTIVE + name!r}, which is no setting of {type(objective).__name__}."
                )
        self.training_objective = replace(objective, **own)

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
                raise ValueError(f"{name}={getattr(self.args, name)!r} was {value!r}; make another trainer.")
        if self.args.should_save:
            kept = self.model.parameters()
            saved = (p for p in kept if p.requires_grad) if isinstance(self.model, PeftModel) else kept
            check_writable(self.args.output_dir, room=sum(p.nbytes for p in saved))
        if self.args.save_on_each_node:
            check_own_folder(self.args.output_dir, saves=self.args.should_save, processes=self.accelerator)
        self._train_batch_size = self.args.train_batch_size
        self.accelerator.dataloader_config.data_seed = self.args.data_seed
        if self._beginning is None or self._resumed_from is None:
            self._beginning = self.start_identity()
        self._run, self._data = {**self.method_identity(), **self._beginning}, None
        check_same_everywhere(self._run, self.accelerator)
        self._check_data_agreed()
        if self._resumed_from is not None:
            self._check_same_run(self._resumed_from)

    def _whole_run(self) -> dict[str, Any]:
        """Which training this is, with its data."""
        if self._data is None:
            self._data = data_identity(self.train_dataset, self.eval_dataset, self.args)
        return {**self._run, **self._data}

    def _check_data_agreed(self) -> None:
        """Raise on every process unless all of them see the same images: each may be on a machine with its own."""
        if self.accelerator.num_processes > 1:
            self._data, seen = together(self._found_data, self.accelerator)
            check_agreed({**seen, "libraries": same_libraries()}, self.accelerator)

    def _found_data(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of this process's images what a checkpoint notes, and that with those that are only evaluated on."""
        noted = data_identity(self.train_dataset, self.eval_dataset, self.args)
        seen = {} if self.eval_dataset is None or "eval_data" in noted else eval_identity(self.eval_dataset)
        return noted, {**noted, **seen}

    def _check_same_run(self, folder: Path) -> None:
        """Raise on every process unless a checkpoint is of this training, with its data, as the main one sees it, and
        its weights fit the model.
        """
        main = self.accelerator.is_main_process
        together(lambda: check_same_run(folder, self._whole_run()) if main else None, self.accelerator)
        core = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        together(lambda: check_fit(folder, core), self.accelerator)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:  # the Trainer's own signature
        """Its epoch, unless all steps are done, or patience was at its end where the training goes on from."""
        if self.state.global_step < self.state.max_steps and not self._was_stopped():
            super()._run_epoch(*args, **kwargs)
            return
        self._load_rng_state(None if self._resumed_from is None else str(self._resumed_from))
        self.control.should_training_stop = True

    def _was_stopped(self) -> bool:
        """Whether a training that goes on had been stopped early."""
        resumed = self.state.global_step == self._initial_global_step > 0
        patient = [own for own in self.callback_handler.callbacks if isinstance(own, Patience)]
        return resumed and any(own.early_stopping_patience_counter >= own.early_stopping_patience for own in patient)

    def _load_callback_state(self) -> None:
        """Its own; for how many evaluations there was no new best is known in any case."""
        super()._load_callback_state()
        told = self.state.stateful_callbacks.get(Patience.__name__)
        for own in self.callback_handler.callbacks:
            if isinstance(own, Patience) and told is not None:
                own.early_stopping_patience_counter = told["attributes"]["early_stopping_patience_counter"]

    def _check_trained(self) -> None:
        """Raise unless something was trained, and its weights are finite."""
        if self.state.global_step == 0:
            raise ValueError("train_dataset gave no update: too few images for a whole batch, or none.")
        if self.updates() == 0:
            raise FloatingPointError("no update was made: every gradient overflowed; train in bf16 or float32.")
        self._check_weights()

    def _check_weights(self) -> None:
        name = first_not_finite(self.accelerator.unwrap_model(self.model))
        if name is not None:
            raise FloatingPointError(f"step {self.state.global_step}: the trained parameter {name!r} is not finite.")

    def updates(self) -> int:
        """Updates that changed weights: those whose gradient overflowed in fp16 were left out."""
        if self._created_lr_scheduler and isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
            return int(self.lr_scheduler.last_epoch)  # it steps with the optimizer alone, and checkpoints hold it
        return self.state.global_step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter. Raises FloatingPointError, before anything is written, if they are not finite."""
        self._check_weights()
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # no pickled arguments beside the weights
            core = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            folder = output_dir or self.args.output_dir
            if isinstance(core, PeftModel):
                save_adapter(core, folder, state_dict)
            else:
                if self.args.save_on_each_node:  # transformers would write weights on the first machine alone
                    core.should_save_on_this_rank = bool
                core.save_pretrained(folder, state_dict=state_dict)

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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._averaging is not None:
            self._averaging.save(output_dir)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, while a training goes on with `ema_decay`, the model has the average of its weights."""
        return nullcontext() if self._averaging is None else self._averaging.in_place()

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


def without_loss(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of a training without its mean loss."""
    return {name: value for name, value in metrics.items() if name != "train_loss"}
