"""What an evaluation of the Trainer counts."""

from __future__ import annotations

import torch
from transformers import EvalPrediction

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
