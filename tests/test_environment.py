"""Where bfloat16 would be slow: float32 is taken, and said to be."""

from dataclasses import replace

import pytest
import torch
from training_script import arguments, digits

from hf_robust_clip import EvaluationSettings, evaluate_robustness
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.environment import multiplies_bfloat16, tell_float32
from hf_robust_clip.evaluation.attack_views import Scene


@pytest.fixture
def old_processor(monkeypatch):
    for module in ("evaluation.settings", "training.config"):
        monkeypatch.setattr(f"hf_robust_clip.{module}.multiplies_bfloat16", lambda device: device != "cpu")
    tell_float32.cache_clear()


@pytest.mark.parametrize("there", [True, False])
def test_onednn_is_asked_of_processors_alone(there, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there, raising=False)
    assert multiplies_bfloat16("cpu") is there and multiplies_bfloat16("cuda")


@pytest.mark.usefixtures("fresh_accelerate", "old_processor")
@pytest.mark.parametrize("name", ["bf16", "attack_bf16"])
def test_a_training_is_in_float32(name, tmp_path, caplog):
    for _ in range(2):
        args = arguments(tmp_path, **{name: True})
    assert (args.bf16, args.attack_bf16, args.mixed_precision) == (False, False, "no")
    assert [record.getMessage().split()[0] for record in caplog.records] == [f"{name}=True"], "said once"


@pytest.mark.usefixtures("fresh_accelerate", "old_processor")
def test_what_accelerate_was_launched_with_is_float32_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments(tmp_path).mixed_precision == "no"


@pytest.mark.usefixtures("fresh_accelerate", "old_processor")
def test_settings_that_contradict_one_another_are_refused_all_the_same(tmp_path):
    with pytest.raises(ValueError, match="attack_bf16"):
        arguments(tmp_path, bf16=True, attack_bf16=True)


@pytest.mark.usefixtures("old_processor")
def test_a_fast_evaluation_is_the_plain_one_and_its_report_says_so(caplog, monkeypatch):
    rough, real = [], Scene.cheaper
    monkeypatch.setattr(Scene, "cheaper", lambda scene, logits_fn: rough.append(scene) or real(scene, logits_fn))
    model, data = digits(8)
    model.float().eval().requires_grad_(False)
    settings = EvaluationSettings(["8/255", "16/255"], attack=PGD(3))
    names = dict(name="name", task="task", model_id="id")
    plain, fast = (
        evaluate_robustness(model, data, replace(settings, precision=own), **names) for own in ("fp32", "fast")
    )
    assert not rough, "no gradient was asked for in bfloat16"
    assert fast.precision == plain.precision == "float32" and fast.outcomes == plain.outcomes
    assert [record.getMessage().split()[0] for record in caplog.records] == ["precision='fast'"]
