"""Data parallelism: each process handles its share of the batches, and their sums are added up.

``accelerate launch`` or ``torchrun`` starts the processes. All call the same functions and get the same adapter. Each
holds the whole model, or its shard of a model that FSDP2 shards. FSDP2 gathers the weights of a block while the block
runs, which needs all processes: they run the same number of batches, and an error of one is agreed on between passes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
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


def share(items: list[T], model: nn.Module) -> tuple[list[T], list[T]]:
    """This process's share of a list that all processes hold, and fillers, to be run on the model and dropped.

    A model that FSDP2 shards runs in all processes or in none: its fillers make all shares equally long.
    """
    own = items[rank() :: count()]
    missing = math.ceil(len(items) / count()) - len(own) if is_sharded(model) else 0
    return own, items[:1] * missing


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
def failing_together(model: nn.Module | None = None) -> Iterator[None]:
    """If one process raises within the block, all raise at its end, so that none waits for it forever.

    This covers every error of this package, and running out of memory, but for a sharded model: within its pass the
    other processes wait for this one's weights, and cannot be told. It raises alone, and the launcher ends them.

    Args:
        model: the model that runs forward or backward in the block, if one does.
    """
    if count() == 1:
        yield
        return
    error: Exception | None = None
    agreed: tuple[type[Exception], ...] = (PerTAError,)
    if model is None or not is_sharded(model):
        agreed += (torch.OutOfMemoryError,)
    try:
        yield
    except agreed as raised:
        error = raised
    failures = [failure for failure in from_all(error and (type(error), str(error))) if failure]
    if error is not None:
        raise error
    if failures:
        error_type, message = failures[0]
        raise error_type(message)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free what FSDP2 has gathered: after a forward pass without a backward pass, that is the root module's weights."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a parameter that may be sharded; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refuse_sharded(model: nn.Module) -> None:
    """Check that this process holds the whole model.

    Raises:
        ConfigError: the model is sharded, or wrapped for data parallelism.
    """
    check_sharding(model)
    if is_sharded(model):
        raise ConfigError(f"the model is sharded by FSDP2, expected whole weights; {_INSTEAD}")


def check_sharding(model: nn.Module) -> None:
    """Check that every block of the model computes its full output: that it is whole, or sharded by FSDP2.

    Raises:
        ConfigError: the model is sharded by FSDP1, tensor parallelism or DeepSpeed ZeRO-3, by FSDP2 over fewer than all
            processes or in 8 bits, or wrapped for data parallelism.
    """
    names = {type(module).__name__ for module in model.modules()}
    if "DistributedDataParallel" in names:
        raise ConfigError(
            "the model is wrapped in DistributedDataParallel, expected the bare model: peft_perta splits the data "
            "itself; pass model.module"
        )
    if "FullyShardedDataParallel" in names:
        raise ConfigError(
            "the model is sharded by FSDP1, expected FSDP2 (fully_shard, or fsdp_version=2 of accelerate) or a whole "
            f"model; {_INSTEAD}"
        )
    by_fsdp2 = is_sharded(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and not (by_fsdp2 and parameter.device_mesh.shape == (count(),)):
            raise ConfigError(
                f"{name} is a DTensor on a mesh of {tuple(parameter.device_mesh.shape)} processes (tensor parallelism "
                f"or hybrid sharding), expected one that FSDP2 shards over all processes, or a whole parameter; "
                f"{_INSTEAD}"
            )
        if isinstance(parameter, DTensor) and parameter.dtype == torch.int8:
            raise ConfigError(
                f"{name} is an 8-bit weight that FSDP2 shards, without its scales; load the base in 4-bit or in a "
                "floating-point type"
            )
        if hasattr(parameter, "ds_id"):
            raise ConfigError(f"{name} is partitioned by DeepSpeed ZeRO-3, expected a whole parameter; {_INSTEAD}")


_INSTEAD = (
    "load the whole model in every process instead (in 4-bit, or with device_map='auto' and CPU offload if it does not "
    "fit) and let accelerate launch split the data"
)
