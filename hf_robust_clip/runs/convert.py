"""From weights that somebody else published to a checkpoint of transformers, with a note of where they are from."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig

from ..arguments import ConvertArguments
from ..command_line import CommandLine, read_command
from ..digits_clip import EMBEDDED_MODEL
from ..environment import library_versions
from ..hub import clear_model
from ..modeling import CLIPForZeroShotClassification, adapter_config
from ..modeling.freshness import weights_digest
from ..modeling.layouts import clip_weights, find_weights, likeness
from ..names import cached_revision, hub_name, same_place, shown_folder, shown_name
from ..report.card import LIBRARY, card_state
from ..report.converted import PROVENANCE, make_converted_card
from ..storage import check_writable, read_json, write_text, written_whole
from .convert_choices import Activation, Case, decide_activation, decide_normalisation, own_config, told_beside
from .convert_source import Source, find_source
from .shared import run_command

logger = logging.getLogger(__name__)
COMMAND = CommandLine({"": (ConvertArguments,)}, {}, ("source", "base", "output_dir"))
ABOUT = "Convert weights that somebody else published. SOURCE may stand first, without --source."
UNRELATED = 0.1  # cosine with the base's matrices; a CLIP that was fine-tuned is far above


def main(words: Sequence[str]) -> None:
    """A conversion as a command. A wrong setting ends it with one line and status 2."""
    first = ["--source", *words[:1]] if words and not words[0].startswith("-") else list(words[:1])
    run_command(lambda: read([*first, *words[1:]]), convert_and_tell, lambda folder: "nothing was written.")


def read(words: Sequence[str]) -> ConvertArguments:
    """Check every setting."""
    given = read_command(COMMAND, words, None, ABOUT)
    return given.group(ConvertArguments, given.made())


def convert_and_tell(settings: ConvertArguments) -> None:
    """Convert, and print what was found and decided."""
    folder = convert_checkpoint(**vars(settings))
    told = read_json(folder / PROVENANCE)
    source, normalisation, activation = told["source"], told["normalisation"], told["activation"]
    files = [own["file"] for own in source["files"] if own["file"] != source["name"]]
    print(f"source: {', '.join([source['name'], *files])}: {told['about']}")
    print(f"layout: {told['layout']}; stored as {', '.join(source['dtypes'])}, here float32")
    if activation:
        print(f"activation: {activation['vision']}, text {activation['text']}: {activation['why']}")
    print(f"normalisation: {normalisation['mean']}, {normalisation['std']}: {normalisation['why']}")
    if told.get("template"):
        print(f"prompt: {told['template']!r}, as the texts in the file say")
    elif told["gives"] == "adapter":
        print("prompt: the file doesn't tell with which texts the prompts were learned; evaluate with --template")
    if source["left_out"]:
        print(f"left out: {', '.join(source['left_out'])}")
    print(f"wrote {folder}; nothing was measured: hf-robust-clip evaluate --model_name_or_path {folder} ...")


def convert_checkpoint(
    source: str | Path,
    base: str,
    output_dir: str | Path,
    *,
    source_file: str | None = None,
    source_revision: str | None = None,
    base_revision: str | None = None,
    layout: str | None = None,
    normalisation: str | None = None,
    activation: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert weights in any layout of `modeling.layouts` to a folder that loads as a plain `CLIPModel` with its
    `CLIPProcessor` (or, of prompts, as an adapter), with a card and `provenance.json`. Returns the folder.

    Args:
        source: a file, a folder or a Hub id; `source_file` names the weights in a folder or repository of several.
        base: the CLIP that they were trained from, which gives what they lack, and whose names and sizes they must
            have. What no weights tell comes from it too: number of heads, and, unless it is given or a configuration
            beside the weights says it, activation and normalisation.
        normalisation: clip, imagenet, "mean,std" or "m,m,m;s,s,s", in units of [0, 1].
        activation: quick_gelu or gelu; of an image tower alone it is that of the image tower.
        overwrite: replace a checkpoint that the folder holds.

    Raises ValueError, OSError or UnfitWeights (an OSError) in one line for what can't be converted for sure; nothing
    is written then.
    """
    settings = ConvertArguments(
        str(source), str(base), str(output_dir), source_file, source_revision, base_revision, layout, normalisation,
        activation, overwrite,
    )  # fmt: skip
    folder = Path(settings.output_dir)
    origin = find_source(settings.source, source_file, source_revision)
    check_output(settings, origin)
    found = find_weights(origin.content(), origin.title, layout)
    model = load_base(settings.base, base_revision)
    if found.layout.gives == "adapter":
        return convert_prompts(Case(settings, origin, found, model))
    case = Case(settings, origin, found, model)
    weights = clip_weights(found, model, origin.title)
    check_writable(folder, room=4 * sum(own.numel() for own in model.parameters()))
    alike = likeness(weights, model)
    about = provenance(case)
    config, told = None if found.layout.renamed else own_config(origin), told_beside(case)
    activation_found, normalisation_found = decide_activation(case, config, told), decide_normalisation(case, told)
    if alike < UNRELATED:
        logger.warning(
            "the weights of source=%r have nothing in common with those of base=%r (cosine %.3f): they were not "
            "trained from it, so that its activation and normalisation may not be theirs",
            origin.title, settings.base, alike,
        )  # fmt: skip
    fill(case, weights, config, activation_found)
    model.set_normalisation(normalisation_found.mean, normalisation_found.std)
    about |= {"activation": vars(activation_found), "normalisation": vars(normalisation_found),
              "logit_scale": model.logit_scale.item(), "likeness_to_base": round(alike, 4)}  # fmt: skip
    with written_whole(folder, last="config.json") as draft:
        model.save_pretrained(draft)
        write_notes(draft, about, folder)
        CLIPForZeroShotClassification.from_pretrained(draft)  # what is not whole is an error here
        if overwrite:
            clear_model(folder)
    return folder


