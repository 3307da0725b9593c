"""What every way to push leaves on a stand-in for the Hub: loadable, with our card, without pickles.

This file run as a script is the client, in a process of its own: huggingface_hub reads its address once, on import.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

NAMES = ("zero", "one", "two")
TEMPLATE = "a photo of a {}."
BASE = "user/base"
TOKEN = "hf_" + "a1B2" * 8  # one that looks real
ROOT = Path(__file__).parent.parent
PICKLED = (".bin", ".pt", ".pth", ".pkl")


@contextmanager
def refused(found: dict, name: str):
    """Note the kind and text of an error."""
    found[name] = None
    try:
        yield
    except (OSError, ValueError) as error:
        kinds = [kind.__name__ for kind in (OSError, ValueError) if isinstance(error, kind)]
        found[name] = {"kinds": kinds, "text": str(error)}


def client(base: Path, work: Path, control: str) -> dict:
    """Push in every way; report what was seen."""
    import urllib.request

    import torch
    from huggingface_hub import ModelCard
    from peft import LoraConfig
    from transformers import TrainerCallback

    from hf_robust_clip import (
        TAPT,
        TTC,
        APTTrainer,
        CLIPForZeroShotClassification,
        ClipPromptConfig,
        DefendedClassifier,
        RobustClipConfig,
        TAPTTrainer,
        TeCoATrainer,
    )
    from hf_robust_clip.hub import push_folder

    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.rand(3, 8, 8, generator=generator), "labels": i % 3} for i in range(8)]
    pixels = torch.stack([row["pixel_values"] for row in data[:3]])
    found: dict = {}

    def model(source=BASE):
        clip = CLIPForZeroShotClassification.from_pretrained(source).eval()
        clip.set_classes(NAMES, TEMPLATE)
        return clip

    def args(repo, folder=None, **more):
        values = dict(max_steps=2, save_steps=1, learning_rate=0.1, per_device_train_batch_size=4, report_to=[],
                      use_cpu=True, disable_tqdm=True, hub_model_id=repo)  # fmt: skip
        return RobustClipConfig(str(work / (folder or repo)), **{**values, **more})

    def logits(clip):
        with torch.no_grad():
            return clip.eval()(pixel_values=pixels).logits.tolist()

    def by_card(repo):
        """What the code of a card gives, one block after the other."""
        scope, seen = {"pixel_values": pixels}, []
        card = ModelCard.load(repo)
        for block in re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL):
            if "pipeline" in block:
                continue
            block = re.sub(r"set_classes\(\[.*?\],", f"set_classes({list(NAMES)},", block)
            with torch.no_grad():
                exec(compile(block, "card", "exec"), scope)
            own = scope["model"].eval()
            seen.append(logits(own))
        return {"logits": seen, "base": card.data.base_model, "library": card.data.library_name, "text": str(card)}

    def server(what, repo):
        urllib.request.urlopen(f"{control}/control/{what}/{repo}").read()

    class Space(TrainerCallback):
        """As Trackio does: its Space is made when something is pushed, and the model is tagged with the address."""

        def on_push_begin(self, args, state, control, model=None, **kwargs):
            model.model_tags = ["trackio", "trackio:https://huggingface.co/spaces/user/logs"]

    class Refused(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            raise RuntimeError("no Space can be made")

    prompts = ClipPromptConfig(design="VLI", vision_depth=2, text_depth=2)
    lora = LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)", init_lora_weights=False)

    for strategy in ("every_save", "end", "checkpoint", "all_checkpoints"):
        with refused(found, strategy):
            own = args(f"user/{strategy}", push_to_hub=True, hub_strategy=strategy)
            tracker = Space() if strategy == "every_save" else Refused()
            trainer = TeCoATrainer(model(), own, train_dataset=data, callbacks=[tracker])
            trainer.train()
            if strategy == "end":
                trainer.save_model()
            found[f"{strategy} pushed"] = {"own": logits(trainer.model), **by_card(f"user/{strategy}")}

    trainer = TeCoATrainer(model(), args("named", hub_token=TOKEN, hub_private_repo=True), train_dataset=data)
    trainer.push_to_hub(language="en", tags="mine")
    found["named"] = {"own": logits(trainer.model), **by_card("user/named")}

    for name, peft_config in (("lora", lora), ("prompts", prompts)):
        trainer = APTTrainer(model(), args(f"user/{name}"), train_dataset=data, peft_config=peft_config)
        trainer.train()
        trainer.push_to_hub()
        found[name] = {"own": logits(trainer.classifier()), **by_card(f"user/{name}")}

    trainer = TAPTTrainer(
        model(), args("user/tapt"), train_dataset=data, peft_config=prompts,
        defence=TAPT(num_views=4, selected=0.5, gamma=1.0),
    )  # fmt: skip
    trainer.train()
    trainer.collect_statistics()
    trainer.push_to_hub()
    found["tapt"] = {"own": logits(trainer.defended()), "static": logits(trainer.classifier()), **by_card("user/tapt")}

    defended = DefendedClassifier(model(), TTC(num_steps=1))
    defended.push_to_hub("user/ttc")
    found["ttc"] = {"own": logits(defended), **by_card("user/ttc")}

    push_folder(work / "figures", "user/figures")
    with refused(found, "path in a text"):
        (work / "figures/notes.md").write_text(f"made in {work}\n")
        push_folder(work / "figures", "user/figures")
    with refused(found, "token in a text"):
        (work / "figures/notes.md").write_text(f"by {TOKEN}\n")
        push_folder(work / "figures", "user/figures")
    (work / "figures/notes.md").unlink()
    with refused(found, "no card"):
        (work / "figures/README.md").unlink()
        push_folder(work / "figures", "user/figures")
    with refused(found, "no processor"):
        (work / "figures/processor_config.json").unlink()
        push_folder(work / "figures", "user/figures")

    with refused(found, "adapter on a folder"):
        APTTrainer(model(base), args("user/on-a-folder", push_to_hub=True), train_dataset=data, peft_config=prompts)
    with refused(found, "defence on its own base"):
        DefendedClassifier(model(), TTC()).push_to_hub(BASE)
    with refused(found, "adapter among weights"):
        APTTrainer(model(), args("user/whole", push_to_hub=True), train_dataset=data, peft_config=prompts)
    with refused(found, "weights beside an adapter"):
        TeCoATrainer(model(), args("user/an-adapter", push_to_hub=True), train_dataset=data)
    with refused(found, "defence on a folder"):
        DefendedClassifier(model(base), TTC()).push_to_hub("user/ttc-on-a-folder")
    with refused(found, "malformed"):
        TeCoATrainer(model(), args("user/a b", push_to_hub=True), train_dataset=data)
    server("read_only", "user/not-mine")
    with refused(found, "read only"):
        TeCoATrainer(model(), args("user/not-mine", push_to_hub=True), train_dataset=data)

    server("broken", "user/broken")
    trainer = TeCoATrainer(model(), args("user/broken", push_to_hub=True), train_dataset=data)
    trainer.train()
    with refused(found, "broken"):
        trainer.push_to_hub()
    server("unplugged", "user/unplugged")
    with refused(found, "unplugged"):
        TeCoATrainer(model(), args("user/unplugged"), train_dataset=data).push_to_hub()
    with refused(found, "another's card"):
        push_folder(work / "user/unplugged", "user/elsewhere")

    trainer = TeCoATrainer(model(), args("user/every_save", folder="other", seed=7), train_dataset=data)
    trainer.train()
    (work / "other/README.md").write_text((work / "measured.md").read_text())
    with refused(found, "another's figures"):
        trainer.push_to_hub()
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server, what the client saw, its folder, what it printed, and the environment for another."""
    from hub_server import HubServer
    from reports import INFO, OWN, write_folder
    from tiny import make_clip, make_processor

    from hf_robust_clip.modeling import CLIPForZeroShotClassification
    from hf_robust_clip.report import make_card

    work = tmp_path_factory.mktemp("pushes")
    processor = make_processor()
    CLIPForZeroShotClassification.from_clip(make_clip(processor), processor).save_pretrained(work / "base")
    make_card(OWN, [], INFO).save(work / "measured.md")
    shutil.copytree(work / "base", work / "figures")
    write_folder(work / "figures", replace(INFO, plot=None))
    recipe = {"model": {"name": str(work / "base")}, "training": {"hub_token": "mine", "seed": 1}}
    (work / "figures/recipe.yaml").write_text(yaml.safe_dump(recipe))
    with HubServer() as server:
        server.repos[BASE] = {path.name: path.read_bytes() for path in (work / "base").iterdir()}
        server.repos["user/ttc"] = {"report.json": b"old", "training_args.bin": b"old", "mine.txt": b"kept"}
        server.repos["user/whole"] = {"model.safetensors": b"old"}
        server.repos["user/an-adapter"] = {"adapter_model.safetensors": b"old"}
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "0", "HF_HOME": str(work / "home"),
            "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        command = [sys.executable, __file__, str(work / "base"), str(work), server.url, str(work / "found.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        yield server, json.loads((work / "found.json").read_text()), work, done.stdout + done.stderr, environment


