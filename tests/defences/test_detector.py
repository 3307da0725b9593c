"""Thresholds of detectors: a quantile of clean scores, and nothing without one."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from prompted_clip import make_base, make_images

from hf_robust_clip.defences.base import Prediction
from hf_robust_clip.defences.detector import Detector


@dataclass(frozen=True, kw_only=True)
class Bright(Detector):
    """Scores by the first pixel."""

    broken: bool = False

    def scored(self, classifier, images_BCHW, seed, path):
        score = images_BCHW[:, 0, 0, 0] * (math.nan if self.broken else 1)
        return Prediction(classifier(images_BCHW).logits, score=score)


def graded(count):
    """Images whose first pixels are 0, 1 / count, ..., not in order."""
    images = make_images(1).expand(count, -1, -1, -1).clone()
    images[:, 0, 0, 0] = torch.arange(count).flip(0) / count
    return images


@pytest.mark.parametrize(("count", "fpr", "flagged"), [(20, 0.05, 1), (39, 0.05, 1), (40, 0.05, 2), (10, 0.3, 3)])
def test_the_threshold_flags_as_many_clean_images_as_allowed(count, fpr, flagged):
    classifier, images = make_base(), graded(count)
    detector = Bright().calibrate(classifier, images, fpr=fpr, batch_size=7)
    found = detector.predict(classifier, images)
    assert found.flagged.sum() == flagged and detector.fpr == fpr
    assert torch.equal(found.score, images[:, 0, 0, 0])
    lower = replace(detector, threshold=found.score.sort().values[-2 - flagged].item())  # the next score
    assert lower.predict(classifier, images).flagged.sum() == flagged + 1


def test_ties_are_not_flagged():
    classifier, images = make_base(), graded(20)
    images[:5, 0, 0, 0] = 0.99
    assert not Bright().calibrate(classifier, images).predict(classifier, images).flagged.any()


def test_what_has_no_threshold_or_no_number_is_refused():
    classifier = make_base()
    with pytest.raises(ValueError, match="threshold is missing"):
        Bright().predict(classifier, make_images(2))
    with pytest.raises(ValueError, match=r"fpr=0\.05"):
        Bright().calibrate(classifier, graded(19))
    with pytest.raises(ValueError, match="finite"):
        Bright(broken=True).calibrate(classifier, graded(20))
    for fpr in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="fpr"):
            Bright(fpr=fpr)
    with pytest.raises(ValueError, match="threshold"):
        Bright(threshold=math.nan)


def test_an_image_without_a_score_is_flagged():
    found = Bright(broken=True, threshold=math.inf).predict(make_base(), make_images(2))
    assert found.flagged.all()
