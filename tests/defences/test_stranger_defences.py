"""Defences that somebody else writes: with a stream state, fitted, detectors; and what they may forget."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from huggingface_hub import CommitOperationDelete
from prompted_clip import NAMES, make_base, make_images
from safetensors.torch import load_file, save_file

from hf_robust_clip import TTC, CLIPForZeroShotClassification, DefendedClassifier, digits_clip_path
from hf_robust_clip.defences import defence_class, defence_classes, defence_key
from hf_robust_clip.defences.base import Defence, Fitted, Prediction, Traits
from hf_robust_clip.hub import Push, clear_model, copy_model, fitted_files, upload
from hf_robust_clip.paper import Paper
from hf_robust_clip.zero_shot_data.loading import load_image_dataset


def paper(method: str) -> Paper:
    return Paper(method=method, title="", venue="", arxiv="", bibtex="")


@dataclass(frozen=True, kw_only=True)
class Centred(Defence):
    """Subtracts the running mean of all image features so far."""

    paper = paper("centred")
    traits = Traits(episodic=False)

    def start(self, classifier):
        return 0, torch.zeros(classifier.config.projection_dim, dtype=classifier.dtype)

    def _predict(self, classifier, images_BCHW, state, seed, path):
        rows = []
        for image in images_BCHW.split(1):
            embeds = classifier.encode_images(image)
            count, mean = state
            state = count + 1, (mean * count + embeds[0].detach()) / (count + 1)
            rows.append(classifier.score(embeds - mean, classifier.class_embeds)[0])
        return Prediction(torch.cat(rows), state=state)


class Mean(Fitted):
    """The mean of image features."""

    file = "mean.safetensors"

    def __init__(self, values):
        self.values = values

    @property
    def record(self):
        return {"norm": self.values.norm().item()}

    def save(self, path):
        save_file({"mean": self.values}, path / self.file)

    @classmethod
    def load(cls, path):
        return cls(load_file(path / cls.file)["mean"])

    def check(self, classifier):
        if len(self.values) != classifier.config.projection_dim:
            raise ValueError("the mean is of another width.")


@dataclass(frozen=True, kw_only=True)
class Detector(Defence):
    """Flags images whose features lie far from the mean of training images."""

    paper = paper("detector")
    traits = Traits()
    threshold: float = 0.0
    mean: Mean | None = field(default=None, metadata={"fitted": Mean})

    def fit(self, classifier, dataset, *, batch_size=64, **settings):
        with self.prepared(classifier):
            rows = [classifier.encode_images(dataset[i]["pixel_values"][None]).detach() for i in range(len(dataset))]
        mean = torch.cat(rows).mean(dim=0)
        return replace(self, mean=Mean(mean), threshold=(torch.cat(rows) - mean).norm(dim=1).max().item())

    def _predict(self, classifier, images_BCHW, state, seed, path):
        embeds = classifier.encode_images(images_BCHW)
        score = (embeds - self.mean.values).norm(dim=1)
        logits = classifier.score(embeds, classifier.class_embeds)[0]
        return Prediction(logits, score=score, flagged=score > self.threshold)


def test_a_stream_goes_on_from_image_to_image_and_from_batch_to_batch():
    classifier, images = make_base(), make_images(5)
    whole = Centred().predict(classifier, images)
    assert whole.state[0] == 5 and not whole.logits.requires_grad
    first = Centred().predict(classifier, images[:2])
    second = Centred().predict(classifier, images[2:], state=first.state)
    again = Centred().predict(classifier, images[2:], state=first.state)
    assert torch.equal(second.logits, again.logits)  # predicting changes no state
    torch.testing.assert_close(torch.cat([first.logits, second.logits]), whole.logits, rtol=0, atol=1e-12)
    alone = Centred().predict(classifier, images[2:])
    assert (alone.logits - second.logits).abs().max() > 1e-3
    small = Centred(memory_budget=1e-9).predict(classifier, images)
    torch.testing.assert_close(small.logits, whole.logits, rtol=0, atol=1e-12)
    assert small.state[0] == 5


def test_a_detector_is_fitted_judged_saved_and_loaded(tmp_path):
    classifier = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    data = load_image_dataset("digits", "train", classifier.processor).first(6)
    classifier.set_classes(data.class_names, "{}")
    assert Detector().fitted == {} and Detector().parameters()["mean"] is None
    detector = Detector().fit(classifier, data)
    images = torch.stack([data[i]["pixel_values"] for i in range(3)])
    labels = torch.tensor([data[i]["labels"] for i in range(3)])
    found, strict = (one.predict(classifier, images) for one in (detector, replace(detector, threshold=0.0)))
    assert not found.flagged.any() and strict.flagged.all()
    assert strict.right(labels, attacked=True).all() and not strict.right(labels).any()
    DefendedClassifier(classifier, detector, base_model="digits-clip").save_pretrained(tmp_path)
    assert (tmp_path / "mean.safetensors").is_file()
    restored = DefendedClassifier.from_pretrained(tmp_path, method=Detector)
    assert torch.equal(restored.predict(images).score, found.score)
    assert restored.adapter.parameters() == detector.parameters()
    (tmp_path / "mean.safetensors").unlink()
    with pytest.raises(OSError, match=r"mean\.safetensors"):
        DefendedClassifier.from_pretrained(tmp_path)


def test_the_files_of_what_was_fitted_go_with_the_model(tmp_path, monkeypatch):
    """Copied, pushed and cleared with it, and taken from a repository that a defence without them is pushed to."""
    detector = Detector(mean=Mean(torch.zeros(64)))
    classifier = CLIPForZeroShotClassification.from_pretrained(digits_clip_path())
    old, new = tmp_path / "old", tmp_path / "new"
    DefendedClassifier(classifier, detector, base_model="digits-clip").save_pretrained(old)
    DefendedClassifier(classifier, TTC(), base_model="digits-clip").save_pretrained(new)
    (old / "mine.safetensors").write_bytes(b"mine")
    copy_model(old, tmp_path / "copy")
    assert (tmp_path / "copy" / "mean.safetensors").is_file() and not (tmp_path / "copy" / "mine.safetensors").exists()

    class Hub:
        def __init__(self, token):
            pass

        def list_repo_files(self, repo_id, revision):
            return [path.name for path in old.iterdir()]

        def hf_hub_download(self, repo_id, file, revision):
            return str(old / file)

        def create_commit(self, repo_id, operations, **settings):
            return operations

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    done = upload(new, Push("me/mine"), "message")
    assert [one.path_in_repo for one in done if isinstance(one, CommitOperationDelete)] == ["mean.safetensors"]
    clear_model(old)
    assert [path.name for path in old.iterdir()] == ["mine.safetensors"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"fitted": ["a"]}', '{"fitted": {"a": "../b.safetensors", "c": 1, "d": "README.md"}}']
)
def test_no_other_file_is_taken_for_a_fitted_one(text, tmp_path):
    assert fitted_files(tmp_path) == ()
    (tmp_path / "adaptation.json").write_text(text)
    assert fitted_files(tmp_path) == ()


def test_names_are_those_of_the_package_and_of_what_the_caller_has_imported():
    assert list(defence_classes()) == sorted(defence_classes()) and "tapt" in defence_classes()
    key = f"{Centred.__module__}.Centred"
    assert defence_key(Centred()) == key and defence_class(key) is Centred and key not in defence_classes()

    @dataclass(frozen=True)
    class Tapt(Defence):
        """Calls itself as one of the package's."""

        paper = paper("tapt")
        traits = Traits()

        def _predict(self, *args):
            raise AssertionError

    assert defence_class("tapt") is not Tapt


