"""Take a backdoor out of a CLIP by fine-tuning it on clean pairs: CleanCLIP (ICCV 2023) or CleanerCLIP.

    accelerate launch recipes/clean.py --poisoned out/poisoned                       # small, offline, minutes
    accelerate launch recipes/clean.py --poisoned out/poisoned --objective CleanerCLIP
    accelerate launch recipes/clean.py --config recipes/configs/clip-vit-base-patch32/clean_clip.yaml

Prints clean accuracy and attack success rate beside those of the clean model, of the poisoned one, and of one that was
fine-tuned on the same pairs without the method. Writes checkpoint, card, report, plot and examples.
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("clean", Path(__file__).parent / "configs/coloured-digits/clean_clip.yaml", __doc__)
