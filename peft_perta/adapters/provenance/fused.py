"""The record of a fused or extrapolated adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...evaluation import Calibration
from .record import Record, code_span, searched_on
from .shapes import Base, Part, Rank, Share


@dataclass
class FusedProvenance(Record):
    """How several adapters became one weighted sum.

    Attributes:
        base_model: name of the base model.
        parts: name, strength and SHA-256 of the factors of each adapter in the sum.
        rank: the rank of the emitted adapter, the same in every layer.
        energy_kept: the share of the sum's squared Frobenius norm that the adapter holds; 1 where nothing was
            truncated.
        dtype: of the emitted factors.
        calibration: the search for the strengths; None where they were given.
    """

    KEY: ClassVar[str | None] = "fused"

    base_model: Base
    parts: list[Part]
    rank: Rank
    energy_kept: Share
    dtype: str = "float32"
    calibration: Calibration | None = None

    def __str__(self) -> str:
        names = " + ".join(f"{part['strength']:g} x {part['name']}" for part in self.parts)
        return f"{names} as one adapter of rank {self.rank}; {self.energy_kept:.1%} of the sum's energy kept"

    def card_section(self) -> list[str]:
        """The lines of the model card that say what was done."""
        parts = [
            f"| {code_span(part['name'])} | {part['strength']:g} | `{part['sha256'][:16]}` |" for part in self.parts
        ]
        return [
            "# Fused adapter",
            "",
            f"Several LoRA adapters for {self.base_code} fused into one by peft_perta, for servers that take one "
            "adapter per request.",
            "",
            "| part | strength | SHA-256 |",
            "|---|---|---|",
            *parts,
            "",
            f"Rank {self.rank}; {self.energy_kept:.1%} of the sum's energy kept"
            + (" (nothing was truncated)." if self.energy_kept == 1 else "."),
            "",
            *(searched_on(self.calibration) if self.calibration else []),
        ]
