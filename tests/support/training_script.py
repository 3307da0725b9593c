"""Tiny training runs: built here once for the tests, and run as a script where a test needs processes of its own.

python training_script.py machines FOLDER      two machines, whose folders are their own; see `machines`
accelerate launch ... training_script.py ranks FOLDER   every case of CASES; each rank writes what it holds
"""

import copy
import functools
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import CLASS_NAMES, make_clip, make_processor
from tiny_siglip import tiny_siglip
from transformers import TrainerCallback

from hf_robust_clip import (
    ACL,
    APT,
    ASCL,
    FAP,
    PMGAFT,
    TAPT,
    TPT,
    AdvCL,
    CleanerCLIP,
    CLIPForZeroShotClassification,
    ClipPromptConfig,
    Contrastive,
    DefenceBlind,
    EvaluationSettings,
    GrammarEditor,
    PMGAFTTrainer,
    RobustClipConfig,
    Static,
    TAPTTrainer,
    digits_clip_path,
    evaluate_robustness,
    load_image_dataset,
)
from hf_robust_clip.attacks.auto_attack import AutoAttack
from hf_robust_clip.attacks.suites import PGD
from hf_robust_clip.defences.fit import collect_statistics
from hf_robust_clip.evaluation.backdoor import measure_backdoor
from hf_robust_clip.poisoning.triggers import Stripes
from hf_robust_clip.processes import leave_processes
from hf_robust_clip.runs import evaluate, train

CASES = {
    "released": dict(objective=PMGAFT.released_preset()),
    "accumulated": dict(objective=PMGAFT.released_preset(), accumulation=2),
    "last layer": dict(objective=PMGAFT(), trainable_layers=1),
    "adapter": dict(objective=PMGAFT(), lora=True),
    "prompts": dict(objective=FAP(), prompts=dict(design="VLI")),
    "coupled prompts": dict(objective=APT("adv_full"), accumulation=2, prompts=dict(design="VLJ")),
    "short last update": dict(objective=PMGAFT.released_preset(), images=21),  # 8, 8, and 4 with 1
    "dropped last batches": dict(objective=PMGAFT(), images=21, dataloader_drop_last=True),
    "captions": dict(objective=Contrastive(), images=21, captions=True),
    "edited captions": dict(objective=CleanerCLIP(editor=GrammarEditor()), images=21, captions=True),
    "contrast": dict(objective=ASCL(text_anchors=True), images=21),
    "SigLIP": dict(objective=PMGAFT.released_preset(), model=tiny_siglip),
    "views": dict(objective=ACL(), images=21, pictures=True),
    "views of one process": dict(objective=AdvCL(), images=18, pictures=True),  # 8, 8, and 2 with none
    # 2 images with 1, twice
    "resumed before it": dict(objective=PMGAFT(), accumulation=2, images=19, resumed=True, ema_decay=0.5),
}
GLOBAL_BATCH = 8
DIGITS = Path(__file__).parents[2] / "recipes/configs/digits-clip/pmg_aft.yaml"


def tiny_model(dtype=torch.float64, classes=CLASS_NAMES, seed=0):
    processor = make_processor()
    model = CLIPForZeroShotClassification.from_clip(make_clip(processor, seed).to(dtype), processor)
    if classes:
        model.set_classes(classes)
    return model


def tiny_prompts(design="VLI", depth=2, **changes):
    """Prompts for `tiny_model`, whose tokens are letters."""
    settings = dict(vision_depth=depth, text_depth=depth, context_init="this is", init_std=0.5)
    return ClipPromptConfig(design=design, **{**settings, **changes})


def tiny_data(size=24, dtype=torch.float64, captions=False):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 8, 8, generator=generator, dtype=dtype)
    data = [{"pixel_values": image, "labels": i % len(CLASS_NAMES)} for i, image in enumerate(images)]
    if captions:
        data = [{**row, "captions": f"a {CLASS_NAMES[row['labels']]} {'x' * (i % 3)}"} for i, row in enumerate(data)]
    return data


