"""The speed comparison of test-time tuning compares equal results, and its script runs. No time is asserted."""

from __future__ import annotations

import json

import adaptation_speed
import pytest
import torch
from prompt_speed import Task

TINY = ["--tiny", "--images", "3", "--classes", "7", "--views", "20"]


def both_ways(*words: str):
    args = adaptation_speed.parse_args([*TINY, *words])
    task = Task(args, args.images, args.classes, dtype=torch.float64)
    return tuple(way(task, args) for way in adaptation_speed.WAYS.values())


@pytest.mark.parametrize("words", [["--design", "VLI"], ["--design", "V"], ["--chunk", "3", "--our_chunk", "5"]])
def test_both_ways_agree(words):
    found = adaptation_speed.compare(*both_ways(*words))
    assert found["loss"] < 1e-10
    assert found["logits"] < 1e-6
    assert found["prompts"] < 1e-3


def test_a_difference_is_seen():
    ours, released = both_ways()
    with torch.no_grad():
        released.start[-1][:, 0].add_(0.1)
    found = adaptation_speed.compare(ours, released)
    assert found["logits"] > 1e-5
    assert found["prompts"] > 1e-4


def test_script_reports_differences_and_ratio(capsys):
    adaptation_speed.main([*TINY, "--no_memory"])
    printed = capsys.readouterr().out
    assert "differences: loss" in printed
    assert "ours is faster by" in printed


def test_views_chosen_in_bfloat16_are_compared(capsys):
    adaptation_speed.main([*TINY, "--no_memory", "--choose_bf16", "--only", "ours"])
    chosen = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["chosen"]
    assert chosen["kept"] == 2
    assert 0 < chosen["same"] <= 2
