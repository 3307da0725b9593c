"""What test-time defences are worth in the two small CLIPs: attacked blindly, and through the defence.

    python recipes/defence_benchmark.py --data_root <folder of Hub datasets> --output_dir out/defence-benchmark

TAPT (presets paper and released, reset to trained and to random prompts) on adversarially trained prompts; TPT, R-TPT,
TTC and the mean over 64 views on the plain CLIP and on a PMG-AFT checkpoint; and these models without a defence. Needs
what `recipes/prompt_benchmark.py`, `recipes/mini_benchmark.py` and `make pmgaft` leave. Writes table, plot, reports;
what is finished is not repeated, and `--only` divides the rows among several runs.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mini_benchmark import OWNER
from prompt_benchmark import CONFIGS, train_run

from hf_robust_clip.attacks.auto_attack import AutoAttack
from hf_robust_clip.attacks.suites import PGD, Suite
from hf_robust_clip.cli import (
    DataSettings,
    ModelSettings,
    load_data,
    load_model,
    parse_arguments,
    quiet_loading,
    read_recipe,
)
from hf_robust_clip.defences.alignment import AlignmentTargets
from hf_robust_clip.defences.base import Defence
from hf_robust_clip.defences.ensemble import Ensemble
from hf_robust_clip.defences.r_tpt import RTPT
from hf_robust_clip.defences.tapt import TAPT
from hf_robust_clip.defences.tpt import TPT
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.evaluation.loop import AdaptiveWorst, EvaluationSettings, evaluate_robustness
from hf_robust_clip.report.report import (
    AttackTarget,
    RobustnessReport,
    defence_table,
    load_reports,
    plot_defences,
    save_csv,
    save_reports,
)
from hf_robust_clip.training.trainer import TAPTTrainer

TEMPLATE = "a photo of a {}."
Defence = Callable[[AlignmentTargets], Defence | None]


@dataclass(frozen=True)
class Benchmark:
    """A base model with what was made of it, and the images to judge on."""

    base: str
    pmg_aft: str
    prompts: str  # of prompt_benchmark.py
    radius: str
    data: dict
    num_images: int
    statistics_images: int


BENCHMARKS = {
    "digits-clip": Benchmark(
        "digits-clip", "out/pmgaft", "out/prompt-benchmark/digits-clip", "16/255",
        {"dataset": "digits", "split": "test"}, 64, 1000,
    ),
    "mini-clip": Benchmark(
        "out/mini-benchmark/mini-clip", "out/mini-benchmark/pmg_aft_released", "out/prompt-benchmark/mini-clip",
        "2/255", {"dataset": "uoft-cs/cifar10", "split": "test"}, 48, 2000,
    ),
}  # fmt: skip
PLAIN: dict[str, Defence] = {
    "none": lambda targets: None,
    "TPT": lambda targets: TPT(),
    "R-TPT": lambda targets: RTPT(),
    "TTC": lambda targets: TTC(),
    "ensemble-64": lambda targets: Ensemble(),
}
TUNED: dict[str, Defence] = {
    "none": lambda targets: None,
    "TAPT (paper)": TAPT.paper_preset,
    "TAPT (paper, random reset)": lambda targets: replace(TAPT.paper_preset(targets), reset_to="random"),
    "TAPT (released)": TAPT.released_preset,
    "TAPT (released, trained reset)": lambda targets: replace(TAPT.released_preset(targets), reset_to="trained"),
}
ROWS: dict[str, dict[str, Defence]] = {
    "CLIP": PLAIN,
    "PMG-AFT": PLAIN,
    "APT-V": {"none": PLAIN["none"]},
    "APT-VLI": TUNED,
}


def folder_of(benchmark: Benchmark, model: str) -> str:
    """Where a row's classifier is."""
    own = {"CLIP": benchmark.base, "PMG-AFT": benchmark.pmg_aft}
    return own.get(model) or f"{benchmark.prompts}/{model.lower().replace('-', '_')}"


def statistics_of(name: str, benchmark: Benchmark, folder: Path) -> AlignmentTargets:
    """Statistics under the adversarial prompts and under clean ones, which are trained here; made once."""
    if not (folder / "statistics.safetensors").is_file():
        words = ["--model.name", benchmark.base, "--output_dir", str(folder), "--overwrite"]
        recipe = read_recipe("apt", parse_arguments(words, CONFIGS / name / "apt.yaml"))
        model = load_model(ModelSettings(folder_of(benchmark, "APT-VLI")))
        images = load_data(recipe.data, model)
        model.set_classes(images.class_names, TEMPLATE)
        fresh = load_model(recipe.model)
        fresh.set_classes(images.class_names, TEMPLATE)
        trainer = TAPTTrainer(fresh, recipe.training, recipe.objective, images, peft_config=recipe.prompts)
        with torch.no_grad():
            for own, trained in zip(trainer.model.parameters(), model.parameters(), strict=True):
                own.copy_(trained)
        trainer.collect_statistics(images.first(benchmark.statistics_images)).save(folder)
    return AlignmentTargets.load(folder)


