"""MirrorCheck: its score, what it keeps, what it is fitted with, and what it refuses."""

import json
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from prompted_clip import NAMES, make_base, make_images

from hf_robust_clip import CLIPForZeroShotClassification, DefendedClassifier, digits_clip_path
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.defences.captioners import ZeroShotCaptioner
from hf_robust_clip.defences.encoders import ClipEncoder, SmallEncoder, resized, train_encoder
from hf_robust_clip.defences.generators import ClasswiseSampler
from hf_robust_clip.defences.mirror_check import Mirror, MirrorCheck
from hf_robust_clip.evaluation.attack_views import DefenceBlind
from hf_robust_clip.evaluation.loop import evaluate_robustness
from hf_robust_clip.evaluation.settings import EvaluationSettings
from hf_robust_clip.zero_shot_data.loading import load_image_dataset


@dataclass(frozen=True)
class White:
    """A white picture of everything; notes what it was asked for."""

    asked: list = field(default_factory=list, compare=False)

    def __call__(self, texts, seed):
        self.asked.append((tuple(texts), seed))
        return torch.ones(len(texts), 3, 8, 8)


class Known(torch.nn.Module):
    """One vector for dark images, another for bright ones."""

    def __init__(self, dark, bright):
        super().__init__()
        self.dark, self.bright = torch.nn.Parameter(torch.tensor(dark)), torch.nn.Parameter(torch.tensor(bright))
        self.requires_grad_(False)

    def forward(self, images):
        return torch.where((images.mean(dim=(1, 2, 3)) > 0.7)[:, None], self.bright, self.dark)


@dataclass(frozen=True)
class Fixed:
    """An encoder with a module of its own."""

    net: torch.nn.Module

    def module(self):
        return self.net


ONE, TWO = Fixed(Known([3.0, 4.0], [4.0, 3.0])), Fixed(Known([1.0, 0.0], [0.6, 0.8]))


def mirror_check(**settings):
    return MirrorCheck(**{"generators": (White(),), "encoders": (ONE, TWO), "threshold": -0.7, **settings})


def test_worked_numbers():
    classifier, images = make_base(), make_images(3)
    assert mirror_check(encoders=(ONE,)).score(classifier, images).tolist() == pytest.approx([-0.96] * 3, abs=1e-6)
    assert mirror_check(encoders=(TWO,)).score(classifier, images).tolist() == pytest.approx([-0.6] * 3, abs=1e-6)
    for tau, flagged in ((0.8, True), (0.7, False)):  # S < tau
        found = mirror_check(threshold=-tau).predict(classifier, images)
        assert found.score.tolist() == pytest.approx([-0.78] * 3, abs=1e-6)
        assert found.flagged.tolist() == [flagged] * 3


def test_each_caption_is_made_once_for_a_seed_and_depends_on_it():
    classifier, images = make_base(), make_images(6)
    white = White()
    detector = mirror_check(generators=(white,), num_draws=1)
    named = [NAMES[i] for i in detector.predict(classifier, images).logits.argmax(dim=1).tolist()]
    assert len(white.asked) == 1 and set(white.asked[0][0]) == {f"a photo of a {name}." for name in named}
    detector.predict(classifier, images)
    detector.predict(classifier, images[:2])
    assert len(white.asked) == 1
    detector.predict(classifier, images, seed=1)
    assert len(white.asked) == 2 and white.asked[0][1] != white.asked[1][1]
    detector.predict(classifier, images, path="through")  # the other classes' too
    assert sorted(white.asked[0][0] + white.asked[2][0]) == sorted(f"a photo of a {name}." for name in NAMES)
    detector.pictures(["else"], seed=5)
    assert detector.pictures(["else", "else"], seed=5).shape == (2, 3, 8, 8) and len(white.asked) == 4


def test_an_image_takes_its_draw_by_itself():
    """Subsets of encoders, seeds of pictures: neither the batch nor the place in it counts."""
    classifier, images = make_base(), make_images(12)
    detector = mirror_check(encoders_at_once=1, num_draws=4)
    whole = detector.score(classifier, images)
    assert {round(score, 4) for score in whole.tolist()} == {-0.96, -0.6}
    assert torch.equal(detector.score(classifier, images.flip(0), batch_size=5).flip(0), whole)
    assert not torch.equal(detector.score(classifier, images, seed=1), whole)
    once = replace(detector, num_draws=1).score(classifier, images)
    assert len(set(once.tolist())) == 1


