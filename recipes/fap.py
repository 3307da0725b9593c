"""Train prompts that image and text share in a frozen CLIP by FAP (NeurIPS 2024).

accelerate launch recipes/fap.py
accelerate launch recipes/fap.py --config recipes/configs/clip-vit-base-patch32/fap_imagenet.yaml
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("train", Path(__file__).parent / "configs/digits-clip/fap.yaml", __doc__)
