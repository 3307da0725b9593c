"""Methods of somebody else, each one file beside a config and nothing more: by class path through the recipes' main
functions, and what they computed is what stands in weights and reports.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from hf_robust_clip import CLIPForZeroShotClassification, DefendedClassifier, digits_clip_path
from hf_robust_clip.cli import run
from hf_robust_clip.crops import RandomResizedCrop
from hf_robust_clip.report import load_reports
from hf_robust_clip.zero_shot_data.loading import load_image_dataset

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[2]
EPS, COUNT, TEMPLATE = 16 / 255, 24, "a photo of a {}."

PATCHES = '''
from dataclasses import dataclass
from torch.nn import functional as F
from hf_robust_clip.objectives.base import Objective
from hf_robust_clip.paper import Paper

@dataclass(frozen=True)
class Patches(Objective):
    """Cross-entropy, and patch tokens that stay near those of the frozen model on clean images."""

    paper = Paper("Patches", "", "", "", "")
    needs = frozenset({"labels", "teacher", "patches"})
    weight: float = 1.0

    def __call__(self, batch, adv_BCHW):
        found = batch.student(adv_BCHW)
        near = F.cosine_similarity(found.patch_embeds, batch.teacher_on_clean.patch_embeds, dim=-1)
        return {"named": F.cross_entropy(found.logits, batch.labels), "torn": self.weight * (1 - near).mean()}
'''

VIEWS = '''
from dataclasses import dataclass
from typing import ClassVar
from torch.nn import functional as F
from hf_robust_clip.objectives.base import Objective
from hf_robust_clip.paper import Paper

@dataclass(frozen=True)
class Views(Objective):
    """Two attacked crops of a picture look alike."""

    paper: ClassVar = Paper("Views", "", "", "", "")
    num_views: ClassVar = 2
    weight: float = 1.0

    def __call__(self, batch, adv_BCHW):
        found = batch.student(adv_BCHW)
        first, second = found.image_embeds.chunk(2)
        alike = F.cosine_similarity(first, second, dim=-1)
        labels = batch.labels.repeat(2)
        return {"named": F.cross_entropy(found.logits, labels), "apart": self.weight * (1 - alike).mean()}
'''

STREAM = '''
from dataclasses import dataclass
import torch
from torch.nn import functional as F
from hf_robust_clip.defences.base import Defence, Prediction, Traits
from hf_robust_clip.paper import Paper

@dataclass(frozen=True, kw_only=True)
class Stream(Defence):
    """A class that was often named before is named less: logits minus strength times the counts so far."""

    paper = Paper("stream", "", "", "", "")
    traits = Traits(episodic=False)
    strength: float = 1.0

    def start(self, classifier):
        return torch.zeros(len(classifier.class_names))

    def _predict(self, classifier, images_BCHW, state, seed, path):
        rows = []
        for logits in classifier(images_BCHW).logits:
            rows.append(logits - self.strength * state)
            state = state + F.one_hot(rows[-1].argmax(), len(state))
        return Prediction(torch.stack(rows), state=state)
'''

FITTED = '''
from dataclasses import dataclass, replace
import torch
from hf_robust_clip.defences.base import Defence, Prediction, Traits
from hf_robust_clip.paper import Paper

@dataclass(frozen=True, kw_only=True)
class Calibrated(Defence):
    """Logits minus strength times their mean over the images that it was fitted on."""

    paper = Paper("calibrated", "", "", "", "")
    traits = Traits()
    strength: float = 1.0
    means: tuple[float, ...] | None = None

    def check(self, classifier):
        super().check(classifier)
        if self.means is None:
            raise ValueError("means are missing: fit them.")

    def fit(self, classifier, dataset, **settings):
        with torch.no_grad():
            rows = [classifier(dataset[i]["pixel_values"][None]).logits[0] for i in range(len(dataset))]
        return replace(self, means=tuple(torch.stack(rows).mean(0).tolist()))

    def _predict(self, classifier, images_BCHW, state, seed, path):
        return Prediction(classifier(images_BCHW).logits - self.strength * torch.tensor(self.means))
'''

DETECTOR = '''
from dataclasses import dataclass
from hf_robust_clip.defences.base import Defence, Prediction, Traits
from hf_robust_clip.paper import Paper

@dataclass(frozen=True, kw_only=True)
class Noisy(Defence):
    """Flags images in which few pixels are black, as under an attack."""

    paper = Paper("noisy", "", "", "", "")
    traits = Traits()
    threshold: float = 0.5

    def _predict(self, classifier, images_BCHW, state, seed, path):
        score = (images_BCHW > 0.01).float().mean(dim=(1, 2, 3))
        return Prediction(classifier(images_BCHW).logits, score=score, flagged=score > self.threshold)
'''

VIEW = '''
from dataclasses import dataclass
from hf_robust_clip.evaluation.attack_views import AttackView

@dataclass(frozen=True)
class Mistaken(AttackView):
    """The attack takes its gradients with the wrong sign, to a degree: of logits times a factor."""

    name = "mistaken"
    text = "gradients of logits times a factor"
    of_defence = False
    factor: float = -1.0

    def victim(self, scene, images_BCHW):
        return scene.defended(lambda pixels: self.factor * scene.logits(pixels))
'''

ATTACK = '''
from dataclasses import asdict, dataclass
from hf_robust_clip.attacks.suites import Member, Suite

@dataclass(frozen=True)
class Veil(Suite):
    """Draws every pixel towards grey, as far as the radius goes."""

    grey: float = 0.5

    def run(self, victim, images_BCHW, labels_B, threat_model):
        return images_BCHW + (self.grey - images_BCHW).clamp(-threat_model.eps, threat_model.eps)

    def members(self, num_classes):
        return [Member("veil", self.run)]

    def name(self, num_classes):
        return "Veil"

    def parameters(self, threat_models, num_classes):
        return asdict(self)
'''

SOURCES = {
    "patches": PATCHES, "views": VIEWS, "stream": STREAM, "fitted": FITTED, "detector": DETECTOR, "view": VIEW,
    "attack": ATTACK,
}  # fmt: skip


@pytest.fixture(autouse=True)
def modules(fresh_accelerate, monkeypatch):
    """Each stranger's file, in the folder where the command is given."""
    for name, source in SOURCES.items():
        Path(f"strange_{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"strange_{name}", raising=False)


def images(split="test", count=COUNT):
    return load_image_dataset("digits", split, model().processor).first(count)


def model():
    return CLIPForZeroShotClassification.from_pretrained(digits_clip_path())


def tensors(data):
    rows = [data[i] for i in range(len(data))]
    return torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])


