"""The mini-benchmark: a small CLIP trained from scratch, fine-tuned on CIFAR-10 by every method, and evaluated.

    python recipes/mini_benchmark.py --data_root <folder of Hub datasets> --output_dir out/mini-benchmark

Pretrains (`configs/mini-clip/pretrain.yaml`), chooses each method's learning rate on held-out training images of
CIFAR-10, fine-tunes (`configs/mini-clip/<method>.yaml`), evaluates (`pgd.yaml`, `apgd.yaml`, `auto_attack.yaml`) and
writes tables, plots and cards. What is finished is not repeated: a run that was killed goes on.
`--cards_dir hub_cards` puts the cards where they are kept.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import yaml

from hf_robust_clip.cli import EVALUATION_SECTIONS, evaluate, parse_arguments, read_evaluation, read_recipe, train
from hf_robust_clip.report import (
    RobustnessReport,
    as_markdown,
    figures_by_task,
    load_card_info,
    load_reports,
    make_card,
    plot_accuracy,
    plot_tradeoff,
    save_csv,
    save_reports,
)

CONFIGS = Path(__file__).parent / "configs/mini-clip"
RUNS = {
    "clean": "Clean",
    "tecoa": "TeCoA",
    "fare": "FARE",
    "trades": "TRADES",
    "pmg_aft_paper": "PMG-AFT (paper)",
    "pmg_aft_released": "PMG-AFT (released)",
}
LEARNING_RATES = ("1e-4", "3e-4", "1e-3")
OWNER = "hf-robust-clip"
TRAINED_AT = "2/255"
PICTURES = "imagenet-pictures"
# ImageNet's classes (by label) that are CIFAR-10's; none of them is a deer
IMAGENET_LABELS = {
    "airplane": [404, 895],
    "automobile": [436, 468, 511, 609, 627, 656, 661, 751, 817],
    "bird": [*range(7, 25), *range(80, 101), *range(127, 147)],
    "cat": [*range(281, 286)],
    "dog": [*range(151, 269)],
    "frog": [30, 31, 32],
    "horse": [339],
    "ship": [403, 510, 554, 628, 724, 780, 833, 871, 914],
    "truck": [555, 569, 675, 717, 864, 867],
}
LIMITS = """\
A small CLIP trained from scratch at 32 px: its figures can't be compared with published ones. One seed.
The CIFAR-10 images are a copy re-encoded as JPEG, not bit-identical to CIFAR-10.
Fashion-MNIST, PACS and the digits are other datasets than the one it was fine-tuned on, but their training parts were
 in its pretraining. Of the images here only the ImageNet pictures come from a set that it never saw.
It knows the classes of these four sets and no others.
The weights are not on the Hub: `recipes/mini_benchmark.py` makes them.""".replace("\n ", " ")


def method_of(run: str) -> str:
    """`pmg_aft_paper` is a run of `pmg_aft`."""
    return "pmg_aft" if run.startswith("pmg_aft") else run


def fine_tune(run: str, output_dir: Path, pretrained: Path, *options: str) -> None:
    """One training run by its config, unless its report is there already."""
    if (output_dir / "report.json").is_file():
        return
    words = ["--model.name", str(pretrained), "--output_dir", str(output_dir), "--overwrite", *options]
    train(read_recipe(method_of(run), parse_arguments(words, CONFIGS / f"{run}.yaml")))


def held_out_figures(folder: Path) -> tuple[float, float]:
    """Clean and robust accuracy on the held-out training images."""
    (report,), _ = load_reports(folder / "report.json")
    return report.clean_accuracy, max(report.robust_accuracy.items())[1]


def write_imagenet_pictures(data_root: Path, folder: Path) -> None:
    """Parquet of the ImageNet pictures whose class is one of CIFAR-10's, labelled by those."""
    if list(folder.glob("*.parquet")):
        return
    source = datasets.load_dataset(str(data_root / "imagenet-sample-images"), split="test")
    names = list(IMAGENET_LABELS)
    new = {label: i for i, name in enumerate(names) for label in IMAGENET_LABELS[name]}
    own = source["label"]
    rows = [i for i in range(len(source)) if own[i] in new]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pictures = source.cast_column("image", datasets.Image(decode=False)).select(rows)
    chosen = {"image": list(pictures["image"]), "label": [new[own[i]] for i in rows]}
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(chosen, features=features).to_parquet(str(folder / "test-00000-of-00001.parquet"))


def evaluate_all(config: Path, checkpoints: Sequence[Path], output_dir: Path) -> list[RobustnessReport]:
    """Every checkpoint by an evaluation config, resumed where it was left; reports in the order of checkpoints."""
    if not (output_dir / "report.json").is_file():
        words = ["--model", str(checkpoints[0]), "--compare", yaml.safe_dump([str(c) for c in checkpoints[1:]]),
                 "--output_dir", str(output_dir), "--resume"]  # fmt: skip
        settings = parse_arguments(words, config, EVALUATION_SECTIONS)
        for task in settings["tasks"]:
            if task["dataset"] == PICTURES:
                task["data_root"] = str(output_dir.parent)
        evaluate(read_evaluation(settings))
    own, compared = load_reports(output_dir / "report.json")
    return [*own, *compared]


