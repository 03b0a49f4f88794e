"""The contract of a method: a setup in, an adapter out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor

FAMILIES = ("negation", "perta", "control", "extrapolation", "trained", "influence")


@dataclass(frozen=True)
class Setup:
    """What a method may use.

    Attributes:
        model: theta_0 with the adapters 'forget' (learned from the forget rows alone) and 'task' (with it on it is the
            full model) on it; 'reference', which never saw the forget rows, is for the judge alone. It must go back as
            it came.
        forget_rows, retain_rows: those that may give gradients. What is judged on the retain set are other rows.
        rank: of the forget adapter, and of what is made, unless being of another is the method's point.
    """

    model: PeftModel
    tokenizer: Any
    forget_rows: list[dict]
    retain_rows: list[dict]
    rank: int
    seed: int


@dataclass(frozen=True)
class Made:
    """An adapter that is stacked on 'task', at any strength.

    Attributes:
        forward_equivalents: what it cost beyond the forget adapter, in forward passes over both sets; a forward and
            backward of a LoRA is 2.
    """

    lora_config: LoraConfig
    state_dict: Mapping[str, Tensor]
    forward_equivalents: float


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        make: raises NumericalError where it gives nothing that could be judged; the comparison goes on without it.
        family: one of ``FAMILIES``.
        needs_forget_adapter: whether the cost of training that is a part of its own.
    """

    description: str
    make: Callable[[Setup], Made]
    family: str
    needs_forget_adapter: bool = True
