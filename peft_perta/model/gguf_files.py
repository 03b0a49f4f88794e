"""A base model in a GGUF file, which transformers dequantises on loading."""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError
from ._gguf_head import read_head

SUFFIX = ".gguf"


def held_ggufs(name: str) -> list[Path]:
    """The GGUF files that a base's name can stand for: itself, or those in a directory without config.json."""
    path = Path(name)
    if path.suffix == SUFFIX and path.is_file():
        return [path]
    if path.is_dir() and not (path / "config.json").is_file():
        return _ggufs_in(path)
    return []


def find_gguf(name: str, gguf_file: str | None = None) -> Path | None:
    """The GGUF file that a base's name stands for: itself, or the only one in a directory without config.json. None for
    any other base.

    Args:
        name: the base's name.
        gguf_file: the name of the file, where the base is a directory.

    Raises:
        ConfigError: the file does not exist, the directory holds several GGUF files, or the package gguf is not
            installed.
    """
    path = Path(name, gguf_file) if gguf_file else Path(name)
    if not path.is_file() and (gguf_file or (path.suffix == SUFFIX and not path.is_dir())):
        raise _missing(path)
    found = [path] if gguf_file else held_ggufs(name)
    if len(found) > 1:
        files = ", ".join(file.name for file in found)
        raise ConfigError(f"{name} holds several GGUF files ({files}), expected one; name the file")
    if found and importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{found[0]}: expected the package gguf to read it, found none; run: pip install gguf")
    return found[0] if found else None


def _ggufs_in(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{SUFFIX}"))


def _missing(path: Path) -> ConfigError:
    directory = path.parent
    others = ", ".join(file.name for file in _ggufs_in(directory))
    if others:
        return ConfigError(f"{path}: expected a GGUF file, found none; {directory} holds {others}: name one of these")
    there = f"{directory} holds no GGUF file" if directory.is_dir() else f"{directory} is no directory on this machine"
    return ConfigError(f"{path}: expected a GGUF file, found none; {there}: correct the path, or download the file")


@dataclass(frozen=True)
class GgufLayout:
    """What a GGUF file holds.

    Attributes:
        architecture: the name of its architecture; None where it names none.
        shapes: tensor -> its shape, the slowest dimension first, as torch has it.
    """

    architecture: str | None
    shapes: Mapping[str, tuple[int, ...]]


def read_gguf_layout(file: Path) -> GgufLayout:
    """Read what a GGUF file holds, without its tensors.

    Raises:
        ConfigError: it is no GGUF file, or ends within its head.
    """
    try:
        head = read_head(file)
    except (EOFError, ValueError) as error:
        raise ConfigError(f"{file} is no whole GGUF file ({error}); copy or download it again") from error
    shapes = {tensor.name.decode("utf-8", "replace"): tensor.shape[::-1] for tensor in head.tensors}
    return GgufLayout(head.text("general.architecture"), shapes)


def check_whole(file: Path) -> None:
    """Check that a GGUF file holds all of its tensors. What is no GGUF file passes: loading it says what it is.

    Raises:
        ConfigError: the file ends early.
    """
    size, end = file.stat().st_size, 0
    blocks = importlib.import_module("gguf").GGML_QUANT_SIZES  # type -> (values of a block, its bytes)
    try:
        tensors = read_head(file).tensors
    except EOFError:
        raise ConfigError(f"{file} ends early, at {size:,} bytes, within its metadata; download it again") from None
    except ValueError:
        return
    for tensor in tensors:
        values, bytes_of_block = blocks.get(tensor.kind, (1, 0))
        end = max(end, tensor.start + math.prod(tensor.shape) // values * bytes_of_block)
    if size < end:
        raise ConfigError(f"{file} ends early: expected {end:,} bytes, found {size:,}; download it again")


def source_of(name: str, file: Path | None) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` of transformers takes to load a base: (name, further arguments)."""
    return (name, {}) if file is None else (str(file.parent), {"gguf_file": file.name})


def write_dequantised(model: Any, tokenizer: Any, directory: str) -> None:
    """Write a model and its tokenizer to a directory, from which another type can be loaded.

    Raises:
        OutputError: the disk has no room for it.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(directory).free
    if free < 1.1 * size:
        raise OutputError(
            f"{tempfile.gettempdir()}: expected {1.1 * size / 1e9:.2g} GB free to quantise a GGUF model anew, found "
            f"{free / 1e9:.2g} GB; set TMPDIR to a directory with room"
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