def check_output(settings: ConvertArguments, origin: Source) -> None:
    """Raise OSError for an output folder that is a file, holds something, or what is read from."""
    given, folder = settings.output_dir, Path(settings.output_dir)
    if folder.exists() and not folder.is_dir():
        raise OSError(f"output_dir={given!r} is a file; name a folder.")
    for name, place in (("source", origin.place), ("base", settings.base)):
        if Path(place).is_dir() and same_place(given, place):
            raise OSError(f"output_dir={given!r} is the folder of the {name}; name another.")
    if folder.is_dir() and any(folder.iterdir()) and not settings.overwrite:
        raise OSError(f"output_dir={given!r} is not empty; add --overwrite, or name another folder.")
    if card_state(folder / "README.md") == "theirs":
        raise OSError(f"output_dir={given!r} has a README.md of somebody's own; move it, or name another folder.")


def load_base(base: str, revision: str | None) -> CLIPForZeroShotClassification:
    """The base in float32. Raises ValueError for an adapter, OSError as `from_pretrained` does."""
    if adapter_config(base, revision) is not None:
        raise ValueError(f"base={base!r} is an adapter; name the whole CLIP that the weights were trained from.")
    return CLIPForZeroShotClassification.from_pretrained(base, revision=revision or "main").float().eval()


def fill(case: Case, weights: Mapping[str, Tensor], config: CLIPConfig | None, activation: Activation) -> None:
    """Put weights and configuration into the base, which is only written then: its modules keep their activation."""
    model = case.model
    own = copy.deepcopy(config if config is not None and case.whole else model.config)
    if config is not None:
        own.vision_config = copy.deepcopy(config.vision_config)
    own.vision_config.hidden_act, own.text_config.hidden_act = activation.vision, activation.text
    own.dtype = own.vision_config.dtype = own.text_config.dtype = model.dtype
    model.load_state_dict(dict(weights), strict=False)
    model.config = own


def provenance(case: Case) -> dict[str, Any]:
    """Where a checkpoint is from, in JSON types, without paths of this disk."""
    settings, origin, found = case.settings, case.origin, case.found
    versions = library_versions()
    floats = [own for own in found.tensors.values() if own.is_floating_point()]
    return {
        "source": {
            "name": shown_name(origin.title),
            "commit": origin.commit or cached_revision(origin.place),
            "files": origin.digests(),
            "place": list(found.place),
            "left_out": list(found.left_out),
            "dtypes": sorted({str(own.dtype).removeprefix("torch.") for own in floats}),
        },
        "layout": found.layout.name,
        "about": found.layout.about,
        "gives": found.layout.gives,
        "base": {
            "name": shown_name(settings.base),
            "published": hub_name(settings.base) is not None,
            "commit": case.model.config._commit_hash or cached_revision(settings.base),
            "weights": weights_digest(case.model),
        },
        "activation": None,
        "versions": {name: versions[name] for name in (LIBRARY, "torch", "transformers")},
    }


def convert_prompts(case: Case) -> Path:
    """Write an adapter of the prompts that a trainer on Dassl learned. Raises ValueError for an activation, which is
    the base's.
    """
    from ..modeling.prompt_learners import prompt_learner_adapter, trained_template
    from ..training.checkpoints import save_adapter

    settings = case.settings
    if settings.activation is not None:
        raise ValueError(f"activation={settings.activation!r} does nothing for prompts: it is the base's.")
    folder, about, chosen = Path(settings.output_dir), provenance(case), decide_normalisation(case, None)
    case.model.set_normalisation(chosen.mean, chosen.std)
    template = trained_template(case.found.tensors, case.model)
    adapted = prompt_learner_adapter(case.found.tensors, case.model)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path, config.revision = _lasting(settings.base), settings.base_revision
    check_writable(folder)
    with written_whole(folder, last="adapter_config.json") as draft:
        save_adapter(adapted, draft)
        write_notes(draft, about | {"normalisation": vars(chosen), "template": template}, folder)
        if settings.overwrite:
            clear_model(folder)
    return folder


def write_notes(draft: Path, about: Mapping[str, Any], folder: Path) -> None:
    """Write provenance and card."""
    write_text(draft / PROVENANCE, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    write_text(draft / "README.md", str(make_converted_card(about, shown_folder(str(folder)))))


def _lasting(base: str) -> str:
    """A base by a name that means the same from another folder: a relative one might be taken for the Hub's."""
    return str(Path(base).resolve()) if base != EMBEDDED_MODEL and Path(base).is_dir() else base
