"""Train adversarial prompts in a frozen CLIP (APT, the stage before TAPT, CVPR 2025): an adapter of kilobytes.

    accelerate launch recipes/apt.py                                                   # small, offline, minutes
    accelerate launch recipes/apt.py --config recipes/configs/clip-vit-base-patch16/apt_vli_imagenet.yaml

Evaluates clean and PGD accuracy before and after, on every dataset under `tasks`, and writes adapter, report, plot and
model card. `--prompts.design V` chooses another design, `--compare coop` trains the control beside it.
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("train", Path(__file__).parent / "configs/digits-clip/apt.yaml", __doc__)