def check_repository(server, repo):
    """Fails on pickles, checkpoints, half-written files, a token, or a path of this disk."""
    files = server.repos[repo]
    assert "README.md" in files
    for name, content in files.items():
        assert not name.endswith(PICKLED), name
        assert not name.startswith(("checkpoint", "last-checkpoint", "state/", ".writing-", "runs/")), name
        assert TOKEN.encode() not in content, name
        assert str(ROOT).encode() not in content, name
        assert b"/tmp/" not in content and str(Path.home()).encode() + b"/" not in content, name


def near(logits):
    return [pytest.approx(row, rel=1e-4, abs=1e-4) for row in logits]


@pytest.mark.parametrize("repo", ["every_save", "end", "named", "lora", "prompts", "tapt", "ttc"])
def test_what_is_pushed_loads_by_the_code_of_its_card(hub, repo):
    server, found, *_ = hub
    check_repository(server, f"user/{repo}")
    seen = found.get(f"{repo} pushed", found.get(repo))
    assert seen["logits"][0] == near(seen["own"])
    assert "**Nothing was measured of this repository.**" in seen["text"]
    assert f'"user/{repo}"' in seen["text"]
    assert seen["base"] == BASE
    assert ("| adapter | LORA of rank 2, alpha 8 |" in seen["text"]) == (repo == "lora")
    library = {"lora": "peft", "prompts": "peft", "tapt": "peft", "ttc": "hf_robust_clip"}.get(repo, "transformers")
    assert seen["library"] == library


