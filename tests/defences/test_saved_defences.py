"""Every defence of the package, saved, and loaded in a new process: equal predictions, digit for digit.

This file run as a script is that process.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from hf_robust_clip import CLIPForZeroShotClassification, ClipPromptConfig, DefendedClassifier, digits_clip_path
from hf_robust_clip.crops import RandomResizedCrop
from hf_robust_clip.defences import defence_class, defence_classes
from hf_robust_clip.defences.alignment import AlignmentTargets
from hf_robust_clip.defences.fit import collect_statistics
from hf_robust_clip.zero_shot_data.loading import load_image_dataset

VIEWS = dict(num_views=4, crop=RandomResizedCrop(scale=(0.5, 1.0)))
TUNED = dict(VIEWS, selected=0.5, learning_rate=0.05)
TOKENS = dict(design="VLI", vision_depth=2, text_depth=2)
ROWS = {  # what is saved: its name and settings, none of them a default; prompts in the classifier
    "rfi": ("rfi", dict(top_k=3, score="squared", centred=True), None),
    "bafta": ("bafta", dict(VIEWS, beta=2.0, alpha=0.7, moved_by="views"), None),
    "bafta_te": ("bafta", dict(VIEWS, beta=0.0), TOKENS),
    "c_avp": ("c_avp", dict(temperature=3.0), dict(design="pixel", per_class=True, border_width=1)),
    "clipure": ("clipure", dict(num_steps=2, step_size=0.5, templates=["a picture of a {}."]), None),
    "mirror_check": ("mirror_check", dict(encoder_steps=20, noise=0.01, num_own_encoders=2, encoders_at_once=1), None),
    "tapt": ("tapt", TUNED, TOKENS),
    "prompt_align": ("prompt_align", TUNED, TOKENS),
    "r_tpt": ("r_tpt", TUNED, None),
    "tpt": ("tpt", dict(TUNED, num_steps=2), None),
    "ttc": ("ttc", dict(eps="8/255", tau=0.5, num_steps=3), None),
    "ensemble": ("ensemble", VIEWS, None),
}


def made(row):
    """A defence in front of the embedded model, fitted on its training images, and prompts larger than they begin."""
    name, settings, prompts = ROWS[row]
    model = classifier = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).eval().requires_grad_(False)
    data = load_image_dataset("digits", "train", classifier.processor).first(120)
    classifier.set_classes(data.class_names, "a photo of a {}.")
    if prompts is not None:
        model = get_peft_model(classifier, ClipPromptConfig(**prompts)).eval()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        model.requires_grad_(False)
    defence = defence_class(name)(**settings)
    if "targets" in defence.learns():
        targets = AlignmentTargets(*(collect_statistics(classifier, data.first(n), batch_size=12) for n in (12, 6)))
        defence = replace(defence, targets=targets)
    else:
        defence = defence.fit(classifier, data)
    return DefendedClassifier(model, defence, seed=5, base_model="digits-clip")


def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def predicted(defended):
    """All that two batches of a stream are given."""
    first = defended.predict(images()[:2])
    second = defended.adapter.predict(defended.classifier, images()[2:], state=first.state, seed=defended.seed)
    found = {}
    for place, batch in (("first", first), ("second", second)):
        parts = {name: getattr(batch, name) for name in ("logits", "score", "flagged", "images", "loss", "kept")}
        parts |= {} if batch.state is None else batch.state.tensors()
        found |= {f"{place} {name}": part for name, part in {**parts, **batch.prompts}.items() if part is not None}
    return {name: part.detach().clone() for name, part in found.items()}


def test_every_defence_has_a_row():
    assert {name for name, _, _ in ROWS.values()} == set(defence_classes())


def test_settings_are_no_defaults():
    for name, settings, _ in ROWS.values():
        assert all(getattr(defence_class(name)(), key) != value for key, value in settings.items())


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """By row, what was predicted before it was saved, and in a new process."""
    folder, own = tmp_path_factory.mktemp("saved"), {}
    for row in ROWS:
        defended = made(row)
        defended.save_pretrained(folder / row)
        own[row] = predicted(defended)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return own, torch.load(folder / "found.pt")


@pytest.mark.parametrize("row", list(ROWS))
def test_a_new_process_predicts_the_same(row, both):
    own, found = (each[row] for each in both)
    assert list(found) == list(own)
    assert [name for name in own if not torch.equal(own[name], found[name])] == []
    plain = both[0]["mirror_check"]["first logits"]  # a detector changes none
    assert row == "mirror_check" or (plain - own["first logits"]).abs().max() > 1e-2


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    torch.save({row: predicted(DefendedClassifier.from_pretrained(root / row)) for row in ROWS}, root / "found.pt")
