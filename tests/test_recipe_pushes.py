"""Recipes that push to a stand-in for the Hub: what arrives, what tells no token and no path, and what fails when.

This file run as a script is the client, in a process of its own: huggingface_hub reads its address once, on import.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes/configs/digits-clip"
TOKEN = "hf_" + "Zy9x" * 8
SMALL = ["--max_images", "16", "--max_steps", "2", "--per_device_train_batch_size", "8",
         "--save_steps", "1", "--evaluation.attack", "pgd-1", "--evaluation.radii", "[24/255]",
         "--hub_token", TOKEN]  # fmt: skip
DIGITS = ["--tasks", "[{dataset: digits, split: test, max_images: 4}]"]


def client(work: Path) -> dict:
    """Run recipes; report their exit status, and what the pushed repositories give."""
    import torch
    from accelerate.state import AcceleratorState
    from command_words import last_of_each

    from hf_robust_clip import CLIPForZeroShotClassification
    from hf_robust_clip.checkpoint_notes import trained_templates
    from hf_robust_clip.cli import run as run_command
    from hf_robust_clip.runs.shared import load_model

    def run(name, method, *words):
        AcceleratorState._reset_state(reset_partial_state=True)
        print(f"==== {name}", flush=True)
        print(f"==== {name}", file=sys.stderr, flush=True)
        status = 0
        try:
            run_command(
                "train", CONFIGS / f"{method}.yaml", "", last_of_each(*SMALL, "--output_dir", work / name, *words)
            )
        except SystemExit as stopped:
            status = stopped.code
        found[name] = status

    def logits(source):
        model = load_model(source)
        model.set_classes(["zero", "one", "two"], "a photo of a {}.")
        with torch.no_grad():
            return model(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).logits.tolist()

    found: dict = {}
    places = ["--model_name_or_path", str(work / "base model"), "--dataset_name", str(work / "my pictures")]
    pictures = ["--tasks", f"[{{dataset: '{work / 'my pictures'}', split: train, max_images: 4}}]"]
    run("whole", "pmg_aft", *places, *pictures, "--classes", "null", "--compare", "[tecoa]",
        "--push_to_hub", "--hub_model_id", "user/whole", "--hub_private_repo", "true")  # fmt: skip
    found["whole, logits"] = [logits(str(work / "whole")), logits("user/whole")]
    run("adapter", "apt", *DIGITS, "--shots", "2", "--max_images", "null", "--push_to_hub",
        "--hub_model_id", "user/adapter")  # fmt: skip
    found["adapter, logits"] = [logits(str(work / "adapter")), logits("user/adapter")]
    found["templates"] = [trained_templates(f"user/{name}") for name in ("whole", "adapter", "bare")]
    run("broken", "pmg_aft", *DIGITS, "--push_to_hub", "--hub_model_id", "user/broken")
    CLIPForZeroShotClassification.from_pretrained(work / "broken")
    run("read-only", "pmg_aft", *DIGITS, "--push_to_hub", "--hub_model_id", "user/read-only")
    run(
        "on-a-folder",
        "apt",
        *DIGITS,
        "--model_name_or_path",
        str(work / "base model"),
        "--push_to_hub",
        "--hub_model_id",
        "user/x",
    )
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server, what the client saw, its folder, and what it printed and wrote as errors, by run."""
    from hub_server import HubServer
    from PIL import Image

    from hf_robust_clip import CLIPForZeroShotClassification, digits_clip_path

    work = tmp_path_factory.mktemp("recipe pushes")
    CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).save_pretrained(work / "base model")
    (work / "base model/README.md").write_text("---\nbase_model: org/ancestor\n---\n\n# mine\n")
    for i in range(12):
        folder = work / "my pictures/train" / ("zero", "one", "two")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 90, 120)).save(folder / f"{i}.png")
    with HubServer() as server:
        server.repos["user/bare"] = {"config.json": b"{}"}
        server.broken.add("user/broken")
        server.read_only.add("user/read-only")
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(work / "home"), "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        command = [sys.executable, __file__, str(work), str(work / "found.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        printed = [dict(re.findall(r"==== (\S+)\n(.*?)(?=\n====|\Z)", text, flags=re.DOTALL))
                   for text in (done.stdout, done.stderr)]  # fmt: skip
        yield server, json.loads((work / "found.json").read_text()), work, printed


