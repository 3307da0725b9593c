"""Fine-tune a CLIP by FARE (ICML 2024): keep the embeddings where they were, under attack, without labels.

accelerate launch recipes/fare.py
accelerate launch recipes/fare.py --config recipes/configs/clip-vit-large-patch14/fare_imagenet.yaml
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("train", Path(__file__).parent / "configs/digits-clip/fare.yaml", __doc__)