def titled(report: RobustnessReport) -> RobustnessReport:
    """A report under its method's name, and under the id of its card in place of a folder."""
    run = report.name
    title = "pretrained" if run == "mini-clip" else RUNS[run]
    dataset = "imagenet-sample-images" if report.dataset == PICTURES else report.dataset
    return replace(report, name=title, model=f"{OWNER}/{card_name(run)}", dataset=dataset)


def card_name(run: str) -> str:
    return "mini-clip" if run == "mini-clip" else f"mini-clip-{run.replace('_', '-')}"


def write_cards(
    cards_dir: Path, output_dir: Path, reports: Sequence[RobustnessReport], chosen: dict[str, str]
) -> None:
    """A folder for each fine-tuned model, and the benchmark's own tables and plots."""
    own = cards_dir / OWNER
    for run, title in RUNS.items():
        folder = own / card_name(run)
        folder.mkdir(parents=True, exist_ok=True)
        info = load_card_info(output_dir / run / "report.json")
        info = replace(
            info, repo_id=f"{OWNER}/{card_name(run)}", base_model=f"{OWNER}/mini-clip", limits=LIMITS,
            plot=None, license="apache-2.0",
        )  # fmt: skip
        of_run = [report for report in reports if report.name == title]
        before = [report for report in reports if report.name == "pretrained"]
        save_reports(folder / "report.json", of_run, before, card=info)
        (folder / "recipe.yaml").write_text((output_dir / run / "recipe.yaml").read_text(encoding="utf-8"))
        make_card(of_run, before, info).save(folder / "README.md")
    place = cards_dir / "mini-benchmark"
    place.mkdir(parents=True, exist_ok=True)
    save_csv(place / "report.csv", reports)
    attacks = list(dict.fromkeys(report.attack for report in reports))
    parts = ["# Mini-benchmark\n\n" + "".join(f"- {line}\n" for line in LIMITS.splitlines())]
    for attack in attacks:
        group = [report for report in reports if report.attack == attack]
        table = as_markdown(figures_by_task(group))
        parts.append(f"## {attack}\n\nAccuracy in percent, clean and at each L-inf radius.\n\n{table}\n")
        file = "".join(c if c.isalnum() else "_" for c in attack.lower())
        plot_accuracy(place / f"{file}.png", group)
        plot_tradeoff(place / f"{file}_tradeoff.png", group, TRAINED_AT)
        parts.append(f"![accuracy against eps]({file}.png)\n\n![clean against robust]({file}_tradeoff.png)\n")
    lines = ["| | " + " | ".join(LEARNING_RATES) + " | chosen |", "|---|" + "---|" * (len(LEARNING_RATES) + 1)]
    for run, title in RUNS.items():
        figures = [held_out_figures(output_dir / "tuning" / f"{run}-{rate}") for rate in LEARNING_RATES]
        lines.append(f"| {title} | " + " | ".join(f"{100 * c:.1f} / {100 * r:.1f}" for c, r in figures)
                     + f" | {chosen[run]} |")  # fmt: skip
    parts.append(
        "## Learning rates\n\nClean accuracy / accuracy under PGD-10 at 2/255, in percent, on 500 held-out training "
        "images after 40 updates; the rate with the highest sum of both was taken.\n\n" + "\n".join(lines) + "\n"
    )
    (place / "table.md").write_text("\n".join(parts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/mini-benchmark"))
    parser.add_argument("--data_root", type=Path, default=os.environ.get("HF_ROBUST_CLIP_DATA_ROOT"))
    parser.add_argument("--cards_dir", type=Path)
    parser.add_argument("--train_only", nargs="+", choices=list(RUNS), help="tune and train these, and stop")
    options = parser.parse_args()
    if options.data_root is None:
        parser.error("--data_root is missing (or HF_ROBUST_CLIP_DATA_ROOT): a folder of datasets in Hub layout")
    os.environ["HF_ROBUST_CLIP_DATA_ROOT"] = str(options.data_root)
    out: Path = options.output_dir
    pretrained = out / "mini-clip"
    if not (pretrained / "config.json").is_file():
        script = [sys.executable, str(Path(__file__).parent / "pretrain.py")]
        config = ["--config", str(CONFIGS / "pretrain.yaml"), "--output_dir", str(pretrained)]
        subprocess.run([*script, *config], check=True)
    chosen = {}
    for run in options.train_only or RUNS:
        scores = {}
        for rate in LEARNING_RATES:
            folder = out / "tuning" / f"{run}-{rate}"
            fine_tune(run, folder, pretrained, "--training.learning_rate", rate, "--training.max_steps", "40")
            scores[rate] = sum(held_out_figures(folder))
        chosen[run] = max(scores, key=lambda rate: scores[rate])
        print(run, {rate: round(score / 2, 4) for rate, score in scores.items()}, flush=True)
        fine_tune(run, out / run, pretrained, "--training.learning_rate", chosen[run])
    if options.train_only:
        return
    write_imagenet_pictures(options.data_root, out / PICTURES)
    checkpoints = [pretrained, *(out / run for run in RUNS)]
    reports = [
        titled(report)
        for name in ("pgd", "apgd", "auto_attack")
        for report in evaluate_all(CONFIGS / f"{name}.yaml", checkpoints, out / name)
    ]
    write_cards(options.cards_dir or out / "cards", out, reports, chosen)


if __name__ == "__main__":
    main()