def test_pushed_cards_show_attacked_pictures_where_the_licence_lets_them(hub):
    server, *_ = hub
    card = server.repos["user/adapter"]["README.md"].decode()
    assert "![attacked images](examples.png)" in card and "Pictures: digits (cc-by-4.0;" in card
    assert server.repos["user/adapter"]["examples.png"].startswith(b"\x89PNG")
    assert "examples.png" not in server.repos["user/whole"], "nobody knows the licence of one's own pictures"
    assert "examples.png" not in server.repos["user/whole"]["README.md"].decode()


@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_what_is_pushed_gives_the_same_logits(hub, name):
    _, found, _, (printed, _) = hub
    assert found[name] == 0
    local, remote = found[f"{name}, logits"]
    assert remote == local
    assert "pushed: http://127.0.0.1" in printed[name]
    assert (
        f'from_pretrained(clip, "user/{name}")' in printed[name] or f'from_pretrained("user/{name}")' in printed[name]
    )


@pytest.mark.parametrize("repo", ["user/whole", "user/adapter"])
def test_a_pushed_repository_tells_no_path_and_no_token(hub, repo):
    server, _, work, _ = hub
    files = server.repos[repo]
    assert {"README.md", "report.json", "recipe.yaml", "accuracy.png"} <= set(files)
    for name, content in files.items():
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl")), name
        assert not name.startswith(("checkpoint", "state", "compared", "runs", "my", ".")), name
        for place in (str(work), str(ROOT), str(Path.home()) + "/", "/tmp/", TOKEN):
            assert place.encode() not in content, (name, place)


def test_cards_and_recipes_name_what_others_can_have(hub):
    server, _, work, _ = hub
    card = server.repos["user/whole"]["README.md"].decode()
    assert "base_model: org/ancestor\n" in card
    assert "It started from a checkpoint made from `org/ancestor` and" in card
    assert "datasets:\n-" not in card
    assert "| data | my pictures, split train, 12 images of 3 classes" in card
    assert "PMG-AFT, my pictures" in card
    assert "TeCoA, my pictures" in card
    assert 'from_pretrained("user/whole")' in card
    recipe = yaml.safe_load(server.repos["user/whole"]["recipe.yaml"])
    assert (recipe["model_name_or_path"], recipe["dataset_name"]) == ("base model", "my pictures")
    assert recipe["tasks"][0]["dataset"] == "my pictures"
    assert "hub_token" not in recipe
    assert (work / "whole/recipe.yaml").read_bytes() == server.repos["user/whole"]["recipe.yaml"], "for `hf upload`"
    rows = json.loads(server.repos["user/whole"]["report.json"])
    assert {row["model"] for row in rows["reports"]} == {"user/whole"}
    assert {row["model"] for row in rows["compared"]} == {"base model", "TeCoA from base model, same settings"}
    adapter = json.loads(server.repos["user/adapter"]["adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "digits-clip"
    assert "hf_robust_clip.digits_clip_path()" in server.repos["user/adapter"]["README.md"].decode()


def test_a_repository_says_with_which_prompt_it_was_trained(hub):
    _, found, *_ = hub
    assert found["templates"] == [["This is a photo of a {}"], ["a photo of a {}."], []]


def test_visibility_and_token_of_the_settings_act_and_training_pushes_too(hub):
    server, *_ = hub
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert server.private["user/whole"] in (True, "private")
    assert server.private["user/adapter"] in (None, False, "public")
    messages = [message for repo, message in server.commits if repo == "user/adapter"]
    assert messages[-1] == "Upload robust CLIP"
    assert "Training in progress, step 2" in messages


def test_a_push_that_fails_late_loses_nothing(hub):
    _, found, work, (printed, errors) = hub
    assert found["broken"] == 2
    (line,) = [line for line in errors["broken"].splitlines() if line.startswith("error: ")]
    assert f"hf upload user/broken '{work}/broken'" in line
    assert "500" in line
    assert f"saved to {work}/broken" in printed["broken"]
    assert (work / "broken/report.json").is_file()


@pytest.mark.parametrize(
    ("name", "part"), [("read-only", "hub_model_id='user/read-only'"), ("on-a-folder", "base model")]
)
def test_a_push_that_can_not_succeed_fails_before_the_training(hub, name, part):
    _, found, work, (printed, errors) = hub
    assert found[name] == 2
    (line,) = [line for line in errors[name].splitlines() if line.startswith("error: ")]
    assert part in line
    assert "images" not in printed.get(name, "")
    assert not (work / name).exists()


def test_no_token_in_anything_written_or_printed(hub):
    _, found, work, printed = hub
    assert TOKEN not in json.dumps([found, printed])
    for path in work.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(client(Path(sys.argv[1]))))
