"""`recipes/pmgaft.py` on a SigLIP and on a CLIP with gelu: trained, evaluated, saved, and read back without us."""

from pathlib import Path

import pytest
import torch
from command_words import last_of_each
from huggingface_hub import ModelCard
from tiny import make_clip, make_processor
from tiny_siglip import tiny_siglip
from transformers import AutoModel, AutoProcessor, CLIPModel, SiglipModel, pipeline

from hf_robust_clip import CLIPForZeroShotClassification
from hf_robust_clip.cli import run as run_command
from hf_robust_clip.report import load_reports
from hf_robust_clip.runs.shared import load_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "recipes/configs/digits-clip/pmg_aft.yaml"
TASK = "{name: held out, dataset: digits, split: test, classes: [six, nine], max_images: 4}"
SMALL = ["--max_images", "12", "--max_steps", "1", "--warmup_steps", "0", "--per_device_train_batch_size", "6",
         "--compare", "[]", "--evaluation.attack", "pgd-1", "--evaluation.radii", "[24/255]", "--output_dir", "out",
         "--model_name_or_path", "base", "--tasks", f"[{TASK}]"]  # fmt: skip


def make_base(family: str) -> None:
    if family == "siglip":
        model = tiny_siglip(dtype=torch.float32, class_names=None)
    else:
        processor = make_processor()
        model = CLIPForZeroShotClassification.from_clip(make_clip(processor, hidden_act="gelu"), processor)
    model.save_pretrained("base")


@pytest.mark.parametrize(("family", "plain"), [("siglip", SiglipModel), ("clip", CLIPModel)])
def test_pmgaft_trains_evaluates_and_saves_a_plain_model(family, plain, capsys):
    make_base(family)
    run_command("train", CONFIG, "", last_of_each(*SMALL))
    assert f'AutoModelForZeroShotClassification.from_pretrained("out")  # or transformers.{plain.__name__}' in (
        capsys.readouterr().out
    )
    before, after = (AutoModel.from_pretrained(name) for name in ("base", "out"))
    assert type(after) is plain
    assert after.config.vision_config.hidden_act == before.config.vision_config.hidden_act
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    assert moved
    assert not any(name.startswith("text") for name in moved)
    (own,), (undefended,) = load_reports("out/report.json")
    assert (own.num_images, undefended.num_images) == (4, 4)
    model, data_is_plain = load_model("out"), AutoProcessor.from_pretrained("out")
    pixels = torch.rand(2, 3, 8, 8)
    model.set_classes(["six", "nine"], "a {}")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in model.normalisation)
    texts = data_is_plain(text=["a six", "a nine"], padding="max_length", return_tensors="pt")
    expected = after(**texts, pixel_values=(pixels - mean) / std).logits_per_image
    torch.testing.assert_close(model(pixels).logits, expected, rtol=0, atol=1e-4)
    card = ModelCard.load("out/README.md")
    assert family in card.data.tags
    assert f"loads as a plain `{plain.__name__}`" in card.text
    assert pipeline("zero-shot-image-classification", model="out").model.config.model_type == family
