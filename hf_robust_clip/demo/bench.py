"""The models of a page, one visitor at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Lock

from ..defences.base import Defence
from ..modeling import ZeroShotClassifier
from .choices import (
    Limits,
    attack_named,
    defences_of,
    read_classes,
    read_label,
    read_picture,
    read_radius,
    read_templates,
)
from .looking import Look, Question, Subject, Turn, look


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for, as typed and chosen: nothing is checked yet.

    Args:
        picture: the path of a file, which the page vouches for.
        class_names: separated by commas or line breaks.
        templates: one a line.
        true_class: a class name; empty for what each model names itself.
        levels: the radius in grey levels of 255.
        steps: of attacks that take a number of them.
        through: whether attacks go through the defence.
    """

    picture: str | None
    class_names: str
    templates: str
    true_class: str
    attack: str
    steps: int
    levels: float
    defence: str
    through: bool


@dataclass
class Bench:
    """Two models with their limits. Classes belong to a request, never to the bench: one request at a time holds the
    models, sets its classes, and leaves the models as they were.

    Args:
        undefended: by name.
        robust: by name; it may be the very same model.
        first_defences: offered before those of the package, by name.
        most_levels: the largest radius, in grey levels.
    """

    undefended: tuple[str, ZeroShotClassifier]
    robust: tuple[str, ZeroShotClassifier]
    first_defences: dict[str, Defence] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    most_levels: int = 64

    def __post_init__(self) -> None:
        for _, classifier in (self.undefended, self.robust):
            classifier.requires_grad_(False).eval()
        self.defences = defences_of(self.robust[1], self.first_defences)
        self._alone = Lock()
        self._turns: dict[str, Event] = {}

    def look(
        self, asked: Asked, visitor: str = "", tell: Callable[[int, str], None] = lambda calls, what: None
    ) -> tuple[Look, Look]:
        """The picture before the undefended model, and before the robust one with its defence.

        Args:
            visitor: whom `stop` names.
            tell: is told how often models were called, and what for.

        Raises ValueError for what can't be, in one sentence; Stopped where the visitor or the clock ended it;
        FloatingPointError for logits that aren't finite.
        """
        limits = self.limits
        class_names, templates = read_classes(asked.class_names, limits), read_templates(asked.templates)
        if len(class_names) * len(templates) > limits.texts:
            told = f"{len(class_names)} class names in {len(templates)} prompts"
            raise ValueError(f"{told} are more than {limits.texts} texts; give fewer of either.")
        question = Question(
            class_names,
            templates,
            attack_named(asked.attack, asked.steps, limits),
            read_radius(asked.levels, self.most_levels),
            bool(asked.through),
            read_label(asked.true_class, class_names),
        )
        if asked.defence not in self.defences:
            raise ValueError(f"defence={asked.defence!r} is unknown; choose one of {', '.join(self.defences)}.")
        picture = read_picture(asked.picture, limits)
        turn = Turn(limits.seconds, self._turns.get(visitor) or self.begin(visitor), tell)
        robust = Subject(*self.robust, self.defences[asked.defence])
        try:
            with self._alone:
                turn.begin()
                return look(Subject(*self.undefended), picture, question, turn), look(robust, picture, question, turn)
        finally:
            with suppress(KeyError):
                if self._turns[visitor] is turn.cancelled:
                    del self._turns[visitor]

    def begin(self, visitor: str) -> Event:
        """Note that a visitor asks for something, which `stop` ends while it waits, too."""
        event = self._turns[visitor] = Event()
        return event

    def stop(self, visitor: str) -> None:
        """End what a visitor asked for, if anything."""
        event = self._turns.get(visitor)
        if event is not None:
            event.set()
