"""Attacks through defences, their controls, and what a report of a defence must hold."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from prompted_clip import make_base, make_images, make_prompted
from test_evaluation import Rank, Watched, crash

from hf_robust_clip.attacks.auto_attack import AutoAttack
from hf_robust_clip.attacks.losses import cross_entropy
from hf_robust_clip.attacks.pgd import pgd
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.attacks.views import STATIC
from hf_robust_clip.defences.base import Defence, Prediction, Traits
from hf_robust_clip.defences.ensemble import Ensemble
from hf_robust_clip.defences.tapt import TAPT
from hf_robust_clip.defences.tpt import TPT
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.evaluation.attack_views import ATTACKERS_SEED, VIEWS, AdaptiveWorst
from hf_robust_clip.evaluation.controls import with_random_prompts
from hf_robust_clip.evaluation.loop import evaluate_robustness
from hf_robust_clip.evaluation.settings import EvaluationSettings
from hf_robust_clip.paper import Paper
from hf_robust_clip.prompts.access import with_prompts
from hf_robust_clip.report import CONTROLS
from hf_robust_clip.threat_model import ThreatModel

NAMES = dict(name="name", task="task", model_id="id")
TARGETS = ("defence_blind", "transfer_from_adapted", "bpda", "adaptive")
RADII = ["1/255", "2/255"]
TUNED = dict(num_views=4, selected=0.5, learning_rate=0.5)
WORST = AdaptiveWorst(pgd_steps=3, apgd_steps=3, num_queries=5)


@dataclass(frozen=True)
class Toy(Defence):
    """The classifier itself, on what `change` makes of the images."""

    randomised: bool = False
    paper: ClassVar[Paper] = Paper("toy", "", "", "", "")

    @property
    def traits(self):
        return Traits(self.randomised, optimising=False)

    def change(self, images, seed, path):
        return images

    def _predict(self, classifier, images_BCHW, state, seed, path):
        with torch.set_grad_enabled(path != "none"):
            logits = classifier(self.change(images_BCHW, seed, path)).logits
        return Prediction(logits, torch.zeros(len(logits), dtype=torch.bool), {})


@dataclass(frozen=True)
class Rounding(Toy):
    """Coarse grey levels: no gradient, unless the rounding counts as the identity."""

    levels: int = 60

    def change(self, images, seed, path):
        rounded = (images * self.levels).round() / self.levels
        return images + (rounded - images).detach() if path == "identity" else rounded


@dataclass(frozen=True)
class Noise(Toy):
    """Noise by the seed, the same for all images."""

    randomised: bool = True
    size: float = 0.02

    def change(self, images, seed, path):
        noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
        return (images + self.size * noise).clamp(0, 1)


class Images:
    """Some images with labels as the classifier sees them, but for every fourth."""

    dataset_id, revision, split, attack_resolution = "random", "none", "test", None

    def __init__(self, model, count=8):
        self.images = make_images(count, seed=3)
        with torch.no_grad():
            self.labels = model(self.images).logits.argmax(1)
        self.labels[::4] = (self.labels[::4] + 1) % 6

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


def run(defence, target="defence_blind", attack=None, prompted=True, count=8, **changes):
    model = make_prompted("V").get_base_model() if prompted else make_base()
    where = {name: changes.pop(name) for name in ("state_dir", "processes") if name in changes}
    attack = attack or (WORST if target == "adaptive_worst" else PGD(3))
    view = {} if isinstance(attack, AdaptiveWorst) else {"view": VIEWS[target]}
    settings = EvaluationSettings(**{"radii": RADII, "attack": attack, **view, **changes})
    return evaluate_robustness(model, Images(model, count), settings, defence=defence, **NAMES, **where)


def plain(report):
    """All that must be equal in a repetition."""
    values = json.loads(json.dumps(asdict(report)))
    if values["defence"]:
        del values["defence"]["ms_per_image"]
    return values


def test_a_defence_that_does_nothing_has_the_figures_of_the_classifier():
    """Its only difference: a blind attack keeps the highest loss, which is one of the iterates."""
    static = run(None, "static")
    assert static.defence is None
    assert 0 < static.robust_accuracy[2 / 255] < static.clean_accuracy == 0.75
    for target in TARGETS[1:]:
        report = run(Toy(), target)
        assert (report.clean_accuracy, report.per_class) == (static.clean_accuracy, static.per_class)
        assert report.robust_accuracy == static.robust_accuracy
        assert report.after_each == static.after_each
        assert list(report.controls) == list(CONTROLS)
        assert report.controls["static prompts"] == {0.0: 0.75, **static.robust_accuracy}
    assert run(Toy()).robust_accuracy == static.robust_accuracy
    auto = AutoAttack(("apgd-ce", "square"), num_steps=2, num_queries=4)
    static = run(None, "static", auto, radii=["2/255"], count=4)
    for target in TARGETS:
        assert run(Toy(), target, auto, radii=["2/255"], count=4).after_each == static.after_each


def test_a_blind_attack_and_the_controls_are_written_out():
    """Every image is attacked, whatever the defence makes of it, and every judge sees the same images."""
    model = make_prompted("V").get_base_model()
    data, defence, ensemble = Images(model), Noise(size=0.3), Ensemble()
    report = run(defence)
    judges = {
        "defence": lambda pixels: defence.predict(model, pixels).logits,
        "static prompts": lambda pixels: model(pixels).logits,
        "ensemble-64": lambda pixels: ensemble.predict(model, pixels).logits,
    }
    right = {}
    for name, judge in judges.items():
        with torch.no_grad():
            right[name] = [judge(data.images).argmax(1) == data.labels]
    for radius in RADII:
        adv = pgd(
            lambda pixels: cross_entropy(model(pixels).logits, data.labels),
            data.images, ThreatModel(radius), num_steps=3, step_size=2.5 * ThreatModel(radius).eps / 3, keep_best=True,
        )  # fmt: skip
        for name, judge in judges.items():
            with torch.no_grad():
                right[name].append(right[name][-1] & (judge(adv).argmax(1) == data.labels))
    shares = {name: [float(each.double().mean()) for each in own] for name, own in right.items()}
    assert [report.clean_accuracy, *report.robust_accuracy.values()] == shares.pop("defence")
    for name, own in shares.items():
        assert list(report.controls[name].values()) == own
    assert report.attack_parameters["counts"] == "the iterate of highest loss"
    assert (report.defence["tuned"], report.defence["fallbacks"]) == (0, 0)
    assert report.defence["ms_per_image"] > 0


def test_rounding_masks_its_gradient_from_none_but_the_naive():
    through = run(Rounding(), "adaptive")
    assert through.zero_gradient_share == 1
    assert through.robust_accuracy[2 / 255] > 0
    for target in ("bpda", "transfer_from_adapted"):
        report = run(Rounding(), target)
        assert report.zero_gradient_share < 0.1
        assert report.robust_accuracy[2 / 255] < through.robust_accuracy[2 / 255]


@pytest.mark.parametrize(
    ("defence", "eot"),
    [(Noise(size=0.1), 2), (Rounding(), 1), (TPT(num_views=4, selected=0.5), 1)],
    ids=["noise", "rounding", "tpt"],
)
def test_the_worst_is_at_most_the_blind_and_says_which_attack_did_it(defence, eot):
    settings = {"prompted": not isinstance(defence, TPT), "count": 5}
    blind = run(defence, "defence_blind", **settings)
    worst = run(defence, "adaptive_worst", eot=eot, **settings)
    assert worst.attack == "PGD-3+APGD-3+Square-5"
    names = ["blind pgd", "blind apgd-ce", "transfer pgd", "bpda pgd", "adaptive pgd", "adaptive apgd-ce", "square"]
    assert [list(left) for left in worst.after_each.values()] == [names] * 2
    assert worst.attack_parameters["eot"] == eot
    assert worst.clean_accuracy == blind.clean_accuracy
    assert worst.defence["traits"] == asdict(defence.traits)
    for radius, left in worst.after_each.items():
        values = list(left.values())
        assert values == sorted(values, reverse=True)
        assert values[-1] <= blind.robust_accuracy[radius]
    assert worst.after_each[1 / 255]["blind pgd"] == blind.robust_accuracy[1 / 255]
    for name, (images, _, robust) in worst.per_class.items():
        assert images == blind.per_class[name][0]
        assert robust <= blind.per_class[name][2]


def test_members_that_take_no_steps_are_left_out_and_named():
    suite = AdaptiveWorst(pgd_steps=2, apgd_steps=0, num_queries=0)
    report = run(Toy(), "adaptive_worst", suite, count=2)
    assert list(report.after_each[1 / 255]) == ["blind pgd", "transfer pgd", "bpda pgd", "adaptive pgd"]
    assert report.attack == "PGD-2"
    assert report.attack_parameters["left_out"] == {
        "blind apgd-ce": "its number is 0",
        "adaptive apgd-ce": "its number is 0",
        "square": "its number is 0",
    }


@pytest.mark.parametrize("defence", [TAPT(**TUNED, align_weight=0), TTC(tau=2)], ids=["tapt", "ttc"])
def test_a_transferred_attack_is_written_out(defence):
    """On what tuning left for the clean image: its prompts, or the counter-perturbation."""
    model = make_prompted("V").get_base_model()
    data, threat_model, found = Images(model), ThreatModel("16/255"), []
    report = run(defence, "transfer_from_adapted", radii=["16/255"], batch_size=3)
    for image, label in zip(data.images.split(1), data.labels.split(1), strict=True):
        own = defence.predict(model, image, seed=ATTACKERS_SEED)
        assert bool(own.prompts) == isinstance(defence, TAPT)
        moved = 0 if own.images is None else own.images - image

        def fixed(pixels, own=own, moved=moved):
            return with_prompts(model, own.prompts, lambda: model((pixels + moved).clamp(0, 1)).logits)

        adv = pgd(
            lambda pixels, label=label: cross_entropy(fixed(pixels), label),
            image, threat_model, num_steps=3, step_size=2.5 * threat_model.eps / 3, keep_best=True,
        )  # fmt: skip
        right = [int(defence.predict(model, pixels).logits.argmax(1) == label) for pixels in (image, adv)]
        found.append((right[0], right[0] * right[1]))
    clean, robust = (sum(column) / len(found) for column in zip(*found, strict=True))
    assert (report.clean_accuracy, report.robust_accuracy[16 / 255]) == (clean, robust)
    assert robust < clean


def test_each_image_keeps_its_own_prompts_where_attacks_let_go_of_images():
    settings = dict(attack=AutoAttack(("apgd-ce",), num_steps=2), prompted=False, count=6)
    reports = [run(TPT(**TUNED), "transfer_from_adapted", batch_size=size, **settings) for size in (1, 6)]
    assert plain(reports[0]) == plain(reports[1])
    assert reports[0].defence["tuned"] > 0


def test_ensemble_is_its_own_control():
    report = run(Ensemble(), radii=["2/255"], count=4)
    assert report.controls["ensemble-64"] == {0.0: report.clean_accuracy, **report.robust_accuracy}


def test_the_model_comes_back_and_no_control_leaves_a_trace():
    model = make_prompted("V").train().get_base_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, asked = [*model.named_modules()], [p.requires_grad for p in model.parameters()]
    data = Images(model.eval(), 3)
    model.train()
    settings = EvaluationSettings(["2/255"], attack=PGD(2), view=VIEWS["adaptive"])
    evaluate_robustness(model, data, settings, defence=Noise(), **NAMES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [*model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == asked
    assert model.training


def test_the_random_control_has_no_adapters_of_the_model():
    """The same whatever prompts the model has, and not the plain classifier; the global random state is as it was."""
    images, base = make_images(4), make_base()
    state = torch.get_rng_state()
    expected = with_random_prompts(base)
    assert torch.equal(torch.get_rng_state(), state)
    prompts = [p for name, p in expected.named_parameters() if "clip_prompt_tokens" in name]
    assert [tuple(p.shape) for p in prompts] == [(2, 20)] * 3
    assert 0.015 < torch.cat(prompts).std() < 0.025
    with torch.no_grad():
        logits = expected(images).logits
        assert not torch.allclose(logits, base(images).logits, atol=1e-6)
        for row in ("V", "VLI", "pixel-border"):
            model = make_prompted(row).get_base_model()
            assert torch.equal(with_random_prompts(model)(images).logits, logits)
            assert not torch.allclose(model(images).logits, logits, atol=1e-3)


# ---- interrupted runs, several processes


@pytest.mark.parametrize("target", ["defence_blind", "adaptive"])
def test_an_interrupted_run_and_several_processes_end_with_the_same_report(target, tmp_path):
    go = partial(run, Noise(size=0.1), target, batch_size=3)
    whole, before, after = Watched(PGD(2)), Watched(PGD(2), 3, crash), Watched(PGD(2))
    expected = plain(go(attack=whole))
    assert expected == plain(go(attack=Watched(PGD(2)), batch_size=8))
    assert sum(map(len, whole.seen)) == 16 if target == "defence_blind" else sum(map(len, whole.seen)) < 16
    with pytest.raises(RuntimeError, match="the power went"):
        go(attack=before, state_dir=tmp_path / "one")
    assert plain(go(attack=after, state_dir=tmp_path / "one")) == expected
    assert before.seen + after.seen == whole.seen
    for rank in range(2):
        go(attack=Watched(PGD(2)), state_dir=tmp_path / "two", processes=Rank(rank, 2))
    assert plain(go(attack=Watched(PGD(2), 0, crash), state_dir=tmp_path / "two")) == expected


@pytest.mark.parametrize(
    ("defence", "changes"),
    [(Noise(size=0.2), {}), (Rounding(), {}), (Noise(), {"target": "bpda"}), (Noise(), {"eot": 2})],
    ids=["parameters", "defence", "target", "eot"],
)
def test_the_state_of_another_defence_is_refused(defence, changes, tmp_path):
    settings = {"target": "adaptive", "attack": PGD(1), "count": 2, "state_dir": tmp_path}
    run(Noise(), **settings)
    with pytest.raises(ValueError, match="state of another evaluation: its defence is"):
        run(defence, **{**settings, **changes})


# ---- what is refused


@pytest.mark.parametrize(
    ("defence", "changes", "message"),
    [
        (None, {"target": "adaptive"}, "'adaptive'.*defence="),
        (None, {"attack": WORST}, "'adaptive_worst'.*defence="),
        (Toy(), {"target": "static"}, "'static'.*toy"),
        (Toy(), {"attack": WORST, "view": VIEWS["adaptive"]}, "view=Adaptive"),
        (Toy(), {"target": "adaptive", "eot": 0}, "eot=0 must be"),
        (Toy(), {"target": "defence_blind", "eot": 2}, "eot=2"),
        (None, {"target": "static", "eot": 2}, "eot=2"),
        (Toy(), {"target": "adaptive", "attack": AutoAttack.rand()}, "set eot of EvaluationSettings"),
    ],
)
def test_targets_that_do_not_fit_are_refused(defence, changes, message):
    with pytest.raises(ValueError, match=message):
        run(defence, **changes)


def test_suites_without_an_attack_are_refused():
    with pytest.raises(ValueError, match="no attack is left"):
        AdaptiveWorst(0, 0, 0)
    with pytest.raises(ValueError, match="pgd_steps=-1 must be"):
        AdaptiveWorst(-1)


def test_a_report_of_a_defence_needs_target_and_controls():
    report = run(Noise(), count=2)
    with pytest.raises(ValueError, match="'static' says nothing of toy"):
        replace(report, view=STATIC)
    with pytest.raises(ValueError, match="controls ensemble-64"):
        replace(report, measurements=[own for own in report.measurements if own.judge != "ensemble-64"])
    with pytest.raises(ValueError, match="defence is missing"):
        replace(report, defence=None)
    assert replace(report) == report


@dataclass(frozen=True)
class Failing(Toy):
    """Says of every other image that its tuning was not finite."""

    def _predict(self, classifier, images_BCHW, state, seed, path):
        found = super()._predict(classifier, images_BCHW, state, seed, path)
        return replace(found, fell_back=torch.arange(len(images_BCHW)) % 2 == 0)


def test_predictions_that_fell_back_are_counted_and_reported():
    """Half of eight images, clean and at two radii."""
    assert run(Failing()).defence["fallbacks"] == 12
    assert run(Failing(), batch_size=3).defence["fallbacks"] == 15


class Renaming(Toy):
    """Leaves the classifier with its classes in another order."""

    def _predict(self, classifier, images_BCHW, state, seed, path):
        classifier.set_classes(sorted(classifier.class_names))
        return super()._predict(classifier, images_BCHW, state, seed, path)


def test_a_defence_that_leaves_other_classes_is_refused():
    with pytest.raises(ValueError, match="toy changed the classifier's classes"):
        run(Renaming(), prompted=False, count=4)
