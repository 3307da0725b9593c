"""What the benchmarks do on a card, tried with a stand-in for it: each way's figures are told and kept as they come,
and a way that doesn't fit leaves the others alone. No time is asserted.
"""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import adaptation_speed
import auto_attack_speed
import gradient_speed
import measuring
import prompt_speed
import pytest
import step_speed
import torch
import training_costs
from torch.autograd import DeviceType

TINY = ["--tiny", "--device", "cuda", "--repeats", "1"]


class StandIn(str):
    """For torch the device `cpu`, for a script `cuda`."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other == "cuda"


class Record:
    """Of a profiler: a kernel of 3 us, one of 2 us that begins within it, and what is none."""

    def __enter__(self) -> Record:
        return self

    start = __enter__

    def __exit__(self, *raised: object) -> None:
        """Nothing is to be stopped."""

    stop = __exit__

    def events(self) -> list[SimpleNamespace]:
        rows = [("gemm", 0, 3, True, False), ("relu", 2, 4, True, False), ("step", 0, 9, True, True)]
        rows.append(("launch", 5, 9, False, False))
        return [
            SimpleNamespace(
                name=name, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=told,
                device_type=DeviceType.CUDA if card else DeviceType.CPU,
            )
            for name, start, end, card, told in rows
        ]  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    """A machine that a script takes for one with a card."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *given, **named):
        args = parse(self, *given, **named)
        args.device = StandIn("cpu")
        return args

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    for name, value in {
        "synchronize": None, "reset_peak_memory_stats": None, "empty_cache": None, "max_memory_allocated": 2**30,
        "memory_allocated": 2**29, "get_device_name": "a card",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(measuring, "profiler", Record)
    monkeypatch.setattr(training_costs, "profiler", Record)


@pytest.fixture
def found_card(card, monkeypatch):
    """The same where torch says that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_kernels_that_overlap_count_once():
    assert measuring.kernels_seen(Record(), calls=2) == {"kernels_s": 2e-6, "products_of_kernels": 0.6}


def test_no_kernels_are_an_error():
    with pytest.raises(RuntimeError):
        measuring.kernels_seen(SimpleNamespace(events=lambda: Record().events()[2:]), calls=1)


def test_operations_of_a_product_and_its_gradients():
    left, right = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    assert measuring.count_operations(lambda: (left @ right).sum().backward()) == 3 * 2 * 2 * 3 * 5


@pytest.mark.parametrize(
    ("script", "words", "ways"),
    [
        (prompt_speed, ["--images", "4", "--classes", "5"], ["ours", "released"]),
        (prompt_speed, ["--what", "text", "--classes", "5"], ["ours", "released"]),
        (adaptation_speed, ["--images", "2", "--classes", "5", "--views", "12"], ["ours", "released"]),
        (gradient_speed, ["--images", "2"], ["plain fp32", "ours fp32", "plain bf16", "ours bf16"]),
        (auto_attack_speed, ["--images", "4", "--classes", "5", "--steps", "1", "--queries", "2"], ["ours", "fast"]),
    ],
)
def test_scripts_keep_speed_memory_and_use(found_card, script, words, ways, tmp_path, capsys):
    tiny = TINY[:-2] if script is auto_attack_speed else TINY
    script.main([*tiny, *words, "--output", str(tmp_path / "new" / "figures.json")])
    kept = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert kept == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert kept["complete"]
    for way in ways:
        found = kept["figures"][way]
        assert "error" not in found
        assert found["peak_gib"] == 1
        assert found["tflops"] > 0
        assert 0 < found["kernel_share"] < 1


def test_a_way_that_does_not_fit_leaves_the_others(found_card, monkeypatch, tmp_path):
    def full(self: step_speed.Released) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step_speed.Released, "step", full)
    file = tmp_path / "figures.json"
    step_speed.main([*TINY, "--images", "4", "--classes", "3", "5", "--output", str(file)])
    figures = json.loads(file.read_text())["figures"]
    for classes in ("3", "5"):
        assert "out of memory" in figures[classes]["released fp16"]["error"]
        assert figures[classes]["ours bf16"]["per_s"] > 0
        assert "ratio" not in figures[classes]["ours bf16"]


@pytest.mark.usefixtures("fresh_accelerate")
def test_costs_of_methods_are_kept(card, tmp_path, capsys):
    file = tmp_path / "costs.json"
    words = ["--measure", "--device", "cuda", "--size", "tiny", "--images", "4", "--repeats", "1"]
    training_costs.main([*words, "--methods", "Clean", "TeCoA", "--output", str(file)])
    kept = json.loads(file.read_text())
    assert kept["passes"] == training_costs.load()["passes"]
    assert set(kept["measured"]["methods"]) == {"Clean", "TeCoA"}
    assert kept["measured"]["methods"]["TeCoA"]["peak_bytes"] == 2**29
    printed = capsys.readouterr().out
    assert "1.00 times TeCoA's time" in printed
    assert "bound by" in printed
