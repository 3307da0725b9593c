"""The speed comparison of prompt training compares equal results, and its script runs. No time is asserted."""

from __future__ import annotations

import gzip

import prompt_speed
import pytest
import torch

TINY = ["--tiny", "--images", "5", "--classes", "7", "--repeats", "1"]


def both_ways(what: str, *words: str) -> tuple[prompt_speed.Ours, prompt_speed.Released]:
    args = prompt_speed.parse_args([*TINY, "--what", what, *words])
    task = prompt_speed.Task(args, args.images, args.classes, dtype=torch.float64)
    return prompt_speed.Ours(task), prompt_speed.Released(task)


@pytest.mark.parametrize("words", [["text"], ["text", "--chunk", "3"], ["step"]])
def test_both_ways_agree(words):
    found = prompt_speed.compare(*both_ways(*words))
    assert found["values"] < 1e-10
    assert found["gradients"] < 1e-8


@pytest.mark.parametrize("what", ["text", "step"])
def test_a_difference_is_seen(what):
    ours, released = both_ways(what)
    with torch.no_grad():
        released.text_prompts[-1][:, 0].add_(0.1)  # one channel: layer norms undo a shift of all
    found = prompt_speed.compare(ours, released)
    assert found["values"] > 1e-6
    assert found["gradients"] > 1e-5


@pytest.mark.parametrize("what", ["text", "step"])
def test_script_reports_differences_and_ratio(what, capsys):
    prompt_speed.main([*TINY, "--what", what, "--no_memory"])
    printed = capsys.readouterr().out
    assert "relative differences" in printed
    assert "ours is faster by" in printed


def test_peak_memory_is_that_of_a_process_of_its_own():
    parent = torch.ones(2**28)  # 1 GiB
    args = prompt_speed.parse_args([*TINY, "--what", "text"])
    assert 2**26 < prompt_speed.peak_memory(args, "ours") < parent.nbytes


def test_merges_of_a_vocabulary_file_are_used(tmp_path):
    file = tmp_path / "merges.txt.gz"
    file.write_bytes(gzip.compress(b"#version\no f</w>\np h\n"))
    tokenizer = prompt_speed.make_tokenizer(file)
    ids = tokenizer("photo of").input_ids
    assert [ids[0], ids[-1]] == [prompt_speed.BOS, prompt_speed.EOS]
    assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == ["ph", "o", "t", "o</w>", "of</w>"]


def test_a_step_of_one_image_is_refused(capsys):
    with pytest.raises(SystemExit):
        prompt_speed.parse_args(["--images", "1"])
    assert "at least 2" in capsys.readouterr().err
