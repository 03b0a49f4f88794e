"""Data parallelism: each process handles its share of the batches, and their sums are added up.

``accelerate launch`` or ``torchrun`` starts the processes. All call the same functions and get the same adapter. Each
holds the whole model; sharded models are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, PerTAError

T = TypeVar("T")


def start() -> None:
    """Join the process group, if a launcher started several processes.

    Raises:
        ConfigError: a variable that launchers set is no number.
    """
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        _of_launcher(name, 0)
    if _of_launcher("WORLD_SIZE", 1) > 1:
        PartialState()


def _of_launcher(name: str, default: int) -> int:
    """A variable that accelerate and torchrun set."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(
            f"the environment variable {name} is {value!r}, expected a number as accelerate and torchrun set it; unset "
            "it to run one process"
        )
    return int(value)


def finish() -> None:
    """Wait for the other processes and leave the process group, if ``start`` joined one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def local_rank() -> int:
    """The index of this process among those on its machine, and of its GPU."""
    return _of_launcher("LOCAL_RANK", 0)


def count_here() -> int:
    """The number of processes on this machine."""
    return _of_launcher("LOCAL_WORLD_SIZE", 1) if count() > 1 else 1


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this process among all."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process of rank 0, which writes and prints."""
    return rank() == 0


def share(items: list[T]) -> list[T]:
    """This process's share of a list that all processes hold."""
    return items[rank() :: count()]


def add_up(tensor: Tensor) -> None:
    """Replace a tensor, in place, by its sum over all processes."""
    if count() == 1:
        return
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":  # NCCL cannot sum on the host
        on_gpu = tensor.cuda()
        dist.all_reduce(on_gpu)
        tensor.copy_(on_gpu)
    else:
        dist.all_reduce(tensor)


def from_main(value: T) -> T:
    """The main process's value, in every process."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """If one process raises within the block, all raise at its end, so that none waits for it forever.

    This covers running out of memory and every error of this package.
    """
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except (PerTAError, torch.OutOfMemoryError) as raised:
        error = raised
    failures = [failure for failure in from_all(error and (type(error), str(error))) if failure]
    if error is not None:
        raise error
    if failures:
        error_type, message = failures[0]
        raise error_type(message)


def refuse_sharded(model: nn.Module) -> None:
    """Check that this process holds the whole model: a layer's gradient is computed from its full input and output.

    Raises:
        ConfigError: the model is sharded by FSDP, tensor parallelism or DeepSpeed ZeRO-3, or wrapped for data
            parallelism.
    """
    instead = (
        "load the whole model in every process instead (in 4-bit, or with device_map='auto' and CPU offload if it does "
        "not fit) and let accelerate launch split the data"
    )
    names = {type(module).__name__ for module in model.modules()}
    if "DistributedDataParallel" in names:
        raise ConfigError(
            "the model is wrapped in DistributedDataParallel, expected the bare model: peft_perta splits the data "
            "itself; pass model.module"
        )
    if "FullyShardedDataParallel" in names:
        raise ConfigError(f"the model is sharded by FSDP, expected a model with whole weights and outputs; {instead}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConfigError(
                f"{name} is a DTensor (FSDP2 or tensor parallelism), expected a whole parameter; {instead}"
            )
        if hasattr(parameter, "ds_id"):
            raise ConfigError(f"{name} is partitioned by DeepSpeed ZeRO-3, expected a whole parameter; {instead}")
