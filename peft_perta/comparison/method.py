"""What a method gets, what it returns, and what its row in the table says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peft import LoraConfig, PeftModel
from torch import Tensor

from ..model import input_device, peak_memory

WARMUP = 0.05  # of the steps of each training
Family = Literal["negation", "perta", "control", "extrapolation", "trained", "influence"]


@dataclass(frozen=True)
class Setup:
    """The input of a method.

    Attributes:
        model: the origin model with the adapters 'forget' (the forget adapter, trained on the forget rows alone; not
            where no method needs it and there is a task adapter), 'task' (the task adapter, which makes it the full
            model; not where the origin itself must forget) and 'retain-only' (for the judge; a method must not use
            it). A method leaves the model as it was.
        tokenizer: the model's tokenizer.
        forget_rows: the rows to forget.
        retain_rows: the retain rows that a method may use. The judge uses other retain rows.
        rank: rank of the forget adapter. A method's adapter has the same rank, unless another rank is its point.
        seed: seed of everything that the method draws.
        task_adapter: 'task'; None where the origin itself must forget.
        made: the adapters that ``once`` keeps.
    """

    model: PeftModel
    tokenizer: Any
    forget_rows: list[dict]
    retain_rows: list[dict]
    rank: int
    seed: int
    task_adapter: str | None = "task"
    made: dict[MakeAdapter, MethodAdapter] = field(default_factory=dict)


@dataclass
class Effort:
    """What an adapter took on this machine.

    Attributes:
        seconds: the wall time.
        memory: the most bytes in use, the model included.
    """

    seconds: float = 0.0
    memory: int = 0

    def then(self, other: Effort) -> Effort:
        """What both took, one after the other."""
        return Effort(self.seconds + other.seconds, max(self.memory, other.memory))


@contextmanager
def measured(setup: Setup) -> Iterator[Effort]:
    """Measure what the block takes."""
    effort, start = Effort(), time.perf_counter()
    with peak_memory(str(input_device(setup.model))) as peak:
        yield effort
    effort.seconds, effort.memory = round(time.perf_counter() - start, 2), peak.bytes


@dataclass(frozen=True)
class MethodAdapter:
    """The output of a method: an adapter to stack on 'task', at any strength.

    Attributes:
        lora_config: PEFT's config of the adapter.
        state_dict: PEFT's keys -> factors.
        forward_equivalents: compute cost beyond the forget adapter's training, in forward passes over both sets. A
            forward and backward pass of a LoRA adapter counts 2.
        effort: what it took, where that is not what its ``make`` took just now.
    """

    lora_config: LoraConfig
    state_dict: Mapping[str, Tensor]
    forward_equivalents: float
    effort: Effort | None = None


MakeAdapter = Callable[[Setup], MethodAdapter]


def once(make: MakeAdapter) -> MakeAdapter:
    """The same method, which makes its adapter once for all methods that build on it."""

    def make_once(setup: Setup) -> MethodAdapter:
        if make not in setup.made:
            with measured(setup) as effort:
                adapter = make(setup)
            setup.made[make] = replace(adapter, effort=effort)
        return setup.made[make]

    return make_once


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        description: one line, which ``compare --list`` prints.
        make: makes the adapter. It raises NumericalError if the result cannot be judged; the comparison then records
            the error and continues.
        family: decides how the picture draws the method's curve.
        needs_forget_adapter: the method edits the forget adapter, so the cost of training it counts.
        step: the command that makes the same adapter from the user's files; None for what no user would make.
        options: the settings that the command takes beside its defaults.
        is_refined: `peft-perta refine` follows the command.
        rounds: how many times as long as the others it trains.
    """

    description: str
    make: MakeAdapter
    family: Family
    needs_forget_adapter: bool = True
    step: Literal["unlearn", "train"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    is_refined: bool = False
    rounds: int = 1

    @property
    def command(self) -> str | None:
        """The command with its options, as a user would type them; None for what no user would make."""
        if self.step is None:
            return None
        return " ".join([self.step, *as_flags(self.options)])


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The options of the command line that set these fields."""
    names = {name.replace("_", "-"): value for name, value in settings.items()}
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}"
        for name, value in names.items()
    ]
