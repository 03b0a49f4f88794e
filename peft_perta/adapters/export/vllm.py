"""PEFT's files for vLLM, which takes one adapter a request, and the line that starts it."""

from __future__ import annotations

import shlex
from pathlib import Path

from transformers import PreTrainedModel

from ..emitted import write_adapter_files
from .format import Served, check_no_gguf

_NAME = "unlearned"  # of the adapter in requests


class Vllm:
    """For vLLM."""

    name = "vllm"
    description = "one adapter for vLLM, of a rank that it allows, and the line that serves it"

    def check(self, base: str, model: PreTrainedModel) -> None:
        """Refuse a GGUF file, on which adapters were not tested."""
        check_no_gguf("vLLM", base)

    def write(self, served: Served, directory: Path, output: Path) -> list[str]:
        """Write PEFT's files, the provenance and the model card."""
        served.layers()  # refuses experts
        write_adapter_files(directory, *served.emitted)
        start = f"vllm serve {shlex.quote(served.base)}"
        if served.revision:
            start += f" --revision {shlex.quote(served.revision)}"
        module = shlex.quote(f"{_NAME}={output}")
        return [f"{start} --enable-lora --max-lora-rank {served.rank} --lora-modules {module}"]
