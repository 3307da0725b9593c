"""The command `hf-robust-clip demo`: from flags to a page that is served, or to the folder of a Space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..arguments import DataArguments, ModelArguments
from ..checkpoint_notes import holds_defence, trained_setting, trained_templates
from ..command_line import ClassFlag, CommandLine, Given, read_command
from ..defences.base import Defence
from ..defences.defended import DefendedClassifier
from ..digits_clip import EMBEDDED_MODEL
from ..modeling import PAPER_TEMPLATE, ZeroShotClassifier, check_classes
from ..names import shown_name
from ..runs import shared
from ..secrets import without_token_keys
from ..threat_model import ThreatModel, parse_radius
from .bench import Bench
from .choices import Limits, first_templates, set_any_classes
from .examples import Examples, examples_of

if TYPE_CHECKING:
    from .page import Page

SAVED = "saved with the model"


@dataclass(frozen=True)
class DemoArguments:
    """What the page shows, and where it is served.

    Args:
        reference: the undefended model beside it; null takes the model itself, without a defence.
        defence: a test-time defence that is chosen at first, a class with its settings as --defence.NAME; one that was
            saved with the model is offered too. Others of the package are offered with their defaults.
        template: prompt with {} for the class name; null takes that of the model's training, else the dataset's.
        radius: chosen at first, in units of [0, 1]; null takes that of the model's training, else 4/255.
        most_levels: the largest radius on the slider, in 255ths.
        examples: how many pictures of the dataset are offered.
        host: address that is listened at; null is this machine alone (or what GRADIO_SERVER_NAME says).
        port: null takes the first free one from 7860 on (or what GRADIO_SERVER_PORT says).
        share: open a public link to this page through gradio's servers, for a week.
        use_cpu: compute on the CPU, whatever else is there.
        export_space: write a folder for a Space there, in place of serving.
        overwrite: replace a Space that the folder holds.
    """

    reference: str | None = None
    defence: Defence | None = None
    template: str | None = None
    radius: float | str | None = None
    most_levels: int = 64
    examples: int = 20
    host: str | None = None
    port: int | None = None
    share: bool = False
    use_cpu: bool = False
    export_space: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.reference == "":
            raise ValueError("reference='' names no model; leave it out.")
        if not 1 <= self.most_levels <= 254:
            raise ValueError(f"most_levels={self.most_levels!r} must be in 1 .. 254.")
        if not 0 <= self.examples <= 100:
            raise ValueError(f"examples={self.examples!r} must be in 0 .. 100.")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"port={self.port!r} must be in 1 .. 65535.")
        if self.template is not None:
            check_classes(["a class"], self.template)
        if self.radius is not None:
            levels = 255 * parse_radius(self.radius, "radius")
            if levels > self.most_levels * (1 + 1e-9):
                raise ValueError(f"radius={self.radius!r} is above most_levels={self.most_levels!r}; raise that.")
        if self.overwrite and self.export_space is None:
            raise ValueError("overwrite=true does nothing without export_space.")
        if self.export_space is not None:
            for name in ("host", "port", "share"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)!r} does nothing beside export_space.")


COMMAND = CommandLine(
    groups={"": (ModelArguments, DataArguments, DemoArguments), "limits": (Limits,)},
    classes={"defence": ClassFlag(Defence, ("hf_robust_clip.defences",))},
    required=(),
    skip=frozenset(
        [
            *("use_peft", "lora_r", "lora_alpha", "dataset_train_split", "augment", "max_images"),
            *("shots", "shots_seed", "streaming"),
        ]
    ),
)


@dataclass(frozen=True)
class Demo:
    """What a page is about, checked.

    Args:
        source: all that was asked for, as plain values.
    """

    model: ModelArguments
    data: DataArguments
    about: DemoArguments
    limits: Limits
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The undefended model."""
        return self.about.reference or self.model.model_name_or_path


@dataclass(frozen=True)
class Prepared:
    """All that a page is made of.

    Args:
        levels: the radius that is chosen at first, in 255ths.
    """

    bench: Bench
    examples: Examples
    templates: tuple[str, ...]
    levels: float
    defence: str


def main(words: Sequence[str]) -> None:
    """A page as a command."""
    run = read(words)
    shared.quiet_loading()
    if run.about.export_space is not None:
        from .space import export_space

        export_space(run)
        print(f"wrote {run.about.export_space}: try it by `python {run.about.export_space}/app.py`")
        return
    check_extra()
    page = open_page(words)
    page.serve(run.about.host, run.about.port, run.about.share)