def tiny_pictures(size=8):
    """Whole pictures, of which crops are made."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, 12 + i % 3, 20) for i in range(size)]
    return [
        {"picture": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), "labels": i % 7}
        for i, shape in enumerate(shapes)
    ]


def arguments(folder, **changes):
    """Three quick steps; PGD moves by several grey levels, so that what it finds matters."""
    settings = dict(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=GLOBAL_BATCH,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        eps="8/255",
        attack_step_size="4/255",
        eval_attack_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return RobustClipConfig(**{**settings, **changes})


def state(model):
    """A copy of every parameter and saved buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def case_trainer(name, folder, processes):
    """The trainer of a case, with the same global batch on any number of processes."""
    case = CASES[name]
    accumulation = case.get("accumulation", 1) if processes > 1 else 1
    args = arguments(
        folder,
        max_steps=3 if "images" not in case else 6,
        save_strategy="steps" if case.get("resumed") else "no",
        save_steps=2,
        learning_rate=0.1,
        per_device_train_batch_size=GLOBAL_BATCH // processes // accumulation,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=2,
        trainable_layers=case.get("trainable_layers"),
        dataloader_drop_last=case.get("dataloader_drop_last", False),
        ema_decay=case.get("ema_decay", 0.0),
    )
    adapter = (
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if case.get("lora") else None
    )
    if "prompts" in case:
        adapter = tiny_prompts(**case["prompts"])
    torch.manual_seed(0)
    images = case.get("images", 24)
    data = dict(
        train_dataset=tiny_pictures(images) if "pictures" in case else tiny_data(images, captions="captions" in case),
        eval_dataset=tiny_data(7),
    )
    make = case.get("model", tiny_model)
    return PMGAFTTrainer(make(), args, case["objective"], **data, teacher=make(seed=5), peft_config=adapter)


@functools.cache
def embedded():
    model = CLIPForZeroShotClassification.from_pretrained(digits_clip_path()).double()
    data = load_image_dataset("digits", "test", model.processor)
    model.set_classes(data.class_names)
    return model, data


def digits(count):
    """The embedded model with its classes, and some of its test images, in float64: rounding decides nothing."""
    model = copy.deepcopy(embedded()[0])
    return model, DoubleImages(replace(embedded()[1], processor=model.processor).first(count))


SUITES = {
    "PGD": PGD(3),
    "AutoAttack": AutoAttack(num_steps=2, num_targets=2, num_queries=5),
    "defence": PGD(2),
}


def digits_report(suite, processes=None, state_dir=None, count=9):
    """What `evaluate_robustness` finds on nine digits."""
    model, data = digits(count)
    defence = TPT(num_views=4, selected=0.5, learning_rate=0.1) if suite == "defence" else None
    view = Static() if defence is None else DefenceBlind()
    settings = EvaluationSettings(["4/255", "12/255"], attack=SUITES[suite], batch_size=2, view=view)
    where = dict(name="d", task="t", model_id="m", defence=defence, processes=processes, state_dir=state_dir)
    report = json.loads(json.dumps(asdict(evaluate_robustness(model, data, settings, **where))))
    if defence is not None:
        del report["defence"]["ms_per_image"]
    return report


def backdoor_figures(processes=None):
    """What `measure_backdoor` finds on nine digits with a trigger."""
    model, data = digits(9)
    found = measure_backdoor(model, data, Stripes(width=2, share=0.6), "zero", batch_size=2, processes=processes)
    return [[row.metric, row.value, row.n] for row in found]


