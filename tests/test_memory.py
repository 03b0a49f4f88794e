"""Memory sizes and budgets: how sizes are parsed and shown, and what the default budgets are."""

import mmap
import re
import types

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta import ConfigError, PerTAConfig
from peft_perta.cli import command_parser
from peft_perta.model import DISK, HOST, budgets, held_to, parse_size, show_size, taken
from peft_perta.model import memory as memory_module

SIZES = {
    1: 1,
    10_000_000_000: 10**10,
    "10000": 10_000,
    "3KB": 3_000,
    "10GB": 10**10,
    "10GiB": 10 * 2**30,
    "1.5 GiB": 3 * 2**29,
    " 2 mib ": 2**21,
    "7KiB": 7 * 2**10,
    "1TB": 10**12,
    "2TiB": 2**41,
    "512 B": 512,
}
JUNK = ("", "GiB", "ten GiB", "10 GiB free", "10XB", "10GBit", "-1", "-1GiB", "1e3", "1,5GB", "nan", "inf", "0", "0GiB")
NO_SIZES = (*JUNK, "0.2", "0.0001KB", 0, -1, -(2**30), True, False, 1.5, 1e9, float("nan"), None, [], b"10GiB")
NAMES = ("max_memory", "host_memory")


@pytest.mark.parametrize(("size", "expected"), SIZES.items())
def test_a_size_is_parsed_to_bytes(size, expected):
    parsed = parse_size(size)
    assert (parsed, type(parsed)) == (expected, int)


@pytest.mark.parametrize("size", NO_SIZES, ids=repr)
def test_an_invalid_size_is_refused(size):
    with pytest.raises(ConfigError, match=re.escape(f"or a number of bytes, found {size!r}")):
        parse_size(size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [None, *SIZES], ids=repr)
def test_the_config_keeps_a_size_as_it_was_written(name, size):
    config = PerTAConfig(**{name: size})
    assert getattr(PerTAConfig.from_dict(config.to_dict()), name) == size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [size for size in NO_SIZES if size is not None], ids=repr)
def test_the_config_refuses_an_invalid_size_by_name(name, size):
    with pytest.raises(ConfigError, match=f"^{name}: expected None, or a size such as .*, found"):
        PerTAConfig(**{name: size})


def test_the_command_line_keeps_a_size_as_it_was_written():
    line = "--model m --forget-adapter f --output o --max-memory 3GiB --host-memory 20000000"
    options = command_parser("unlearn").parse_args(line.split())
    assert (options.max_memory, options.host_memory) == ("3GiB", "20000000")


@given(size=st.integers(1, 2**46))
def test_a_shown_size_can_be_parsed(size):
    """A message names the smallest sufficient budget; the user can type it as it is shown."""
    assert abs(parse_size(show_size(size)) - size) <= 0.005 * size + 1


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (12 * 2**20, "12 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (999.7 * 2**20, "1000 MiB"),
        (1023 * 2**20, "1023 MiB"),
        (123_456 * 2**30, "123456 GiB"),
    ],
)
def test_a_size_is_shown_with_three_digits_or_as_an_integer(size, shown):
    assert show_size(size) == shown


def test_memory_in_use_is_what_the_process_holds(monkeypatch):
    before = taken(HOST)
    pages = mmap.mmap(-1, 2**26)  # fresh pages: a tensor may reuse the allocator's
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    assert taken(HOST) - before > 0.9 * len(pages)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {"cuda:0": 5}.__getitem__)
    assert taken("cuda:0") == 5
    assert taken(DISK) == 0


@pytest.fixture
def machine(monkeypatch):
    """100 bytes are free on the host, 50 on the disk, 30 on the GPU, where the allocator reserves 10 more."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=100))
    monkeypatch.setattr(memory_module, "taken", lambda pool: 20 if pool == HOST else 0)
    monkeypatch.setattr(memory_module.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=50))
    monkeypatch.setattr(torch.cuda, "mem_get_info", {"cuda:0": (30, 1000)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {"cuda:0": 10}.__getitem__)


@pytest.mark.parametrize(
    ("max_memory", "host_memory", "expected"),
    [
        (None, None, {"cuda:0": 36, HOST: 108, DISK: 45}),
        ("1KB", None, {"cuda:0": 1000, HOST: 108, DISK: 45}),
        (None, 77, {"cuda:0": 36, HOST: 77, DISK: 45}),
    ],
)
def test_a_budget_is_what_was_asked_for_or_nine_tenths_of_what_is_free_or_in_use(
    machine, max_memory, host_memory, expected
):
    assert budgets([HOST, "cuda:0"], max_memory, host_memory) == expected


def test_processes_on_one_machine_share_its_free_memory(machine):
    assert budgets(["cuda:0"], None, None, sharing=5) == {"cuda:0": 36, HOST: 0.9 * (100 / 5 + 20), DISK: 0.9 * 50 / 5}
    assert budgets([HOST], None, 77, sharing=5)[HOST] == 77, "an explicit budget is per process"


def test_a_cpu_has_the_budgets_of_host_and_disk_only(machine):
    assert budgets([HOST], "1KB", 77) == {HOST: 77, DISK: 45}


@pytest.mark.parametrize("raises", [False, True])
def test_a_gpu_is_limited_to_its_budget_within_the_block(monkeypatch, raises):
    fractions = {"cuda:0": 0.8, "cuda:1": 0.5}
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fractions[device])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.update({device: fraction})
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def block():
        with held_to({HOST: 1, "cuda:0": 300, DISK: 1, "cuda:1": 900}):
            assert fractions == {"cuda:0": 0.3, "cuda:1": 0.5}, "never above the user's own limit"
            if raises:
                raise RuntimeError("on purpose")

    if raises:
        with pytest.raises(RuntimeError, match="on purpose"):
            block()
    else:
        block()
    assert fractions == {"cuda:0": 0.8, "cuda:1": 0.5}
