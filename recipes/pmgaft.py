"""Fine-tune a CLIP by PMG-AFT (CVPR 2024): adversarial examples, guided by the frozen pretrained model.

    accelerate launch recipes/pmgaft.py                                                # small, offline, minutes
    accelerate launch recipes/pmgaft.py --config recipes/configs/clip-vit-base-patch32/pmg_aft_tiny_imagenet.yaml

Evaluates clean and PGD accuracy before and after, on every dataset under `tasks`, and writes checkpoint, report, plot
and model card. `--compare tecoa` trains a second method on the same data and settings and shows both.
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("train", Path(__file__).parent / "configs/digits-clip/pmg_aft.yaml", __doc__)
