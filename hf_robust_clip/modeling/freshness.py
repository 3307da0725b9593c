"""Whether what was computed from a part of a model still holds: an exact key of its tensors and its settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from operator import is_
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

KNOWN = ("torch.nn.modules.", "transformers.models.clip.", "transformers.models.siglip.",
         "transformers.activations", "peft.tuners.lora.",
         "peft.utils.other", "hf_robust_clip.")  # fmt: skip
PIECE = 2**25  # bytes away from the CPU that are hashed together; three times as many are taken for it
_ROW = 2048  # words whose weighted sums are taken together
_SETTINGS = frozenset({bool, int, float, str})
_PARTS = ("_parameters", "_buffers", "_modules")


def module_key(modules: Iterable[nn.Module], tensors: Sequence[Tensor]) -> tuple | None:
    """Equal for two moments only if modules compute the same of the same input; None if that can't be told.

    It holds the content of the tensors, bit for bit, so that no way of writing into them goes unnoticed, and every
    plain setting of each module (scales and active adapters of LoRA among them). It can't be told of modules with
    hooks or a replaced `forward`, with dropout in training, and of kinds whose state isn't all in tensors and plain
    settings (quantised ones, say).
    """
    settings: list[Any] = []
    for module in modules:
        own = vars(module)
        unclear = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
        if unclear or not type(module).__module__.startswith(KNOWN) or _drops(module):
            return None
        settings.append(type(module))
        settings.append(tuple(_settings(own)))
    return tuple(settings), content_key(tensors)


def _settings(own: dict[str, Any]) -> Iterator[Any]:
    """Names and values of a module's settings, and the names of its parts."""
    for name, value in own.items():
        if type(value) in _SETTINGS:
            if name != "training":
                yield name
                yield value
        elif value is None or (isinstance(value, dict) and not value):
            continue
        elif name in _PARTS:
            yield name
            yield tuple(value)
        elif plain := _plain(value):
            yield name
            yield plain


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


class SameParts:
    """Whether modules have the very parameters and submodules that they had when this was made: told in microseconds,
    but blind to what is written into them.

    Args:
        modules: with all that is in them.
        further: what else must be the same objects.
    """

    def __init__(self, modules: Sequence[nn.Module], further: Iterable[Any]):
        inside = [part for module in modules for part in module.modules()]
        self._tables = [table for module in inside for table in (module._modules, module._parameters)]
        self._parts = self._now(further)

    def _now(self, further: Iterable[Any]) -> list[Any]:
        return [*further, *(part for table in self._tables for part in table.values())]

    def hold(self, further: Iterable[Any]) -> bool:
        """Whether they do, and `further` are those of then."""
        now = self._now(further)
        return len(now) == len(self._parts) and all(map(is_, now, self._parts))


@torch.no_grad()
def content_key(tensors: Sequence[Tensor]) -> tuple:
    """Shapes, types and content of tensors, in their order: 128 bits of those on the CPU, 64 of each `PIECE` of those
    on another device.
    """
    here = xxhash.xxh3_128()
    away: dict[torch.device, list[Tensor]] = {}
    shapes = []
    for tensor in tensors:
        shapes.append((tuple(tensor.shape), tensor.dtype, tensor.device))
        if tensor.is_meta or not tensor.numel():
            continue
        if tensor.device.type == "cpu":
            here.update(as_bytes(tensor).numpy().data)
        else:
            away.setdefault(tensor.device, []).append(tensor)
    return tuple(shapes), here.digest(), tuple(tuple(device_keys(own).tolist()) for own in away.values())


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of all of a model's own weights, to the precision of bfloat16, which a cast to another
    type leaves alone. What adapters add doesn't count.
    """
    found = xxhash.xxh3_64()
    for name, value in sorted(model.named_parameters()):
        if not any(part in name for part in ("clip_prompt_", "lora_", ".modules_to_save.")):
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            found.update(f"{plain} {tuple(value.shape)}".encode())
            found.update(as_bytes(value.bfloat16().cpu()).numpy().data)
    return found.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The content of a tensor as a row of bytes, not copied where it is contiguous; under `torch.no_grad`."""
    return tensor.reshape(-1).view(torch.uint8)


@torch.no_grad()
def device_keys(tensors: Iterable[Tensor]) -> Tensor:
    """Whole numbers, int64, one for each piece of tensors on one device, computed there in few operations: one of them
    changes with every bit and with its place.

    Of a piece, the sum over its 32-bit words v_ij, in rows of 2048, of r_i * c_j * v_ij with odd r and c, in whole
    numbers that wrap around at 64 bits.
    """
    found = []
    weights: Tensor | None = None
    for parts in _pieces(as_bytes(tensor) for tensor in tensors):
        missing = -sum(map(len, parts)) % (4 * _ROW)
        words = torch.cat([*parts, parts[0].new_zeros(missing)]).view(torch.int32).view(-1, _ROW)
        if weights is None:
            weights = _odd(_ROW + PIECE // (4 * _ROW), words.device)
        rows = (words * weights[:_ROW]).sum(dim=1)
        found.append((rows * weights[_ROW : _ROW + len(rows)]).sum())
    return torch.stack(found)


def _pieces(rows: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Rows of bytes one after another, as pieces of `PIECE` bytes each, the last of what is left."""
    parts: list[Tensor] = []
    room = PIECE
    for row in rows:
        while len(row) > room:
            yield [*parts, row[:room]]
            row, parts, room = row[room:], [], PIECE
        parts.append(row)
        room -= len(row)
    if parts:
        yield parts


def _odd(count: int, device: torch.device) -> Tensor:
    """Odd whole numbers that look random, (count,), always the same."""
    value = torch.arange(count, device=device, dtype=torch.int64)
    value = (value ^ (value >> 16)) * 0x21F0AAAD + 0x735A2D97
    return (value ^ (value >> 15)) * 0x2127599BF4325C37 | 1
