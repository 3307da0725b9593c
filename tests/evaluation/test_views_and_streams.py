"""Views of strangers, detectors, defences with a stream state, and what an attack's steps may look at."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from test_defence_evaluation import NAMES, Images, Toy, make_base, make_images, plain
from test_evaluation import Rank, Watched, crash
from torch.utils._python_dispatch import TorchDispatchMode

from hf_robust_clip.attacks.auto_attack import AutoAttack
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.suites import PGD, Member, Suite, Victim, find_adversarial
from hf_robust_clip.checks import Blindness
from hf_robust_clip.defences.base import Prediction, Traits
from hf_robust_clip.defences.undefended import Undefended
from hf_robust_clip.evaluation.attack_views import (
    ATTACKERS_SEED,
    BPDA,
    VIEWS,
    Adaptive,
    AttackView,
    DefenceBlind,
    Static,
)
from hf_robust_clip.evaluation.loop import _Evaluation, evaluate_robustness
from hf_robust_clip.evaluation.settings import EvaluationSettings
from hf_robust_clip.prediction import withstood
from hf_robust_clip.threat_model import ThreatModel

EPS = "4/255"


def run(defence, view, attack, count=8, radii=(EPS,), **where):
    model = where.pop("model", None) or make_base()
    batch_size = where.pop("batch_size", 8)
    settings = EvaluationSettings(list(radii), attack=attack, view=view, batch_size=batch_size)
    return evaluate_robustness(model, Images(model, count), settings, defence=defence, **NAMES, **where)


# ---- no defence


def test_no_defence_is_the_defence_that_does_nothing():
    """The same report, without controls, with as many forwards."""
    reports, forwards = [], []
    for defence in (None, Undefended()):
        model, seen = make_base(), []
        model.visual_projection.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        reports.append(run(defence, Static(), PGD(3), model=model))
        forwards.append(len(seen))
    assert reports[0] == reports[1] and reports[0].defence is None
    assert 0 < reports[0].robust_accuracy[4 / 255] < 0.75
    # labels of `Images`; randomised: 2, optimising: 1; clean: 1; PGD's look at the start: 1, its steps: 3; verdict: 1
    assert forwards == [1 + 3 + 1 + 5] * 2


# ---- a view of a stranger


@dataclass(frozen=True)
class LastLogitsAlone(AttackView):
    """Sees the defence's answer only after a shift of the pixels."""

    shift: float = 0.0
    name: ClassVar[str] = "shifted"
    text: ClassVar[str] = "through the defence, shifted"
    goes_through: ClassVar[bool] = True

    def victim(self, scene, images_BCHW):
        return scene.defended(lambda pixels: scene.drawn((pixels + self.shift).clamp(0, 1), "through").logits)


def found_by(view, attack, defence):
    model = make_base()
    settings = EvaluationSettings([EPS], attack=attack, view=view)
    evaluation = _Evaluation(model, Images(model), settings, defence, None, None, False)
    evaluation.run()
    return evaluation.state.found


def test_a_view_of_a_stranger_is_one_class():
    own, known = found_by(LastLogitsAlone(), PGD(3), Toy()), found_by(Adaptive(), PGD(3), Toy())
    assert (own.levels, own.zeros, own.total) == (known.levels, known.zeros, known.total)
    settings = EvaluationSettings([EPS], view=LastLogitsAlone(), eot=2)
    assert (settings.seen.name, settings.seen.text) == ("shifted", "through the defence, shifted")
    assert settings.attack_parameters(6)["eot"] == 2
    assert found_by(LastLogitsAlone(shift=0.5), PGD(3), Toy()).levels != known.levels


def test_a_view_with_other_settings_is_another_evaluation(tmp_path):
    model = make_base()
    for shift, error in ((0.0, None), (0.1, "its defence is")):
        settings = EvaluationSettings([EPS], attack=PGD(1), view=LastLogitsAlone(shift))
        with nullcontext() if error is None else pytest.raises(ValueError, match=error):
            _Evaluation(model, Images(model, 2), settings, Toy(), None, tmp_path, False).run()


def test_attacks_without_gradients_ask_the_defence_itself():
    plan = EvaluationSettings([EPS], attack=AutoAttack(("apgd-ce", "square")), view=Adaptive()).plan(6)
    assert [type(view).__name__ for view, _ in plan] == ["Adaptive", "Queries"]
    plan = EvaluationSettings([EPS], attack=AutoAttack(("apgd-ce", "square")), view=DefenceBlind()).plan(6)
    assert [type(view).__name__ for view, _ in plan] == ["DefenceBlind", "DefenceBlind"]
    assert set(VIEWS) == {"static", "defence_blind", "transfer_from_adapted", "bpda", "adaptive", "queries"}


