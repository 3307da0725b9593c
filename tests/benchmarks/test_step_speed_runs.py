"""The speed comparison compares equal results, and its script runs. No time is asserted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import step_speed
import torch
from measuring import count_operations

TINY = ["--tiny", "--images", "4", "--classes", "5", "--repeats", "1"]


def test_both_ways_agree():
    task = step_speed.Task(step_speed.parse_args(TINY), images=4, classes=5, dtype=torch.float64)
    found = step_speed.compare(task)
    assert found["ours"] > 0
    assert found["pixels"] == 0
    for name in ("ce", "kl_general", "kl_clean", "loss", "gradient"):
        assert found[name] < 1e-6, found


def test_a_difference_is_seen(monkeypatch):
    monkeypatch.setattr(step_speed, "OBJECTIVE", replace(step_speed.OBJECTIVE, kl_direction="adv_first"))
    task = step_speed.Task(step_speed.parse_args(TINY), images=4, classes=5, dtype=torch.float64)
    found = step_speed.compare(task)
    assert found["kl_general"] > 1e-4
    assert found["gradient"] > 1e-6


def test_script_reports_loss_and_ratio(capsys):
    step_speed.main(TINY)
    printed = capsys.readouterr().out
    assert "relative differences" in printed
    assert "ours is faster by" in printed


def test_script_times_parts(capsys):
    step_speed.main([*TINY, "--parts"])
    assert "random start" in capsys.readouterr().out


def test_flop_count_includes_the_backward():
    ours = step_speed.Ours(step_speed.Task(step_speed.parse_args(TINY), images=4, classes=5))
    with torch.no_grad():
        forward = count_operations(lambda: ours.student(ours.task.images_BCHW))
    assert 8 < count_operations(ours.step) / forward < 12  # attack 2 x 2, student 2 x 3, teacher 1


def test_prompts_end_within_positions_6_to_12():
    config = step_speed.clip_config(tiny=False)
    ids_CL = step_speed.random_token_ids(step_speed.class_prompts(1000)[1], config)
    assert ids_CL.shape == (1000, 77)
    eos_C = (ids_CL == config.text_config.eos_token_id).int().argmax(dim=1)
    assert eos_C.min() >= 6
    assert eos_C.max() <= 12


def test_bfloat16_on_cpu_is_timed_beside_float32(capsys):
    step_speed.main([*TINY, "--dtype", "bf16"])
    printed = capsys.readouterr().out
    assert "ours, attack in bf16 is faster by" in printed
    assert "ours bf16 is faster by" in printed


def test_cuda_options_are_refused_on_cpu(capsys):
    with pytest.raises(SystemExit):
        step_speed.parse_args(["--compile"])
    assert "--device cuda" in capsys.readouterr().err
