"""Loading that gives the saved model or an error: every weight in its place, adapters whole, the right family."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import cached_file, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from ..normalisation import agree_on_normalisation, has_adapter, without_normalisation
from ..pictures import normalisation_of
from ..storage import read_json
from .untrusted import ADAPTER, ADAPTER_CONFIG, NO_CODE, WHOLE, check_adapter_file, present

T = TypeVar("T")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
REFUSED_TYPES = {
    "clip_vision_model": "the image tower of a CLIP alone; give a whole CLIPModel",
    "clip_text_model": "the text tower of a CLIP alone; give a whole CLIPModel",
    "siglip_vision_model": "the image tower of a SigLIP alone; give a whole SiglipModel",
    "siglip_text_model": "the text tower of a SigLIP alone; give a whole SiglipModel",
    "siglip2": "a SigLIP2 of variable resolution (naflex), which takes patches in place of images; give one of fixed "
    "resolution, such as google/siglip2-base-patch16-224",
}
FAMILY_CLASSES = {"clip": ("CLIPModel", "CLIPForZeroShotClassification"),
                  "siglip": ("SiglipModel", "SiglipForZeroShotClassification")}  # fmt: skip
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
         "num_channels", "vocab_size", "max_position_embeddings", "projection_dim", "projection_size")  # fmt: skip
LAYERS = 1000  # of a tower at most


class UnfitWeights(OSError):
    """Weights that are damaged, or don't fit the model that they are loaded into."""


