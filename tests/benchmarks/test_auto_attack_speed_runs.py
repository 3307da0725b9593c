"""The comparison of AutoAttack runs, and what scripts print last is one line of JSON. No time is asserted."""

from __future__ import annotations

import json

import auto_attack_speed
import gradient_speed


def test_every_run_judges_the_same_images(capsys):
    auto_attack_speed.main(
        ["--tiny", "--images", "6", "--classes", "5", "--steps", "2", "--queries", "5", "--radius", "8/255"]
    )
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last["figures"]) == set(auto_attack_speed.RUNS)
    assert all(figures["judged_otherwise"] == 0 for figures in last["figures"].values())
    assert last["settings"]["steps"] == 2


def test_gradients_of_every_way_agree(capsys):
    gradient_speed.main(["--tiny", "--images", "4", "--repeats", "1"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["ours fp32"]["off"] < 1e-5
    assert 1e-4 < figures["plain bf16"]["off"] < 0.2
    assert 1e-4 < figures["ours bf16"]["off"] < 0.2
