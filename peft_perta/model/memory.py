"""Memory budgets, and how much memory is in use. A pool is a GPU ('cuda:0'), the host ('cpu') or the disk."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from ..errors import ConfigError

HOST, DISK = "cpu", "disk"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DEFAULT_SHARE = 0.9  # of the free memory; the rest is for fragmentation and other processes


def parse_size(size: int | str) -> int:
    """The number of bytes that 10_000_000_000, '10GB' (powers of ten) or '10GiB' (powers of two) stands for.

    Raises:
        ConfigError: the size has another form, or is below 1 byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", str(size).strip().upper())
    unit = _UNITS.get(match.group(2) or "B") if match and not isinstance(size, float) else None
    count = float(match.group(1)) * unit if match and unit else 0.0
    if not 1 <= count < math.inf:
        raise ConfigError(f"expected a size such as '10GiB', '10GB' or a number of bytes, found {size!r}")
    return int(count)


def show_size(size: float) -> str:
    """A number of bytes as text, such as '1.5 GiB' or '12 MiB'."""
    for unit in ("GiB", "MiB", "KiB"):
        count = size / _UNITS[unit.upper()]
        if abs(count) >= 1:
            return f"{count:.3g} {unit}" if abs(count) < 999.5 else f"{count:.0f} {unit}"
    return f"{size:.0f} B"


def taken(pool: str) -> int:
    """Bytes of a pool that this process uses now: by tensors on a GPU, by everything on the host."""
    if pool == DISK:
        return 0
    return psutil.Process().memory_info().rss if pool == HOST else torch.cuda.memory_allocated(pool)


@dataclass
class Peak:
    """The most memory in use during a block.

    Attributes:
        bytes: filled in when the block ends.
    """

    bytes: int = 0


@contextmanager
def peak_memory(pool: str, interval: float = 0.02) -> Iterator[Peak]:
    """Measure the most bytes of a pool that this process uses within the block, the model included.

    A GPU's allocator keeps the exact peak; that of the host is read every ``interval`` seconds.
    """
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak.bytes = max(peak.bytes, taken(pool))

    if pool != HOST:
        torch.cuda.reset_peak_memory_stats(pool)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(pool)
        return
    peak.bytes = taken(pool)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.bytes = max(peak.bytes, taken(pool))


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device; of the host for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def budgets(
    devices: Iterable[str], max_memory: int | str | None, host_memory: int | str | None, sharing: int = 1
) -> dict[str, int]:
    """The most bytes of each pool that this process may use at its peak, the model included.

    The default is nine tenths of the sum of what is free and what this process already uses.

    Args:
        devices: the devices in use, such as 'cuda:0' or 'cpu'.
        max_memory: the budget of each GPU; None for the default.
        host_memory: the budget of the host; None for the default.
        sharing: how many processes on this machine share what is free of the host and of the disk.

    Raises:
        ConfigError: a size cannot be parsed.
    """
    pools = {}
    for device in devices:
        if device == HOST:
            continue
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        pools[device] = parse_size(max_memory) if max_memory is not None else int(_DEFAULT_SHARE * free)
    if host_memory is not None:
        pools[HOST] = parse_size(host_memory)
    else:
        pools[HOST] = int(_DEFAULT_SHARE * (psutil.virtual_memory().available / sharing + taken(HOST)))
    pools[DISK] = int(_DEFAULT_SHARE * shutil.disk_usage(tempfile.gettempdir()).free / sharing)
    return pools


@contextmanager
def held_to(pools: dict[str, int]) -> Iterator[None]:
    """Within the block the allocator of each GPU enforces the GPU's budget."""
    devices = [pool for pool in pools if pool not in (HOST, DISK)]
    before = {device: torch.cuda.get_per_process_memory_fraction(device) for device in devices}
    try:
        for device in devices:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(pools[device] / total, before[device]), device)
        yield
    finally:
        for device, fraction in before.items():
            torch.cuda.set_per_process_memory_fraction(fraction, device)
