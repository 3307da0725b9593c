"""Fine-tune a CLIP by TeCoA (ICLR 2023): cross-entropy on adversarial examples.

accelerate launch recipes/tecoa.py
accelerate launch recipes/tecoa.py --config recipes/configs/clip-vit-base-patch32/tecoa_tiny_imagenet.yaml
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("train", Path(__file__).parent / "configs/digits-clip/tecoa.yaml", __doc__)
