"""A GGUF of the base with the adapters merged into it, by llama.cpp's own converter.

Reference:
    github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from ...data import note
from ...errors import ConfigError, OutputError
from ...model import find_gguf, load_tokenizer
from ..emitted import write_adapter_files
from ..merge import merge_adapters
from .format import Served

MODEL_NAME = "model.gguf"

_CONVERTER = "convert_hf_to_gguf.py"
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class MergedGguf:
    """For llama.cpp, and whatever is built on it: a whole model, whose adapters cannot be left out."""

    name = "gguf-merged"
    description = f"a GGUF of the base with the adapters merged in, by llama.cpp's own {_CONVERTER} on the PATH"

    def check(self, base: str, model: PreTrainedModel) -> None:
        """Refuse a quantised base, a machine without the converter, and a model that the converter does not know."""
        if find_gguf(base) is not None:
            raise ConfigError(
                f"gguf-merged: expected the full-precision base, found the GGUF file {base}; name the model that the "
                "file was made from, or export to gguf"
            )
        with tempfile.TemporaryDirectory() as directory:  # the converter reads the config and the tokenizer alone
            model.config.save_pretrained(directory)
            load_tokenizer(base).save_pretrained(directory)
            _convert(Path(directory), Path(directory) / MODEL_NAME, "--vocab-only")

    def write(self, served: Served, directory: Path, output: Path) -> list[str]:
        """Merge, convert in the base's own type, and leave the GGUF alone."""
        adapter, merged = directory / "adapter", directory / "merged"
        adapter.mkdir()
        write_adapter_files(adapter, *served.emitted)
        merge_adapters(served.base, {str(adapter): 1.0}, merged, revision=served.revision)
        shutil.rmtree(adapter)
        stored = _TYPES.get(str(served.model.config.dtype).removeprefix("torch."), "auto")
        _convert(merged, directory / MODEL_NAME, "--outtype", stored)
        shutil.rmtree(merged)
        note("if you quantise the GGUF, measure what you serve: rounding to 4 bits can undo the edit (docs/serving.md)")
        file = shlex.quote(str(output / MODEL_NAME))
        return [f"llama-server -m {file}"]


def _convert(model: Path, file: Path, *options: str) -> None:
    """Run the converter.

    Raises:
        ConfigError: it is not on the PATH, or it does not convert the model.
        OutputError: the disk is full.
    """
    converter = shutil.which(_CONVERTER)
    if converter is None:
        raise ConfigError(
            f"gguf-merged: expected llama.cpp's {_CONVERTER} on the PATH, found none; add a checkout of "
            "github.com/ggml-org/llama.cpp to the PATH and pip install gguf sentencepiece, or run peft-perta merge and "
            "convert its output where you have it"
        )
    command = [sys.executable, converter, str(model), "--outfile", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode or not file.is_file():
        lines = done.stderr.strip().splitlines() or ["it wrote nothing"]
        if "No space left" in lines[-1]:
            raise OutputError(f"{file.parent} has no space for the GGUF; free some, or write elsewhere")
        raise ConfigError(
            f"{converter} does not convert the model: {lines[-1]}; install what it names, update llama.cpp, or run "
            "peft-perta merge and convert its output elsewhere"
        )
