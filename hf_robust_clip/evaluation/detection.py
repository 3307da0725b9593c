"""How well a detector tells attacked images from clean ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..prediction import Prediction
from ..report.report import Measurement

FPR = 0.05  # of the rate of true alarms that is told beside the AUROC


class Alarm(NamedTuple):
    """What a detector says of an image.

    Args:
        score: the higher, the more it looks attacked.
        flagged: whether it raised an alarm.
        right: whether the class that it would give is the label.
    """

    score: float
    flagged: bool
    right: bool


def alarms_of(prediction: Prediction, labels_B: Tensor) -> list[Alarm]:
    """Those of a batch; none of a defence that flags nothing or gives no scores."""
    if prediction.flagged is None or prediction.score is None:
        return []
    right_B = prediction.logits.argmax(dim=1) == labels_B
    rows = zip(prediction.score.tolist(), prediction.flagged.tolist(), right_B.tolist(), strict=True)
    return [Alarm(*row) for row in rows]


def auroc(clean: Sequence[float], attacked: Sequence[float]) -> float:
    """The probability that an attacked image scores above a clean one, ties at half.

    Raises ValueError for no images of either kind, and scores that are no numbers.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_told_apart(clean, attacked)))


def tpr_at(clean: Sequence[float], attacked: Sequence[float], fpr: float = FPR) -> float:
    """The share of attacked images above the best threshold that at most a share of `fpr` of the clean ones is above.

    Raises ValueError as `auroc` does.
    """
    from sklearn.metrics import roc_curve

    shares, caught, _ = roc_curve(*_told_apart(clean, attacked), drop_intermediate=False)
    return float(caught[shares <= fpr + 1e-12].max())


def _told_apart(clean: Sequence[float], attacked: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    scores = np.array([*clean, *attacked], dtype=np.float64)
    if not len(clean) or not len(attacked):
        raise ValueError(f"{len(clean)} clean and {len(attacked)} attacked scores; give at least one of each.")
    if np.isnan(scores).any():
        raise ValueError("scores have values that are no numbers; nothing can be told apart by them.")
    return np.array([0] * len(clean) + [1] * len(attacked)), np.nan_to_num(scores)


def detection_report(
    clean: Mapping[int, Alarm], attacked: Mapping[tuple[float, str | None], Mapping[int, Alarm]]
) -> tuple[Measurement, ...]:
    """What a report says of a detector beside accuracies, as measurements in [0, 1]:

    - `detection_fpr`: share of clean images that are flagged, and `detection_fpr_of_errors`, the same among those
      whose class is wrong;
    - by radius and attack, of the attacked images whose class was right before: `detection_auroc` against all clean
      images and `detection_tpr_at_5_fpr`; and among those that the attack gave another class
      `detection_of_successful`, the share that is flagged, and `detection_auroc_of_successful`.

    Args:
        clean: by image.
        attacked: by radius and attack (None: all attacks together), by image.

    An attack on no image says nothing. Raises ValueError for no clean images, and for scores that are no numbers.
    """
    if not clean:
        raise ValueError("clean is empty; there is nothing to tell attacked images from.")
    rows = [_share("detection_fpr", [alarm.flagged for alarm in clean.values()])]
    rows += [_share("detection_fpr_of_errors", [alarm.flagged for alarm in clean.values() if not alarm.right])]
    scores = [alarm.score for alarm in clean.values()]
    for (eps, member), alarms in attacked.items():
        own = [alarm for index, alarm in alarms.items() if clean[index].right]
        if not own:
            continue
        found = {"detection_auroc": auroc, "detection_tpr_at_5_fpr": tpr_at}
        rows += [
            Measurement(name, of(scores, [alarm.score for alarm in own]), len(own), eps, member=member, counted=False)
            for name, of in found.items()
        ]
        fooled = [alarm for alarm in own if not alarm.right]
        rows += [_share("detection_of_successful", [alarm.flagged for alarm in fooled], eps, member)]
        if fooled:
            value = auroc(scores, [alarm.score for alarm in fooled])
            name = "detection_auroc_of_successful"
            rows.append(Measurement(name, value, len(fooled), eps, member=member, counted=False))
    return tuple(row for row in rows if row is not None)


def _share(metric: str, flags: Sequence[bool], eps: float = 0.0, member: str | None = None) -> Measurement | None:
    """Of the flagged; None of none."""
    return Measurement(metric, sum(flags) / len(flags), len(flags), eps, member=member) if flags else None


def detection(
    alarms: Mapping[int, Mapping[int, Alarm]], stages: Sequence[tuple[float, str]]
) -> tuple[Measurement, ...]:
    """`detection_report` of an evaluation; nothing of a defence that raises no alarms.

    Args:
        alarms: by stage, 0 for clean, then by image.
        stages: radius and attack of stages 1, 2, ...

    Of all attacks at a radius together, an image counts as the last of them left it: the one that it fell to, or the
    last that it withstood.
    """
    if not alarms:
        return ()
    attacked: dict[tuple[float, str | None], dict[int, Alarm]] = {}
    for number, (eps, member) in enumerate(stages, start=1):
        own = dict(alarms.get(number, {}))
        attacked[eps, member] = own
        attacked.setdefault((eps, None), {}).update(own)
    return detection_report(alarms[0], attacked)