def test_training_moved_the_weights_and_each_save_was_pushed(hub):
    server, found, *_ = hub
    own = found["every_save pushed"]["own"]
    assert own != near(found["named"]["own"])
    messages = [message for repo, message in server.commits if repo == "user/every_save"]
    assert messages == ["Training in progress, step 1", "Training in progress, step 2"]
    assert [message for repo, message in server.commits if repo == "user/end"] == ["Model save"]
    for repo, files in server.seen:
        assert not [name for name in files if name.endswith(PICKLED)], repo
        assert "README.md" in files and ("processor_config.json" in files or "adapter_config.json" in files
                                         or "adaptation.json" in files), repo  # fmt: skip


def test_what_a_tracker_uploads_is_linked_and_stops_nothing_where_it_fails(hub):
    _, found, _, printed, _ = hub
    linked = "- trackio\n- trackio:https://huggingface.co/spaces/user/logs\n"
    assert linked in found["every_save pushed"]["text"]
    assert "trackio" not in found["end pushed"]["text"]
    assert "no Space can be made" in printed


def test_a_defence_is_pushed_with_its_prompts(hub):
    server, found, *_ = hub
    assert found["tapt"]["logits"] == [near(found["tapt"]["own"]), near(found["tapt"]["static"])]
    assert found["tapt"]["own"] != near(found["tapt"]["static"])
    assert {"adaptation.json", "statistics.safetensors"} <= set(server.repos["user/tapt"])


def test_figures_that_were_there_before_and_pickles_go_other_files_stay(hub):
    server, *_ = hub
    assert server.repos["user/whole"] == {"model.safetensors": b"old"}
    assert set(server.repos["user/ttc"]) == {"mine.txt", "README.md", "adaptation.json"}


def test_token_visibility_and_metadata_of_the_settings_act(hub):
    server, found, *_ = hub
    assert f"Bearer {TOKEN}" in server.tokens
    assert server.private["user/named"] in (True, "private")
    assert server.private["user/lora"] in (None, False, "public")
    assert "language: en" in found["named"]["text"]
    assert "- mine\n" in found["named"]["text"]


