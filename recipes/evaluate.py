"""Clean and robust accuracy of CLIP checkpoints: PGD, CW, AutoAttack, on any datasets, resumable.

    accelerate launch recipes/evaluate.py --model_name_or_path out/pmgaft                # the digits, minutes
    accelerate launch recipes/evaluate.py --model_name_or_path org/clip --dataset_name cifar10 \\
        --evaluation.attacks autoattack
    accelerate launch recipes/evaluate.py --model_name_or_path org/clip --dataset_name my/folder \\
        --class_names names.txt --defence my_package.MyDefence

Writes report.json, report.csv, plots of accuracy and of attacked images, and prints a table. A run that was killed
goes on with --resume, without repeating finished images, also on another number of processes.
"""

from pathlib import Path

from hf_robust_clip.cli import run

if __name__ == "__main__":
    run("evaluate", Path(__file__).parent / "configs/evaluate.yaml", __doc__)
