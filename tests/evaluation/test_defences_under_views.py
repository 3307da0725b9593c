"""Every defence of the package under every view of an attack: one that a view can't attack must say why."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from attackable import check_attackable
from defence_rows import ROWS, make
from prompted_clip import make_base, make_images
from test_defence_evaluation import NAMES, Images

import hf_robust_clip
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.defences import defence_classes
from hf_robust_clip.defences.base import Defence, Prediction
from hf_robust_clip.defences.detector import Detector
from hf_robust_clip.evaluation.attack_views import BPDA, VIEWS, AdaptiveWorst
from hf_robust_clip.evaluation.loop import evaluate_robustness
from hf_robust_clip.evaluation.settings import EvaluationSettings

SAME = {
    "tapt-V",
    "tapt-VLJ",
    "tpt-T",
    "r_tpt-VLI",
    "ttc-VLI",
}  # as another row, with other prompts
WORST = AdaptiveWorst(pgd_steps=2, apgd_steps=2, num_queries=0)
OF_DEFENCES = {name: view for name, view in VIEWS.items() if view.of_defence}


def grey_images(count=2):
    return ((0.2 + 0.6 * make_images(count)) * 255).round() / 255


def test_every_exported_defence_has_a_row():
    exported = [getattr(hf_robust_clip, name) for name in hf_robust_clip.__all__]
    exported = {one for one in exported if isinstance(one, type) and issubclass(one, Defence)}
    concrete = {one for one in exported if one.defends and not one.__abstractmethods__}
    rows = {type(defence) for row, (_, defence) in ROWS.items() if row not in SAME}
    assert {*concrete, *defence_classes().values()} == rows


@pytest.mark.parametrize("row", [row for row in ROWS if row not in SAME])
def test_every_view_attacks_every_defence(row):
    classifier, defence = make(row)
    images = grey_images(1 + defence.traits.couples_images)
    for view in OF_DEFENCES.values():
        check_attackable(defence, classifier, view, images)


# ---- what is planted


@dataclass(frozen=True, kw_only=True)
class Planted(Defence):
    """The classifier's logits, and half those of the mirrored image; with ways to break gradients."""

    breaks: str = "nothing"

    def _predict(self, classifier, images_BCHW, state, seed, path):
        def logits(pixels):
            return classifier(pixels).logits

        with torch.set_grad_enabled(path != "none" and self.breaks != f"no graph {path}"):
            own, mirrored = logits(images_BCHW), logits(images_BCHW.flip(3))
            if self.breaks == f"zeros {path}":
                own, mirrored = own.detach() + 0 * images_BCHW.sum(), mirrored.detach()
            if self.breaks == f"a part {path}":
                mirrored = mirrored.detach()
            if self.breaks == f"another {path}":
                mirrored = mirrored * 0.9
        return Prediction(own + 0.5 * mirrored)


@dataclass(frozen=True, kw_only=True)
class Flat(Planted):
    """Says that it has no gradient."""

    masked: ClassVar = {"through": "it is flat"}


@dataclass(frozen=True, kw_only=True)
class Alarm(Detector):
    """A score whose gradient is that of another."""

    threshold: float = 1e3
    right: bool = False

    def scored(self, classifier, images_BCHW, seed, path):
        with torch.set_grad_enabled(path != "none"):
            logits = classifier(images_BCHW).logits
            score = images_BCHW.square().sum(dim=(1, 2, 3))
            score = score if self.right else score + (images_BCHW - images_BCHW.detach()).sum(dim=(1, 2, 3))
        return Prediction(logits, score=score)


@pytest.mark.parametrize(
    ("defence", "views"),
    [
        (Planted(), ()),
        (Planted(breaks="no graph through"), ("adaptive",)),
        (Planted(breaks="no graph identity"), ("bpda",)),
        (Planted(breaks="zeros through"), ("adaptive",)),
        (Planted(breaks="zeros identity"), ("bpda",)),
        (Planted(breaks="a part through"), ("adaptive",)),
        (Planted(breaks="another through"), ("adaptive",)),
        (Planted(breaks="another identity"), ("bpda",)),
        (Flat(breaks="zeros through"), ()),
        (Flat(), ("adaptive",)),
        (Alarm(right=True), ()),
        (Alarm(), ("adaptive",)),
    ],
    ids=lambda value: getattr(value, "breaks", None) or type(value).__name__,
)
def test_a_defence_that_breaks_its_gradients_is_caught(defence, views):
    classifier, caught = make_base(), []
    for name, view in OF_DEFENCES.items():
        try:
            check_attackable(defence, classifier, view, grey_images())
        except AssertionError:
            caught.append(name)
    assert tuple(caught) == views


# ---- what an evaluation says of a stranger's


def judged(defence, attack=None, view=None, count=3):
    model = make_base()
    settings = EvaluationSettings(["4/255"], attack=attack or PGD(2), **({"view": view} if view else {}))
    return evaluate_robustness(model, Images(model, count), settings, defence=defence, **NAMES)


@pytest.mark.parametrize(("path", "view"), [("through", "adaptive"), ("identity", "bpda")])
def test_a_defence_without_a_gradient_is_refused_before_any_attack(path, view, monkeypatch):
    def attacked(*_):
        raise AssertionError("an attack ran")

    monkeypatch.setattr("hf_robust_clip.evaluation.loop.find_adversarial", attacked)
    for how in (dict(attack=WORST), dict(view=VIEWS[view])):
        with pytest.raises(ValueError, match=f"{view}.*no gradient"):
            judged(Planted(breaks=f"no graph {path}"), **how)


def test_a_defence_without_a_gradient_along_one_path_is_attacked_along_the_other():
    assert "remarks" not in judged(Planted(breaks="no graph through"), view=BPDA()).defence


@pytest.mark.parametrize("cls", [Planted, Flat])
def test_zeros_are_in_the_report_though_other_attacks_drown_them(cls, caplog):
    with caplog.at_level(logging.WARNING):
        report = judged(cls(breaks="zeros through"), attack=WORST)
    view, attacks = report.defence["remarks"]
    assert "'adaptive'" in view and ("it is flat" in view) == (cls is Flat) and view in caplog.text
    assert attacks.endswith(": adaptive pgd 100.0 %, adaptive apgd-ce 100.0 %")
    assert "remarks" not in judged(cls(), attack=WORST).defence


@pytest.mark.parametrize("view", ["defence_blind", "transfer_from_adapted"])
def test_views_past_the_defence_ask_it_for_no_gradient(view):
    assert "remarks" not in judged(Planted(breaks="no graph through"), view=VIEWS[view]).defence
