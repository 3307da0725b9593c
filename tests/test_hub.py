"""Push and load through a local stand-in for the Hub.

This file run as a script is the client, in a process of its own: huggingface_hub reads its address once, on import.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO, TRAINER_REPO, DRAFT_REPO = "user/robust-clip", "user/from-trainer", "user/without-card"
NAMES = ("zero", "one", "two")


def client(folder: Path, work: Path) -> dict:
    """Push `folder`, load it back in both ways, push from a trainer with and without a card; report what was seen."""
    import torch
    from huggingface_hub import HfApi, ModelCard
    from transformers import CLIPModel, CLIPProcessor

    from hf_robust_clip import RobustClipConfig, TeCoATrainer
    from hf_robust_clip.hub import push_folder
    from hf_robust_clip.modeling import CLIPForZeroShotClassification

    def logits_of(source):
        model = CLIPForZeroShotClassification.from_pretrained(source).eval()
        model.set_classes(NAMES)
        with torch.no_grad():
            return model, model(pixels).logits

    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    _, local = logits_of(folder)
    found = {"address": push_folder(folder, REPO)}
    model, remote = logits_of(REPO)
    found["revision"] = [model.config._commit_hash, HfApi().model_info(REPO).sha]
    clip, processor = CLIPModel.from_pretrained(REPO).eval(), CLIPProcessor.from_pretrained(REPO)
    texts = processor.tokenizer([f"This is a photo of a {name}" for name in NAMES], padding=True, return_tensors="pt")
    mean, std = (torch.tensor(getattr(processor.image_processor, key)).view(-1, 1, 1)
                 for key in ("image_mean", "image_std"))  # fmt: skip
    with torch.no_grad():
        plain = clip(pixel_values=(pixels - mean) / std, **texts).logits_per_image
    found["logits"] = {"local": local.tolist(), "remote": remote.tolist(), "plain": plain.tolist()}
    card = ModelCard.load(REPO)
    found["eval_results"] = [dataclasses.asdict(row) for row in card.data.eval_results]
    found["model_name"] = card.data.model_name
    found["pushed_again"] = push_folder(folder, REPO)

    text = (folder / "README.md").read_text().replace(REPO, TRAINER_REPO)
    for repo, card_text in ((TRAINER_REPO, text), (DRAFT_REPO, None)):
        output_dir = work / repo
        output_dir.mkdir(parents=True)
        if card_text:
            (output_dir / "README.md").write_text(card_text)
        args = RobustClipConfig(output_dir=str(output_dir), hub_model_id=repo, report_to=[], use_cpu=True)
        TeCoATrainer(model, args).push_to_hub()
        found[repo] = sorted(HfApi().list_repo_files(repo))
        found[repo + " loads"] = torch.equal(logits_of(repo)[1], remote)
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server, what the client saw, and the folder that it pushed."""
    from conftest import make_clip, make_processor
    from hub_server import HubServer
    from reports import make_report

    from hf_robust_clip.modeling import CLIPForZeroShotClassification
    from hf_robust_clip.objectives.tecoa import TeCoA
    from hf_robust_clip.report import CardInfo, make_card, save_reports

    work = tmp_path_factory.mktemp("hub")
    folder = work / "model"
    processor = make_processor()
    CLIPForZeroShotClassification.from_clip(make_clip(processor), processor).save_pretrained(folder)
    reports = [make_report(), make_report(task="held-out classes", clean_accuracy=0.5)]
    save_reports(folder / "report.json", reports)
    settings = {"objective": {}, "attack": None, "threat_model": "L-inf eps=1/255"}
    info = CardInfo(REPO, "digits-clip", "digits", TeCoA.paper, settings, "This is a photo of a {}", NAMES, "Tiny.")
    make_card(reports, [], info).save(folder / "README.md")
    for name in ("checkpoint-2/model.safetensors", "checkpoint-2/optimizer.pt", "training_args.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for others")
    with HubServer() as server:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "0", "HF_HOME": str(work / "home"),
            "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        command = [sys.executable, __file__, str(folder), str(work / "trainers"), str(work / "found.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        yield server, json.loads((work / "found.json").read_text()), folder


def test_pushed_model_gives_the_same_logits_here_and_as_plain_clip(hub):
    _, found, _ = hub
    logits = found["logits"]
    assert logits["remote"] == logits["local"]
    for own, plain in zip(logits["local"], logits["plain"], strict=True):
        assert own == pytest.approx(plain, rel=1e-4, abs=1e-4)
    assert len({round(value, 3) for row in logits["local"] for value in row}) > 3


def test_a_model_knows_the_commit_that_it_was_loaded_from(hub):
    """Reports name it: `main` moves on."""
    _, found, _ = hub
    assert len(found["revision"][0]) == 40 and found["revision"][0] == found["revision"][1]


def test_push_says_where_and_may_be_repeated(hub):
    server, found, _ = hub
    assert found["address"] == found["pushed_again"] == f"{server.url}/{REPO}"


def test_report_and_card_come_along_byte_for_byte(hub):
    server, _, folder = hub
    for name in ("README.md", "report.json", "model.safetensors", "processor_config.json", "tokenizer.json"):
        assert server.repos[REPO][name] == (folder / name).read_bytes(), name


def test_checkpoints_and_pickled_arguments_stay_here(hub):
    server, _, _ = hub
    left = [name for name in server.repos[REPO] if "checkpoint" in name or name == "training_args.bin"]
    assert left == []


def test_metadata_was_accepted_and_gives_back_its_results(hub):
    server, found, _ = hub
    assert server.cards
    assert found["model_name"] == "robust-clip"
    rows = {(row["dataset_config"], row["metric_type"]): row["metric_value"] for row in found["eval_results"]}
    assert len(rows) == len(found["eval_results"]) == 6
    assert rows["held-out classes, clean, n=40", "accuracy"] == 0.5


def test_trainer_pushes_a_loadable_model_and_keeps_our_card(hub):
    server, found, folder = hub
    assert found[TRAINER_REPO + " loads"]
    kept = (folder / "README.md").read_bytes().replace(REPO.encode(), TRAINER_REPO.encode())
    assert server.repos[TRAINER_REPO]["README.md"] == kept
    assert "training_args.bin" not in found[TRAINER_REPO]


def test_trainer_without_a_card_pushes_a_draft(hub):
    server, found, _ = hub
    assert found[DRAFT_REPO + " loads"]
    assert {"README.md", "model.safetensors", "processor_config.json"} <= set(found[DRAFT_REPO])
    assert server.repos[DRAFT_REPO]["README.md"].startswith(b"---\n")


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(client(Path(sys.argv[1]), Path(sys.argv[2]))))
