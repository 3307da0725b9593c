"""A classifier with its defence: saved, loaded in another process, pushed to a stand-in for the Hub.

This file run as a script is that process: huggingface_hub reads its address once, on import.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_robust_clip import (
    TAPT,
    TTC,
    AlignmentTargets,
    CLIPForZeroShotClassification,
    ClipPromptConfig,
    DefendedClassifier,
    Ensemble,
    RandomResizedCrop,
    collect_statistics,
    digits_clip_path,
)
from hf_robust_clip.arguments import Images
from hf_robust_clip.defences.defended import PROMPTS, SETTINGS, adapter_from
from hf_robust_clip.runs.shared import load_data

STATISTICS = AlignmentTargets.file

NAMES = ("zero", "one", "two")
TEMPLATE = "a photo of a {}."
REPO = "user/defended"
TESTS = Path(__file__).parent.parent


def base_model():
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).eval()
    model.set_classes(NAMES, TEMPLATE)
    return model


def make_targets(classifier):
    """Statistics of a few images, and in the place of clean-trained prompts' those of fewer."""
    few = load_data(Images("digits", max_images=12), base_model())
    return AlignmentTargets(*(collect_statistics(classifier, few.first(n), batch_size=12) for n in (12, 6)))


def make_defended(design="VLI", **settings):
    """A defended digits model with prompts larger than they begin, so that they matter."""
    depth = dict(vision_depth=2, text_depth=2)
    model = get_peft_model(base_model(), ClipPromptConfig(design=design, **depth))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    core = model.eval().get_base_model()
    settings = {"num_views": 8, "selected": 0.25, "learning_rate": 0.05, **settings}
    return DefendedClassifier(model, TAPT(targets=make_targets(core), **settings), seed=3)


def make_images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A defended model and the folder it was saved to."""
    defended = make_defended(crop=RandomResizedCrop(scale=(0.5, 1.0)))
    folder = tmp_path_factory.mktemp("defended") / "new/folder"
    defended.save_pretrained(folder)
    return defended, folder


def child(folder: Path, found: Path) -> None:
    """Load from the folder and, after a push, from the Hub, by class and by pipeline."""
    from huggingface_hub import ModelCard

    logits = {"folder": TAPT.from_pretrained(folder)(make_images()).logits.tolist()}
    address = DefendedClassifier.from_pretrained(folder).push_to_hub(REPO)
    remote = TAPT.from_pretrained(REPO)
    logits["hub"] = remote(make_images()).logits.tolist()
    card = ModelCard.load(REPO)
    found.write_text(json.dumps({"logits": logits, "address": address, "tags": card.data.tags, "card": card.text}))


def test_another_process_and_the_hub_give_equal_logits(saved, tmp_path):
    sys.path.insert(0, str(TESTS))
    from hub_server import HubServer

    defended, folder = saved
    with HubServer() as server:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        command = [sys.executable, __file__, str(folder), str(tmp_path / "found.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = server.repos[REPO]
    found = json.loads((tmp_path / "found.json").read_text())
    wanted = defended.predict(make_images()).logits
    static = defended.classifier(make_images()).logits
    assert (wanted - static).abs().max() > 1e-3
    for source, logits in found["logits"].items():
        torch.testing.assert_close(torch.tensor(logits), wanted, rtol=0, atol=1e-6, msg=source)
    assert set(pushed) >= {SETTINGS, STATISTICS, PROMPTS, "adapter_config.json", "README.md"}
    assert "tapt" in found["tags"]
    assert "Nothing was measured" in found["card"]
    assert REPO in found["address"]


def test_everything_comes_back(saved):
    defended, folder = saved
    again = DefendedClassifier.from_pretrained(folder)
    assert replace(again.adapter, targets=None) == replace(defended.adapter, targets=None)
    assert (again.seed, again.classifier.class_names, again.classifier.templates) == (3, NAMES, (TEMPLATE,))
    assert again.base_model == "digits-clip"
    assert (
        str(digits_clip_path()) not in (folder / SETTINGS).read_text() + (folder / "adapter_config.json").read_text()
    )
    assert torch.equal(again(make_images()).logits, defended(make_images()).logits)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_the_prompts_are_a_peft_adapter(saved):
    defended, folder = saved
    loaded = PeftModel.from_pretrained(base_model(), folder).eval()
    assert torch.equal(loaded(pixel_values=make_images()).logits, defended.classifier(make_images()).logits)


@pytest.mark.parametrize("adapter", [TTC(num_steps=1), Ensemble(num_views=4)], ids=["ttc", "ensemble"])
def test_defences_without_prompts_stand_on_any_checkpoint(adapter, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    plain = CLIPForZeroShotClassification.from_pretrained(tmp_path / "base").eval()
    plain.set_classes(NAMES)
    defended = DefendedClassifier(plain, adapter)
    defended.save_pretrained(tmp_path / "out")
    again = DefendedClassifier.from_pretrained(tmp_path / "out")
    assert again.adapter == adapter
    assert torch.equal(again(make_images()).logits, defended(make_images()).logits)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SETTINGS}
    with pytest.raises(ValueError, match=f"holds a defence by {type(adapter).__name__}, not by TAPT"):
        TAPT.from_pretrained(tmp_path / "out")


def broken(folder, copy, name, change):
    """A copy of a saved folder with one file changed (None: taken away)."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = change((copy / name).read_bytes())
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    return copy


