"""Exports: adapters -> the files that a runtime reads. One file per format, one row each in ``EXPORTS``.

To add a format: its file, a row here, a row in tests/tables.py, and its runtime in benchmarks/serving.
"""

from .check import check_export
from .format import Format
from .gguf import Gguf
from .merged_gguf import MergedGguf
from .mlx import Mlx
from .ollama import Ollama
from .peft import Peft
from .run import EXPORT_NAME, ExportRecord, export_adapters
from .vllm import Vllm

EXPORTS: dict[str, Format] = {each.name: each for each in (Gguf(), MergedGguf(), Ollama(), Mlx(), Vllm(), Peft())}
__all__ = ["EXPORTS", "EXPORT_NAME", "ExportRecord", "Format", "check_export", "export_adapters"]