@dataclass(frozen=True)
class Whiten(Suite):
    """Each pixel to the top of the ball."""

    def members(self, num_classes):
        return [Member("up", lambda victim, images, labels, threat: (images + threat.eps).clamp(max=1))]

    def name(self, num_classes):
        return "up"

    def parameters(self, threat_models, num_classes):
        return {"brighter": True}


def test_an_attack_of_a_stranger_is_one_class():
    report = run(None, Static(), Whiten())
    assert list(report.after_each[4 / 255]) == ["up"]
    model = make_base()
    data = Images(model)
    with torch.no_grad():
        right = [model(x).logits.argmax(1) == data.labels for x in (data.images, (data.images + 4 / 255).clamp(max=1))]
    assert report.robust_accuracy[4 / 255] == float((right[0] & right[1]).double().mean())


# ---- detectors


@dataclass(frozen=True)
class Detector(Toy):
    """Takes an image for attacked that is brighter than the one it knows, on the mean by more than `most`."""

    most: float = 0.0
    count: int = 16

    def _predict(self, classifier, images_BCHW, state, seed, path):
        found = super()._predict(classifier, images_BCHW, state, seed, path)
        apart = images_BCHW.detach()[:, None] - make_images(self.count, seed=3)
        nearest = apart.abs().mean(dim=(2, 3, 4)).argmin(dim=1)
        score = apart[torch.arange(len(nearest)), nearest].mean(dim=(1, 2, 3))
        return replace(found, score=score, flagged=score > self.most)


def test_flags_are_errors_on_clean_images_and_withstand_on_attacked_ones():
    nothing, deaf = (run(defence, DefenceBlind(), PGD(3), 16) for defence in (Toy(), Detector(most=1.0)))
    assert deaf.robust_accuracy == nothing.robust_accuracy
    assert run(Detector(most=-1.0), DefenceBlind(), PGD(3), 16).clean_accuracy == 0
    report = run(Detector(), DefenceBlind(), PGD(3), 16)
    assert report.clean_accuracy == nothing.clean_accuracy
    assert report.robust_accuracy[4 / 255] > nothing.robust_accuracy[4 / 255]
    control = report.controls["static prompts"]
    assert control == {0.0: nothing.clean_accuracy, **nothing.robust_accuracy}  # a control raises no alarm


def test_an_attack_goes_on_until_it_is_not_seen_either():
    """Written out: an image falls at the first iterate of another class that is not flagged."""
    model, threat, defence = make_base(), ThreatModel(EPS), Detector()
    data = Images(model, 16)
    report = run(defence, Adaptive(), PGD(8), 16)
    clean = defence.predict(model, data.images)
    right = (clean.logits.argmax(1) == data.labels) & ~clean.flagged
    stands, caught = right.clone(), torch.zeros(16, dtype=torch.bool)
    adv = threat.random_start(data.images, 0)
    for step in range(9):
        found = defence.predict(model, adv)
        wrong = found.logits.argmax(1) != data.labels
        caught |= stands & wrong & found.flagged
        stands &= ~(wrong & ~found.flagged)
        if step < 8:
            adv.requires_grad_()
            (grad,) = torch.autograd.grad(cross_entropy(model(adv).logits, data.labels).sum(), adv)
            adv = threat.ascend(adv.detach(), grad, data.images, 2.5 * threat.eps / 8)
    assert (caught & ~stands).any()  # seen at first, and then no more
    assert (caught & stands).any()
    assert report.clean_accuracy == float(right.double().mean()) == 0.75
    assert report.robust_accuracy[4 / 255] == float(stands.double().mean())


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "square"])
def test_no_attack_lets_go_of_an_image_that_raises_an_alarm(name):
    """With every wrong class flagged it spends all that it has on every image."""
    model, threat = make_base(), ThreatModel("32/255")
    images = make_images(4, seed=3)
    with torch.no_grad():
        labels = model(images).logits.argmax(1)
    asked = []

    def predict(pixels, alarmed=True):
        asked.append(len(pixels))
        logits = model(pixels).logits
        return Prediction(logits, flagged=(logits.argmax(1) >= 0) & alarmed)

    suite = PGD(4) if name == "pgd" else AutoAttack((name,), num_steps=4, num_queries=6)
    counts = []
    for alarmed in (True, False):
        asked.clear()
        victim = Victim(lambda pixels, alarmed=alarmed: predict(pixels, alarmed), lambda pixels: model(pixels).logits)
        if name == "square":
            victim = replace(victim, surrogate=None)
        adv = find_adversarial(suite.members(6)[0], victim, images, labels, threat)
        assert withstood(victim.predict, adv, labels).all() == alarmed
        counts.append(sum(asked))
    assert counts[0] > counts[1]


# ---- streams


