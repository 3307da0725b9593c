"""Weights of the Hub are converted with their commit, and pushed again; by a local stand-in for the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FARE, LEAF, BASE, OWN = "org/fare", "org/leaf", "org/base", "me/robust"


def child(folder: Path) -> None:
    """In a process of its own, whose Hub is the stand-in."""
    os.chdir(folder)
    from hf_robust_clip.cli import main
    from hf_robust_clip.hub import push_folder
    from hf_robust_clip.modeling import CLIPForZeroShotClassification

    for source, words in ((FARE, []), (LEAF, ["--source_revision", "main"])):
        main(["convert", source, "--base", BASE, "--output_dir", source.partition("/")[2], *words])
    push_folder("fare", OWN)
    CLIPForZeroShotClassification.from_pretrained(OWN)
    with pytest.raises(SystemExit):
        main(["convert", FARE, "--base", BASE, "--output_dir", "none", "--source_file", "nothing.bin"])
    with pytest.raises(SystemExit):
        main(["convert", "org/nobody", "--base", BASE, "--output_dir", "none"])
    assert not Path("none").exists()


@pytest.mark.slow
def test_repositories_are_converted_with_their_commits_and_pushed(tmp_path):
    import torch
    from hub_server import HubServer
    from layout_files import open_clip_training
    from openai_clip import OpenAIClip
    from tiny import make_clip, make_processor

    from hf_robust_clip.modeling import CLIPForZeroShotClassification

    processor = make_processor()
    CLIPForZeroShotClassification.from_clip(make_clip(processor), processor).save_pretrained(tmp_path / "base")
    torch.save(open_clip_training(OpenAIClip(len(processor.tokenizer), "quick_gelu")), tmp_path / "weights.bin")
    with HubServer() as server:
        base = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
        server.repos[BASE] = base
        server.repos[LEAF] = {name: base[name] for name in ("config.json", "model.safetensors")}
        server.repos[FARE] = {
            "open_clip_pytorch_model.bin": (tmp_path / "weights.bin").read_bytes(),
            "README.md": b"x",
        }
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for repo, layout in ((FARE, "open_clip"), (LEAF, "hugging_face")):
            told = json.loads((tmp_path / repo.partition("/")[2] / "provenance.json").read_text())
            assert told["source"]["name"] == repo and told["source"]["commit"] == server.sha(repo)
            assert told["base"].items() >= {"name": BASE, "published": True, "commit": server.sha(BASE)}.items()
            assert told["layout"] == layout
        card = server.repos[OWN]["README.md"].decode()
        assert f'"{OWN}"' in card and f"base_model: {BASE}" in card
        assert {"provenance.json", "model.safetensors", "processor_config.json"} <= set(server.repos[OWN])
        assert any("source_file" in line for line in done.stderr.splitlines() if line.startswith("error:")), (
            done.stderr
        )


if __name__ == "__main__":
    child(Path(sys.argv[1]))
