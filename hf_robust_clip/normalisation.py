"""Mean and std of an adapter that was trained under others than those of its base model: they travel with its weights.

The configuration of prompts has fields for them. Other adapters (LoRA) carry them as two more tensors of their file,
which PEFT hands to `load_state_dict` with the rest, and as the image processor beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .pictures import normalisation_of

logger = logging.getLogger(__name__)
TENSORS = ("image_mean", "image_std")
PEFT_PREFIX = "base_model.model."


def agree_on_normalisation(classifier: Any, mean: Sequence[float], std: Sequence[float], alone: bool) -> None:
    """Give a classifier the mean and std that an adapter was trained with, unless they are its own.

    Args:
        alone: whether the model has no other adapter.

    Raises ValueError where other adapters in the model were trained with another normalisation.
    """
    here = [list(values) for values in normalisation_of(classifier.require_processor().image_processor)]
    there = [list(mean), list(std)]
    if torch.allclose(torch.tensor(there), torch.tensor(here), rtol=0, atol=1e-6):
        return
    if not alone:
        raise ValueError(f"the adapter has mean and std {there}, the others {here}; give it a model of its own.")
    logger.warning("mean and std of the model become those that its adapter was trained with, %s", there)
    classifier.set_normalisation(*there)


def carry_normalisation(classifier: Any, file: Path) -> None:
    """Put mean and std into the weights of an adapter, where they are others than the base model's."""
    from safetensors.torch import load_file, save_file

    if classifier.has_own_normalisation() and file.is_file():
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in classifier.normalisation)
        own = {f"{PEFT_PREFIX}{name}": values for name, values in zip(TENSORS, (mean, std), strict=True)}
        save_file({**load_file(file), **own}, file, metadata={"format": "pt"})


def adopt_normalisation(classifier: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Take mean and std from the weights of an adapter that is being loaded by `load_state_dict`."""
    found = [state_dict.pop(f"{prefix}{name}", None) for name in TENSORS]
    if all(values is not None for values in found):
        try:
            mean, std = (values.tolist() for values in found)
            agree_on_normalisation(classifier, mean, std, alone=not _others(classifier, state_dict, prefix))
        except ValueError as error:
            rest[-1].append(str(error))


def without_normalisation(keys: Sequence[str] | set[str]) -> set[str]:
    """The names of an adapter's tensors without those of mean and std."""
    return {key for key in keys if key.removeprefix(PEFT_PREFIX) not in TENSORS}


def has_adapter(model: nn.Module) -> bool:
    """Whether a PEFT method has put layers into a model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _others(classifier: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether the model has adapters of which nothing is being loaded."""
    for name, layer in classifier.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for own, _ in layer.named_parameters(prefix=name):
                of_adapter = own.removeprefix(f"{name}.").split(".")[0] in layer.adapter_layer_names
                if of_adapter and f"{prefix}{own}" not in state_dict:
                    return True
    return False
