"""A moving average of the weights over the updates of a training, which takes their place at its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

logger = logging.getLogger(__name__)
AVERAGE_FILE = "weight_average.safetensors"


class WeightAveraging(TrainerCallback):
    """With the weights w_n after the n-th update, all that are trained, and the decay d = `args.ema_decay`:

        a_1 = w_1,  a_n = d * a_(n-1) + (1 - d) * w_n

    When the training ends the model has a_n. Until then it has w_n, from which the next update starts; checkpoints
    hold both. A step whose gradient overflowed is no update. By `torch.optim.swa_utils`.

    Args:
        checkpoint: the folder from which the training goes on; None at its beginning.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self._checkpoint = checkpoint
        self._average: AveragedModel | None = None
        self._trained = nn.ParameterList()

    def on_train_begin(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        """Start anew, or where the checkpoint stands; with `args.ema_decay` 0 nothing is averaged.

        Raises ValueError for trained weights below float32, in which small steps of an average are lost.
        """
        decay = args.ema_decay
        if not decay:
            return
        self._trained.extend(parameter for parameter in events["model"].parameters() if parameter.requires_grad)
        narrow = next((p.dtype for p in self._trained if p.dtype.itemsize < 4), None)
        if narrow is not None:
            raise ValueError(f"ema_decay={decay!r} averages weights of float32, these are {narrow}; load them so.")
        self._average = AveragedModel(self._trained, multi_avg_fn=get_ema_multi_avg_fn(decay))
        if self._checkpoint is not None:
            self._average.load_state_dict(load_file(Path(self._checkpoint, AVERAGE_FILE)))
        first = decay ** max(state.max_steps - 1, 0)
        if first > 0.1 and state.is_world_process_zero:
            logger.warning(
                "ema_decay=%r: of %d updates the first weighs %.0f %% in the average; take a smaller one",
                decay, state.max_steps, 100 * first,
            )  # fmt: skip

    def save(self, folder: str) -> None:
        """Write the average into a checkpoint, if there is one."""
        if self._average is not None:
            save_file({name: value.contiguous() for name, value in self._average.state_dict().items()},
                      Path(folder, AVERAGE_FILE))  # fmt: skip

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average; outside what it had."""
        if self._average is None or not self._average.n_averaged:
            yield
            return
        before = [parameter.detach().clone() for parameter in self._trained]
        self._put(list(self._average.parameters()))
        try:
            yield
        finally:
            self._put(before)

    def on_step_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        """Take the weights of an update in."""
        if self._average is not None and not getattr(events.get("optimizer"), "step_was_skipped", False):
            self._average.update_parameters(self._trained)

    def on_train_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        """Give the model the average."""
        if self._average is not None and self._average.n_averaged:
            self._put(list(self._average.parameters()))
            self._average = None

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._trained, values, strict=True):
            parameter.copy_(value)