@dataclass(frozen=True)
class Stream(Toy):
    """Subtracts a part of the mean of all images before it."""

    share: float = 0.1

    @property
    def traits(self):
        return Traits(episodic=False)

    def start(self, classifier):
        return torch.zeros(3, 8, 8, dtype=torch.float64), 0

    def _predict(self, classifier, images_BCHW, state, seed, path):
        logits = []
        for image in images_BCHW:
            total, count = state
            with torch.set_grad_enabled(path != "none"):
                logits.append(classifier((image - self.share * total / max(count, 1))[None].clamp(0, 1)).logits)
            state = total + image.detach(), count + 1
        return Prediction(torch.cat(logits), state=state)


def logits_of(function, pixels):
    return function(pixels).logits


@pytest.mark.parametrize("view", [DefenceBlind(), Adaptive()], ids=["blind", "adaptive"])
def test_a_stream_is_written_out(view):
    """Each stage begins anew; each image is attacked with the state before it, the fallen ones too, and joins it as
    the attack left it."""
    model, defence, radii = make_base(), Stream(), ["2/255", "4/255"]
    data = Images(model)
    report = run(defence, view, PGD(2), radii=radii)
    kept = []
    for threat in (None, *map(ThreatModel, radii)):
        state, right = defence.start(model), []
        for image, label in zip(data.images.split(1), data.labels.split(1), strict=True):
            asked = partial(defence.predict, model, state=state)
            adv = image
            if threat is not None:
                through = partial(asked, seed=ATTACKERS_SEED, path="through")
                seen = model if isinstance(view, DefenceBlind) else through
                victim = Victim(asked, partial(logits_of, seen), to_the_end=isinstance(view, DefenceBlind))
                adv = find_adversarial(PGD(2).members(6)[0], victim, image, label, threat)
            found = asked(adv)
            state = found.state
            right.append(bool(found.logits.argmax(1) == label))
        kept.append(torch.tensor(right) & (kept[-1] if kept else True))
    shares = [float(own.double().mean()) for own in kept]
    assert [report.clean_accuracy, *report.robust_accuracy.values()] == shares
    assert 0 < shares[2] < shares[0]
    episodic = run(Toy(), view, PGD(2), radii=radii)
    assert episodic.per_class != report.per_class
    assert plain(run(defence, view, PGD(2), radii=radii, batch_size=3)) == plain(report)


def test_a_stage_of_a_stream_that_was_cut_short_begins_anew(tmp_path):
    settings = dict(radii=["2/255", "4/255"], batch_size=3, count=8)
    whole, before, after = Watched(PGD(2)), Watched(PGD(2), 13, crash), Watched(PGD(2))
    expected = plain(run(Stream(), Adaptive(), whole, **settings))
    assert len(whole.seen) == 16
    with pytest.raises(RuntimeError, match="the power went"):
        run(Stream(), Adaptive(), before, state_dir=tmp_path, **settings)
    assert plain(run(Stream(), Adaptive(), after, state_dir=tmp_path, **settings)) == expected
    assert after.seen == whole.seen[8:]
    nothing = Watched(PGD(2))
    assert plain(run(Stream(), Adaptive(), nothing, state_dir=tmp_path, **settings)) == expected
    assert nothing.seen == []


def test_a_stream_runs_on_one_process():
    with pytest.raises(ValueError, match="2 processes"):
        run(Stream(), Adaptive(), PGD(1), processes=Rank(0, 2))


# ---- what steps look at


class Looks(TorchDispatchMode):
    """Counts how often a number of pixels' kind, or a smallest and largest one, is carried to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "aminmax" or (name == "_local_scalar_dense" and args[0].is_floating_point()):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("suite", [PGD, lambda n: AutoAttack(("apgd-ce",), num_steps=n)], ids=["pgd", "apgd"])
@pytest.mark.parametrize("view", [Static(), DefenceBlind(), BPDA(), Adaptive()], ids=lambda view: view.name)
def test_no_step_of_an_attack_waits_for_a_look_at_pixels(view, suite):
    """As many looks for many steps as for few: images are looked at where they enter, and as they come out."""
    looks, gradients = [], []
    for steps in (2, 7):
        model = make_base()
        settings = EvaluationSettings([1e-6], attack=suite(steps), view=view)
        defence = Toy() if view.of_defence else Undefended()
        evaluation = _Evaluation(model, Images(model, 3), settings, defence, None, None, False)
        with Looks() as seen:
            evaluation.run()
        looks.append(seen.count)
        gradients.append(evaluation.state.found.total)
    assert gradients[1] > 2 * gradients[0]
    assert looks[0] == looks[1]


def test_zeros_are_counted_where_they_are_and_told_at_the_end():
    blindness = Blindness()
    with Looks() as seen:
        blindness(torch.tensor([0.0, 1.0, torch.nan]))
        blindness(torch.tensor([[0.0, 2.0]]))
    assert seen.count == 0
    assert (blindness.zeros, blindness.total, blindness.share) == (3, 5, 0.6)