def adapter_config(
    name: str | Path, revision: str | None = None, where: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """What `adapter_config.json` says, if a folder or Hub repository holds a PEFT adapter and no whole model.

    Raises ValueError for a folder that holds the weights of a model and an adapter: nobody can tell which is meant.
    """
    folder = Path(name)
    if (folder / "config.json").is_file() and not (folder / "adaptation.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{str(name)!r} holds a whole model and an adapter ({ADAPTER_CONFIG}); move one away.")
        return None
    try:
        file = find_adapter_config_file(str(name), **{**(where or {}), "revision": revision})
    except OSError:
        return None
    found = None if file is None else read_json(file)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{ADAPTER_CONFIG} of {str(name)!r} holds no settings; save the adapter again.")
    return found


def base_of(name: str | Path, adapter: Mapping[str, Any], where: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Name and revision of the model that an adapter stands on, by its `adapter_config.json`.

    Raises OSError where it names none, or an adapter, such as itself.
    """
    base, revision = adapter.get("base_model_name_or_path"), adapter.get("revision") or "main"
    if not base or not isinstance(base, str) or not isinstance(revision, str):
        raise OSError(f"the adapter {str(name)!r} doesn't name its base model; load that and PeftModel on it.")
    elsewhere = {key: value for key, value in (where or {}).items() if key not in ("revision", "subfolder")}
    if adapter_config(base, revision, elsewhere) is not None:
        raise OSError(f"the adapter {str(name)!r} names {base!r} as its base model, an adapter; correct its settings.")
    return base, revision


def read_config(source: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of a checkpoint says. Raises OSError with the mend if there is none, or it can't be read."""
    config = explained(source, lambda: PretrainedConfig.get_config_dict(source, **where))[0]
    if not isinstance(config, dict):
        raise OSError(f"config.json of {source!r} holds no settings; save it with save_pretrained.")
    return config


def check_family(source: str, family: str, config: Mapping[str, Any]) -> None:
    """Raise OSError unless a checkpoint is of the family (a `model_type`)."""
    found = config.get("model_type")
    if not isinstance(found, str | None):
        raise OSError(f"model_type={found!r} in config.json of {source!r} is no text; save it with save_pretrained.")
    if found in REFUSED_TYPES:
        raise OSError(f"{source!r} is {REFUSED_TYPES[found]}.")
    if found is not None and found != family:
        raise OSError(f"{source!r} is a model of the family {found!r}, not {family!r}, and can't be loaded as one.")


def check_adapter_family(classifier: Any, source: str, where: Mapping[str, Any]) -> None:
    """Raise OSError for an adapter that says that it was made for another family: its tensors may fit all the same."""
    file = present(source, ADAPTER_CONFIG, where)
    settings = None if file is None else read_json(file)
    made_for = (settings.get("auto_mapping") or {}) if isinstance(settings, dict) else {}
    name = made_for.get("base_model_class") if isinstance(made_for, dict) else None
    family = next((family for family, classes in FAMILY_CLASSES.items() if name in classes), None)
    if family not in (None, classifier.config.model_type):
        raise OSError(f"the adapter {source!r} was made for a {name}, not for a {type(classifier).__name__}.")


def commit_of(source: str, where: Mapping[str, Any]) -> str | None:
    """The commit of the Hub from which a checkpoint was read; None for a folder."""
    if Path(source).is_dir():
        return None
    return extract_commit_hash(cached_file(source, "config.json", **where), None)


def check_tower_sizes(source: str, config: Any, where: Mapping[str, Any]) -> None:
    """Raise OSError for sizes in a configuration that are no whole numbers above 0, and where the matrices that
    it asks for have more values than its files have bytes: to build them would take minutes, or all memory.
    """
    asked = 0
    for part in (config, config.vision_config, config.text_config):
        for name in SIZES:
            value = getattr(part, name, 1)
            if not isinstance(value, int) or value < 1:
                raise OSError(f"{name}={value!r} in config.json of {source!r} must be a whole number above 0.")
    for tower in (config.vision_config, config.text_config):
        if tower.num_hidden_layers > LAYERS:
            raise OSError(
                f"num_hidden_layers={tower.num_hidden_layers}, config.json of {source!r}, is above {LAYERS}."
            )
        width = tower.hidden_size
        projected = getattr(config, "projection_dim", getattr(tower, "projection_size", 0))
        rows = tower.num_hidden_layers * (4 * width + 2 * tower.intermediate_size) + projected
        if hasattr(tower, "patch_size"):
            rows += (tower.image_size // tower.patch_size) ** 2 + tower.num_channels * tower.patch_size**2
        else:
            rows += tower.vocab_size + tower.max_position_embeddings
        asked += rows * width
    files = weight_files(source, where)
    there = sum(file.stat().st_size for file in files)
    if files and asked > there:
        raise OSError(f"config.json of {source!r} asks for {asked:,} weights, its files have {there:,} bytes.")


def check_stored(source: str, where: Mapping[str, Any]) -> None:
    """Raise OSError for weights that are stored as whole numbers or truth values: they were other ones once."""
    from safetensors import safe_open

    def kinds(file: Path) -> dict[str, str]:
        with safe_open(file, "pt") as weights:
            return {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118

    for file in weight_files(source, where):
        for name, kind in explained(source, lambda file=file: kinds(file)).items():  # type: ignore[misc]
            if not kind.startswith(("F", "BF")) and not name.endswith("position_ids"):
                raise OSError(f"{name} in {source!r} is stored as {kind}, not as floats; convert the weights anew.")


def weight_files(source: str, where: Mapping[str, Any]) -> list[Path]:
    """The safetensors files of a folder; of a repository the one that holds all weights, if one does."""
    if Path(source).is_dir():
        return sorted(Path(source, where.get("subfolder") or "").glob("*.safetensors"))
    return [file for file in (present(source, name, where) for name in (WHOLE, ADAPTER)) if file]


def check_loaded(source: str, info: Mapping[str, Any], what: str = "the model", mend: str | None = None) -> None:
    """Raise UnfitWeights for weights that are missing, unknown, or of another shape: the model would have random ones
    in their place, or lack layers.

    Args:
        mend: what to do, where it isn't to load them as another kind of model.
    """
    mismatched = [f"{key} {tuple(there)} for {tuple(here)}" for key, there, here in info.get("mismatched_keys", ())]
    unexpected = [key for key in info.get("unexpected_keys", ()) if not key.endswith("position_ids")]
    problems = {
        "lack": sorted(info.get("missing_keys", ())),
        "hold, unknown to it,": sorted(unexpected),
        "have in another shape": sorted(mismatched),
    }
    found = [f"{verb} {_first(keys)}" for verb, keys in problems.items() if keys]
    if found:
        prefixed = any(key.startswith("module.") for key in unexpected)
        usual = "take the prefix 'module.' off" if prefixed else "load them as the kind of model that wrote them"
        told = f"they {', and '.join(found)}; {mend or usual}."
        raise UnfitWeights(f"the weights in {source!r} don't fit {what}: {told}")


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@contextmanager
def quiet_report() -> Iterator[None]:
    """Without the table that transformers logs of weights that don't fit: `check_loaded` says it in one line."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "integrations.peft")]

    def errors_alone(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for logger in loggers:
        logger.addFilter(errors_alone)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(errors_alone)


def with_adapter(base: nn.Module, folder: str | Path, **where: Any) -> nn.Module:
    """A classifier with a saved adapter in it, by PEFT: every tensor of the file in its place, and every place filled.

    The normalisation of a processor that lies beside the adapter is given to the classifier.

    Args:
        where: `revision`, `token`, `cache_dir`, `local_files_only`, for an adapter on the Hub.

    Raises OSError if the file doesn't fit the adapter that its configuration describes.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    source, options = str(folder), {name: value for name, value in where.items() if value is not None}
    check_adapter_file(source, options)
    alone = not has_adapter(base)

    def load() -> tuple[Any, set[str]]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            return PeftModel.from_pretrained(base, source, **options), set(load_peft_weights(source, **options))

    check_stored(source, options)
    check_adapter_family(base, source, options)
    model, given = explained(source, load)
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    unknown = without_normalisation(given - expected)
    check_loaded(source, {"missing_keys": expected - given, "unexpected_keys": unknown}, "the adapter")
    core = model.get_base_model()
    take_normalisation(core, source, options, alone)
    return core


def take_normalisation(classifier: Any, source: str, where: Mapping[str, Any], alone: bool) -> None:
    """Give a classifier the normalisation of the processor that lies beside its adapter, if one does.

    Args:
        alone: whether the model has no other adapter; else ValueError is raised for another normalisation.
    """
    from transformers import AutoImageProcessor

    if any(present(source, name, where) for name in PROCESSOR_FILES):
        processor = explained(source, lambda: AutoImageProcessor.from_pretrained(source, **where, **NO_CODE))
        agree_on_normalisation(classifier, *normalisation_of(processor), alone)


def check_whole_adapters(module: nn.Module, state_dict: dict, prefix: str, *rest: Any) -> None:
    """Let `load_state_dict` fail for an adapter of which some tensors are there and some are not: the others would
    keep their random values, whichever library loads it.
    """
    error_msgs: list[str] = rest[-1]
    by_adapter: dict[str, list[str]] = {}
    for name, layer in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(layer, BaseTunerLayer):
            for own, parameter in layer.named_parameters(prefix=name):
                parts = own.removeprefix(f"{name}.").split(".")
                if parts[0] in layer.adapter_layer_names and len(parts) > 1 and parameter.numel():
                    by_adapter.setdefault(parts[1], []).append(own)
    for adapter, names in by_adapter.items():
        missing = [name for name in names if name not in state_dict]
        if missing and len(missing) < len(names):
            error_msgs.append(f"the weights of adapter {adapter!r} lack {_first(sorted(missing))}.")


def readable(source: str, load: Callable[[], T]) -> T:
    """Run a loader; turn what it raises about damaged weights, or those of another model, into one UnfitWeights."""
    from safetensors import SafetensorError

    try:
        return load()
    except SafetensorError as error:
        raise UnfitWeights(f"the weights in {source!r} are cut short or damaged ({error}).") from error
    except (OSError, ValueError, TypeError):
        raise
    except ImportError as error:
        raise UnfitWeights(
            f"can't load {source!r} without a library; install it: {' '.join(str(error).split())}"
        ) from error
    except Exception as error:  # whatever a file that is damaged, or of another kind, brings up
        lines = [line.strip() for line in str(error).splitlines()] or [""]
        if "Error(s) in loading state_dict" in lines[0]:
            raise UnfitWeights(f"the weights in {source!r} don't fit the model: {lines[1]}") from error
        raise UnfitWeights(
            f"can't load {source!r}: its files are damaged, of another kind, or too large for the memory "
            f"({type(error).__name__}: {' '.join(lines):.200})"
        ) from error


def explained(source: str, load: Callable[[], T]) -> T:
    """`readable`, where what else is raised about a missing or damaged checkpoint names the mend."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    folder = Path(source).is_dir()
    try:
        return readable(source, load)
    except UnfitWeights:
        raise
    except (OSError, ValueError, TypeError) as error:
        if folder:
            mend = "the folder lacks a readable config, weights or processor; save it with save_pretrained."
        elif HF_HUB_OFFLINE:
            mend = (
                "no such folder, and the Hub is switched off (HF_HUB_OFFLINE=1): give a folder, or unset the variable."
            )
        else:
            mend = "no such folder, and the Hub could not give it: check the name, the connection and your token."
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"can't load {source!r}: {mend} ({reason:.200})") from error
