"""The record of an adapter that was trained to forget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from typing_extensions import NotRequired, TypedDict

from ...data import Holds
from .record import Record, code_span, data_table, named_hash
from .shapes import Adapter, Base, Count, DataSet, Rank


class _Settings(TypedDict):
    forget_loss: str
    forget_weight: float
    retain_loss: str
    retain_weight: float
    combiner: str
    target_forget_loss: NotRequired[float | None]
    retain_tolerance: NotRequired[float | None]


class _Training(TypedDict):
    steps: Count
    global_batch: Count
    learning_rate: float
    seed: int


class _Check(TypedDict):
    step: Count
    forget: float
    retain: float


@dataclass
class TrainedProvenance(Record):
    """How an unlearning adapter was trained.

    Attributes:
        settings: the ``UnlearningSettings``.
        training: the optimiser's settings, and the number of steps.
        base_model: name or path, revision, SHA-256 of the embeddings, and quantisation of the base model.
        start_adapter: name, and SHA-256 of the factors, of the adapter that training started from; None where it
            started at zero.
        task_adapter: the adapter that was on during training; None without one.
        data: set -> number of samples and SHA-256 of their tokens.
        figures: the last logged values of the losses, of the gradients' cosines and of the share of conflicting
            elements.
        checks: {step, forget, retain} of the start and of every evaluation: the mean cross-entropy of the forget rows
            and of the held-out rows, or else of as many retain rows, nats per token. Empty where nothing was evaluated.
        rank: the rank of the emitted adapter, the same in every layer.
        dtype: of the emitted factors.
        versions: package -> version.
        seconds: stage -> wall time in seconds; not written to the file.
    """

    KEY: ClassVar[str | None] = "trained"

    settings: Annotated[dict[str, Any], Holds(_Settings)]
    training: Annotated[dict[str, Any], Holds(_Training)]
    base_model: Base
    start_adapter: Adapter | None
    task_adapter: str | None
    data: dict[str, DataSet]
    figures: dict[str, float]
    rank: Rank
    dtype: str
    versions: dict[str, str]
    checks: list[Annotated[dict[str, Any], Holds(_Check)]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        sets = ", ".join(f"{entry['samples']} {name}" for name, entry in self.data.items())
        start = f" from {self.start_adapter['name']!r}" if self.start_adapter else ""
        return (
            f"unlearning adapter of rank {self.rank}, trained{start} by {self.settings['forget_loss']} and "
            f"{self.settings['retain_loss']}, combined by {self.settings['combiner']}, in {self.training['steps']} "
            f"steps on {sets} samples" + "".join(f"; {end}" for end in self._end())
        )

    def _end(self) -> list[str]:
        """How the run ended, with respect to its goals; empty where nothing was evaluated."""
        if not self.checks:
            return []
        target, tolerance = self.settings.get("target_forget_loss"), self.settings.get("retain_tolerance")
        start, last = self.checks[0], self.checks[-1]
        taken = next((check for check in self.checks if check["step"] == self.training["steps"]), last)
        goal = f" for the target {target:.3f}" if target is not None else ""
        end = [
            f"forget loss {taken['forget']:.3f}{goal}, retain loss {taken['retain']:.3f} (at the start "
            f"{start['forget']:.3f} and {start['retain']:.3f}), at step {taken['step']}"
        ]
        if taken is not last and tolerance is not None:
            end += [
                f"training stopped at step {last['step']}, where the retain loss was {last['retain']:.3f}, past the "
                f"tolerance of {tolerance:g}"
            ]
        if target is not None and taken["forget"] < target:
            end += ["the target was NOT reached" + (": train longer" if taken is last else "")]
        return ["; ".join(end)]

    def card_section(self) -> list[str]:
        """The lines of the model card that say what was done."""
        settings, training = self.settings, self.training
        start = f"from {named_hash(self.start_adapter)}" if self.start_adapter else "from zero"
        return [
            "# Unlearning adapter",
            "",
            f"A LoRA adapter for {self.base_code}. Stack it on the model to remove the knowledge of one forget set. "
            "It was trained to forget one set and to keep another. Made with peft_perta "
            f"{self.versions.get('peft_perta', '')}.",
            "",
            "## How it was made",
            "",
            f"- forget loss: `{settings['forget_loss']}`, weight {settings['forget_weight']:g}; retain loss: "
            f"`{settings['retain_loss']}`, weight {settings['retain_weight']:g}",
            f"- the gradients of the two losses were combined by `{settings['combiner']}`",
            f"- {training['steps']} steps of {training['global_batch']} samples of each set, learning rate "
            f"{training['learning_rate']:g}, seed {training['seed']}, {start}",
            *(f"- {end}" for end in self._end()),
            *([f"- trained on top of the adapter {code_span(self.task_adapter)}"] if self.task_adapter else []),
            f"- rank: {self.rank} (`lora_alpha` is the same), {self.dtype}",
            "",
            *data_table(self.data, "set"),
            "",
            "`perta_provenance.json` holds everything else.",
            "",
        ]
