"""A classifier with its test-time defence: one model to call, save, load and push."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..digits_clip import EMBEDDED_MODEL, digits_clip_path
from ..hub import Push, check_base, check_folder, prepare_repository, upload
from ..modeling import (
    DESCRIPTION,
    PAPER_TEMPLATE,
    AutoModelForZeroShotClassification,
    ZeroShotClassifier,
    ZeroShotOutput,
    base_of,
    with_adapter,
)
from ..modeling.freshness import weights_digest
from ..names import hub_name, shown_name
from ..prompts.access import active_adapter, classes_with_prompts, prompts_of
from ..report.card import CardInfo, make_unmeasured_card
from ..secrets import without_tokens
from ..storage import read_json, write_text, written_whole
from . import defence_class, defence_key
from .base import Defence, Prediction

logger = logging.getLogger(__name__)
SETTINGS, PROMPTS = "adaptation.json", "adapter_model.safetensors"
FORMAT = 1
FILES = (SETTINGS, PROMPTS, "adapter_config.json", "config.json", "README.md")


class DefendedClassifier(nn.Module):
    """A `ZeroShotClassifier` (with prompts in it, where the method tunes some) behind a test-time defence.

        model = DefendedClassifier.from_pretrained(folder)      # or TAPT.from_pretrained(folder)
        logits = model(pixel_values).logits                     # defended; pixel_values: (B, 3, H, W) in [0, 1]

    Saved are the prompts (a PEFT adapter), the statistics and the settings, not the base model, whose name is kept.

    Args:
        classifier: with its classes set, or a `PeftModel` around one.
        adapter: the defence.
        seed: of all that the defence draws.
        base_model: Hub id or folder of the checkpoint that the prompts stand on; None takes what the prompts, or the
            classifier, were loaded from.

    Raises TypeError for another kind of model or adapter.
    """

    def __init__(
        self,
        classifier: ZeroShotClassifier | PeftModel,
        adapter: Defence,
        *,
        seed: int = 0,
        base_model: str | None = None,
    ):
        super().__init__()
        core = classifier.get_base_model() if isinstance(classifier, PeftModel) else classifier
        if not isinstance(core, ZeroShotClassifier):
            raise TypeError(f"classifier is a {type(core).__name__}; give one of AutoModelForZeroShotClassification.")
        if not isinstance(adapter, Defence):
            raise TypeError(f"adapter is a {type(adapter).__name__}; give a test-time defence, such as TAPT().")
        self.classifier, self.adapter, self.seed = core, adapter, seed
        self.base_model = base_model

    def forward(self, pixel_values: Tensor) -> ZeroShotOutput:
        """The defended logits. Images and errors are those of `Defence.predict`."""
        return ZeroShotOutput(logits=self.predict(pixel_values).logits)

    def predict(self, images_BCHW: Tensor) -> Prediction:
        """All that the defence makes of a batch, detached: logits, tuned prompts, kept views."""
        return self.adapter.predict(self.classifier, images_BCHW, seed=self.seed)

    def set_classes(
        self,
        class_names: Sequence[str],
        template: str | Sequence[str] | None = None,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Choose the classes; see `ZeroShotClassifier.set_classes`."""
        self.classifier.set_classes(class_names, template, descriptions)

    @property
    def config(self) -> Any:
        """The base model's."""
        return self.classifier.config

    @property
    def device(self) -> torch.device:
        """Where the classifier is."""
        return self.classifier.device

    @property
    def dtype(self) -> torch.dtype:
        """In what it computes."""
        return self.classifier.dtype

    @property
    def processor(self) -> Any:
        """The base model's. Raises ValueError if it has none."""
        return self.classifier.require_processor()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write prompts (`adapter_*`), what was fitted (files of its own) and `adaptation.json`, whole or not at all.


        Other files in the folder stay. Raises ValueError for a defence whose class can't be found again, and a base
        model that has no name or other weights than the classifier: weights aren't saved here.
        """
        folder = Path(folder)
        base, revision = self._base()
        self._check_weights(base, revision)
        own = {field.name for field in fields(self.adapter)}
        settings = {
            "format": FORMAT,
            "method": defence_key(self.adapter),
            "parameters": {name: value for name, value in self.adapter.parameters().items() if name in own},
            "fitted": {name: part.file for name, part in sorted(self.adapter.fitted.items())},
            "prompts": bool(getattr(self.classifier, "peft_config", None)),
            "seed": self.seed,
            "base_model": base,
            "base_revision": revision,
            "class_names": list(self.classifier.class_names),
            "templates": list(self.classifier.templates),
            **({"descriptions": self.classifier.descriptions} if self.classifier.descriptions else {}),
            "input_size": self.classifier.input_size,
            "image_mean": self.classifier.image_mean.flatten().tolist(),
            "image_std": self.classifier.image_std.flatten().tolist(),
            "hf_robust_clip": version("hf_robust_clip"),
        }
        with written_whole(folder, SETTINGS) as draft:
            self._save_prompts(draft, base, revision)
            for part in self.adapter.fitted.values():
                part.save(draft)
            if base == EMBEDDED_MODEL:  # `transformers.pipeline` asks for a config before it asks us
                self.config.__class__.from_dict({**self.config.to_dict(), "architectures": None}).save_pretrained(
                    draft
                )
            write_text(draft / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def _check_weights(self, base: str, revision: str | None) -> None:
        """Raise ValueError unless the classifier's weights, adapters aside, are those of the base model."""
        try:
            there = AutoModelForZeroShotClassification.from_pretrained(base, revision=revision or "main")
        except OSError as error:
            logger.warning("nobody could look whether the weights are those of the base model: %s", error)
            return
        if weights_digest(there) != weights_digest(self.classifier):
            raise ValueError(f"the classifier's weights are not those of base_model={base!r}; save and name them.")

    def _save_prompts(self, folder: Path, base: str, revision: str | None) -> None:
        configs = getattr(self.classifier, "peft_config", {})
        if not configs:
            return
        if not prompts_of(self.classifier):
            raise ValueError("the classifier has an adapter without prompts; merge_and_unload() it first.")
        active = active_adapter(self.classifier)
        state = get_peft_model_state_dict(self.classifier, adapter_name=active, save_embedding_layers=False)
        state = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(state, folder / PROMPTS, metadata={"format": "pt"})
        config = configs[active].from_peft_type(**configs[active].to_dict())
        config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
        config.save_pretrained(folder)

    def _base(self) -> tuple[str, str | None]:
        """Name and revision of the base model."""
        configs = getattr(self.classifier, "peft_config", {})
        config = configs[active_adapter(self.classifier)] if configs and prompts_of(self.classifier) else None
        name = self.base_model or getattr(config, "base_model_name_or_path", None) or self.classifier.name_or_path
        if not name:
            raise ValueError("nobody knows the base model's name; give base_model=<Hub id or folder>.")
        return EMBEDDED_MODEL if str(name) == digits_clip_path() else str(name), getattr(config, "revision", None)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        method: type[Defence] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
    ) -> DefendedClassifier:
        """Restore prompts, statistics and settings on their base model, in eval mode, with the classes of the saved.

        Args:
            name: a folder, or an id on the Hub.
            method: refuse every other method.
            revision, token, cache_dir, local_files_only: as everywhere on the Hub. The base model has a revision of
                its own.
            dtype: of the weights; None takes that of the checkpoint.

        Raises OSError if files can't be found or are damaged; ValueError for a folder that holds no defence or another
        one, and for statistics that don't belong to the model.
        """
        where = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = _fetched(str(name), FILES, revision, where)
        settings = read_settings(folder, str(name))
        adapter_cls = defence_class(settings["method"])
        if method is not None and adapter_cls is not method:
            raise ValueError(f"{str(name)!r} holds a defence by {adapter_cls.__name__}, not by {method.__name__}.")
        learned = adapter_cls.learns()
        parts = {part: kind for part, kind in learned.items() if part in settings["fitted"]}
        if parts:
            folder = _fetched(str(name), [*FILES, *(kind.file for kind in parts.values())], revision, where)
        needed = [kind.file for kind in parts.values()]
        needed += [PROMPTS, "adapter_config.json"] if settings["prompts"] else []
        for file in needed:
            if not (folder / file).is_file():
                raise OSError(f"{str(name)!r} has no {file}, which the defence needs; save it again.")
        found = {part: kind.load(folder) for part, kind in parts.items()}
        plain = {key: value for key, value in settings["parameters"].items() if key not in learned}
        adapter = adapter_from(adapter_cls, {**plain, **found})
        named = {"base_model_name_or_path": settings["base_model"], "revision": settings["base_revision"]}
        base, base_revision = base_of(name, named, where)
        classifier = AutoModelForZeroShotClassification.from_pretrained(
            base, **{**where, "revision": base_revision}, **({} if dtype is None else {"dtype": dtype})
        )
        if settings["prompts"]:
            classifier = with_adapter(classifier, folder)
        if "image_mean" in settings:
            classifier.set_normalisation(settings["image_mean"], settings["image_std"])
        classifier.requires_grad_(False).eval().set_input_size(settings["input_size"])
        for part in found.values():
            part.check(classifier)
        if settings["class_names"]:
            classifier.set_classes(settings["class_names"], settings["templates"], settings.get("descriptions"))
        return cls(classifier, adapter, seed=settings["seed"], base_model=base).eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
        """Upload what `save_pretrained` writes, with a short card; returns the address.

        The card holds no figures: one with figures is made by `recipes/tapt.py`, and pushed with `--push_to_hub`.
        Raises ValueError for a base model that others can't load, OSError if the Hub can't be written to.
        """
        check_base(self._base()[0], "the defence")
        push = prepare_repository(Push(repo_id, token, private), "defence", "repo_id")
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary)
            write_text(Path(temporary) / "README.md", str(self.card(push.repo_id)))
            check_folder(temporary)
            return without_tokens(str(upload(temporary, push, "Upload defended CLIP").repo_url))

    def card(self, repo_id: str) -> ModelCard:
        """A card that says what the repository holds and how to load it, and that nothing was measured."""
        settings, told = self.adapter.parameters(), self.classifier.templates or (PAPER_TEMPLATE,)
        for kind in self.adapter.learns().values():
            record = settings.get(name := Path(kind.file).stem)
            if record and {"num_images", "dataset"} <= set(record):
                settings[name] = f"{record['num_images']} images of {shown_name(record['dataset'])}"
        if classes_with_prompts(self.classifier) is not None:
            settings["units"] = "class-wise"
        info = CardInfo(
            repo_id=repo_id,
            base_model=hub_name(self._base()[0]) or "",
            training_data="",
            paper=self.adapter.paper,
            settings=settings,
            template=next((t for t in told if DESCRIPTION in t), told[0]),
            class_names=self.classifier.class_names or ("cat", "dog"),
            limits="",
            family=self.config.model_type,
            described=bool(self.classifier.descriptions),
        )
        return make_unmeasured_card(info, "defence")


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """What `adaptation.json` says. Raises ValueError, naming the mend, if it is missing or not ours."""
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{name!r} has no {SETTINGS}, hence no defence; save one, for TAPT.from_pretrained, say.")
    settings = read_json(folder / SETTINGS)
    known = ("format", "method", "parameters", "fitted", "prompts", "seed", "base_model", "base_revision",
             "class_names", "templates", "input_size")  # fmt: skip
    missing = [key for key in known if not isinstance(settings, dict) or key not in settings]
    if missing or settings["format"] != FORMAT:
        what = (
            f"lacks {missing[0]!r}" if missing else f"has format {settings['format']!r}, this version reads {FORMAT}"
        )
        raise ValueError(f"{SETTINGS} of {name!r} {what}; save it again, or take the version that wrote it.")
    for key in ("parameters", "fitted"):
        if not isinstance(settings[key], dict):
            raise ValueError(f"{key}={settings[key]!r} in {SETTINGS} of {name!r} must be a dict.")
    if not isinstance(settings["seed"], int):
        raise ValueError(f"seed={settings['seed']!r} in {SETTINGS} of {name!r} must be a whole number.")
    return settings


def adapter_from(adapter_cls: type[Defence], values: Mapping[str, Any]) -> Defence:
    """An adapter of plain values, as `parameters()` gives them. Raises ValueError for a name it doesn't have."""
    known = {field.name: field for field in fields(adapter_cls) if field.init}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{adapter_cls.__name__} has no setting {unknown[0]!r}; it has {', '.join(known)}.")
    built = {}
    for name, value in values.items():
        make = known[name].default_factory
        if isinstance(value, Mapping) and isinstance(make, type) and is_dataclass(make):  # such as RandomResizedCrop
            value = make(**{key: tuple(v) if isinstance(v, list) else v for key, v in value.items()})
        built[name] = value
    return adapter_cls(**built)


def _fetched(name: str, files: Sequence[str], revision: str | None, where: Mapping[str, Any]) -> Path:
    """The folder itself, or a copy of what the Hub has. Raises OSError if neither is there."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), **where))
    except (OSError, ValueError) as error:
        raise OSError(
            f"can't load {name!r}: no such folder, and the Hub could not give it: check the name, the connection and "
            f"your token. ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
