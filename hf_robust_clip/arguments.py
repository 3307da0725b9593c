"""What flags and YAML fill: frozen dataclasses that check themselves. Nothing is loaded or written here."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from .attacks.suites import Suite
from .checks import check_whole
from .defences.base import Defence
from .digits_clip import EMBEDDED_MODEL
from .evaluation.attack_views import AttackView, DefenceBlind, Static
from .evaluation.settings import EvaluationSettings, Precision
from .evaluation.streams import check_poisoning
from .modeling import PAPER_TEMPLATE
from .modeling.layouts import KNOWN
from .names import is_path, same_place
from .objectives.base import Objective
from .zero_shot_data.adversarial import PixelFormat

SLICE = re.compile(r"[^\[]+\[(\d*)(%?):(\d*)(%?)\]")  # of a split: start, its unit, stop, its unit
ACTIVATIONS = ("quick_gelu", "gelu")  # of OpenAI's CLIPs, of others
NORMALISATIONS = {
    "clip": (list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)),
    "imagenet": (list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)),
}


@dataclass(frozen=True)
class ModelArguments:
    """What is trained or evaluated.

    Args:
        model_name_or_path: a Hub id, a folder, or digits-clip (shipped with the package); for an evaluation also an
            adapter, which is loaded on its base model.
        model_revision: of a Hub id.
        use_peft: train LoRA in the image encoder in place of its weights.
        lora_r: rank of LoRA.
        lora_alpha: scale of LoRA.
    """

    model_name_or_path: str = EMBEDDED_MODEL
    model_revision: str | None = None
    use_peft: bool = False
    lora_r: int = 8
    lora_alpha: int = 16

    def __post_init__(self) -> None:
        name = self.model_name_or_path
        if not name:
            raise ValueError("model_name_or_path='' must name a model.")
        if self.model_revision is not None and (name == EMBEDDED_MODEL or is_path(name)):
            raise ValueError(
                f"model_revision={self.model_revision!r} does nothing for {name!r}, which is not read from the Hub."
            )
        if self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r!r} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class PictureArguments:
    """Which pictures of a dataset are taken, and how.

    Args:
        data_root: a folder of datasets in Hub layout, in which the dataset is looked for.
        classes: take these classes alone.
        class_names: names of the classes, a file of them, or a known set of names.
        image_column: where it can't be guessed.
        label_column: where it can't be guessed.
        background: what shows where a picture is transparent.
        resize: shorter side before the centre crop; null takes the processor's.
        streaming: read max_images rows of a shuffled stream, without downloading the rest.
        max_images: so many images at most.
        shots: so many images of each class, drawn once.
        shots_seed: of that draw.
        augment: random crops and mirroring of whole pictures (crop_scale, flip), in training, and, where asked for,
            other colours and erased parts (jitter, greyscale, erasing).
    """

    data_root: str | None = None
    classes: Sequence[str] | None = None
    class_names: Mapping[str, str] | Sequence[str] | str | None = None
    image_column: str | None = None
    label_column: str | None = None
    background: str | Sequence[int] = "white"
    resize: int | None = None
    streaming: bool = False
    max_images: int | None = None
    shots: int | None = None
    shots_seed: int = 0
    augment: bool = False

    def __post_init__(self) -> None:
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images={self.max_images!r} must be at least 1.")
        if self.shots is None and self.shots_seed:
            raise ValueError(f"shots_seed={self.shots_seed!r} does nothing without shots.")
        if self.augment and self.resize is not None:
            raise ValueError(
                f"resize={self.resize!r} does nothing beside augment: whole pictures are cropped at random."
            )


@dataclass(frozen=True)
class Images(PictureArguments):
    """Pictures with labels, as `zero_shot_data.loading` reads them; with a name a task to evaluate on.

    Args:
        dataset: a key of the known datasets, a Hub id, or a folder of pictures or parquet.
        split: such as test, or train[:100].
        name: what tables call a task.
        config: where a dataset has several configurations.
        revision: of a Hub id.
        template: prompt with {} for the class name, or a key of templates.json; null takes that of the run.
        attack_resolution: side in pixels at which pictures are attacked, or model for the model's input size; null
            takes the known dataset's own.
        crop_pct: side of the centre crop by the shorter side of the resized picture, in place of resize: 0.875 is
            256 and 224 px. It counts at the model's input size.
        suite: of which this is a task, for remarks on what differs from the paper's table.
        All others are those of `PictureArguments`.
    """

    dataset: str = ""
    split: str = "test"
    name: str | None = None
    config: str | None = None
    revision: str | None = None
    template: str | None = None
    attack_resolution: int | Literal["model"] | None = None
    crop_pct: float | None = None
    suite: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct!r} must be above 0 and at most 1.")
        if self.crop_pct is not None and (self.resize is not None or self.augment):
            other = f"resize={self.resize!r}" if self.augment is False else "augment=true"
            raise ValueError(f"crop_pct={self.crop_pct!r} does nothing beside {other}; choose one.")
        if isinstance(self.attack_resolution, int) and self.attack_resolution < 1:
            raise ValueError(f"attack_resolution={self.attack_resolution!r} must be at least 1.")
        if self.dataset == "digits" and self.data_root is not None:
            raise ValueError(f"data_root={self.data_root!r} does nothing for digits, which come with scikit-learn.")

    def overlaps(self, other: Images) -> bool:
        """Whether both may take pictures of the same split, by its name and slice, and of a class in common where both
        choose classes.
        """
        places = {(i.dataset, i.data_root, i.config, i.revision) for i in (self, other)}
        chosen = [set(i.classes) for i in (self, other) if i.classes is not None]
        common = len(chosen) < 2 or bool(chosen[0] & chosen[1])
        return len(places) == 1 and common and not _are_apart(self.split, other.split)


def _are_apart(split: str, other: str) -> bool:
    """Whether the texts of two splits, such as train[:80%], say that no row is in both."""
    return all(_parts_are_apart(*pair) for pair in itertools.product(split.split("+"), other.split("+")))


def _parts_are_apart(one: str, two: str) -> bool:
    names = {part.partition("[")[0] for part in (one, two)}
    slices = [SLICE.fullmatch(part) for part in (one, two)]
    if "all" in names or len(names) == 2 or not all(slices):
        return "all" not in names and len(names) == 2
    ends = [found.groups() for found in slices if found]
    units = {unit for start, first, stop, last in ends for number, unit in ((start, first), (stop, last)) if number}
    latest_start = max(int(start or 0) for start, _, _, _ in ends)
    first_stop = min(int(stop or sys.maxsize) for _, _, stop, _ in ends)
    return len(units) <= 1 and latest_start >= first_stop


@dataclass(frozen=True)
class DataArguments(PictureArguments):
    """The pictures to train on, or, where nothing is trained, to evaluate on.

    Args:
        dataset_name: a key of the known datasets, a Hub id, or a folder of pictures or parquet.
        dataset_config: where a dataset has several configurations.
        dataset_revision: of a Hub id.
        dataset_train_split: what is trained on, such as train, or train[:100].
        dataset_test_split: what is evaluated on, where there are no `tasks`.
        All others are those of `PictureArguments`.
    """

    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.images(self.dataset_test_split)

    def images(self, split: str) -> Images:
        """A split of these pictures."""
        shared = {f.name: getattr(self, f.name) for f in fields(PictureArguments)}
        where = (self.dataset_name or "", split, None, self.dataset_config, self.dataset_revision)
        return Images(*where, **shared)


@dataclass(frozen=True)
class EvaluationArguments:
    """How hard to attack: an `EvaluationSettings` whose attacks may be given by their short names.

    Args:
        radii: radii in units of [0, 1], such as [1/255, 4/255]; nothing with the attack none.
        norm: linf or l2.
        attack: pgd-N, cw-N, apgd (APGD-CE and APGD-T), autoattack, autoattack-rand, apgd-ce, apgd-dlr, apgd-t, fab-t,
            square, or a class of attacks with its settings; none for clean accuracy alone, as of pictures that were
            attacked already.
        attacks: several, each of which gives a report.
        step_size: of PGD and CW by their short names; null takes 2.5 * eps / steps.
        view: what the attacks see of a defence: defence_blind (the default), transfer_from_adapted, bpda, adaptive,
            queries, or the dotted path of your own; attacks such as AdaptiveWorst bring their own.
        batch_size: images per forward.
        seed: of all that attacks draw.
        precision: fp32, or fast: gradients in bfloat16, every break confirmed in float32.
        num_workers: processes that load pictures ahead.
        eot: draws of the defence in each gradient through it.
    """

    radii: Sequence[float | str] | None = None
    norm: str = "linf"
    attack: Suite | str = "pgd-20"
    attacks: Sequence[Suite | str] | None = None
    step_size: float | str | None = None
    view: AttackView | None = None
    batch_size: int = 128
    seed: int = 0
    precision: Precision = "fp32"
    num_workers: int = 0
    eot: int = 1

    def settings(self, *, defended: bool = False) -> tuple[EvaluationSettings, ...]:
        """One for each attack; by default a defence is attacked blindly.

        Raises ValueError for an attack that is there twice, for none, and for a step size of attacks that have none.
        """
        from .attacks.named import suite_named

        if self.attacks is not None and not self.attacks:
            raise ValueError("evaluation.attacks=[] names no attack.")
        given = [self.attack] if self.attacks is None else list(self.attacks)
        suites = [suite_named(own, self.step_size) if isinstance(own, str) else own for own in given]
        still = [own for own, suite in zip(given, suites, strict=True) if not suite.has_radii]
        if still and len(given) > 1:
            raise ValueError(
                f"evaluation.attacks={self.attacks!r} holds {still[0]!r}, which has no radii; run it alone."
            )
        if still and self.view is not None:
            raise ValueError(f"evaluation.view={self.view!r} does nothing with attack={still[0]!r}; leave it out.")
        if not still and not self.radii:
            raise ValueError("missing: evaluation.radii; give at least one, such as [1/255].")
        if self.view is not None and all(suite.about is not None for suite in suites):
            raise ValueError(
                f"evaluation.view={self.view!r} does nothing: these attacks bring their own; leave it out."
            )
        view = self.view or (DefenceBlind() if defended else Static())
        found: list[EvaluationSettings] = []
        for own, suite in zip(given, suites, strict=True):
            if not isinstance(own, str) and self.step_size is not None:
                raise ValueError(
                    f"evaluation.step_size={self.step_size!r} goes with pgd-N and cw-N, not with {own!r}."
                )
            how = EvaluationSettings(
                self.radii or [], self.norm, suite, view if suite.about is None else Static(), self.batch_size,
                self.seed, self.precision, self.num_workers, self.eot,
            )  # fmt: skip
            if how in found:
                raise ValueError(f"evaluation.attacks={self.attacks!r} names {own!r} twice.")
            found.append(how)
        return tuple(found)


@dataclass(frozen=True)
class DefenceEvaluation:
    """How a defence is attacked after a training: blind by `evaluation.attack`, and through it.

    Args:
        attack: the attacks through the defence, such as AdaptiveWorst with its steps and queries.
        radius: one of evaluation.radii; null takes the first.
        eot: draws of the defence in each gradient through it.
        max_images: of each task; null takes those of the task.
        batch_size: images per forward.
        presets: presets of the defence that are evaluated beside it.
    """

    attack: Suite | None = None
    radius: float | str | None = None
    eot: int = 1
    max_images: int | None = None
    batch_size: int = 64
    presets: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"defence_evaluation.max_images={self.max_images!r} must be at least 1.")


@dataclass(frozen=True)
class TrainingRunArguments:
    """What a training is about.

    Args:
        template: prompt with {} for the class name; with descriptions what they are put into, at {description}, by
            default nothing else.
        descriptions: a JSON file of {class name: [texts]} for all classes of training and tasks, or a known set
            (digits, cifar10).
        objective: the method: a class of `hf_robust_clip.objectives`, or the dotted path of your own, with its
            settings as --objective.NAME.
        tasks: datasets to evaluate on, before and after; the name of a suite, such as pmg_aft_16, stands for all test
            sets of a paper's table.
        defence: a test-time defence, a class with its settings as --defence.NAME, which is fitted on the training
            images, evaluated, and saved with the adapter.
        fit_images: the defence is fitted on so many training images; null takes all.
        compare: further objectives, which are trained by the same settings and shown beside.
        held_out_images: share of the training images of each class, at least one, that is held out of the training
            and on which it is evaluated while it runs (eval_steps, by default save_steps); the weights with the best
            robust accuracy there are kept. Never the test split.
        card_pictures: so many attacked test pictures on the card, of the first task whose licence is known to let
            anybody show them (digits, say); null takes 4 where the run is pushed to the Hub, 0 none.
        overwrite: begin anew in a folder that holds a run.
    """

    template: str = PAPER_TEMPLATE
    descriptions: str | None = None
    objective: Objective | None = None
    tasks: Sequence[Images] | None = None
    defence: Defence | None = None
    fit_images: int | None = None
    compare: Sequence[str] = ()
    held_out_images: float | None = None
    card_pictures: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.held_out_images is not None:
            check_share("held_out_images", self.held_out_images)
        if self.card_pictures is not None and not 0 <= self.card_pictures <= 64:
            raise ValueError(f"card_pictures={self.card_pictures!r} must be from 0 to 64.")
        if self.fit_images is not None and self.fit_images < 1:
            raise ValueError(f"fit_images={self.fit_images!r} must be at least 1.")
        if self.defence is None and self.fit_images is not None:
            raise ValueError(f"fit_images={self.fit_images!r} does nothing without a defence, which is fitted.")


@dataclass(frozen=True)
class TuneArguments:
    """Settings that are found on held-out training images, before the training.

    Args:
        trials: so many short trainings, each with settings drawn from the space; then the run trains with the best,
            on all training images. Needs Optuna.
        space: {SETTING: RANGE, ...}: settings of the training, and as objective.NAME of the objective. A range is
            [LOW, HIGH], on a log scale where HIGH is at least 10 times LOW; {low: LOW, high: HIGH, log: true or false}
            says so itself; three or more values, or {choices: [...]}, are the only ones to choose from.
        max_steps: updates of a trial; null takes a quarter of the run's. A warm-up is shortened alike.
        held_out_images: share of the training images of each class, at least one, that no trial is trained on and by
            which all are scored.
        held_out_classes: share of the classes, at least two, or 0 for none, that no trial is trained on, and by whose
            training images all are scored too, told apart from one another; both parts then count one half.
        clean_weight: a score is clean_weight * clean + (1 - clean_weight) * robust accuracy, under the attack of
            eval_attack_steps.
    """

    trials: int | None = None
    space: dict[str, Any] | None = None
    max_steps: int | None = None
    held_out_images: float = 0.2
    held_out_classes: float = 0.0
    clean_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("trials", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"tune.{name}={getattr(self, name)!r} must be at least 1.")
        if self.trials is not None and not self.space:
            raise ValueError("tune.space is missing: name settings and their ranges, {learning_rate: [1e-5, 1e-3]}.")
        check_share("tune.held_out_images", self.held_out_images)
        if self.held_out_classes != 0:
            check_share("tune.held_out_classes", self.held_out_classes)
        if not 0 <= self.clean_weight <= 1:
            raise ValueError(f"tune.clean_weight={self.clean_weight!r} must be in 0 .. 1.")


@dataclass(frozen=True)
class EvaluationRunArguments:
    """What an evaluation is about.

    Args:
        output_dir: where report, table and plots are written.
        template: prompt with {} for the class name; null takes that of a task or of its suite, else that of the
            model's training, if a recipe.yaml or report.json beside it says so, else the known dataset's own. With
            descriptions what they are put into, at {description}; null then takes that of the training, if it takes
            descriptions, else nothing but them.
        descriptions: a JSON file of {class name: [texts]} for all classes of all tasks, or a known set (digits,
            cifar10); null takes those of the model's training, where its template takes some.
        tasks: datasets to evaluate on; one of them may be given by --dataset_name in their place. The name of a suite,
            such as pmg_aft_16, stands for all test sets of a paper's table.
        compare: further checkpoints, shown beside.
        reference: an undefended checkpoint, which a working attack brings to about 0.
        defence: a test-time defence, a class with its settings as --defence.NAME. Where the model's folder holds one
            of the same class, its statistics and settings are taken, save those given here. --fit_on.NAME says on
            which other images it is fitted first.
        stream_poisoning: of a defence with a stream state: so many images at the head of the stream are attacked, and
            the clean ones after them judged, in several random orders; 0 for the orders alone.
        permutations: how many orders.
        published: a published method, such as pmg_aft or tga_zsr/pmg_aft, whose figures are shown beside the measured
            ones. An evaluation with another radius, norm, attack or model is refused.
        published_anyway: show them all the same, with what differs.
        explain: of so many images of each task, the first, where the models look in them, clean and attacked by the
            first attack at the largest radius: a line each in explanations.csv, 8 of them in explanations.png. 0 for
            none. --resume makes them anew.
        save_adversarial: save the adversarial pictures of the checkpoint in question, of each task and attack as a
            dataset in <output_dir>/adversarial: uint8 (PNGs, which an attack may not survive), float16 or float32
            (arrays; float32 is exact). Read again with --dataset_name and --evaluation.attack none they give the
            robust accuracy of the report.
        use_cpu: evaluate on the CPU, whatever else is there.
        overwrite: begin anew in a folder that holds a run.
        resume: go on with a run that was stopped.
    """

    output_dir: str | None = None
    template: str | None = None
    descriptions: str | None = None
    tasks: Sequence[Images] | None = None
    compare: Sequence[str] = ()
    reference: str | None = None
    defence: Defence | None = None
    stream_poisoning: int | None = None
    permutations: int = 5
    published: str | None = None
    published_anyway: bool = False
    explain: int = 0
    save_adversarial: PixelFormat | None = None
    use_cpu: bool = False
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        check_whole(0, explain=self.explain)
        if self.explain and self.defence is not None:
            raise ValueError(f"explain={self.explain!r} shows the classifier by itself: evaluate without a defence.")
        for name, models in (("compare", list(self.compare)), ("reference", [self.reference])):
            if "" in models:
                raise ValueError(f"{name}={getattr(self, name)!r} holds an empty name; leave it out.")
        if self.overwrite and self.resume:
            raise ValueError("overwrite=true deletes what resume=true would go on from; choose one.")
        if self.published_anyway and self.published is None:
            raise ValueError("published_anyway=true does nothing without published; name a published method.")
        if self.defence is not None and self.reference is not None:
            raise ValueError(f"reference={self.reference!r} is undefended: evaluate it without a defence.")
        if self.stream_poisoning is not None:
            check_poisoning(self.defence, self.stream_poisoning, self.permutations)


@dataclass(frozen=True)
class CardArguments:
    """Which card is written again, or which folder of cards gets an index page.

    Args:
        folder: of one card, with report.json and recipe.yaml.
        license: of the weights, as the Hub writes it (apache-2.0, say); kept in report.json.
        defences: Hub ids of test-time defences that stand on this model, which the card links; kept in report.json.
        eval_results: write the figures on datasets of the Hub to .eval_results/hf_robust_clip.yaml too.
        collection: a folder of cards, whose README.md becomes an index page.
        sort_by: of its tables: robust (the default), clean, method, model, or the title of a task.
    """

    folder: str | None = None
    license: str | None = None
    defences: Sequence[str] | None = None
    eval_results: bool = False
    collection: str | None = None
    sort_by: str | None = None

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.collection is None):
            raise ValueError(f"folder={self.folder!r} and collection={self.collection!r}: give one of them.")
        of_cards = ("license", "defences", "eval_results")
        idle = of_cards if self.collection is not None else ("sort_by",)
        for name in idle:
            if getattr(self, name) not in (None, False):
                other = "with collection" if self.collection is not None else "without collection"
                raise ValueError(f"{name}={getattr(self, name)!r} does nothing {other}.")


@dataclass(frozen=True)
class ConvertArguments:
    """Which weights become a checkpoint of transformers, and what they don't tell.

    Args:
        source: a file of weights, a folder, or a Hub id.
        base: the CLIP that they were trained from, a Hub id or a folder: it gives what they lack (text tower,
            tokenizer, processor), and all names and sizes are compared with its own.
        output_dir: where the checkpoint is written.
        source_file: the file of weights in a folder or repository of several.
        source_revision: of a Hub id.
        base_revision: of a Hub id.
        layout: how the weights are written; null finds it by their names.
        normalisation: of the images in the training: clip, imagenet, MEAN,STD, or three of each as M,M,M;S,S,S; null
            takes that of the base's processor.
        activation: of the training: quick_gelu or gelu; null takes that of the base's config.
        overwrite: replace a checkpoint that the folder holds.
    """

    source: str = ""
    base: str = ""
    output_dir: str = ""
    source_file: str | None = None
    source_revision: str | None = None
    base_revision: str | None = None
    layout: str | None = None
    normalisation: str | None = None
    activation: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("source", "base", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}='' names nothing.")
        if self.layout is not None and self.layout not in KNOWN:
            raise ValueError(f"layout={self.layout!r} is unknown; choose one of {', '.join(KNOWN)}.")
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(f"activation={self.activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}.")
        if self.base_revision is not None and (self.base == EMBEDDED_MODEL or is_path(self.base)):
            raise ValueError(
                f"base_revision={self.base_revision!r} does nothing for {self.base!r}, which is no Hub id."
            )
        self.mean_and_std()

    def mean_and_std(self) -> tuple[list[float], list[float]] | None:
        """Three values each, in units of [0, 1]; None if none were given. Raises ValueError for others."""
        text = self.normalisation
        if text is None or text in NORMALISATIONS:
            return None if text is None else NORMALISATIONS[text]
        try:
            halves = text.split(";") if ";" in text else text.split(",")
            mean, std = ([float(value) for value in half.split(",")] for half in halves)
        except ValueError:
            mean, std = [], []
        mean, std = (values * 3 if len(values) == 1 else values for values in (mean, std))
        fits = all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)
        if len(mean) != 3 or len(std) != 3 or not fits:
            raise ValueError(
                f"normalisation={text!r} must be {', '.join(NORMALISATIONS)}, MEAN,STD or M,M,M;S,S,S, in units of "
                "[0, 1]."
            )
        return mean, std


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless a share leaves something on either side."""
    if not 0 < value < 1:
        raise ValueError(f"{name}={value!r} must be above 0 and below 1.")


def check_folder(output_dir: str, model: str, goes_on: bool) -> None:
    """Raise OSError if the output folder is a file, the model's own, or holds something and nothing says what of it.

    Args:
        goes_on: whether the run goes on with what is there, or deletes it.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise OSError(f"output_dir={output_dir!r} is a file; name a folder.")
    if Path(model).is_dir() and same_place(output_dir, model):
        raise OSError(f"output_dir={output_dir!r} is the folder of the model itself; name another folder.")
    if folder.is_dir() and any(folder.iterdir()) and not goes_on:
        raise OSError(
            f"output_dir={output_dir!r} is not empty; add --overwrite, or go on with what is there (--resume, in a "
            "training --resume_from_checkpoint true), or name another folder."
        )
