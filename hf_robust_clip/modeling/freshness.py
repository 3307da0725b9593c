"""Whether what was computed from a part of a model still holds: an exact key of its tensors and its settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

KNOWN = ("torch.nn.modules.", "transformers.models.clip.", "transformers.models.siglip.",
         "transformers.activations", "peft.tuners.lora.",
         "peft.utils.other", "hf_robust_clip.")  # fmt: skip
_ROW = 2048  # values whose weighted sums are taken together


def module_key(modules: Iterable[nn.Module], tensors: Sequence[Tensor]) -> tuple | None:
    """Equal for two moments only if modules compute the same of the same input; None if that can't be told.

    It holds the content of the tensors, bit for bit, so that no way of writing into them goes unnoticed, and every
    plain setting of each module (scales and active adapters of LoRA among them). It can't be told of modules with
    hooks or a replaced `forward`, with dropout in training, and of kinds whose state isn't all in tensors and plain
    settings (quantised ones, say).
    """
    settings = []
    for module in modules:
        own = vars(module)
        unclear = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
        if unclear or not type(module).__module__.startswith(KNOWN) or _drops(module):
            return None
        plain = ((name, _plain(value)) for name, value in own.items() if name != "training")
        settings.append((type(module), tuple((name, value) for name, value in plain if value)))
    return tuple(settings), content_key(tensors)


def _drops(module: nn.Module) -> bool:
    if not module.training:
        return False
    rate = getattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0)
    return isinstance(rate, float) and rate > 0


def _plain(value: Any) -> tuple:
    """A setting as something to compare; empty for what is none (modules, tensors, configurations)."""
    if isinstance(value, bool | int | float | str | type | torch.dtype | torch.device | Enum):
        return (value,)
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    return ()


def content_key(tensors: Sequence[Tensor]) -> tuple:
    """Shapes, types and content of tensors, in their order: 128 bits for those on the CPU, 64 each elsewhere."""
    here = xxhash.xxh3_128()
    away: dict[torch.device, list[Tensor]] = {}
    shapes = []
    for tensor in tensors:
        tensor = tensor.detach()
        shapes.append((tuple(tensor.shape), tensor.dtype, tensor.device))
        if tensor.is_meta or not tensor.numel():
            continue
        if tensor.device.type == "cpu":
            here.update(as_bytes(tensor).numpy().data)
        else:
            away.setdefault(tensor.device, []).append(device_key(tensor))
    return tuple(shapes), here.digest(), tuple(tuple(torch.stack(keys).tolist()) for keys in away.values())


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of all of a model's own weights, to the precision of bfloat16, which a cast to another
    type leaves alone. What adapters add doesn't count.
    """
    found = xxhash.xxh3_64()
    for name, value in sorted(model.named_parameters()):
        if not any(part in name for part in ("clip_prompt_", "lora_", ".modules_to_save.")):
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            found.update(f"{plain} {tuple(value.shape)}".encode())
            found.update(as_bytes(value.detach().bfloat16().cpu()).numpy().data)
    return found.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The content of a tensor as a row of bytes, not copied where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def device_key(tensor: Tensor) -> Tensor:
    """A whole number that changes with every value and its place, computed where the tensor is: sums with odd weights,
    in whole numbers that wrap around.
    """
    values = as_bytes(tensor)
    values = nn.functional.pad(values, (0, -len(values) % (8 * _ROW))).view(torch.int64).view(-1, _ROW)
    rows = (values * _odd(_ROW, values.device)).sum(dim=1)
    return (rows * _odd(len(rows), values.device)).sum()


def _odd(count: int, device: torch.device) -> Tensor:
    """Odd whole numbers that look random, (count,), always the same."""
    value = torch.arange(count, device=device, dtype=torch.int64)
    value = (value ^ (value >> 16)) * 0x21F0AAAD + 0x735A2D97
    return (value ^ (value >> 15)) * 0x2127599BF4325C37 | 1
