"""What visitors may choose, and what is made of what they typed or uploaded: checked, and of bounded size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from ..attacks.named import short_names, suite_named
from ..attacks.suites import Suite
from ..checks import check_whole
from ..command_line import ClassFlag, classes_in
from ..defences import defence_classes
from ..defences.base import Defence
from ..defences.undefended import Undefended
from ..modeling import ZeroShotClassifier, check_classes
from ..names import check_shown
from ..pictures import to_rgb
from ..runs.shared import SUITES, take_descriptions

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # decoders that run nothing else, as that of EPS would
STEPS = re.compile(r"(?P<kind>.+)-(?P<steps>\d+)")  # of a short name with a number of steps
LONGEST_NAME = 100  # characters
LONGEST_TEMPLATES = 100
NO_DEFENCE = "none"


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for, so that nobody waits for him long.

    Args:
        seconds: of the models' time for one click.
        classes: names at once.
        texts: names times prompts.
        steps: of attacks that take a number of them.
        side: of a picture, in pixels.
        megabytes: of a picture's file.
    """

    seconds: float = 60.0
    classes: int = 200
    texts: int = 1000
    steps: int = 100
    side: int = 4096
    megabytes: int = 10

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps, side=self.side, megabytes=self.megabytes)
        check_whole(2, classes=self.classes, texts=self.texts)
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds!r} must be positive.")


def attack_names() -> tuple[str, ...]:
    """All attacks that the command line knows and that can be made without settings: those with a short name, then
    classes. Suites that bring views of their own, for defences alone, are none for two models side by side.
    """
    suites = {name: suite_named(name) for name in short_names()}
    short = [name for name, suite in suites.items() if suite.has_radii]
    known = {type(suite) for suite in suites.values()}
    found = []
    for name, cls in classes_in(ClassFlag(Suite, SUITES)).items():
        if cls not in known and getattr(cls, "about", None) is None and _makes(cls):
            found.append(name)
    return (*short, *found)


def _makes(cls: type) -> bool:
    """Whether a class can be made without settings."""
    try:
        cls()
    except (TypeError, ValueError):
        return False
    return True


def takes_steps(name: str) -> bool:
    """Whether an attack's name ends in its number of steps."""
    return name in short_names() and STEPS.fullmatch(name) is not None


def shown_attack(name: str) -> str:
    """What a page calls an attack whose steps are chosen beside it: pgd-N."""
    return STEPS.sub(r"\g<kind>-N", name) if takes_steps(name) else name


def attack_named(name: str, steps: int, limits: Limits) -> Suite:
    """The attacks of one of `attack_names`.

    Args:
        steps: of those whose names end in it; the others have their own.

    Raises ValueError for another name, and a number that is no whole one of 1 to `limits.steps`.
    """
    if name not in attack_names():
        raise ValueError(f"attack={name!r} is unknown; choose one of {', '.join(attack_names())}.")
    if name not in short_names():
        return classes_in(ClassFlag(Suite, SUITES))[name]()
    match = STEPS.fullmatch(name)
    if match is None:
        return suite_named(name)
    if isinstance(steps, bool) or not isinstance(steps, int | float) or steps != int(steps):
        raise ValueError(f"steps={steps!r} must be a whole number.")
    if not 1 <= steps <= limits.steps:
        raise ValueError(f"steps={steps:g} must be in 1 .. {limits.steps}.")
    return suite_named(f"{match['kind']}-{int(steps)}")


def defences_of(classifier: ZeroShotClassifier, first: dict[str, Defence]) -> dict[str, Defence]:
    """Defences by what the page calls them: given ones, none at all, then all of the package that work in front of
    this classifier by their default settings, without having been fitted.
    """
    found = {**first, NO_DEFENCE: Undefended()}
    with classifier.same_classes_after():
        set_any_classes(classifier)
        for name, cls in defence_classes().items():
            if name not in found and cls.fit is Defence.fit:
                defence = _working(cls, classifier)
                if defence is not None:
                    found[name] = defence
    return found


def set_any_classes(classifier: ZeroShotClassifier) -> None:
    """Two classes, for a look at what a defence needs, where the model came with none."""
    if not classifier.class_names:
        classifier.set_classes(["one class", "another class"], "a photo of a {}.")


