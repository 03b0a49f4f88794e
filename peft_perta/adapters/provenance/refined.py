"""The record of an adapter that was refined along the input directions of its layers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field
from typing_extensions import TypedDict

from ...data import Holds
from .record import Record, code_span, data_table, named_hash
from .shapes import Adapter, Base, DataSet, OnSets, Rank


class _Settings(TypedDict):
    retain_weight: float
    damping: float
    dtype: str


@dataclass
class RefinedProvenance(Record):
    """How an adapter was refined.

    Attributes:
        base_model: name or path, revision, SHA-256 of the embeddings, and quantisation of the base model.
        adapter: name of the refined adapter, and SHA-256 of its factors.
        task_adapter: the adapter that was on while the layers' inputs were read; None without one.
        data: set -> number of samples and SHA-256 of their tokens.
        settings: the ``RefinementSettings``.
        left_on_inputs: layer -> set -> the share of the adapter's mean squared output that is left on that set's
            inputs.
        unchanged: the adapter's weights that have no input of their own (experts), and were left as they were.
        rank: the rank of the emitted adapter, the same in every layer.
        versions: package -> version.
        seconds: stage -> wall time in seconds; not written to the file.
    """

    KEY: ClassVar[str | None] = "refined"

    base_model: Base
    adapter: Adapter
    task_adapter: str | None
    data: dict[str, DataSet]
    settings: Annotated[dict[str, Any], Holds(_Settings)]
    left_on_inputs: Annotated[dict[str, OnSets], Field(min_length=1)]
    unchanged: list[str]
    rank: Rank
    versions: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)

    def left(self, set_name: str) -> float:
        """The share of the output that is left on a set's inputs, averaged over layers."""
        return statistics.fmean(of_layer[set_name] for of_layer in self.left_on_inputs.values())

    def __str__(self) -> str:
        sets = ", ".join(f"{entry['samples']} {name}" for name, entry in self.data.items())
        return (
            f"{self.adapter['name']!r} refined along the input directions of {len(self.left_on_inputs)} layers, from "
            f"{sets} samples: {self.left('forget'):.1%} of its squared output is left on forget inputs, "
            f"{self.left('retain'):.1%} on retain inputs"
        )

    def card_section(self) -> list[str]:
        """The lines of the model card that say what was done."""
        experts = f"- left as they were, having no input of their own: {len(self.unchanged)} expert weights"
        return [
            "# Refined adapter",
            "",
            f"A LoRA adapter for {self.base_code}. Stack it on the model to remove the knowledge of one forget set. "
            "It is another adapter with its A weighed along the input directions of each layer, so that it acts where "
            f"forget rows lead it and not where retain rows do. Made with peft_perta "
            f"{self.versions.get('peft_perta', '')}.",
            "",
            "## How it was made",
            "",
            f"- refined adapter: {named_hash(self.adapter)}",
            f"- A became A C_f (C_f + {self.settings['retain_weight']:g} C_r + d)^-1, with C_f and C_r the second "
            f"moments of the layer's inputs and d {self.settings['damping']:g} of their mean energy",
            *([f"- inputs were read with the adapter {code_span(self.task_adapter)} on"] if self.task_adapter else []),
            f"- left of its squared output, averaged over layers: {self.left('forget'):.1%} on forget inputs, "
            f"{self.left('retain'):.1%} on retain inputs",
            *([experts] if self.unchanged else []),
            f"- rank: {self.rank} (`lora_alpha` is the same), {self.settings['dtype']}",
            "",
            *data_table(self.data, "set"),
            "",
        ]
