"""Processes that were launched together: how they join, what runs, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Processes: TypeAlias = "Accelerator | PartialState | None"  # None: this one alone
Found = TypeVar("Found")
TIMEOUT = 1800  # seconds, as the Trainer's `ddp_timeout`
ALONE = "ACCELERATE_USE_CPU"  # what `accelerate launch` sets where it starts one process, however many are asked for
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def join_processes(cpu: bool, timeout: int = TIMEOUT, backend: str | None = None) -> PartialState:
    """The processes that were launched together.

    Where they are on several machines, a line says what is waited for, and for how long.

    Args:
        timeout: seconds until a process that doesn't come, or doesn't answer later, is an error.
        backend: of torch.distributed; None takes that of the device.

    Raises ValueError if fewer joined than were launched, as accelerate does it on the CPU, and for a launch file that
    asks for what isn't supported; OSError if not all joined in time.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils.environment import get_cpu_distributed_information

    for variable, name in UNSUPPORTED.items():
        if _is_set(variable):
            raise ValueError(f"the launch file asks for {name}, which is not supported; use DDP.")
    about = get_cpu_distributed_information()  # by the variables of torchrun and of MPI
    launched, joined = about.world_size, torch.distributed.is_available() and torch.distributed.is_initialized()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if launched > about.local_world_size and not joined and about.local_rank == 0:
        print(f"waiting for all {launched} processes to join at {place}, at most {timeout} s", flush=True)
    try:
        cpu = cpu or _is_set("ACCELERATE_USE_CPU")
        processes = PartialState(cpu=cpu, timeout=timedelta(seconds=timeout), backend=backend)
    except RuntimeError as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"not all of {launched} processes joined at {place} within {timeout} s ({reason[0]}); start every "
            "machine, and let it reach this address."
        ) from error
    asked_for_several = ALONE in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if processes.num_processes != launched or (asked_for_several and launched == 1):
        raise ValueError(
            f"{'several' if asked_for_several else launched} processes were launched, but {processes.num_processes} "
            "joined: each would work alone. Use one of the accelerate configs in recipes/accelerate, which say how."
        )
    return processes


def leave_processes() -> None:
    """Ends what joined these processes, without waiting for any of them.

    A process that ends without it may abort: gloo's threads can hold Python objects when the interpreter is gone.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def what_runs(processes: PartialState) -> str:
    """How many processes run on which device."""
    if processes.num_processes == 1:
        return f"one process on {processes.device.type}"
    from torch.distributed import get_backend

    return f"{processes.num_processes} processes on {processes.device.type} ({get_backend()})"


def everyone(value: Found, processes: Processes) -> list[Found]:
    """What each process holds, in their order, on every one of them."""
    if processes is None or processes.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def together(check: Callable[[], Found], processes: Processes) -> Found:
    """What a check gives here. Raises on every process what it raises on the first that fails, so that none waits for
    another that is gone.
    """
    if processes is None or processes.num_processes == 1:
        return check()
    found: Found | None = None
    error: Exception | None = None
    try:
        found = check()
    except (OSError, ValueError, TypeError) as raised:
        error = raised
    kinds = (OSError, TypeError, ValueError)
    told = None if error is None else ([isinstance(error, kind) for kind in kinds].index(True), str(error))
    for rank, other in enumerate(everyone(told, processes)):
        if other is not None:
            raise kinds[other[0]](f"process {rank}: {other[1]}") from error
    return found  # type: ignore[return-value]  # it was found, since nothing was raised


def check_agreed(told: Mapping[str, Any], processes: Processes) -> None:
    """Raise ValueError on every process, naming the first entry that differs, unless all of them tell the same: each
    would work on something else, and what they find together would be of neither.
    """
    first, *others = everyone(dict(told), processes)
    for rank, other in enumerate(others, start=1):
        for name in dict.fromkeys([*first, *other]):
            if (here := first.get(name)) != (there := other.get(name)):
                raise ValueError(
                    f"process {rank} was started with another {name} than process 0: {there!r}, not {here!r}."
                )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
