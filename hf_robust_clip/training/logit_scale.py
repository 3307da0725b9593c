"""The temperature of a contrast, kept where CLIP keeps it."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback


class LimitScale(TrainerCallback):
    """Keeps exp(logit_scale) in [1, 100], as CLIP does."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
