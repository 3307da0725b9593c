"""TAPT (CVPR 2025): adversarial prompts that are tuned anew on every test image, and what an attack leaves of them.

    accelerate launch recipes/tapt.py                                                  # small, offline, minutes
    accelerate launch recipes/tapt.py --config recipes/configs/clip-vit-base-patch16/tapt_vli.yaml

Trains prompts (adversarially, and clean ones for their statistics), collects the statistics, evaluates the static
prompts and the defence: under an attack that doesn't know it, under attacks through it, and beside its controls.
Writes adapter, statistics, report, plot and model card; `DefendedClassifier.from_pretrained(folder)` restores it.
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("train", Path(__file__).parent / "configs/digits-clip/tapt.yaml", __doc__)
