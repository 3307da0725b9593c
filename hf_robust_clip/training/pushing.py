"""A `transformers.Trainer` whose pushes leave repositories that others can load, with a card and without pickles."""

from __future__ import annotations

import logging
import shutil
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..hub import (
    MODEL_FILES,
    Kind,
    Push,
    check_base,
    check_card,
    check_folder,
    check_push,
    copy_model,
    fitted_files,
    prepare_repository,
    reason_of,
    saved_in,
    upload,
)
from ..report.card import card_state, changed_card, contradiction, name_repository
from ..storage import disk_errors, write_text

logger = logging.getLogger(__name__)
UNMEASURED = (*MODEL_FILES, "README.md")  # what is pushed where no figures belong to the weights, and what is fitted


class PushingTrainer(Trainer):
    """Uploads what `_save` writes with our card: by `push_to_hub`, `save_model`, and while training goes on.

    `hub_strategy` is `end` or `every_save`; `checkpoint` and `all_checkpoints` are refused: the optimiser's states,
    which they upload, are pickles.
    """

    _passed_over: str | None = None  # the last checkpoint, where it was not uploaded

    @abstractmethod
    def unmeasured_card(self, repo_id: str) -> ModelCard:
        """The card of the model as it is now, of which nothing was measured."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a card tells of the training."""

    @abstractmethod
    def adapter_base(self) -> str | None:
        """The name of the model that the trained adapter stands on; None where whole weights are trained."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's own. Raises NotWritten where the disk is full; what there is of the checkpoint is deleted."""
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        try:
            with disk_errors(folder, "checkpoint"):
                super()._save_checkpoint(model, trial)
        except OSError:
            if self.args.should_save and not (folder / "trainer_state.json").is_file():  # which comes last
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of `hub_model_id`, or see that it is there and can be written to.

        Raises ValueError for an id that can't be, a base model that others don't have, and a strategy that uploads
        pickles; OSError where nothing can be uploaded: offline, no token, or the Hub refuses.
        """
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(f"hub_strategy={self.args.hub_strategy.value!r} uploads pickles; take every_save or end.")
        base = self.adapter_base()
        if base is not None:
            check_base(base, "hub_model_id: the adapter")
        push = self._push(token, private)
        check_push(push, "hub_model_id")
        if self.is_world_process_zero():
            self.hub_model_id = prepare_repository(push, self._kind(), "hub_model_id").repo_id
            self.push_in_progress = None

    def _kind(self) -> Kind:
        return "model" if self.adapter_base() is None else "adapter"

    def _push(self, token: str | bool | None = None, private: bool | None = None, revision: str | None = None) -> Push:
        """Where pushes go, by the arguments, else by the settings."""
        args = self.args
        return Push(
            self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name,
            args.hub_token if token is None else token,
            args.hub_private_repo if private is None else private,
            args.hub_revision if revision is None else revision,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model into output_dir and upload it with its card, and with the figures that the card tells.

        Arguments are the Trainer's own; all others (tags, language, license, ...) go to `create_model_card`. Returns
        the `CommitInfo`, or a Future of it if not `blocking`.

        Raises ValueError as `init_hf_repo` and `create_model_card` do, OSError if it can't be uploaded: what was
        trained is saved then, and the error names the command that uploads it.
        """
        self.save_model(_internal_call=True)
        self._push_trackers()
        if not self.is_world_process_zero():
            return None
        push, folder = self._push(token, private, revision), self.args.output_dir
        with saved_in(folder, push):
            self.create_model_card(**kwargs)
            push = prepare_repository(push, self._kind(), "hub_model_id")
            if self.hub_model_id != push.repo_id:
                self.hub_model_id = push.repo_id
                self.create_model_card(**kwargs)
            self._passed_over = None
            self._finish_current_push()
            only: tuple[str, ...] = (*UNMEASURED, *fitted_files(folder))
            if card_state(Path(folder, "README.md")) == "measured":
                only = ("*",)
                name_repository(folder, push.repo_id)
                check_card(folder, push.repo_id)
            check_folder(folder, only)
            message = commit_message or "End of training"
            if blocking:
                return upload(folder, push, message, only)
        return HfApi().run_as_future(_upload_saved, folder, push, message, only)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the model of a checkpoint in the background, with a card that says that nothing was measured."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running: PushInProgress | None = self.push_in_progress
        busy = running is not None and not running.is_done()
        self._passed_over = checkpoint_folder if busy and not self.args.hub_always_push else None
        if self._passed_over is not None:
            return
        self._push_trackers()
        folder = Path(self.args.output_dir)
        copy_model(checkpoint_folder, folder)
        push = self._push()
        if card_state(folder / "README.md") != "theirs":
            card = self.unmeasured_card(push.repo_id)
            card.data.tags = [*(card.data.tags or []), *self._model_tags()]
            write_text(folder / "README.md", str(card))
        job = HfApi().run_as_future(
            _upload_saved, folder, push, f"Training in progress, step {self.state.global_step}", UNMEASURED
        )
        self.push_in_progress = PushInProgress([*(running.jobs if running is not None and busy else []), job])

    def _push_trackers(self) -> None:
        """Let trackers upload what they logged (Trackio makes a Space of it, and tags the model with its address). A
        warning tells of one that can't: neither a training nor its upload ends with it.
        """
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except Exception as error:  # whatever a tracker raises
            logger.warning("a tracker did not upload its logs, the model is pushed without: %s", reason_of(error))

    def _model_tags(self) -> list[str]:
        """The tags that the model was given, such as the address of a Trackio Space."""
        return list(getattr(self.model, "model_tags", None) or ())

    def _finish_current_push(self) -> None:
        """Wait for uploads in the background, and upload the last checkpoint if it was passed over because another was
        on its way; a warning tells how the last upload failed, and what to do.
        """
        super()._finish_current_push()
        if self._passed_over is not None and Path(self._passed_over).is_dir():
            self._push_from_checkpoint(self._passed_over)
            super()._finish_current_push()
        running: PushInProgress | None = getattr(self, "push_in_progress", None)
        jobs = [] if running is None else running.jobs
        error = jobs[-1].exception() if jobs and jobs[-1].done() else None
        if error is not None:
            logger.warning("%s", error)
            self.push_in_progress = None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md into output_dir: a card that says that nothing was measured. One that `make_card` made of
        this training, or that somebody else wrote, is kept; its metadata take what is given.

        Raises ValueError for a card that tells of another training, and for `tasks`, `dataset` and `dataset_args`, by
        which the Trainer would tell figures that nobody measured.
        """
        for name, value in (("tasks", tasks), ("dataset", dataset), ("dataset_args", dataset_args)):
            if value is not None:
                raise ValueError(f"{name}={value!r} describes measured results; make_card tells those of reports.")
        if not self.is_world_process_zero():
            return
        file = Path(self.args.output_dir) / "README.md"
        state = card_state(file)
        if state not in ("measured", "theirs"):
            write_text(file, str(self.unmeasured_card(self._push().repo_id)))
        elif state == "measured":
            trained = self.state.global_step > 0
            own = {k: v for k, v in self.settings().items() if trained or k not in ("updates", "trainable_parameters")}
            other = contradiction(file.read_text(encoding="utf-8"), own)
            if other is not None:
                raise ValueError(f"README.md in {self.args.output_dir!r} is of another training ({other}); delete it.")
        if found := self._model_tags():
            tags = [*([tags] if isinstance(tags, str) else tags or []), *found]
        given = {"language": language, "license": license, "model_name": model_name, "base_model": finetuned_from,
                 "tags": tags, "datasets": dataset_tags}  # fmt: skip
        if any(value is not None for value in given.values()):
            changed = changed_card(file, {name: value for name, value in given.items() if value is not None})
            write_text(file, str(changed))


def _upload_saved(folder: str | Path, push: Push, commit_message: str, only: tuple[str, ...]) -> CommitInfo:
    with saved_in(folder, push):
        return upload(folder, replace(push), commit_message, only)