def tapt_trainer(folder, processes):
    """Prompts that were trained for two steps, their statistics, and what tuning at test time finds."""
    args = arguments(
        folder, max_steps=2, per_device_train_batch_size=GLOBAL_BATCH // processes, per_device_eval_batch_size=2
    )
    torch.manual_seed(0)
    trainer = TAPTTrainer(
        tiny_model(), args, APT("adv_full"), tiny_data(), tiny_data(7), peft_config=tiny_prompts(),
        defence=TAPT(num_views=4, selected=0.5),
    )  # fmt: skip
    trainer.train()
    targets = trainer.collect_statistics()
    found = {"adversarial": targets.adversarial.mean, "clean": targets.clean.variance}
    return trainer.evaluate(), trainer.predict(tiny_data(3)).predictions, found


class DoubleImages:
    """An image dataset in float64."""

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        examples = self.data.__getitems__(indices)
        return [{**example, "pixel_values": example["pixel_values"].double()} for example in examples]


def long_run(folder, callbacks=()):
    """12 steps over shuffled epochs of five, with everything that a resume must bring back: momentum and schedule."""
    args = arguments(
        folder,
        max_steps=12,
        per_device_train_batch_size=4,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        save_strategy="steps",
        save_steps=4,
    )
    model, teacher = (tiny_model(torch.float32, seed=seed) for seed in (0, 5))
    data = tiny_data(20, torch.float32)
    return PMGAFTTrainer(model, args, train_dataset=data, teacher=teacher, callbacks=list(callbacks))


