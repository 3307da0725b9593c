"""A leaderboard of small converted checkpoints that a stand-in for the Hub serves, as a user starts it."""

import io
import os
import subprocess
import sys

import pytest
import torch
import yaml
from hub_server import HubServer
from tiny import make_clip, make_processor

from hf_robust_clip.modeling import CLIPForZeroShotClassification
from hf_robust_clip.report import load_reports

pytest.importorskip("hf_robust_clip.runs.convert")
openai_clip = pytest.importorskip("openai_clip")


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_checkpoints_of_the_hub_are_converted_evaluated_and_ranked(tmp_path):
    processor = make_processor()
    base = CLIPForZeroShotClassification.from_clip(make_clip(processor), processor)
    base.save_pretrained(tmp_path / "base")
    first, second = (openai_clip.OpenAIClip(len(processor.tokenizer), "quick_gelu", seed=seed) for seed in (1, 2))
    tower, tecoa = first.visual.state_dict(), second.visual.state_dict()
    trap = {"state_dict": {}, "add_prompter": {}, "vision_encoder_state_dict": tecoa, "epoch": 1}
    shared = {"base": "org/base", "reference": "base", "licence": "mit", "trained_eps": "1/255"}
    attack = {"class_path": "AutoAttack", "init_args": {"num_steps": 3, "num_queries": 20}}
    settings = {
        "output_dir": "out",
        "evaluation": {"radii": ["1/255", "4/255"], "attack": attack},
        "tasks": [{"dataset": "digits", "max_images": 12}],
        "references": [{"key": "base", "title": "base", "source": "org/base", "licence": "mit"}],
        "models": [
            {**shared, "key": "a", "title": "visual", "source": "org/towers", "file": "fare.pt", "layout": "visual"},
            {**shared, "key": "b", "title": "TeCoA", "source": "org/tecoa", "file": "best.pth.tar", "layout": "tecoa"},
            {**shared, "key": "c", "title": "whole", "source": "org/whole", "layout": "open_clip"},
            {**shared, "key": "d", "title": "lost", "source": "org/nowhere", "file": "x.pt", "layout": "visual"},
            {**shared, "key": "e", "title": "wrong", "source": "org/towers", "file": "fare.pt", "layout": "tecoa"},
        ],
    }  # fmt: skip
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(settings))
    with HubServer() as server:
        server.repos |= {
            "org/base": files_of(tmp_path / "base"),
            "org/towers": {"fare.pt": saved(tower)},
            "org/tecoa": {"best.pth.tar": saved(trap)},
            "org/whole": {"open_clip_pytorch_model.bin": saved(first.state_dict())},
        }

        def start(*words):
            environment = {
                **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
                "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
                "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            }  # fmt: skip
            command = [sys.executable, "-c", "from hf_robust_clip.cli import main; main()"]
            words = ["leaderboard", "board.yaml", *words]
            return subprocess.run([*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True,
                                  timeout=300)  # fmt: skip

        done = start()
        assert done.returncode == 1, done.stderr[-3000:]
        assert "lost: not run: " in done.stdout and "wrong: not run: " in done.stdout
        reports, _ = load_reports(tmp_path / "out/report.json")
        shas = {repo: server.sha(repo) for repo in server.repos}
        assert {(own.name, own.model, own.model_revision) for own in reports} == {
            (title, repo, shas[repo])
            for title, repo in (("visual", "org/towers"), ("TeCoA", "org/tecoa"), ("whole", "org/whole"),
                                ("base", "org/base"))
        }  # fmt: skip
        page = (tmp_path / "out/leaderboard.md").read_text()
        assert page.count("| L-inf eps=1/255 |") == 5 and f"org/tecoa, best.pth.tar at {shas['org/tecoa'][:7]}" in page
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*ed/*/*.json")}
        assert len(written) > 6
        settings["models"] = settings["models"][:3]
        (tmp_path / "board.yaml").write_text(yaml.safe_dump(settings))
        server.repos.clear()  # nothing is asked for again
        again = start()
        assert again.returncode == 0, again.stderr[-3000:]
        assert {path: path.stat().st_mtime_ns for path in written} == written
        assert "lost" not in (tmp_path / "out/leaderboard.md").read_text()