def attacks(defended: bool) -> dict[str, tuple[AttackTarget, Suite]]:
    """What each row goes through."""
    apgd = AutoAttack(("apgd-ce", "apgd-t"), num_steps=25)
    if not defended:
        return {"pgd": ("static", PGD(20)), "apgd": ("static", apgd)}
    worst = AdaptiveWorst(pgd_steps=10, apgd_steps=10, num_queries=20, blind=(PGD(20), apgd))
    return {"pgd": ("defence_blind", PGD(20)), "apgd": ("defence_blind", apgd), "worst": ("adaptive_worst", worst)}


def evaluate_row(benchmark: Benchmark, model: str, title: str, out: Path, make: Defence) -> list[RobustnessReport]:
    """A row's reports, unless they are there already."""
    folder = out / f"{model}-{title}".lower().replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")
    if not (folder / "report.json").is_file():
        classifier = load_model(ModelSettings(folder_of(benchmark, model)))
        data = load_data(read_task(benchmark), classifier)
        classifier.set_classes(data.class_names, TEMPLATE)
        needs = title.startswith("TAPT")
        defence = make(AlignmentTargets.load(out / "statistics") if needs else None)  # type: ignore[arg-type]
        found = []
        for name, (target, suite) in attacks(defence is not None).items():
            settings = EvaluationSettings([benchmark.radius], attack=suite, target=target, batch_size=32)
            report = evaluate_robustness(
                classifier, data, settings, name=model, task=f"{data.dataset_id} test",
                model_id=f"{OWNER}/{out.name}-{model.lower()}" if model != "CLIP" else out.name,
                defence=defence, state_dir=folder / "state" / name,
            )  # fmt: skip
            found.append(report)
            print(model, title, name, report.clean_accuracy, report.robust_accuracy, flush=True)
        save_reports(folder / "report.json", found)
    return load_reports(folder / "report.json")[0]


def read_task(benchmark: Benchmark) -> DataSettings:
    """The images to judge on."""
    return DataSettings(**benchmark.data, max_images=benchmark.num_images)


def timed(benchmark: Benchmark, model: str, out: Path, make: Defence, reports: list[RobustnessReport]) -> list:
    """The reports of a defence with its time as measured by itself: processor time of one thread, 16 images at once,
    the lower of two runs. What the evaluations noted depends on what else ran beside them.
    """
    if reports[0].defence is None:
        return reports
    classifier = load_model(ModelSettings(folder_of(benchmark, model)))
    data = load_data(read_task(benchmark), classifier)
    classifier.set_classes(data.class_names, TEMPLATE)
    defence = make(AlignmentTargets.load(out / "statistics"))
    assert defence is not None
    pixels = torch.stack([data[i]["pixel_values"] for i in range(16)])
    torch.set_num_threads(1)
    seconds = []
    with defence.prepared(classifier):
        for _ in range(2):
            start = time.process_time()
            defence.predict(classifier, pixels)
            seconds.append(time.process_time() - start)
    ms = 1000 * min(seconds) / len(pixels)
    return [replace(report, defence={**(report.defence or {}), "ms_per_image": ms}) for report in reports]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/defence-benchmark"))
    parser.add_argument("--data_root", type=Path, default=os.environ.get("HF_ROBUST_CLIP_DATA_ROOT"))
    parser.add_argument("--cards_dir", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="evaluate these and stop")
    options = parser.parse_args()
    if options.data_root is not None:
        os.environ["HF_ROBUST_CLIP_DATA_ROOT"] = str(options.data_root)
    elif "mini-clip" in options.models:
        parser.error("--data_root is missing (or HF_ROBUST_CLIP_DATA_ROOT): a folder of datasets in Hub layout")
    quiet_loading()
    for name in options.models:
        benchmark, out = BENCHMARKS[name], options.output_dir / name
        for run in ("apt_v", "apt_vli"):
            train_run(name, run, Path(benchmark.prompts) / run, benchmark.base)
        statistics_of(name, benchmark, out / "statistics")
        reports = {
            (model, title): evaluate_row(benchmark, model, title, out, make)
            for model in options.only
            for title, make in ROWS[model].items()
        }
        if set(options.only) != set(ROWS):
            continue
        reports = {
            (model, title): timed(benchmark, model, out, ROWS[model][title], own)
            for (model, title), own in reports.items()
        }
        place = (options.cards_dir or options.output_dir / "cards") / "defence-benchmark"
        place.mkdir(parents=True, exist_ok=True)
        every = [report for rows in reports.values() for report in rows]
        save_reports(place / f"{name}.json", every)
        save_csv(place / f"{name}.csv", every)
        rows = {model if title == "none" else f"{title} on {model}": own for (model, title), own in reports.items()}
        plot_defences(place / f"{name}.png", rows)
        about = (
            f"Accuracy in percent at L-inf {benchmark.radius}. The blind attacks were made on the classifier alone "
            "(white box where there is no defence); adaptive worst counts an image only if it withstood these and "
            "every attack through the defence. Controls: clean / under the PGD-20 that the defence was shown. ms: per "
            "image, one thread, 16 images at once."
        )
        text = f"# Test-time defences in {name}\n\n{about}\n\n{defence_table(rows)}\n\n![accuracies]({name}.png)\n"
        (place / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
