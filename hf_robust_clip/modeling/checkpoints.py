"""Loading that gives the saved model or an error: every weight in its place, adapters whole, the right family."""

from __future__ import annotations

import json
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

from ..pictures import normalisation_of
from .normalisation import agree_on_normalisation, has_adapter, without_normalisation
from .untrusted import NO_CODE, check_adapter_file, present

T = TypeVar("T")
ADAPTER_CONFIG, PROCESSOR_FILES = "adapter_config.json", ("processor_config.json", "preprocessor_config.json")
TOWERS = {"clip_vision_model": "image", "clip_text_model": "text"}


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
            raise ValueError(
                f"{str(name)!r} holds a whole model and an adapter ({ADAPTER_CONFIG}); move one of them elsewhere."
            )
        return None
    try:
        file = find_adapter_config_file(str(name), **{**(where or {}), "revision": revision})
    except OSError:
        return None
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def read_config(source: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of a checkpoint says. Raises OSError with the mend if there is none, or it can't be read."""
    return explained(source, lambda: PretrainedConfig.get_config_dict(source, **where))[0]


def check_family(source: str, family: str, config: Mapping[str, Any]) -> None:
    """Raise OSError unless a checkpoint is of the family (a `model_type`)."""
    found = config.get("model_type")
    if found in TOWERS:
        raise OSError(
            f"{source!r} is the {TOWERS[found]} tower of a CLIP alone; give a whole CLIPModel, with both towers."
        )
    if found is not None and found != family:
        raise OSError(f"{source!r} is a model of the family {found!r}, not {family!r}, and can't be loaded as one.")


def commit_of(source: str, where: Mapping[str, Any]) -> str | None:
    """The commit of the Hub from which a checkpoint was read; None for a folder."""
    if Path(source).is_dir():
        return None
    return extract_commit_hash(cached_file(source, "config.json", **where), None)


def check_loaded(source: str, info: Mapping[str, Any], what: str = "the model") -> None:
    """Raise UnfitWeights for weights that are missing, unknown, or of another shape: the model would have random ones
    in their place, or lack layers.
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
        prefixed = [key for key in unexpected if key.startswith("module.")]
        mend = "take the prefix 'module.' off" if prefixed else "load them as the kind of model that wrote them"
        raise UnfitWeights(f"the weights in {source!r} don't fit {what}: they {', and '.join(found)}; {mend}.")


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

    model, given = readable(source, load)
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
        raise UnfitWeights(
            f"the weights in {source!r} are cut short or damaged ({error}); copy or download them again."
        ) from error
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        reason = str(error).splitlines()[1].strip()
        raise UnfitWeights(f"the weights in {source!r} don't fit the model: {reason}") from error


def explained(source: str, load: Callable[[], T]) -> T:
    """`readable`, where what else is raised about a missing or damaged checkpoint names the mend."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    folder = Path(source).is_dir()
    try:
        return readable(source, load)
    except UnfitWeights:
        raise
    except (OSError, ValueError) as error:
        if folder:
            mend = "the folder lacks a readable config, weights or processor; save it with save_pretrained."
        elif HF_HUB_OFFLINE:
            mend = (
                "no such folder, and the Hub is switched off (HF_HUB_OFFLINE=1): give a folder, or unset the variable."
            )
        else:
            mend = "no such folder, and the Hub could not give it: check the name, the connection and your token."
        raise OSError(
            f"can't load {source!r}: {mend} ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
