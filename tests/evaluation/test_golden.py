"""Figures of attacks and defences on digits, as they were counted by other code: every verdict on every image."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset

from hf_robust_clip import (
    BPDA,
    RTPT,
    TAPT,
    TTC,
    Adaptive,
    AdaptiveWorst,
    AlignmentTargets,
    CLIPForZeroShotClassification,
    ClipPromptConfig,
    DefenceBlind,
    Ensemble,
    EvaluationSettings,
    Static,
    TransferFromAdapted,
    evaluate_robustness,
    load_image_dataset,
)
from hf_robust_clip.attacks.auto_attack import AutoAttack
from hf_robust_clip.attacks.losses import cw_margin
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.defences.fit import fingerprints
from hf_robust_clip.defences.moments import VisionStatistics, layer_inputs
from hf_robust_clip.digests import unsigned

GOLDEN = json.loads((Path(__file__).parents[1] / "data/golden_figures.json").read_text())
FEWER = dict(num_views=6, selected=0.5)
AUTO = AutoAttack(num_steps=10, num_targets=3, num_queries=50)
FEW_QUERIES = AutoAttack(("apgd-ce", "square"), num_steps=3, num_queries=8)
VIEWS = {
    "static": dict(view=Static()),
    "defence_blind": dict(view=DefenceBlind()),
    "transfer_from_adapted": dict(view=TransferFromAdapted()),
    "bpda": dict(view=BPDA()),
    "adaptive": dict(view=Adaptive()),
    "adaptive_worst": dict(attack=AdaptiveWorst(pgd_steps=3, apgd_steps=3, num_queries=8)),
}
SUITES = {"pgd": PGD(20), "cw": PGD(20, loss=cw_margin), "autoattack": AUTO}
MORE = {"": {}, "autoattack": dict(attack=FEW_QUERIES), "eot": dict(eot=2)}


@dataclass
class Doubles(Dataset):
    """Images in float64: rounding decides nothing."""

    data: object

    def __getattr__(self, name):
        return getattr(self.__dict__["data"], name)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        example = self.data[index]
        return {**example, "pixel_values": example["pixel_values"].double()}


@functools.cache
def classifier(prompted):
    """The embedded model in float64, as it is or with prompts near where they begin; and the test digits."""
    model = CLIPForZeroShotClassification.from_pretrained("digits-clip").double().eval()
    data = load_image_dataset("digits", "test", model.processor)
    model.set_classes(data.class_names, "a photo of a {}.")
    model.requires_grad_(False)
    if prompted:
        places = dict(num_vision_tokens=2, num_text_tokens=2, vision_depth=2, text_depth=2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tuned = get_peft_model(model, ClipPromptConfig(design="VLI", context_init="a photo of a", **places))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.add_(0.02 * noise)
        model = tuned.get_base_model().requires_grad_(False)
    return model, data


def targets_of(model, data):
    """Statistics of 16 other digits, and the same a little off in place of those under clean prompts."""
    images = torch.stack([data[i]["pixel_values"].double() for i in range(100, 116)])
    with layer_inputs(model) as read, torch.no_grad():
        model(images)
    mean, variance = torch.stack([x.mean(0) for x in read]), torch.stack([x.var(0) for x in read])
    record = dict(zip(("model_fingerprint", "prompts_fingerprint"), fingerprints(model), strict=True))
    return AlignmentTargets(
        VisionStatistics(mean, variance, 16, record), VisionStatistics(0.9 * mean, 1.1 * variance, 16, record)
    )


DEFENCES = {
    "tapt": lambda model, data: TAPT(targets=targets_of(model, data), learning_rate=0.05, **FEWER),
    "r_tpt": lambda model, data: RTPT(learning_rate=0.02, **FEWER),
    "ttc": lambda model, data: TTC(eps="8/255", step_size="4/255", tau=0.5),
    "ensemble": lambda model, data: Ensemble(num_views=6),
}


def check(case, size, images, folder):
    name, view, *more = case.split()
    model, data = classifier(name == "tapt")
    defence = DEFENCES[name](model, data) if name in DEFENCES else None
    usual = dict(radii=["6/255", "12/255"] if defence is None else ["10/255"], batch_size=images)
    attack = dict(attack=PGD(3) if defence else SUITES[name])
    settings = EvaluationSettings(**{**usual, **attack, **VIEWS[view], **MORE[" ".join(more)]})
    report = evaluate_robustness(
        model, Doubles(data.first(images)), settings,
        name="name", task="task", model_id="id", defence=defence, state_dir=folder,
    )  # fmt: skip
    expected = GOLDEN[size][case]
    assert report.clean_accuracy == expected["clean"]
    assert [[f"{radius:.8f}", left] for radius, left in report.after_each.items()] == expected["after_each"]
    assert (report.attack, report.model_flags) == (expected["attack"], expected["flags"])
    assert report.attack_parameters == expected["parameters"]
    if defence is not None:
        controls = {key: list(own.values()) for key, own in report.controls.items()}
        assert controls == expected["controls"]
        assert (report.defence["fallbacks"], report.defence["tuned"]) == (expected["fallbacks"], expected["tuned"])
    lines = [json.loads(unsigned(line)) for line in (folder / "state-0.jsonl").read_bytes().splitlines()[1:]]
    assert [sum(line[key] for line in lines) for key in ("zeros", "total")] == expected["zero_gradients"]
    verdicts = {}
    for line in lines:
        for index, _, *stands in line["rows"]:
            verdicts.setdefault(index, []).append(f"{line['stage']}:" + "".join(map(str, stands)))
    assert [" ".join(own) for _, own in sorted(verdicts.items())] == expected["verdicts"]


@pytest.mark.parametrize("case", GOLDEN["few"])
def test_figures_on_a_few_digits(case, tmp_path):
    check(case, "few", 8 if case.split()[0] in DEFENCES else 40, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN["many"])
def test_figures_on_many_digits(case, tmp_path):
    check(case, "many", 40 if case.split()[0] in DEFENCES else 200, tmp_path)
