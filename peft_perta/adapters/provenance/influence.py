"""The record of an adapter that was edited by influence functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from ...data import Holds
from .record import Record, code_span, data_table, named_hash
from .shapes import Adapter, Base, Count, DataSet


class _Change(NamedTuple):
    """How one influence function changes the training set: as the summary says it, and as the model card says it."""

    summary: str
    card: str


_CHANGES = {
    "erase_instances": _Change("erased", "without some rows of its training set"),
    "modify_queries": _Change("given other queries", "with other queries in some rows of its training set"),
    "correct_responses": _Change("given other responses", "with other responses in some rows of its training set"),
}


class _Config(TypedDict):
    curvature: str
    tolerance: float


class _Sets(TypedDict):
    training: DataSet
    changed: DataSet
    unchanged: NotRequired[DataSet]
    new: NotRequired[DataSet]


@dataclass
class InfluenceProvenance(Record):
    """How rows were taken out of an adapter, or changed in it, by the curvature of its training loss.

    Attributes:
        kind: the function that was called: 'erase_instances', 'modify_queries' or 'correct_responses'.
        config: the ``InfluenceSettings``.
        base_model: name or path, revision, SHA-256 of the embeddings, and quantisation of the base model.
        adapter: name of the edited adapter, and SHA-256 of its factors.
        data: set -> number of samples and SHA-256 of their tokens. The sets are 'training' (all rows), 'changed' (the
            rows to forget or to replace), 'unchanged' (the other rows) and 'new' (the replacements).
        damping: the number that was added to the curvature's diagonal.
        residual: |b - (H + damping) D| / |b| at the solution D.
        iterations: number of products with the whole curvature.
        stopped: why the solver stopped: 'tolerance', 'iterations' or 'rounding'.
        losses: set -> mean loss with the original and with the edited adapter, in nats per token.
        versions: package -> version.
        with_adapters: name and SHA-256 of the factors of each adapter that was on beside the edited one. The losses
            and the solution hold with them on.
        form: which adapter is emitted: 'edited' (it replaces the original) or 'difference' (it is stacked on it).
        rank: the rank of the emitted adapter, the same in every layer.
        dtype: of the emitted factors.
        seconds: stage -> wall time in seconds; not written to the file.
    """

    KEY: ClassVar[str | None] = "influence"

    kind: Annotated[str, Field(pattern=f"^({'|'.join(_CHANGES)})$")]
    config: Annotated[dict[str, Any], Holds(_Config)]
    base_model: Base
    adapter: Adapter
    data: Annotated[dict[str, dict[str, Any]], Holds(_Sets)]
    damping: float
    residual: float
    iterations: Count
    stopped: Annotated[str, Field(pattern="^(tolerance|iterations|rounding)$")]
    losses: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]
    versions: dict[str, str]
    with_adapters: list[Adapter] = field(default_factory=list)
    form: Annotated[str, Field(pattern="^(edited|difference)$")] = "difference"
    rank: int = 0
    dtype: str = "float32"
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def stopping(self) -> str:
        """The residual that was reached, and why the solver stopped there."""
        tolerance = f"{self.config['tolerance']:.1g}"
        reasons = {
            "tolerance": f"the tolerance is {tolerance}",
            "iterations": f"stopped early, at max_iterations; the tolerance is {tolerance}",
            "rounding": f"stopped early, at the limit of the model's precision; the tolerance is {tolerance}",
        }
        return f"residual {self.residual:.2g} after {self.iterations} products ({reasons[self.stopped]})"

    def __str__(self) -> str:
        losses = ", ".join(f"{name} rows {old:.3f} -> {new:.3f}" for name, (old, new) in self.losses.items())
        return (
            f"{self.data['changed']['samples']} of {self.data['training']['samples']} training rows of "
            f"{self.adapter['name']!r} {_CHANGES[self.kind].summary}: {self.config['curvature']} curvature, damping "
            f"{self.damping:.2g}, {self.stopping}; mean loss: {losses}"
        )

    def card_section(self) -> list[str]:
        """The lines of the model card that say what was done."""
        name = code_span(self.adapter["name"])
        if self.form == "edited":
            heading, use = "# Edited adapter", f"Use it in place of {name}, at the same rank."
        else:
            heading, use = "# Difference adapter", f"Stack it on {name}; the sum is exact, at twice the rank."
        losses = [f"| {rows} | {old:.3f} | {new:.3f} |" for rows, (old, new) in self.losses.items()]
        return [
            heading,
            "",
            f"A LoRA adapter for {self.base_code}. It estimates the adapter {name} as if that had been trained "
            f"{_CHANGES[self.kind].card}, from the curvature of the training loss and without training again "
            f"(LLMEraser, arXiv 2412.00383). {use} Made with peft_perta {self.versions.get('peft_perta', '')}.",
            "",
            "## How it was made",
            "",
            f"- edited adapter: {named_hash(self.adapter)}",
            *[f"- on beside it: {named_hash(adapter)}" for adapter in self.with_adapters],
            f"- {self.config['curvature']} curvature, damping {self.damping:.3g}, {self.stopping}",
            f"- rank: {self.rank} (`lora_alpha` is the same), {self.dtype}",
            "",
            *data_table(self.data, "rows"),
            "",
            "Mean loss in nats per token:",
            "",
            "| rows | original adapter | edited adapter |",
            "|---|---|---|",
            *losses,
            "",
        ]
