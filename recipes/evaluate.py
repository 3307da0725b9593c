"""Clean and robust accuracy of CLIP checkpoints: PGD, CW, AutoAttack, on any datasets, resumable.

    accelerate launch recipes/evaluate.py --model out/pmgaft                                  # the digits, minutes
    accelerate launch recipes/evaluate.py --model org/robust-clip --dataset cifar10 --attacks autoattack
    accelerate launch recipes/evaluate.py --model org/robust-clip --dataset my/folder --class_names names.txt

Writes report.json, report.csv, plots of accuracy and of attacked images, and prints a table. A run that was killed
goes on with --resume, without repeating finished images, also on another number of processes.
"""

from pathlib import Path

from hf_robust_clip.cli import run_evaluation

if __name__ == "__main__":
    run_evaluation(Path(__file__).parent / "configs/evaluate.yaml", __doc__)