def attacked(classifier, pixels, labels, factor=1.0):
    """One signed step of the whole radius, up the cross-entropy of logits times a factor."""
    pixels = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(factor * classifier(pixels).logits, labels), pixels)
    return (pixels + EPS * gradient.sign()).clamp(0, 1).detach()


def test_a_stranger_is_a_screenful_and_nowhere_else():
    package = "".join(path.read_text() for path in (ROOT / "hf_robust_clip").rglob("*.py"))
    for name, source in SOURCES.items():
        assert len(source.strip().splitlines()) <= 40
        assert f"strange_{name}" not in package


# ---- objectives


def train(objective, *words, **settings):
    """The weights after one step on all images at once, and the means of the terms that were logged."""
    recipe = {
        "dataset_name": "digits", "dataset_train_split": "train", "max_images": COUNT, "template": TEMPLATE,
        "output_dir": "out", "max_steps": 1, "per_device_train_batch_size": COUNT, "learning_rate": 0.05,
        "lr_scheduler_type": "constant", "eps": "16/255", "attack_steps": 1, "attack_step_size": "16/255",
        "attack_random_start": False, "logging_steps": 1, "save_steps": 1,
        "evaluation": {"radii": ["16/255"], "attack": "pgd-1"},
        "tasks": [{"dataset": "digits", "max_images": 8}], **settings,
    }  # fmt: skip
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    run("train", Path("own.yaml"), "", ["--objective", objective, *words])
    log = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())["log_history"][0]
    return CLIPForZeroShotClassification.from_pretrained("out").state_dict(), log


