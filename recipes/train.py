"""Fine-tune a CLIP by any objective: one of the package, or a class of your own by its dotted path.

    accelerate launch recipes/train.py --objective TeCoA                                  # small, offline, minutes
    accelerate launch recipes/train.py --objective my_package.MyObjective --objective.weight 2
    accelerate launch recipes/train.py --config recipes/configs/clip-vit-base-patch32/fare_imagenet.yaml

Evaluates clean and PGD accuracy before and after, on every dataset under `tasks`, and writes checkpoint, report, plot
and model card. `--defence my_package.MyDefence` fits a test-time defence, evaluates it and saves it too.
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("train", Path(__file__).parent / "configs/digits-clip/pmg_aft.yaml", __doc__)
