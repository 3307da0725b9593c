"""What an evaluation of the Trainer counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback

from ..metrics import accuracy_after_each
from ..prediction import Prediction


def robust_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`clean_accuracy` and `robust_accuracy` in [0, 1] from what `RobustClipTrainer` predicts: (clean, adversarial)
    logits and, of a detector, which of the clean and of the adversarial images it flagged.
    """
    labels = torch.as_tensor(prediction.label_ids)
    parts = [torch.as_tensor(part) for part in prediction.predictions]
    flags = [flag.bool() for flag in parts[2:]] if len(parts) > 2 else (None, None)
    right_2 = [
        Prediction(logits, flagged=flag).right(labels, attacked=under_attack)
        for logits, flag, under_attack in zip(parts[:2], flags, (False, True), strict=True)
    ]
    clean, robust = accuracy_after_each(torch.stack(right_2, dim=1))
    return {"clean_accuracy": clean, "robust_accuracy": robust}


def show_so_far(callbacks: Sequence[TrainerCallback], right_N2: Tensor) -> None:
    """Clean and robust accuracy of N images beside the progress bar, where there is one.

    Args:
        right_N2: whether each is right as it is, and under attack.
    """
    shares = zip(("clean", "robust"), accuracy_after_each(right_N2), strict=True)
    so_far = {name: f"{share:.1%}" for name, share in shares}
    for callback in callbacks:
        if getattr(callback, "prediction_bar", None) is not None:
            callback.prediction_bar.set_postfix(so_far)
