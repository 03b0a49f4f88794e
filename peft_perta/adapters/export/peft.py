"""PEFT's own files, as ``fuse`` writes them."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..emitted import write_adapter_files
from .format import Served


class Peft:
    """For PEFT, and for transformers' own loader."""

    name = "peft"
    description = "one adapter for PEFT and for transformers' own loader, on any base"

    def check(self, base: str, model: PreTrainedModel) -> None:
        """PEFT takes every base that this package takes."""

    def write(self, served: Served, directory: Path, output: Path) -> list[str]:
        """Write PEFT's files, the provenance and the model card."""
        write_adapter_files(directory, *served.emitted)
        return [f"model = peft.PeftModel.from_pretrained(model, {str(output)!r})"]