def test_the_noise_is_one_for_an_image_and_its_picture_and_is_gone_afterwards():
    classifier, images = make_base(), make_images(4)
    same = Fixed(Known([1.0, 2.0], [1.0, 2.0]))
    detector = mirror_check(encoders=(same,), noise=0.5, num_draws=1, noise_on="embeddings")
    assert detector.score(classifier, images).tolist() == pytest.approx([-1.0] * 4, abs=1e-6)
    for kind in ("embeddings", "parameters"):
        found = [mirror_check(encoders=(ONE,), noise=noise, noise_on=kind) for noise in (0.0, 5e-6, 1.0)]
        plain, little, much = (one.score(classifier, images) for one in found)
        assert (little - plain).abs().max() < 1e-4 < 1e-2 < (much - plain).abs().max()
        assert torch.equal(found[2].score(classifier, images), much)
    assert ONE.net.dark.tolist() == [3.0, 4.0]


def test_the_score_of_each_class_has_its_pictures_and_its_gradient():
    """Written out in float64: -cos of an encoder that reads single pixels."""
    classifier, images = make_base(), make_images(3).requires_grad_()

    class Pixels(torch.nn.Module):
        def forward(self, images):
            return images.double().flatten(1)

    sampler = ClasswiseSampler(
        tuple(f"a photo of a {name}." for name in NAMES), torch.rand(6, 3, 8, 8), 0.1 * torch.rand(6, 2, 3, 8, 8)
    )
    detector = MirrorCheck(generators=(sampler,), encoders=(Fixed(Pixels()),), threshold=0.0, num_draws=1)
    found = detector.predict(classifier, images, path="through")
    draw = detector._draw(0, 0)
    pictures = sampler(sampler.texts, draw.seed).double().flatten(1)
    flat = images.flatten(1)
    by_hand = -(flat @ pictures.T) / flat.norm(dim=1, keepdim=True) / pictures.norm(dim=1)
    torch.testing.assert_close(found.class_scores.double(), by_hand, rtol=0, atol=1e-6)
    named = found.logits.argmax(dim=1)
    assert torch.equal(found.score, found.class_scores[torch.arange(3), named])
    for one in (0, 3):
        ours, theirs = (torch.autograd.grad(x[:, one].sum(), images, retain_graph=True)[0] for x in
                        (found.class_scores, by_hand))  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_free_captions_have_a_score_with_a_gradient_and_no_classes():
    @dataclass(frozen=True)
    class Free:
        def __call__(self, images, named):
            return [f"something {int(image.mean() * 10)}" for image in images]

        def of_classes(self, class_names):
            return None

    detector = mirror_check(captioner=Free(), encoders=(Fixed(SmallEncoder(8).requires_grad_(False)),))
    images = make_images(3).requires_grad_()
    found = detector.predict(make_base(), images, path="through")
    assert found.class_scores is None and torch.autograd.grad(found.score.sum(), images)[0].abs().max() > 0


# ---- generator and encoder


def test_the_sampler_is_the_principal_components_of_each_class():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 3, 4, 4, generator=generator), torch.arange(40) % 2
    sampler = ClasswiseSampler.fit(images, labels, ["even", "odd"], num_components=25)
    own = images[labels == 1].flatten(1).double()
    torch.testing.assert_close(sampler.mean[1].flatten().double(), own.mean(dim=0), rtol=0, atol=1e-6)
    basis = sampler.basis[1].flatten(1).double()
    torch.testing.assert_close(basis.T @ basis, own.T.cov(), rtol=0, atol=1e-6)  # all of them are the covariance
    assert basis[19:].abs().max() < 1e-6  # of 20 images
    lengths = basis.norm(dim=1)
    assert (lengths[:-1] >= lengths[1:] - 1e-6).all()
    drawn = sampler(["odd", "even"], seed=3)
    assert torch.equal(drawn, sampler(["even", "odd"], seed=3).flip(0)) and not torch.equal(
        drawn, sampler(["odd", "even"], 4)
    )
    assert drawn.min() >= 0 and drawn.max() <= 1
    few = ClasswiseSampler.fit(images, labels, ["even", "odd"], num_components=1)
    assert few.basis.shape == (2, 1, 3, 4, 4)
    with pytest.raises(ValueError, match="'else'"):
        sampler(["else"], 0)
    with pytest.raises(ValueError, match="'none'"):
        ClasswiseSampler.fit(images, labels, ["even", "odd", "none"])
    with pytest.raises(ValueError, match="one text"):
        ClasswiseSampler.fit(images, labels, ["same", "same"])


def test_an_encoder_is_the_same_for_a_seed_and_leaves_random_state_alone():
    images, labels = make_images(30, dtype=torch.float32), torch.arange(30) % 3
    state = torch.get_rng_state()
    one, same, other = (train_encoder(images, labels, side=8, num_steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one(images), same(images)) and not torch.equal(one(images), other(images))
    assert one(images[:, :, :6, :6]).shape == (30, 64)
    assert resized(images, 8) is images
    torch.testing.assert_close(resized(images, 4).mean(dim=(2, 3)), images.mean(dim=(2, 3)), rtol=0, atol=0.1)


# ---- fitted


@pytest.fixture(scope="module")
def world():
    """The embedded model, and a detector fitted on training images of it."""
    classifier = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).requires_grad_(False)
    data = {split: load_image_dataset("digits", split, classifier.processor) for split in ("train", "test")}
    classifier.set_classes(data["train"].class_names, "a photo of a {}.")
    detector = MirrorCheck(encoder_steps=150).fit(classifier, data["train"].first(500))
    test = data["test"].first(48)
    images = torch.stack([test[i]["pixel_values"] for i in range(len(test))])
    return classifier, detector, images, data


