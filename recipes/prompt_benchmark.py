"""What prompts do: CoOp, APT-V and APT-VLI in the two small CLIPs, against the models without prompts.

    python recipes/prompt_benchmark.py --data_root <folder of Hub datasets> --output_dir out/prompt-benchmark

Needs `out/mini-benchmark/mini-clip` (`recipes/mini_benchmark.py` pretrains it). Trains by `configs/<model>/apt.yaml`,
evaluates under PGD-20 and AutoAttack, white box, and writes tables and cards. What is finished is not repeated.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from mini_benchmark import LIMITS, OWNER, evaluate_all

from hf_robust_clip.cli import parse_arguments, read_recipe, train
from hf_robust_clip.report import (
    RobustnessReport,
    as_markdown,
    figures_by_task,
    load_card_info,
    make_card,
    save_csv,
    save_reports,
)

CONFIGS = Path(__file__).parent / "configs"
MODELS = {
    "digits-clip": "digits-clip",
    "mini-clip": f"{OWNER}/mini-clip",
}
RUNS = {"coop": ("coop", "CoOp", None), "apt_v": ("apt", "APT-V", "V"), "apt_vli": ("apt", "APT-VLI", "VLI")}
DIGITS_LIMITS = "It knows nothing but pictures of handwritten digits. One seed."


def train_run(model: str, run: str, folder: Path, pretrained: str) -> None:
    """One adapter by the model's config, unless its report is there already."""
    if (folder / "report.json").is_file():
        return
    method, _, design = RUNS[run]
    words = ["--model.name", pretrained, "--output_dir", str(folder), "--overwrite"]
    words += [] if design is None else ["--prompts.design", design]
    settings = parse_arguments(words, CONFIGS / model / "apt.yaml")
    if method == "coop":  # clean images, and the words that CoOp learns
        settings = {key: value for key, value in settings.items() if key not in ("objective", "prompts")}
    train(read_recipe(method, settings))


def titled(report: RobustnessReport, model: str) -> RobustnessReport:
    """A report under its method's name, and under the id of its card in place of a folder."""
    title = RUNS[report.name][1] if report.name in RUNS else "without prompts"
    return replace(report, name=title, model=card_id(model, report.name) if report.name in RUNS else MODELS[model])


def card_id(model: str, run: str) -> str:
    return f"{OWNER}/{model}-{run.replace('_', '-')}"


def write_cards(cards_dir: Path, model: str, out: Path, reports: list[RobustnessReport]) -> None:
    """A folder for each adapter, and the model's table."""
    for run, (_, title, _) in RUNS.items():
        folder = cards_dir / card_id(model, run)
        folder.mkdir(parents=True, exist_ok=True)
        info = load_card_info(out / run / "report.json")
        info = replace(
            info, repo_id=card_id(model, run), base_model=MODELS[model], plot=None, license="apache-2.0",
            limits=DIGITS_LIMITS if model == "digits-clip" else LIMITS,
        )  # fmt: skip
        own = [report for report in reports if report.name == title]
        before = [report for report in reports if report.name == "without prompts"]
        save_reports(folder / "report.json", own, before, card=info)
        (folder / "recipe.yaml").write_text((out / run / "recipe.yaml").read_text(encoding="utf-8"))
        make_card(own, before, info).save(folder / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/prompt-benchmark"))
    parser.add_argument("--mini_clip", type=Path, default=Path("out/mini-benchmark/mini-clip"))
    parser.add_argument("--data_root", type=Path, default=os.environ.get("HF_ROBUST_CLIP_DATA_ROOT"))
    parser.add_argument("--cards_dir", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    if "mini-clip" in options.models:
        if options.data_root is None:
            parser.error("--data_root is missing (or HF_ROBUST_CLIP_DATA_ROOT): a folder of datasets in Hub layout")
        os.environ["HF_ROBUST_CLIP_DATA_ROOT"] = str(options.data_root)
        if not (options.mini_clip / "config.json").is_file():
            parser.error(f"--mini_clip {options.mini_clip} is no checkpoint; recipes/mini_benchmark.py makes it")
    cards_dir = options.cards_dir or options.output_dir / "cards"
    place = cards_dir / "prompt-benchmark"
    place.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        out = options.output_dir / model
        pretrained = "digits-clip" if model == "digits-clip" else str(options.mini_clip)
        for run in RUNS:
            train_run(model, run, out / run, pretrained)
        reports = []
        for name in ("pgd", "auto_attack"):
            found = evaluate_all(
                CONFIGS / model / f"prompts_{name}.yaml", [Path(pretrained), *(out / run for run in RUNS)], out / name
            )
            reports += [titled(report, model) for report in found]
        write_cards(cards_dir, model, out, reports)
        save_csv(place / f"{model}.csv", reports)
        parts = [f"# Prompts in {model}\n\nAccuracy in percent, clean and at each L-inf radius, white box.\n"]
        for attack in dict.fromkeys(report.attack for report in reports):
            group = [report for report in reports if report.attack == attack]
            parts.append(f"## {attack}\n\n{as_markdown(figures_by_task(group))}\n")
        (place / f"{model}.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
