"""What no file of weights tells of a CLIP, and who says it: activation, and mean and std of the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPProcessor

from ..arguments import ConvertArguments
from ..modeling import CLIPForZeroShotClassification
from ..modeling.checkpoints import PROCESSOR_FILES, check_family, check_tower_sizes, explained
from ..modeling.layouts import FoundWeights
from ..modeling.open_clip_config import NAME as OPEN_CLIP
from ..modeling.open_clip_config import OpenClipConfig, read_open_clip_config
from ..modeling.untrusted import NO_CODE, check_config
from ..pictures import normalisation_of
from .convert_source import Source

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
DEFAULT = "quick_gelu"  # of transformers, where a config.json says nothing
EXACT = 1e-4  # means and standard deviations are published with 3 digits or more


@dataclass(frozen=True)
class Case:
    """What is converted.

    Args:
        settings: what was asked for.
        origin: where the weights lie.
        found: the weights.
        model: the base.
    """

    settings: ConvertArguments
    origin: Source
    found: FoundWeights
    model: CLIPForZeroShotClassification

    @property
    def whole(self) -> bool:
        """Whether the file has both towers."""
        return self.found.layout.gives == "whole"


@dataclass(frozen=True)
class Activation:
    """What the towers compute with, and who says so."""

    vision: str
    text: str
    why: str


@dataclass(frozen=True)
class Normalisation:
    """Mean and std in units of [0, 1], and who says so."""

    mean: list[float]
    std: list[float]
    why: str


def own_config(origin: Source) -> CLIPConfig | None:
    """The configuration beside weights of transformers; None if there is none. Raises OSError for one that the loader
    would refuse.
    """
    content = origin.clip_config()
    if content is None:
        return None
    check_family(origin.title, CLIPConfig.model_type, content)
    check_config(origin.title, content, {})
    config = explained(origin.title, lambda: CLIPConfig.from_pretrained(origin.place, **origin.where))
    check_tower_sizes(origin.title, config, origin.where)
    return config


def told_beside(case: Case) -> OpenClipConfig | None:
    """What `open_clip_config.json` beside weights in OpenAI's names says; None if there is none."""
    file = case.origin.beside(OPEN_CLIP) if case.found.layout.renamed else None
    return None if file is None else read_open_clip_config(file, case.model.config)


def decide_activation(case: Case, config: CLIPConfig | None, told: OpenClipConfig | None) -> Activation:
    """The activation of both towers: what was given, else what the base's config says; that of a text tower that the
    base gives is the base's own. Weights of transformers have it in their config.

    Raises ValueError where a config beside the weights and the base, or the flag, say otherwise.
    """
    asked, of_base = case.settings.activation, case.model.config
    base = of_base.vision_config.hidden_act, of_base.text_config.hidden_act
    if config is not None:
        return _of_own_config(case, base)
    if asked is not None:
        return Activation(asked, asked if case.whole else base[1], "as it was given by --activation")
    if told is not None and {told.activation} != set(base if case.whole else base[:1]):
        raise ValueError(
            f"activation: {OPEN_CLIP} of source={case.origin.title!r} means {told.activation}, the config of "
            f"base={case.settings.base!r} {base[0]}, text {base[1]}; give --activation."
        )
    also = f" and {OPEN_CLIP} beside the weights say" if told else " says"
    return Activation(*base, f"as the base's config{also}; the weights themselves don't tell")


def _of_own_config(case: Case, base: tuple[str, str]) -> Activation:
    """The activations that config.json beside weights of transformers says. Where it leaves one out, transformers
    takes quick_gelu: so it must be the base's too, or given.
    """
    content, asked, title = case.origin.clip_config() or {}, case.settings.activation, case.origin.title
    found, left_out = list(base), False
    for number, part in enumerate(("vision_config", "text_config")[: 2 if case.whole else 1]):
        said = (content.get(part) or content.get(f"{part}_dict") or {}).get("hidden_act")
        left_out = left_out or said is None
        if said is not None and asked not in (None, said):
            raise ValueError(
                f"activation={asked!r} is against {part} in config.json of source={title!r} ({said}); correct that "
                "file where it is wrong."
            )
        found[number] = said or asked or DEFAULT
        if said is None and asked is None and base[number] != DEFAULT:
            raise ValueError(
                f"activation: {part} in config.json of source={title!r} leaves it out, which means {DEFAULT}, and "
                f"base={case.settings.base!r} has {base[number]}; give --activation."
            )
    why = "as config.json of the source says"
    if left_out:
        why += ", and where it says nothing " + ("as it was given by --activation" if asked else "as the base does")
    return Activation(found[0], found[1], why)


def decide_normalisation(case: Case, told: OpenClipConfig | None) -> Normalisation:
    """Mean and std: those that were given, else those of a processor beside weights of transformers, which becomes the
    model's, else those of the base's processor.

    Raises ValueError where what lies beside the weights says otherwise.
    """
    asked, own = case.settings.mean_and_std(), not case.found.layout.renamed and take_processor(case)
    mean, std = (list(values) for values in normalisation_of(case.model.require_processor().image_processor))
    said = (told.mean, told.std) if told else (mean, std) if own else None
    there = [] if said is None or None in said else [*said[0], *said[1]]  # type: ignore[misc]
    if asked is not None:
        return Normalisation(*asked, f"as it was given by --normalisation {case.settings.normalisation}")
    if there and not _alike(there, [*mean, *std]):
        raise ValueError(
            f"normalisation: {OPEN_CLIP} of source={case.origin.title!r} has mean and std {there}, the processor of "
            f"base={case.settings.base!r} {[*mean, *std]}; give --normalisation."
        )
    if own:
        return Normalisation(mean, std, "as the source's own processor says")
    also = f" and {OPEN_CLIP} beside the weights say" if there else " says"
    return Normalisation(mean, std, f"as the base's processor{also}")


def _alike(first: list[float], second: list[float]) -> bool:
    return len(first) == len(second) and all(abs(a - b) <= EXACT for a, b in zip(first, second, strict=True))


def take_processor(case: Case) -> bool:
    """Give the model the image processor and the tokenizer that lie beside weights of transformers; whether there was
    an image processor.
    """
    origin, processor = case.origin, case.model.require_processor()
    images, tokenizer = processor.image_processor, processor.tokenizer
    own_images = any(origin.beside(name) for name in PROCESSOR_FILES)
    where: dict[str, Any] = {**origin.where, **NO_CODE}
    if own_images:
        images = explained(origin.title, lambda: AutoImageProcessor.from_pretrained(origin.place, **where))
    if any(origin.beside(name) for name in TOKENIZER_FILES):
        tokenizer = explained(origin.title, lambda: AutoTokenizer.from_pretrained(origin.place, **where))
    case.model.set_processor(CLIPProcessor(images, tokenizer))
    return own_images