def read(words: Sequence[str]) -> Demo:
    """Check every setting. Nothing is loaded or downloaded here, save an own YAML file."""
    given: Given = read_command(COMMAND, words, None, "A page on which people look at one picture.")
    made = given.made()
    model, data, about = (given.group(cls, made) for cls in (ModelArguments, DataArguments, DemoArguments))
    return Demo(model, data, about, made.limits or Limits(), without_token_keys(given.settings))


def check_extra() -> None:
    """Raise OSError where gradio isn't installed."""
    if find_spec("gradio") is None:
        raise OSError("gradio is not installed; the page needs it: pip install 'gradio>=6.31,<7'.")


def open_page(words: Sequence[str]) -> Page:
    """The page of some flags, with its models loaded."""
    from .page import Page

    return Page(prepare(read(words)))


def prepare(run: Demo) -> Prepared:
    """Load the models, find what is offered, and try nothing yet.

    Raises OSError and ValueError for models and datasets that can't be loaded, and for a defence that doesn't go with
    the model.
    """
    import torch

    device = "cpu" if shared.on_cpu(run.about.use_cpu) else "cuda"
    name, revision = run.model.model_name_or_path, run.model.model_revision
    classifier, saved = _loaded(name, revision)
    classifier = classifier.to(torch.device(device))
    if run.reference == name:
        reference, _ = classifier, None
        if saved is not None and saved.needs_prompts:
            raise ValueError(f"{name!r} has prompts in it, and is no undefended model; give --reference.")
    else:
        reference = _loaded(run.reference, None)[0].to(torch.device(device))
    offered: dict[str, Defence] = {}
    if run.about.defence is not None:
        asked = with_fitted(run.about.defence, saved, name)
        offered[f"{asked.name} as asked for"] = asked
    if saved is not None:
        offered[f"{saved.name}, {SAVED}"] = saved
    bench = Bench((shown_name(run.reference), reference), (shown_name(name), classifier), offered, run.limits,
                  run.about.most_levels)  # fmt: skip
    for own in offered.values():
        check_defence(own, classifier)
    examples = examples_of(run.data, run.about.examples, classifier, run.limits.classes)
    own_template = () if run.about.template is None else (run.about.template,)
    templates = first_templates(
        own_template, trained_templates(name, revision), examples.templates, otherwise=PAPER_TEMPLATE
    )
    return Prepared(bench, examples, templates, first_levels(run), next(iter(bench.defences)))


def _loaded(name: str, revision: str | None) -> tuple[ZeroShotClassifier, Defence | None]:
    """A model, with the defence that was saved with it."""
    if name != EMBEDDED_MODEL and holds_defence(name, revision):
        defended = DefendedClassifier.from_pretrained(name, revision=revision)
        return defended.classifier, defended.adapter
    return shared.load_model(name, revision), None


def with_fitted(defence: Defence, saved: Defence | None, name: str) -> Defence:
    """A defence with what a saved one was fitted with. Raises OSError where it must be fitted and nothing was."""
    if not defence.learns() and type(defence).fit is Defence.fit:
        return defence
    parts: dict[str, Any] = {
        part: own
        for part, own in ({} if saved is None else saved.fitted).items()
        if isinstance(own, defence.learns().get(part, ()))
    }
    if not parts:
        raise OSError(f"{name!r} holds nothing that {defence.name} was fitted with; train it with this defence first.")
    return replace(defence, **parts)


def check_defence(defence: Defence, classifier: ZeroShotClassifier) -> None:
    """Raise ValueError for a defence that doesn't go with a classifier, whatever its classes."""
    with classifier.same_classes_after():
        set_any_classes(classifier)
        defence.check(classifier)


def first_levels(run: Demo) -> float:
    """The radius that is chosen at first, in 255ths: that asked for, else the training's, else 4."""
    told = run.about.radius
    if told is None:
        trained = trained_setting(run.model.model_name_or_path, run.model.model_revision)[1]
        told = "4/255" if trained is None else trained
    try:
        levels = 255 * ThreatModel(told).eps  # type: ignore[arg-type]
    except ValueError:
        if run.about.radius is not None:
            raise
        levels = 4.0
    return float(min(round(levels, 3), run.about.most_levels))