def test_fit_divides_the_images_and_calibrates_on_those_that_nothing_was_made_of(world):
    classifier, detector, _, data = world
    record = detector.parameters()["mirror"]
    assert record["num_images"] == 500 and record["split"] == "train"
    calibrated = record["calibrated"]
    assert (calibrated["num_images"], calibrated["threshold"]) == (150, detector.threshold)
    rows = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    chosen = data["train"].first(500)
    images = torch.stack([chosen[i]["pixel_values"] for i in rows.tolist()])
    flagged = detector.predict(classifier, images[:150]).flagged
    assert flagged.sum() == 7  # 5 % of 150, rounded down
    labels = torch.tensor([chosen[i]["labels"] for i in rows.tolist()])
    texts = ZeroShotCaptioner().of_classes(classifier.class_names)
    sampler = ClasswiseSampler.fit(images[150:], labels[150:], texts)
    assert torch.equal(sampler.mean, detector.mirror.sampler.mean)


def test_a_blind_attack_is_seen_and_an_encoder_that_is_the_victim_is_told_of(world):
    classifier, detector, _, data = world
    victim = MirrorCheck(encoders=(ClipEncoder("digits-clip"),)).fit(classifier, data["train"].first(500))
    found = []
    for one in (detector, victim):
        settings = EvaluationSettings(["16/255"], attack=PGD(5), view=DefenceBlind())
        test = data["test"].first(32)
        found.append(
            evaluate_robustness(classifier, test, settings, defence=one, name="a", task="b", model_id="digits-clip")
        )
    own, same = found
    told = {row.metric: row.value for row in own.measurements if row.member is None}
    assert told["detection_auroc_of_successful"] > 0.95 and told["detection_of_successful"] > 0.6
    assert own.robust_accuracy[16 / 255] > own.controls["static prompts"][16 / 255] + 0.3
    assert "remarks" not in own.defence
    assert len(same.defence["remarks"]) == 1 and "digits-clip" in same.defence["remarks"][0]
    assert same.robust_accuracy[16 / 255] < own.robust_accuracy[16 / 255]
    assert all(row.n for row in own.measurements)


def test_given_parts_are_saved_by_their_settings(world, tmp_path):
    classifier, _, images, data = world
    settings = dict(captioner=ZeroShotCaptioner("{}"), encoders=(ClipEncoder("digits-clip"),))
    detector = MirrorCheck(**settings).fit(classifier, data["train"].first(200))
    assert detector.mirror.weights == () and detector.mirror.sampler.texts[1] == "one"
    DefendedClassifier(classifier, detector, base_model="digits-clip").save_pretrained(tmp_path)
    restored = DefendedClassifier.from_pretrained(tmp_path)
    assert restored.adapter.encoders == detector.encoders and restored.adapter.captioner == detector.captioner
    assert torch.equal(restored.predict(images[:4]).score, detector.predict(classifier, images[:4]).score)
    settings = json.loads((tmp_path / "adaptation.json").read_text())
    settings["parameters"]["encoders"][0]["class_path"] = "os.system"
    (tmp_path / "adaptation.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"encoders.*os\.system"):
        DefendedClassifier.from_pretrained(tmp_path)


def test_what_was_fitted_is_saved_whole(world, tmp_path):
    classifier, detector, images, _ = world
    DefendedClassifier(classifier, detector, base_model="digits-clip").save_pretrained(tmp_path)
    restored = DefendedClassifier.from_pretrained(tmp_path, method=MirrorCheck)
    found, own = restored.predict(images), detector.predict(classifier, images)
    assert torch.equal(found.score, own.score) and torch.equal(found.flagged, own.flagged)
    assert restored.adapter.parameters() == detector.parameters()
    assert (tmp_path / "mirror.safetensors").stat().st_size < 1_000_000


def test_another_clip_is_defended_too():
    """A random one. A class is a picture with noise, one of those that it puts there; of the others it is grey."""
    classifier = make_base()
    shapes = make_images(40, seed=4)
    with torch.no_grad():
        named = classifier(shapes).logits.argmax(dim=1)
    first = {label: shapes[row] for row, label in reversed(list(enumerate(named.tolist())))}
    noise = 0.04 * torch.randn(len(first), 30, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    images = (torch.stack(list(first.values()))[:, None] + noise).clamp(0, 1).flatten(0, 1)
    labels = torch.tensor(list(first)).repeat_interleave(30)
    texts = ZeroShotCaptioner().of_classes(NAMES)
    others = torch.tensor([label for label in range(len(NAMES)) if label not in first] * 2)
    every = torch.cat([images.float(), torch.full((len(others), 3, 8, 8), 0.5)])
    sampler = ClasswiseSampler.fit(every, torch.cat([labels, others]), texts)
    encoder = Fixed(train_encoder(images.float(), labels, side=8, num_steps=40, seed=1))
    with torch.no_grad():
        right = (classifier(images).logits.argmax(dim=1) == labels).nonzero().squeeze(1)
    right = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(0))]
    detector = MirrorCheck(generators=(sampler,), encoders=(encoder,)).calibrate(classifier, images[right[24:]])
    data = Pictures(images[right[:24]], labels[right[:24]])
    settings = EvaluationSettings(["32/255"], attack=PGD(5), view=DefenceBlind())
    report = evaluate_robustness(classifier, data, settings, defence=detector, name="a", task="b", model_id="c")
    told = {row.metric: row for row in report.measurements if row.member is None}
    assert told["detection_of_successful"].n > 10 and told["detection_auroc_of_successful"].value > 0.9
    assert report.robust_accuracy[32 / 255] > report.controls["static prompts"][32 / 255] + 0.3
    assert report.clean_accuracy > 0.8