DAMAGES = {
    "no settings": (SETTINGS, lambda _: None, ValueError, "no adaptation.json.*TAPT.from_pretrained"),
    "cut settings": (SETTINGS, lambda data: data[:50], ValueError, "adaptation.json.*damaged"),
    "later format": (SETTINGS, lambda data: data.replace(b'"format": 1', b'"format": 9'), ValueError, "format 9"),
    "unknown method": (SETTINGS, lambda data: data.replace(b'"tapt"', b'"tadt"'), ValueError, "unknown .*'tadt'"),
    "unknown setting": (SETTINGS, lambda data: data.replace(b'"gamma"', b'"gama"'), ValueError, "no setting 'gama'"),
    "no statistics": (STATISTICS, lambda _: None, OSError, "no statistics.safetensors"),
    "cut statistics": (STATISTICS, lambda data: data[:200], OSError, "statistics"),
    "no prompts": (PROMPTS, lambda _: None, OSError, "no adapter_model.safetensors"),
}


@pytest.mark.parametrize(("name", "change", "kind", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused(saved, tmp_path, name, change, kind, message):
    with pytest.raises(kind, match=message):
        TAPT.from_pretrained(broken(saved[1], tmp_path / "copy", name, change))


def test_statistics_of_other_prompts_are_refused(saved, tmp_path):
    _, folder = saved
    other = make_defended("V")
    other.save_pretrained(tmp_path / "other")
    swapped = broken(folder, tmp_path / "copy", STATISTICS, lambda _: (tmp_path / "other" / STATISTICS).read_bytes())
    with pytest.raises(ValueError, match="statistics"):
        TAPT.from_pretrained(swapped)


def test_a_folder_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    defended, folder = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(AlignmentTargets, "save", fail)
    for target in (folder, tmp_path / "new/folder"):
        with pytest.raises(OSError, match="disk is full"):
            defended.save_pretrained(target)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_saved_or_defended():
    with pytest.raises(TypeError, match="classifier is a Linear"):
        DefendedClassifier(torch.nn.Linear(1, 1), TTC())
    with pytest.raises(TypeError, match="give a test-time defence"):
        DefendedClassifier(base_model(), "tapt")
    with pytest.raises(ValueError, match="no setting 'views'; it has"):
        adapter_from(Ensemble, {"views": 3})
    with pytest.raises(OSError, match="no such folder"):
        DefendedClassifier.from_pretrained("no/such", local_files_only=True)


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]))