def stepped(terms, views):
    """By hand: attack the given views of all images at once, one step of gradient descent; weights and terms."""
    student, data = model(), images("train")
    labels = tensors(data)[1]
    with student.prepared_for(data, TEMPLATE, training=True):
        labels = labels.repeat(len(views))
        clean = torch.cat(views)
        adv = attacked(student, clean, labels)
        found = terms(student, clean, adv, labels)
        trained = [p for module in student.image_modules for p in module.parameters()]
        gradients = torch.autograd.grad(sum(found.values()), trained, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter -= 0.05 * (0 if gradient is None else gradient)
    return student.state_dict(), {name: value.item() for name, value in found.items()}


def distance(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def check_update(weights, log, terms, views):
    """The update is that of the terms, and none of them could have been left out."""
    by_hand, values = stepped(terms, views)
    assert distance(weights, by_hand) < 2e-6
    for name, value in values.items():
        assert log[name] == pytest.approx(value, rel=1e-4)

        def without(*told, left_out=name):
            return {key: term for key, term in terms(*told).items() if key != left_out}

        assert distance(weights, stepped(without, views)[0]) > 1e-4


def test_an_objective_of_patch_tokens():
    weights, log = train("strange_patches.Patches", "--objective.weight", "3")
    teacher = model()

    def terms(student, clean, adv, labels):
        own = student(adv, output_patches=True)
        with teacher.prepared_for(images("train"), TEMPLATE), torch.no_grad():
            other = teacher(clean, output_patches=True).patch_embeds
        near = F.cosine_similarity(own.patch_embeds, other, dim=-1)
        return {"named": F.cross_entropy(own.logits, labels), "torn": 3 * (1 - near).mean()}

    check_update(weights, log, terms, [tensors(images("train"))[0]])
    (report,), _ = load_reports("out/report.json")
    assert report.name == "Patches"


def test_an_objective_of_two_views():
    weights, log = train("strange_views.Views", "--objective.weight", "2", augment=True, crop_scale=0.5, seed=3)
    data = replace(images("train"), augment=True)
    crop, side = RandomResizedCrop(scale=(0.5, 1.0)), model().input_size
    pictures = [data[i]["picture"] for i in range(len(data))]
    views = [crop(pictures, side, (3 << 32) + (view << 28)) for view in range(2)]
    assert not torch.equal(*views)

    def terms(student, clean, adv, labels):
        found = student(adv)
        alike = F.cosine_similarity(*found.image_embeds.chunk(2), dim=-1)
        return {"named": F.cross_entropy(found.logits, labels), "apart": 2 * (1 - alike).mean()}

    check_update(weights, log, terms, views)


# ---- defences


def evaluate(
    *words, folder="out", attack="{class_path: PGD, init_args: {num_steps: 1, step_size: 16/255, random_start: false}}"
):
    """The report of the digits that come first, under one signed step unless told."""
    common = ["--dataset_name", "digits", "--max_images", str(COUNT), "--template", TEMPLATE, "--output_dir", folder,
              "--evaluation.radii", "[16/255]", "--evaluation.batch_size", "5"]  # fmt: skip
    attacks = ["--evaluation.attacks", f"[{attack}]"]
    run("evaluate", ROOT / "recipes/configs/evaluate.yaml", "", [*common, *attacks, *words])
    (report,), _ = load_reports(f"{folder}/report.json")
    return report


@pytest.fixture
def judged():
    """By hand: logits of the images, and of the same under one signed step, with their labels."""
    classifier, data = model().requires_grad_(False), images()
    pixels, labels = tensors(data)
    with classifier.prepared_for(data, TEMPLATE):
        adv = attacked(classifier, pixels, labels)
        return pixels, adv, classifier(pixels).logits, classifier(adv).logits, labels


def share(right):
    return right.double().mean().item()


def by_class(right, labels):
    return [int(right[labels == label].sum()) for label in range(10)]


def check_figures(report, clean, robust, labels):
    """Accuracies, and those by class, are those of truth values by hand; `robust` counts images right when clean."""
    assert report.clean_accuracy == pytest.approx(share(clean))
    assert report.robust_accuracy[EPS] == pytest.approx(share(clean & robust))
    assert [own[1] for own in report.per_class.values()] == by_class(clean, labels)
    assert [own[2] for own in report.per_class.values()] == by_class(clean & robust, labels)


def test_a_defence_with_a_stream_state(judged):
    _, _, clean, adv, labels = judged
    report = evaluate("--defence", "strange_stream.Stream", "--defence.strength", "6")

    def in_order(logits):
        counts, right = torch.zeros(10), []
        for row, label in zip(logits, labels, strict=True):
            named = int((row - 6 * counts).argmax())
            counts[named] += 1
            right.append(named == int(label))
        return torch.tensor(right)

    check_figures(report, in_order(clean), in_order(adv), labels)
    assert by_class(in_order(clean), labels) != by_class(clean.argmax(1) == labels, labels)
    assert report.defence["parameters"]["strength"] == 6 and not report.defence["traits"]["episodic"]


def test_a_defence_that_must_be_fitted(judged, capsys):
    _, _, clean, adv, labels = judged
    words = ["--defence", "strange_fitted.Calibrated", "--defence.strength", "9"]
    with pytest.raises(SystemExit):
        evaluate(*words)
    assert "error: means are missing" in capsys.readouterr().err
    fit_on = ["--fit_on.dataset", "digits", "--fit_on.split", "train", "--fit_on.max_images", "7"]
    report = evaluate(*words, *fit_on, "--overwrite")
    classifier, data = model(), images("train", 7)
    with classifier.prepared_for(data, TEMPLATE), torch.no_grad():
        means = classifier(tensors(data)[0]).logits.mean(dim=0)
    right, robust = ((logits - 9 * means).argmax(dim=1) == labels for logits in (clean, adv))
    check_figures(report, right, robust, labels)
    assert by_class(right, labels) != by_class(clean.argmax(1) == labels, labels)
    assert report.defence["parameters"]["means"] == pytest.approx(means.tolist(), rel=1e-4)
    told = {key: report.defence["fit_on"][key] for key in ("dataset", "split", "num_images")}
    assert told == {"dataset": "digits", "split": "train", "num_images": 7}


def test_a_fitted_defence_is_saved_with_what_was_trained_and_found_there():
    words = ["--defence", "strange_fitted.Calibrated", "--defence.strength", "9", "--prompts.design", "V",
             "--prompts.vision_depth", "2", "--fit_images", "7"]  # fmt: skip
    attack = {"class_path": "PGD", "init_args": {"num_steps": 1}}
    train("TeCoA", *words, prompts={"num_vision_tokens": 1}, defence_evaluation={"attack": attack})
    own, _ = load_reports("out/report.json")
    assert [report.defence["name"] for report in own] == ["calibrated"] * 2
    saved = DefendedClassifier.from_pretrained("out")
    pixels, _ = tensors(images("train").first(7))
    saved.set_classes(images().class_names, TEMPLATE)
    with saved.classifier.prepared_for(images()), torch.no_grad():
        means = saved.classifier(pixels).logits.mean(dim=0)
        right = (saved.classifier(tensors(images())[0]).logits - 9 * means).argmax(dim=1) == tensors(images())[1]
    assert saved.adapter.means == pytest.approx(means.tolist(), abs=1e-3)
    report = evaluate("--model_name_or_path", "out", "--defence", "strange_fitted.Calibrated", folder="again")
    assert report.defence["parameters"] == own[0].defence["parameters"]
    assert report.clean_accuracy == pytest.approx(share(right))


def test_a_detector(judged):
    pixels, attacked_pixels, clean, adv, labels = judged
    scores = [(images > 0.01).float().mean(dim=(1, 2, 3)) for images in (pixels, attacked_pixels)]
    threshold = scores[0].quantile(0.75).item() + 1e-4
    report = evaluate("--defence", "strange_detector.Noisy", "--defence.threshold", repr(threshold))
    alarm, alarm_under_attack = (score > threshold for score in scores)
    right = (clean.argmax(1) == labels) & ~alarm
    check_figures(report, right, (adv.argmax(1) == labels) | alarm_under_attack, labels)
    assert 0 < alarm.sum() < COUNT and (alarm_under_attack & right).any()


# ---- views and attacks


def test_an_attack_view(judged):
    pixels, _, clean, adv, labels = judged
    report = evaluate("--evaluation.view", "strange_view.Mistaken", "--evaluation.view.factor", "-0.5")
    assert report.view.name == "mistaken" and "mistaken" in report.full_attack
    classifier, data = model(), images()
    with classifier.prepared_for(data, TEMPLATE):
        mistaken = classifier(attacked(classifier, pixels, labels, -0.5)).logits
    right, robust, undeceived = (logits.argmax(1) == labels for logits in (clean, adv, mistaken))
    check_figures(report, right, undeceived, labels)
    assert share(undeceived) > share(robust)


def test_an_attack(judged):
    pixels, _, clean, _, labels = judged
    report = evaluate(attack="{class_path: strange_attack.Veil, init_args: {grey: 0.2}}")
    classifier, data = model(), images()
    veiled = pixels + (0.2 - pixels).clamp(-EPS, EPS)
    with classifier.prepared_for(data, TEMPLATE), torch.no_grad():
        adv = classifier(veiled).logits
    check_figures(report, clean.argmax(1) == labels, adv.argmax(1) == labels, labels)
    assert (report.attack, report.attack_parameters["grey"]) == ("Veil", 0.2)
