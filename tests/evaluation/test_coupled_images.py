"""Defences whose images change one another: batches are judged and attacked as wholes, or refused."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from prompted_clip import make_base, make_images
from test_defence_evaluation import NAMES as REPORT
from test_defence_evaluation import Images

from hf_robust_clip.attacks.auto_attack import AutoAttack
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.pgd import pgd
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.defences.base import Defence, Prediction
from hf_robust_clip.defences.clipure import CLIPure
from hf_robust_clip.evaluation.attack_views import ATTACKERS_SEED, Adaptive, AdaptiveWorst, DefenceBlind, Scene
from hf_robust_clip.evaluation.loop import _Evaluation, evaluate_robustness
from hf_robust_clip.evaluation.settings import EvaluationSettings
from hf_robust_clip.threat_model import ThreatModel


def evaluate(defence, view=None, attack=None, count=6, model=None, data=None, **changes):
    model = model or make_base()
    where = {name: changes.pop(name) for name in ("state_dir", "processes") if name in changes}
    attack = attack or PGD(3)
    seen = {} if view is None else {"view": view}
    settings = EvaluationSettings(["8/255"], attack=attack, batch_size=3, **seen, **changes)
    return evaluate_robustness(model, data or Images(model, count), settings, defence=defence, **REPORT, **where)


TOGETHER = CLIPure(num_steps=3, step_size=2.0, normalised_over="batch")


def test_every_batch_is_judged_and_attacked_whole(monkeypatch):
    """By hand: batches of three, each attacked to the end, whatever falls on the way."""
    model = make_base().requires_grad_(False)
    data = Images(model, 6)
    data.labels = torch.cat([TOGETHER.predict(model, part).logits.argmax(1) for part in data.images.split(3)])
    data.labels[1] = (data.labels[1] + 1) % 6  # wrong from the start, and it stays in its batch
    stands = []
    for rows in (slice(0, 3), slice(3, 6)):
        labels = data.labels[rows]

        def loss(pixels, labels=labels):
            return cross_entropy(TOGETHER.predict(model, pixels, seed=ATTACKERS_SEED, path="through").logits, labels)

        adv = pgd(loss, data.images[rows], ThreatModel("8/255", "linf"), num_steps=3, step_size=2.5 * 8 / 255 / 3,
                  random_start=True, seed=0, keep_best=True)  # fmt: skip
        stands += (TOGETHER.predict(model, adv).logits.argmax(1) == labels).tolist()
    verdict, seen = Scene.verdict, []
    monkeypatch.setattr(Scene, "verdict", lambda self, images: seen.append(len(images)) or verdict(self, images))
    report = evaluate(TOGETHER, Adaptive(), model=model, data=data)
    assert seen == [3, 3, 3, 3]
    assert report.clean_accuracy == 5 / 6
    stands[1] = False
    assert report.robust_accuracy[8 / 255] == sum(stands) / 6
    assert report.attack_parameters["counts"] == "the iterate of highest loss"
    assert report.defence["traits"]["couples_images"] and "batches of 3" in " ".join(report.defence["remarks"])


def test_attacks_that_let_go_of_images_and_several_processes_are_refused():
    for attack in (AdaptiveWorst(), AutoAttack(("square",))):
        with pytest.raises(ValueError, match="attack="):
            evaluate(TOGETHER, None if isinstance(attack, AdaptiveWorst) else Adaptive(), attack)
    with pytest.raises(ValueError, match="processes"):
        evaluate(TOGETHER, DefenceBlind(), processes=SimpleNamespace(process_index=0, num_processes=2))
    with pytest.raises(ValueError, match="memory_budget"):
        replace(TOGETHER, memory_budget=1e-9).predict(make_base(), make_images(2))
    model = make_base()
    images = make_images(2)
    alone = replace(TOGETHER, memory_budget=1e-9).predict(model, images[:1]).logits
    torch.testing.assert_close(alone, replace(TOGETHER, normalised_over="image").predict(model, images).logits[:1])


def test_batches_stay_the_same_in_a_run_that_goes_on(tmp_path, monkeypatch):
    whole = evaluate(TOGETHER, DefenceBlind())
    model = make_base()
    data = Images(model, 6)
    with monkeypatch.context() as patch:
        judge, calls = _Evaluation.judge, []

        def killed(self, stage, images, labels):
            calls.append(len(images))
            if len(calls) == 4:  # the second batch of the attack
                raise KeyboardInterrupt
            return judge(self, stage, images, labels)

        patch.setattr(_Evaluation, "judge", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(TOGETHER, DefenceBlind(), model=model, data=data, state_dir=tmp_path)
    again = evaluate(TOGETHER, DefenceBlind(), model=model, data=data, state_dir=tmp_path)
    assert again.after_each == whole.after_each and again.per_class == whole.per_class
    assert again.controls == whole.controls
    settings = EvaluationSettings(["8/255"], attack=PGD(3), view=DefenceBlind(), batch_size=2)
    with pytest.raises(ValueError, match="state of another evaluation"):
        evaluate_robustness(model, data, settings, defence=TOGETHER, state_dir=tmp_path, **REPORT)


@dataclass(frozen=True, kw_only=True)
class Silent(Defence):
    """Centres the logits of a batch, and doesn't say so."""

    def _predict(self, classifier, images_BCHW, state, seed, path):
        logits = classifier(images_BCHW).logits
        return Prediction(logits - logits.mean(dim=0))


def test_a_defence_that_couples_images_must_say_so():
    with pytest.raises(ValueError, match="couples_images"):
        evaluate(Silent(), DefenceBlind())


def test_the_worst_attack_covers_it_and_the_report_tells_what_comes_back():
    report = evaluate(CLIPure(), None, AdaptiveWorst(pgd_steps=2, apgd_steps=2, num_queries=2), count=3)
    left = list(report.after_each[8 / 255].values())
    assert len(left) == 7 and left == sorted(left, reverse=True)
    remark = CLIPure().remarks(make_base(), Images(make_base(), 3).images)
    assert tuple(report.defence.get("remarks", ())) == remark