def _working(cls: type[Defence], classifier: ZeroShotClassifier) -> Defence | None:
    """A defence by its default settings; None where it needs some, or the classifier lacks what it needs."""
    try:
        defence = cls()
        defence.check(classifier)
    except (TypeError, ValueError, OSError):
        return None
    return defence


def read_classes(text: str, limits: Limits) -> tuple[str, ...]:
    """The class names of a text, separated by commas or line breaks.

    Raises ValueError for fewer than two, two of the same, too many, and one that is too long.
    """
    names = tuple(part.strip() for part in re.split(r"[,\n]", text or "") if part.strip())
    if len(names) < 2:
        given = f"only {names[0]!r}" if names else "no class names"
        raise ValueError(f"there {'is' if names else 'are'} {given}: give two or more, separated by commas.")
    if len(names) > limits.classes:
        raise ValueError(f"{len(names)} class names are too many; give at most {limits.classes}.")
    for name in names:
        if len(name) > LONGEST_NAME:
            raise ValueError(f"the class name {name[:30]!r}... has {len(name)} letters; give at most {LONGEST_NAME}.")
        check_shown(name, "class name")
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other is not name:
            raise ValueError(f"the class name {name!r} is there twice; names must differ.")
    return names


def read_templates(text: str) -> tuple[str, ...]:
    """The prompts of a text, one a line. Raises ValueError for none, too many, and one without {} for the class."""
    templates = tuple(line.strip() for line in (text or "").splitlines() if line.strip())
    if not templates:
        raise ValueError("there is no prompt; give one such as 'a photo of a {}.'.")
    if len(templates) > LONGEST_TEMPLATES:
        raise ValueError(f"{len(templates)} prompts are too many; give at most {LONGEST_TEMPLATES}.")
    for template in templates:
        if len(template) > 5 * LONGEST_NAME:
            raise ValueError(f"the prompt {template[:30]!r}... is too long.")
    return check_classes(("a class",), templates)[1]


def first_templates(*told: Sequence[str], otherwise: str) -> tuple[str, ...]:
    """The first of some lists of templates that isn't empty and takes no descriptions, which nobody types here."""
    return tuple(next((own for own in told if own and not take_descriptions(own)), (otherwise,)))


def read_label(name: str | None, class_names: Sequence[str]) -> int | None:
    """The index of the true class; None where none was chosen. Raises ValueError for one that isn't among them."""
    if not (name or "").strip():
        return None
    folded = [own.casefold() for own in class_names]
    if (name or "").strip().casefold() not in folded:
        raise ValueError(f"the true class {name!r} is none of the class names; choose one of them, or none.")
    return folded.index((name or "").strip().casefold())


def read_radius(levels: float, highest: int) -> float:
    """A radius in units of [0, 1] of one in grey levels. Raises ValueError for one outside of 0 .. `highest`."""
    if isinstance(levels, bool) or not isinstance(levels, int | float) or not 0 <= levels <= highest:
        raise ValueError(f"radius={levels!r} must be a number of grey levels in 0 .. {highest}.")
    return levels / 255


def read_picture(path: str | Path | None, limits: Limits) -> Image.Image:
    """An uploaded picture, in RGB and upright.

    Raises ValueError for none, one that is too large, and a file that is none, cut short or of another kind.
    """
    if path is None:
        raise ValueError("there is no picture; choose an example, or upload one.")
    content = Path(path).read_bytes()
    if len(content) > limits.megabytes * 2**20:
        raise ValueError(f"the file has more than {limits.megabytes} MB; save the picture smaller.")
    try:
        picture = Image.open(BytesIO(content), formats=FORMATS)
        width, height = picture.size
    except Image.DecompressionBombError:
        raise ValueError(f"the picture is too large; give one of at most {limits.side} pixels a side.") from None
    except Exception:  # whatever a decoder brings up on bytes of strangers
        raise ValueError(f"the file is no picture that can be read; give one of {', '.join(FORMATS)}.") from None
    if max(width, height) > limits.side:
        raise ValueError(f"the picture has {width} x {height} pixels; give one of at most {limits.side} a side.")
    if min(width, height) * 50 < max(width, height):
        raise ValueError(f"the picture has {width} x {height} pixels, too long and narrow; crop it.")
    try:
        return to_rgb(picture)
    except Exception as error:
        why = str(error) if isinstance(error, ValueError | OSError) else type(error).__name__
        raise ValueError(f"the picture can't be read ({why.rstrip('.')}); save it as PNG in RGB.") from None