class Kill(TrainerCallback):
    """Ends the process by SIGKILL after the tenth step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)


def ranks(folder):
    for name in CASES:
        trainer = case_trainer(name, folder / "out", processes=2)
        trainer.train()
        if CASES[name].get("resumed"):
            trainer = case_trainer(name, folder / "out", processes=2)
            trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
        found = {"world": trainer.accelerator.num_processes, "metrics": trainer.evaluate()}
        found["logs"] = [{key: log[key] for key in log if key in ("loss", "ce")} for log in trainer.state.log_history]
        if name == "released":
            found["reports"] = {
                suite: digits_report(suite, trainer.accelerator, folder / f"state {suite}") for suite in SUITES
            }
            found["backdoor"] = backdoor_figures(trainer.accelerator)
        place = folder / f"{name}-{trainer.args.process_index}"
        save_file(state(trainer.accelerator.unwrap_model(trainer.model)), f"{place}.safetensors")
        Path(f"{place}.json").write_text(json.dumps(found))
    metrics, predictions, statistics = tapt_trainer(folder / "out", processes=2)
    place = folder / f"tapt-{trainer.args.process_index}"
    logits = {f"logits{i}": torch.as_tensor(part) for i, part in enumerate(predictions)}
    save_file({**statistics, **logits}, f"{place}.safetensors")
    Path(f"{place}.json").write_text(json.dumps({"metrics": metrics}))


def error_of(work):
    """Kind and text of the error in which some work ends, or None."""
    try:
        work()
    except (OSError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def machines(folder):
    """What this process, one of two, finds where every machine has folders of its own, case by case."""
    rank = int(os.environ["RANK"])
    folder = folder / str(rank)
    found = {}

    def trainer(case, seed=3, images=(24, 7), **changes):
        own = dict(max_steps=4, per_device_train_batch_size=4, save_strategy="steps", save_steps=2, seed=seed)
        args = arguments(folder / case, **{**own, **changes})
        return PMGAFTTrainer(tiny_model(), args, None, *map(tiny_data, images), teacher=tiny_model(seed=5))

    trainer("alone").train()  # the main machine alone has checkpoints
    found["alone"] = error_of(lambda: trainer("alone").train(resume_from_checkpoint=True))
    found["wishes"] = error_of(lambda: trainer("alone").train(resume_from_checkpoint=rank == 0))
    found["settings"] = error_of(lambda: trainer("settings", seed=rank).train())
    shared = dict(save_on_each_node=True, output_dir=str(folder.parent / "shared"))
    found["shared"] = error_of(lambda: trainer("shared", **shared).train())
    found["data"] = error_of(lambda: trainer("data", images=(24 + rank, 7)).train())
    found["eval_data"] = error_of(lambda: trainer("data", images=(24, 7 + rank)).train())
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", eval_strategy="steps", eval_steps=2)
    found["best"] = error_of(lambda: trainer("best", **best).train())
    whole = trainer("each", save_on_each_node=True)
    whole.train()
    if rank == 1:  # cut short on one machine: both go on from the one before
        os.truncate(folder / "each" / "checkpoint-4" / "optimizer.pt", 100)
    expected, found["each"] = state(whole.classifier()), []
    for _ in range(2):  # the second time nothing is left to train
        resumed = trainer("each", save_on_each_node=True)
        resumed.train(resume_from_checkpoint=True)
        equal = all(torch.equal(tensor, expected[name]) for name, tensor in state(resumed.classifier()).items())
        found["each"].append([resumed._resumed_from.name, resumed.state.global_step, equal])

    processes, place = resumed.accelerator, folder / "evaluation"
    report = digits_report("PGD", processes, place)
    file = place / f"state-{rank}.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: 3 + rank]))
    found["evaluation"] = digits_report("PGD", processes, place) == report
    if rank == 1:
        file.write_bytes(b"".join([*lines[:2], b"42\n", *lines[2:]]))
    found["damaged"] = error_of(lambda: digits_report("PGD", processes, place))
    found["pictures"] = error_of(lambda: digits_report("PGD", processes, count=9 + rank))
    found["statistics"] = error_of(
        lambda: collect_statistics(tiny_model(), tiny_data(4 + rank), batch_size=4, processes=processes)
    )
    found["another"] = error_of(lambda: digits_report(("PGD", "AutoAttack")[rank], processes, folder / "another"))
    found |= commands(folder, rank)
    (folder / "found.json").write_text(json.dumps(found))


def commands(folder, rank):
    """What a machine finds by the commands, with folders of its own; an earlier run left a model in the second's."""
    words = ["--max_images", "16", "--max_steps", "2", "--per_device_train_batch_size", "4", "--objective", "TeCoA",
             "--evaluation.attack", "pgd-1", "--evaluation.radii", "[24/255]", "--use_cpu", "true", "--overwrite",
             "--tasks", "[{name: few, dataset: digits, split: test, max_images: 6}]"]  # fmt: skip

    def trained(*more):
        return train.train(train.read([*words, "--output_dir", str(folder / "trained"), *more], DIGITS))

    def evaluated(count):
        own = ["--model_name_or_path", str(folder / "trained"), "--output_dir", str(folder / "evaluated"),
               "--dataset_name", "digits", "--max_images", count, "--evaluation.radii", "[24/255]",
               "--evaluation.attack", "pgd-1", "--use_cpu", "true"]  # fmt: skip
        return evaluate.evaluate(evaluate.read(own, DIGITS.parents[1] / "evaluate.yaml"))

    found = {"seed": error_of(lambda: trained("--seed", str(rank)))}
    if rank == 1:
        (folder / "trained").mkdir(exist_ok=True)
        (folder / "trained/report.json").write_text("{}")
    (report,) = trained()
    found["trained"] = sorted(path.name for path in (folder / "trained").iterdir() if path.is_file())
    found["report"] = [report.num_images, report.clean_accuracy, report.robust_accuracy[24 / 255]]
    found["no model"] = error_of(lambda: evaluated("4"))
    if rank == 1:
        shutil.copytree(folder.with_name("0") / "trained", folder / "trained", dirs_exist_ok=True)
    found["max_images"] = error_of(lambda: evaluated(f"{4 + rank}"))
    found["evaluated"] = [report.num_images for report in evaluated("4")]
    found["written"] = (folder / "evaluated/report.json").is_file()
    return found


if __name__ == "__main__":
    if sys.argv[1] == "machines":
        machines(Path(sys.argv[2]))
    else:
        ranks(Path(sys.argv[2]))
    leave_processes()