class Pictures:
    """Images with labels as a dataset."""

    dataset_id, revision, split, attack_resolution = "made", "none", "test", None

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


# ---- what is refused


def test_what_belongs_to_another_model_or_to_other_settings_is_refused(world):
    classifier, detector, images, data = world
    with pytest.raises(ValueError, match="noise"):
        replace(detector, noise=0.1).predict(classifier, images)
    with pytest.raises(ValueError, match="fpr"):
        replace(detector, fpr=0.1).predict(classifier, images)
    chosen = replace(detector, noise=0.1, threshold=-0.9)  # by hand
    assert chosen.predict(classifier, images).flagged.any()
    with classifier.same_classes_after():
        classifier.set_classes(["one", "else"], "a {}")
        with pytest.raises(ValueError, match="else"):
            detector.predict(classifier, images, path="through")
    other = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    other.set_classes(classifier.class_names, "a photo of a {}.")
    with torch.no_grad():
        other.visual_projection.weight.add_(0.1)
    with pytest.raises(ValueError, match="another image encoder"):
        detector.predict(other, images)
    with pytest.raises(ValueError, match="threshold"):
        MirrorCheck(threshold=-0.5).fit(classifier, data["train"].first(100))
    with pytest.raises(ValueError, match="fpr"):
        MirrorCheck(encoder_steps=1).fit(classifier, data["train"].first(60))
    with pytest.raises(ValueError, match="augment"):
        detector.fit(classifier, replace(data["train"], augment=True))
    with pytest.raises(ValueError, match="mirror is missing"):
        MirrorCheck().predict(classifier, images)
    with pytest.raises(ValueError, match="threshold is missing"):
        replace(detector, threshold=None).predict(classifier, images)


def test_a_generator_that_gives_no_pictures_is_refused():
    class Wrong(White):
        def __call__(self, texts, seed):
            return 2 * super().__call__(texts, seed)

    class Short(White):
        def __call__(self, texts, seed):
            return super().__call__(texts, seed)[:0]

    for cls in (Wrong, Short):
        with pytest.raises(ValueError, match=r"generators\[0\]"):
            mirror_check(generators=(cls(),)).predict(make_base(), make_images(1))


def test_files_of_another_kind_are_refused(world, tmp_path):
    _, detector, _, _ = world
    detector.mirror.save(tmp_path)
    again = Mirror.load(tmp_path)
    assert torch.equal(again.sampler.basis, detector.mirror.sampler.basis) and again.about == detector.mirror.about
    (tmp_path / "mirror.safetensors").write_bytes(b"else")
    with pytest.raises(OSError, match="mirror"):
        Mirror.load(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_draws=0), dict(noise=-1.0), dict(noise=math.nan), dict(noise_on="pixels"), dict(held_out=0.0),
        dict(held_out=1.0), dict(encoders_at_once=2), dict(encoders_at_once=0), dict(num_components=0),
        dict(encoder_steps=0), dict(num_own_encoders=0), dict(largest_side=2), dict(fpr=1.5),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MirrorCheck(**wrong)


def test_settings_that_do_nothing_are_named():
    assert set(MirrorCheck().idle_settings()) == {"noise_on"}
    assert set(mirror_check(noise=1.0).idle_settings()) == {"num_components", "num_own_encoders", "encoder_steps"}
    with pytest.raises(ValueError, match="template"):
        ZeroShotCaptioner("a photo")
