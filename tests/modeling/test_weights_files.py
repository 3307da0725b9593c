"""Files of weights give tensors and plain values: no code runs, and damage is seen."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_untrusted import Bomb
from torch import nn

from hf_robust_clip.modeling.checkpoints import UnfitWeights
from hf_robust_clip.modeling.weights_files import Unread, read_weights_file

WEIGHTS = {"a": torch.arange(2048.0), "b": torch.ones(3, dtype=torch.float16)}


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_and_plain_values_are_read(legacy, tmp_path):
    content = {
        "state_dict": WEIGHTS,
        "epoch": 3,
        "name": "x",
        "best": torch.tensor(1.0),
        "list": [1, {"c": WEIGHTS["b"]}],
    }
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    found = read_weights_file(tmp_path / "w.pt")
    assert found["epoch"] == 3 and torch.equal(found["state_dict"]["a"], WEIGHTS["a"])
    assert found["list"][1]["c"].dtype == torch.float16


def test_the_content_tells_the_format_not_the_name(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.pt")
    assert torch.equal(read_weights_file(tmp_path / "w.pt")["a"], WEIGHTS["a"])


@pytest.mark.parametrize(
    "value", [np.float64(38.18), np.int64(3), np.arange(3.0), argparse.Namespace(lr=1), {"deep": [np.float32(1)]}]
)
def test_what_isnt_needed_is_left_unread(value, tmp_path):
    torch.save({**WEIGHTS, "best_acc1": value}, tmp_path / "w.pt")
    found = read_weights_file(tmp_path / "w.pt")
    assert torch.equal(found["a"], WEIGHTS["a"])
    own = found["best_acc1"]
    assert isinstance(own["deep"][0] if isinstance(own, dict) else own, Unread)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: Path(path).write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("inside", [lambda bomb: bomb, lambda bomb: {"x": torch.zeros(2), "best_acc1": bomb}])
def test_a_pickle_with_code_in_it_is_not_run(write, inside, tmp_path):
    mark = tmp_path / "run"
    write(inside(Bomb(mark)), tmp_path / "w.pt")
    with pytest.raises(UnfitWeights, match=r"w\.pt"):
        read_weights_file(tmp_path / "w.pt")
    assert not mark.exists()


def test_a_whole_module_and_an_archive_of_code_are_refused_with_the_mend(tmp_path):
    model = nn.Linear(2, 2)
    torch.save(model, tmp_path / "module.pt")
    with pytest.raises(UnfitWeights, match="state_dict"):
        read_weights_file(tmp_path / "module.pt")
    torch.jit.trace(model, torch.zeros(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UnfitWeights, match="TorchScript"):
        read_weights_file(tmp_path / "script.pt")


def flipped(content: bytes) -> bytes:
    """Bytes in the midst of the tensor are others."""
    middle = content.index(WEIGHTS["a"][1000:1010].numpy().tobytes())
    return content[:middle] + b"\x00" * 40 + content[middle + 40 :]


DAMAGE = {
    "first_half": lambda content: content[: len(content) // 2],
    "last_byte": lambda content: content[:-1],
    "beginning": lambda content: content[:30],
    "empty": lambda content: b"",
    "garbage": lambda content: b"\x80\x02garbage" * 20,
    "web_page": lambda content: b"<!DOCTYPE html><html>quota exceeded</html>",
    "pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damage_is_seen(kind, name, tmp_path):
    file = tmp_path / "w.pt"
    if kind == "safetensors":
        save_file(WEIGHTS, file)
    else:
        torch.save(WEIGHTS, file, _use_new_zipfile_serialization=kind == "zip")
    file.write_bytes(DAMAGE[name](file.read_bytes()))
    with pytest.raises((UnfitWeights, ValueError), match=r"w\.pt"):
        read_weights_file(file)


def test_changed_bytes_of_an_archive_are_seen(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(WEIGHTS, file)
    file.write_bytes(flipped(file.read_bytes()))
    assert not torch.equal(torch.load(file, weights_only=True)["a"], WEIGHTS["a"])  # torch itself doesn't look
    with pytest.raises(UnfitWeights, match=r"w\.pt"):
        read_weights_file(file)
