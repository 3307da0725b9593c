"""AUROC and alarms: worked numbers, scikit-learn's, and what stands in a report."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_defence_evaluation import Images, make_base
from test_views_and_streams import run

from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.attacks.targeted import TargetedPGD
from hf_robust_clip.defences.base import Prediction
from hf_robust_clip.defences.detector import Detector
from hf_robust_clip.evaluation.attack_views import Adaptive, AdaptiveWorst, DefenceBlind, Static, evading
from hf_robust_clip.evaluation.detection import Alarm, alarms_of, auroc, detection_report, tpr_at
from hf_robust_clip.report.tables import detections

EPS = 4 / 255
CLEAN, ATTACKED = [-0.9, -0.8, -0.7, -0.6], [-0.65, -0.5, -0.4, -0.3]  # scores are -S


def figures(report, member=None):
    rows = (row for row in report.measurements if row.metric.startswith("detection") and row.member == member)
    return {(row.metric, row.eps): (row.value, row.n) for row in rows}


def test_worked_numbers():
    assert auroc(CLEAN, ATTACKED) == pytest.approx(0.9375, abs=1e-9)
    for tau, tpr, fpr in ((0.6, 0.75, 0.0), (0.65, 0.75, 0.25), (0.7, 1.0, 0.25)):
        flagged = [np.mean([-score < tau for score in scores]) for scores in (ATTACKED, CLEAN)]
        assert flagged == [tpr, fpr]
    assert tpr_at(CLEAN, ATTACKED) == 0.75 and tpr_at(CLEAN, ATTACKED, 0.25) == 1.0
    assert tpr_at(CLEAN, ATTACKED, 0.24) == 0.75


def test_auroc_is_that_of_scikit_learn_and_of_counted_pairs():
    draws = np.random.default_rng(0)
    clean, attacked = draws.integers(0, 8, 30) / 8, draws.integers(2, 10, 20) / 8
    pairs = np.mean([(a > c) + 0.5 * (a == c) for a in attacked for c in clean])
    assert auroc(clean, attacked) == pytest.approx(pairs, abs=1e-12)
    assert auroc(clean, attacked) == roc_auc_score([0] * 30 + [1] * 20, [*clean, *attacked])
    assert tpr_at(clean, attacked) == np.mean(attacked > 7 / 8)  # a lower one would flag more than 5 %


def test_a_detection_report_counts_whom_it_says():
    clean = {
        i: Alarm(score, score > -0.65, right) for i, (score, right) in enumerate(zip(CLEAN, [1, 1, 1, 0], strict=True))
    }
    attacked = {i: Alarm(score, score > -0.45, i == 0) for i, score in enumerate(ATTACKED)}
    found = {(row.metric, row.member): row for row in detection_report(clean, {(EPS, "pgd"): attacked})}
    assert found["detection_fpr", None].value == 0.25 and found["detection_fpr", None].n == 4
    assert found["detection_fpr_of_errors", None].value == 1 and found["detection_fpr_of_errors", None].n == 1
    row = found["detection_auroc", "pgd"]  # without the image whose class was wrong before
    assert (row.value, row.n) == (auroc(CLEAN, ATTACKED[:3]), 3) and row.interval is None
    assert found["detection_tpr_at_5_fpr", "pgd"].value == pytest.approx(2 / 3)
    row = found["detection_of_successful", "pgd"]  # of the images 1 and 2 that got another class
    assert (row.value, row.n) == (0.5, 2)
    assert found["detection_auroc_of_successful", "pgd"].value == 1.0
    assert len(detection_report(clean, {(EPS, None): {}})) == 2
    with pytest.raises(ValueError, match="clean"):
        detection_report({}, {})
    with pytest.raises(ValueError, match="numbers"):
        auroc([0.0, float("nan")], [1.0])
    with pytest.raises(ValueError, match="0 attacked"):
        auroc([0.0], [])


def test_alarms_are_those_of_detectors_alone():
    logits, labels = torch.eye(2), torch.tensor([0, 0])
    assert alarms_of(Prediction(logits), labels) == []
    found = Prediction(logits, score=torch.tensor([1.0, 2.0]), flagged=torch.tensor([True, False]))
    assert alarms_of(found, labels) == [(1.0, True, True), (2.0, False, False)]


@cache
def other_model():
    return make_base(seed=1).requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Twin(Detector):
    """Flags where another model finds the class unlikely: the score of class c is -log p of the other."""

    blind: bool = False  # no gradient, and one score for all classes

    def scored(self, classifier, images_BCHW, seed, path):
        other = other_model()
        with torch.set_grad_enabled(path != "none"):
            logits = classifier(images_BCHW).logits
            scores = -(other(images_BCHW).logits / 3).log_softmax(dim=1)
        score = scores.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
        own = {"score": score.detach()} if self.blind else {"score": score, "class_scores": scores}
        return Prediction(logits, **own)


@pytest.fixture(scope="module")
def twins():
    model = make_base()
    data = Images(model, 12)
    with torch.no_grad():
        labels = model(data.images).logits.argmax(dim=1)
        score = Twin().score(model, data.images)
    return [Twin(threshold=float(score.max()), blind=blind) for blind in (False, True)], labels


def test_evading_keeps_the_named_class_highest_and_has_the_gradient_of_log_p_and_score(twins):
    (twin, blind), _ = twins
    model = make_base()
    images = Images(model, 12).images.requires_grad_()
    found = twin.predict(model, images, path="through")
    values = evading(found, 20.0)
    assert torch.equal(values.argmax(dim=1), found.logits.argmax(dim=1))
    exact = found.logits.log_softmax(dim=1) - 20.0 * found.class_scores
    assert not torch.equal(exact.argmax(dim=1), found.logits.argmax(dim=1))
    for one in range(6):
        own, other = (torch.autograd.grad(x[:, one].sum(), images, retain_graph=True)[0] for x in (values, exact))
        torch.testing.assert_close(own, other)
    found = blind.predict(model, images, path="through")
    assert evading(found, 20.0) is found.logits
    alone = Prediction(found.logits, score=found.logits[:, 0])
    torch.testing.assert_close(
        evading(alone, 2.0), found.logits.log_softmax(dim=1) - 2 * found.logits[:, :1], rtol=0, atol=1e-9
    )


def test_an_attack_through_a_detector_evades_it(twins):
    (twin, blind), _ = twins
    settings = dict(attack=TargetedPGD(6), count=12, radii=["8/255"])
    aware, unaware = (run(one, Adaptive(3.0), **settings) for one in (twin, blind))
    assert aware.clean_accuracy == unaware.clean_accuracy > 0.5
    assert aware.robust_accuracy[8 / 255] < unaware.robust_accuracy[8 / 255]


def test_a_report_of_a_detector_has_its_figures_and_others_have_none(twins, tmp_path):
    (twin, _), _ = twins
    worst = AdaptiveWorst(pgd_steps=2, apgd_steps=2, num_queries=2)
    report = run(twin, DefenceBlind(), PGD(3), 12, state_dir=tmp_path)
    own = figures(report)
    model = make_base()
    data = Images(model, 12)
    clean = twin.predict(model, data.images)
    right = clean.logits.argmax(dim=1) == data.labels
    assert own["detection_fpr", 0.0] == (float(clean.flagged.double().mean()), 12)
    assert own["detection_auroc", EPS][1] == int(right.sum())
    assert figures(report, "pgd") == {key: value for key, value in own.items() if key[1]}
    again = run(twin, DefenceBlind(), PGD(3), 12, state_dir=tmp_path)
    assert figures(again) == own  # read from the file
    report = run(twin, Static(), worst, 12)
    assert list(report.after_each[EPS])[-2:] == ["evading 3", "evading 30"]
    told = detections([report])
    assert told is not None and told.rows[0][1] == "clean"
    assert any(row[1] == "4/255 evading 30" for row in told.rows) or report.robust_accuracy[EPS] == 0
    assert told.rows[-1][1] == "4/255 all"
