"""Several processes, one job: each takes its share of the batches, and the sums are added up.

``accelerate launch`` or ``torchrun`` starts them; every process calls the same functions and gets the same adapter.
Each holds the whole model. Sharded models are refused by name.
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
    """Join the other processes, where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState()


def finish() -> None:
    """Part from the other processes, where ``start`` joined them."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def local_rank() -> int:
    """Which of this machine's processes this is, as its launcher says: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count_here() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def share(items: list[T]) -> list[T]:
    """This process's part of a list that all processes have."""
    return items[rank() :: count()]


def add_up(tensor: Tensor) -> None:
    """Replace a tensor, in place, by its sum over processes."""
    if count() == 1:
        return
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":  # a sum kept on the host
        moved = tensor.cuda()
        dist.all_reduce(moved)
        tensor.copy_(moved)
    else:
        dist.all_reduce(tensor)


def from_main(value: T) -> T:
    """What the main process has."""
    if count() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def from_all(value: T) -> list[T]:
    """What each process has, in order."""
    if count() == 1:
        return [value]
    held: list[Any] = [None] * count()
    dist.all_gather_object(held, value)
    return held


@contextmanager
def failing_together() -> Iterator[None]:
    """Where one process runs out of memory or refuses its data within the block, all raise, and none waits for ever."""
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except (PerTAError, torch.OutOfMemoryError) as raised:
        error = raised
    first = next((found for found in from_all(error and (type(error), str(error))) if found), None)
    if error is not None:
        raise error
    if first is not None:
        raise first[0](first[1])


def refuse_sharded(model: nn.Module) -> None:
    """Every process must hold the whole model: a layer's gradient is formed from its own input and output.

    Raises:
        ConfigError: FSDP, tensor parallelism or DeepSpeed ZeRO-3 has cut the weights up; with what to use instead.
    """
    instead = (
        "load the whole model in every process instead (4-bit, or device_map='auto' with CPU offload where it does not "
        "fit) and let accelerate launch split the data"
    )
    names = {type(module).__name__ for module in model.modules()}
    if "DistributedDataParallel" in names:
        raise ConfigError("the model is wrapped in DistributedDataParallel; pass model.module: the data is split here")
    if "FullyShardedDataParallel" in names:
        raise ConfigError(f"the model is sharded by FSDP, whose layers' weights and outputs are not whole; {instead}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConfigError(f"{name} is a DTensor (FSDP2 or tensor parallelism), which is not whole; {instead}")
        if hasattr(parameter, "ds_id"):
            raise ConfigError(f"{name} is partitioned by DeepSpeed ZeRO-3, which is not whole; {instead}")
