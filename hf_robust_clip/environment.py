"""Where something was measured: libraries and hardware."""

from __future__ import annotations

import logging
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

logger = logging.getLogger(__name__)


def library_versions() -> dict[str, str]:
    """The installed versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("hf_robust_clip", "torch", "transformers", "accelerate", "peft", "datasets", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def same_libraries() -> dict[str, str]:
    """The versions that processes on several machines must share, since a report names one of each: not Python's."""
    return {name: own for name, own in library_versions().items() if name != "python"}


def hardware() -> str:
    """The accelerator's name, or the processor with its number of threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return f"CPU {processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device (`"cpu"`, `"cuda"`) is about as fast in bfloat16 as in float32. A processor without
    AVX-512 or other instructions for it is not: of matrix products it makes a sixtieth, and training takes ten times
    as long.
    """
    import torch

    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not there in builds without oneDNN
    return device != "cpu" or asked is None or bool(asked())


@cache
def tell_float32(asked: str) -> None:
    """Say once that a setting asked for bfloat16 and got float32."""
    logger.warning("%s is float32 here: this processor has no instructions for bfloat16.", asked)