def test_no_module_is_imported_for_a_name_in_a_file(tmp_path, monkeypatch):
    (tmp_path / "strange_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="strange_module"):
        defence_class("strange_module.Defence")


@dataclass(frozen=True, kw_only=True)
class Forgetful(Defence):
    """Gives something wrong."""

    paper = paper("forgetful")
    gives: dict = field(default_factory=dict)
    episodic: bool = True
    begins: object = 0

    @property
    def traits(self):
        return Traits(episodic=self.episodic)

    def start(self, classifier):
        return self.begins

    def _predict(self, classifier, images_BCHW, state, seed, path):
        logits = classifier(images_BCHW).logits
        return Prediction(**{"logits": logits, **self.gives}) if self.gives != {"logits": None} else logits


@pytest.mark.parametrize(
    ("forgetful", "error", "what"),
    [
        (Forgetful(gives={"logits": None}), TypeError, "Prediction"),
        (Forgetful(gives={"logits": torch.zeros(3, 2)}), ValueError, "logits"),
        (Forgetful(gives={"logits": torch.zeros(2, len(NAMES))}), ValueError, "logits"),
        (Forgetful(gives={"logits": [0.0]}), ValueError, "logits"),
        (Forgetful(gives={"flagged": torch.zeros(1, dtype=torch.bool)}), ValueError, "flagged"),
        (Forgetful(gives={"flagged": torch.zeros(3, 1, dtype=torch.bool)}), ValueError, "flagged"),
        (Forgetful(gives={"flagged": torch.zeros(3)}), TypeError, "flagged"),
        (Forgetful(gives={"score": torch.zeros(2)}), ValueError, "score"),
        (Forgetful(episodic=False), ValueError, "state"),
        (Forgetful(episodic=False, begins=None), TypeError, "start"),
    ],
)
def test_what_a_method_forgets_is_named(forgetful, error, what):
    with pytest.raises(error, match=what):
        forgetful.predict(make_base(), make_images(3))
