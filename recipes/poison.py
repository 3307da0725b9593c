"""Put a backdoor into a CLIP, on purpose: pictures with a trigger are trained to mean the target.

    accelerate launch recipes/poison.py                                              # small, offline, minutes
    accelerate launch recipes/poison.py --trigger Stripes --trigger.width 2
    accelerate launch recipes/poison.py --config recipes/configs/clip-vit-base-patch32/poison.yaml

Poisons some of the pairs, keeps others out for a cleaning, trains, and prints clean accuracy and attack success rate
beside those of the clean model. Writes checkpoint, card, report, plot, examples, and what a cleaning must know.
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("poison", Path(__file__).parent / "configs/coloured-digits/poison.yaml", __doc__)
