"""The README's Python runs as it stands, on the embedded model where it names one of the Hub."""

import re
from pathlib import Path

import pytest
from PIL import Image

from hf_robust_clip import CLIPForZeroShotClassification, digits_clip_path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
STAND_INS = {
    '"openai/clip-vit-base-patch32"': "MODEL",
    '"zh-plus/tiny-imagenet", "train", model.processor, resize=256': '"digits", "test", model.processor',
    'dataset("imagenet", "train", clip.processor)': 'dataset("digits", "train", clip.processor)',
    'rc.ClipPromptConfig(design="VLI")': 'rc.ClipPromptConfig(design="VLI", vision_depth=3, text_depth=3)',
    "learning_rate=3.5e-3": "learning_rate=3.5e-3, max_steps=2, use_cpu=True",
    "per_device_train_batch_size=256": "per_device_train_batch_size=32, max_steps=1, use_cpu=True",
    'data = rc.load_image_dataset("digits", "test", model.processor)': (
        'data = rc.load_image_dataset("digits", "test", model.processor).first(20)'
    ),
    "first(100)": "first(4)",
    "rc.AdaptiveWorst()": "rc.AdaptiveWorst(2, 1, 2)",
    "rc.RTPT()": "rc.RTPT(num_views=8, selected=0.25)",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).save_pretrained(folder / "out" / "pmgaft")
    Image.new("L", (8, 8)).save(folder / "digit.png")
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    code = BLOCKS[number]
    for text, stand_in in STAND_INS.items():
        code = code.replace(text, stand_in)
    exec(compile(code, f"README block {number + 1}", "exec"), {"MODEL": digits_clip_path(), "__name__": "readme"})


def test_every_stand_in_is_still_in_the_readme():
    assert all(text in README for text in STAND_INS)
    assert len(BLOCKS) >= 4