@pytest.mark.parametrize(
    ("name", "kind", "parts"),
    [
        ("checkpoint", "ValueError", ["hub_strategy", "'checkpoint'"]),
        ("all_checkpoints", "ValueError", ["hub_strategy", "'all_checkpoints'"]),
        ("adapter on a folder", "ValueError", ["hub_model_id", "base"]),
        ("defence on a folder", "ValueError", ["base"]),
        ("defence on its own base", "ValueError", [f"repo_id='{BASE}'", "model.safetensors"]),
        ("adapter among weights", "ValueError", ["hub_model_id='user/whole'", "model.safetensors"]),
        ("weights beside an adapter", "ValueError", ["hub_model_id='user/an-adapter'", "adapter_model.safetensors"]),
        ("malformed", "ValueError", ["hub_model_id", "'user/a b'"]),
        ("read only", "OSError", ["hub_model_id", "'user/not-mine'"]),
        ("path in a text", "ValueError", ["notes.md"]),
        ("token in a text", "ValueError", ["notes.md"]),
        ("no card", "ValueError", ["README.md", "figures"]),
        ("no processor", "ValueError", ["processor", "figures"]),
        ("another's card", "ValueError", ["README.md", "'user/elsewhere'"]),
        ("another's figures", "ValueError", ["README.md", "method PMG-AFT, not TeCoA"]),
    ],
)
def test_what_can_not_be_pushed_is_refused_in_one_line(hub, name, kind, parts):
    server, found, *_ = hub
    assert kind in found[name]["kinds"]
    assert "\n" not in found[name]["text"]
    assert all(part in found[name]["text"] for part in parts)
    for repo in ("user/checkpoint", "user/all_checkpoints", "user/on-a-folder", "user/a b", "user/ttc-on-a-folder"):
        assert repo not in server.repos
    assert not server.repos["user/not-mine"]


def test_a_folder_pushed_under_another_name_tells_it_in_card_and_report(hub):
    server, *_ = hub
    files = server.repos["user/figures"]
    check_repository(server, "user/figures")
    assert b'model="user/figures"' in files["README.md"]
    report = json.loads(files["report.json"])
    assert (report["card"]["repo_id"], report["reports"][0]["model"]) == ("user/figures", "user/figures")
    assert yaml.safe_load(files["recipe.yaml"]) == {"model": {"name": "base"}, "training": {"seed": 1}}


@pytest.mark.parametrize("own", [None, "# my words\n"])
def test_saving_an_adapter_writes_no_draft_of_a_card(own, tiny_clip, tmp_path):
    from peft import LoraConfig

    from hf_robust_clip import RobustClipConfig, TeCoATrainer

    if own:
        (tmp_path / "README.md").write_text(own)
    lora = LoraConfig(r=2, target_modules=r".*vision_model.*\.q_proj")
    args = RobustClipConfig(str(tmp_path), report_to=[], use_cpu=True)
    TeCoATrainer(tiny_clip(dtype=torch.float32), args, peft_config=lora).save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert ((tmp_path / "README.md").read_text() if own else (tmp_path / "README.md").exists()) == (own or False)


def test_a_push_that_fails_loses_nothing_and_says_what_uploads_it(hub):
    server, found, work, printed, environment = hub
    folder = work / "user/broken"
    for name in ("broken", "unplugged"):
        assert found[name]["kinds"] == ["OSError"]
        text = found[name]["text"]
        assert "\n" not in text
        assert f"hf upload user/{name} {work}/user/{name}" in text
    assert "the upload to 'user/broken' failed" in printed, "pushes in the background fail with a warning"
    for name in ("model.safetensors", "config.json", "processor_config.json", "README.md"):
        assert (folder / name).is_file()
    assert not server.repos["user/broken"]
    (folder / "training_args.bin").write_bytes(b"a pickle")
    server.broken.clear()
    words = shlex.split(re.search(r"hf upload .*", found["broken"]["text"])[0])
    assert words[:4] == ["hf", "upload", "user/broken", str(folder)]
    script = [str(Path(sys.executable).with_name("hf")), *words[1:]]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    check_repository(server, "user/broken")
    assert {"model.safetensors", "processor_config.json"} <= set(server.repos["user/broken"])


def test_no_token_in_anything_written_or_printed(hub):
    _, found, work, printed, _ = hub
    assert TOKEN not in printed + json.dumps(found)
    for path in work.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(json.dumps(client(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
