"""What the speed benchmarks share: clocks, memory, operations, time in a card's kernels, and figures as JSON."""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import __version__ as transformers_version

from hf_robust_clip.storage import write_text

GIB = 2**30
PEAK_TFLOPS = 989  # of dense matrix products in bfloat16, H100 SXM
PROFILED_CALLS = 3
ENOUGH = 0.8  # of the time in kernels: below it, the processor that launches them is what is waited for
PRODUCTS = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|wgmma|fmha|flash|attention|conv", re.IGNORECASE)


def exact_dtype(device: str) -> torch.dtype:
    """What the ways are compared in: float64 on a card, whose convolutions round float32 to ten bits."""
    return torch.float64 if device == "cuda" else torch.float32


def timed(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall and processor time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def resident_peak() -> int:
    """This process's highest resident size in bytes. On Linux `ru_maxrss` would begin at the peak of the parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- a card


class _Operations(TorchDispatchMode):
    """Adds up what torch's formulas say of each operation."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count_operations(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of one call, backward included:
    a multiplication and an addition are two. Compiled code isn't counted.
    """
    with _Operations() as counter:
        function()
    return counter.total


def profiler() -> torch.profiler.profile:
    """One that sees a card's kernels alone, which slows them least."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def kernels_seen(record: torch.profiler.profile, calls: int) -> dict[str, float]:
    """Seconds of a call in which the card computes or copies, and the share of it that is products and attention.

    Raises RuntimeError if the profiler saw no kernels.
    """
    events = [
        event for event in record.events() or []
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip
    if not events:
        raise RuntimeError("the profiler saw no kernels.")
    busy, until = 0.0, -float("inf")
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    lengths = [(event.time_range.end - event.time_range.start, event.name) for event in events]
    products = sum(length for length, name in lengths if PRODUCTS.search(name))
    return {
        "kernels_s": busy / 1e6 / calls,
        "products_of_kernels": products / max(sum(length for length, _ in lengths), 1e-9),
    }


def on_card(
    function: Callable[[], object], count: int, repeats: int, *, warm_ups: int = 2, operations: int | None = None
) -> dict[str, float]:
    """Of one way, alone on the card: median seconds of a call after warm-ups, images (or else) per second of `count`
    in a call, the peak of the memory that tensors had, TFLOP/s, and the share of the time in kernels.

    Args:
        operations: of a call; None counts them.
    """
    for _ in range(warm_ups):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    walls = [timed(function, "cuda")[0] for _ in range(repeats)]
    peak, wall = torch.cuda.max_memory_allocated(), statistics.median(walls)
    found = {"wall_s": wall, "lowest_s": min(walls), "highest_s": max(walls), "per_s": count / wall}
    found["peak_gib"] = peak / GIB
    operations = count_operations(function) if operations is None else operations
    return found | {"operations": operations} | used(operations, wall) | kernels_of(function, wall)


def used(operations: float, wall: float) -> dict[str, float]:
    """TFLOP/s, and their share of the peak."""
    tflops = operations / wall / 1e12
    return {"tflops": tflops, "share_of_peak": tflops / PEAK_TFLOPS}


def kernels_of(function: Callable[[], object], wall: float | None = None, calls: int = PROFILED_CALLS
) -> dict[str, Any]:  # fmt: skip
    """`kernels_seen` and its share of a call's wall time without a profiler, which None measures; what hinders the
    profiler is told.
    """
    found: dict[str, Any] = {}
    reason: dict[str, Any] = {}
    with told_if_failed("time in kernels", reason):
        with profiler() as record:
            timed(lambda: [function() for _ in range(calls)], "cuda")
        found = dict(kernels_seen(record, calls))
        found["kernel_share"] = min(1.0, found["kernels_s"] / (wall or timed(function, "cuda")[0]))
    return found if not reason else {"kernels_error": reason["error"]}


def card_told(found: dict[str, Any], unit: str) -> str:
    """What `on_card` found, in a line."""
    return (
        f"{1000 * found['wall_s']:.1f} ms ({1000 * found['lowest_s']:.1f} .. {1000 * found['highest_s']:.1f}), "
        f"{found['per_s']:.0f} {unit}, peak {found['peak_gib']:.1f} GiB, {use_told(found)}"
    )


def use_told(found: dict[str, Any]) -> str:
    """How the card was used, and what is waited for."""
    line = f"{found['tflops']:.0f} TFLOP/s = {found['share_of_peak']:.1%} of the bf16 peak"
    if "kernel_share" not in found:
        return line
    bound = "launches or the processor" if found["kernel_share"] < ENOUGH else "kernels"
    products = f"{found['products_of_kernels']:.0%} of them products and attention"
    return f"{line}, {found['kernel_share']:.0%} of the time in kernels ({products}): bound by {bound}"


def clear_card() -> None:
    """Give back what a way left: models hold cycles."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def told_if_failed(what: str, figures: dict[str, Any]) -> Iterator[None]:
    """A way that fails on a card, by want of memory or otherwise, is told in one line and leaves the others alone."""
    try:
        yield
    except Exception as error:  # of torch.compile there is no common class
        message = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]
        figures["error"] = message
        print(f"{what}: {message}", flush=True)


# ---- figures


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option `--output`."""
    parser.add_argument("--output", type=Path, help="JSON file of the figures, written anew after each way")


def about(file: str, args: argparse.Namespace) -> dict[str, Any]:
    """Where something was measured, and with which settings."""
    cuda = args.device == "cuda"
    place = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    settings = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float | list)}
    found = {"script": Path(file).stem, "place": place, "torch": torch.__version__}
    found |= {"transformers": transformers_version, "settings": settings}
    return found | ({"float32": float32_told()} if cuda else {})


def float32_told() -> str:
    """How a card multiplies float32."""
    convolutions = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
    products = {"highest": "float32", "high": "TF32", "medium": "bfloat16"}[torch.get_float32_matmul_precision()]
    return f"products in {products}, convolutions in {convolutions}"


def keep(file: str, args: argparse.Namespace, figures: dict[str, Any], *, complete: bool = False) -> str:
    """What was measured so far, where, and with which settings, as a line of JSON; written where --output says."""
    line = json.dumps(about(file, args) | {"complete": complete, "figures": figures})
    if getattr(args, "output", None):
        write_text(args.output, line + "\n")
    return line


def print_figures(file: str, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """One line of JSON, the last that a script prints."""
    print(keep(file, args, figures, complete=True), flush=True)
