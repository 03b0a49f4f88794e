"""The settings of a new adapter, and of an unlearning run: losses, combiner, and their parameters."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, TaskType

from ..adapters import SERVABLE_RANKS
from ..data import check_setting, explained, is_count, is_number, setting
from .combiners import COMBINERS
from .losses import FORGET_LOSSES, RETAIN_LOSSES, ForwardPass, Loss

_NAMES = "names separated by commas or spaces (q_proj,v_proj) or a regular expression that whole paths match"
REFUSALS = (
    "I don't know.",
    "I have no information about that.",
    "I'm not able to answer that.",
    "That is something I don't know anything about.",
    "I can't say; I have not learned about this.",
    "I'm afraid I don't have an answer to that question.",
)


def _own_values(name: str) -> str:
    """The forget losses' own values of a parameter, for its help."""
    values = {loss.name: getattr(loss, name) for loss in FORGET_LOSSES.values()}
    return ", ".join(f"{loss} {value:g}" for loss, value in values.items() if value is not None)


_STATE_LOSSES = " and ".join(loss.name for loss in (FORGET_LOSSES | RETAIN_LOSSES).values() if loss.needs_states)
_REFUSAL_LOSSES = " and ".join(loss.name for loss in FORGET_LOSSES.values() if loss.reads_refusals)


@explained
@dataclass(frozen=True)
class LoraSettings:
    """A new adapter, as PEFT's LoraConfig has it.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    rank: int = setting(16, f"R, the LoRA rank of every layer: an integer from 1 to {SERVABLE_RANKS[-1]}.")
    lora_alpha: int | float | None = setting(
        None, "The adapter is scaled by lora_alpha / rank: a number > 0. By default twice the rank."
    )
    lora_dropout: float = setting(0.0, "Dropout of the adapter's inputs in training: a number in [0, 1).")
    use_rslora: bool = setting(False, "Scale by lora_alpha / sqrt(rank) instead (rank-stabilised LoRA).")
    target_modules: str | tuple[str, ...] = setting(
        "all-linear", f"The layers to adapt: 'all-linear' (all but the output head), or {_NAMES}."
    )
    exclude_modules: str | tuple[str, ...] | None = setting(
        None, f"Layers to leave out, although target_modules names them: {_NAMES}."
    )

    def __post_init__(self) -> None:
        largest = SERVABLE_RANKS[-1]
        in_range = is_count(self.rank) and self.rank <= largest
        check_setting(in_range, "rank", f"an integer from 1 to {largest}", self.rank)
        alpha, dropout = self.lora_alpha, self.lora_dropout
        check_setting(alpha is None or (is_number(alpha) and alpha > 0), "lora_alpha", "a number > 0", alpha)
        check_setting(is_number(dropout) and 0 <= dropout < 1, "lora_dropout", "a number in [0, 1)", dropout)
        _check_modules("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            _check_modules("exclude_modules", self.exclude_modules)

    def to_lora_config(self) -> LoraConfig:
        """The config that PEFT makes the adapter from."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.lora_alpha is None else self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=_modules(self.target_modules),
            exclude_modules=None if self.exclude_modules is None else _modules(self.exclude_modules),
            task_type=TaskType.CAUSAL_LM,
        )


@explained
@dataclass(frozen=True)
class UnlearningSettings:
    """What ``UnlearningTrainer`` minimises, and how it combines the two gradients.

    The optimizer gets g = combiner(g_f, g_r; gamma, alpha), with g_f and g_r the gradients of the mean forget loss and
    the mean retain loss over a global batch.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or the chosen losses do not use it.
    """

    forget_loss: str = setting("npo", "The loss to minimise on the forget rows.", tuple(FORGET_LOSSES))
    retain_loss: str = setting("nll", "The loss to minimise on the retain rows.", tuple(RETAIN_LOSSES))
    combiner: str = setting("pcgrad", "How the forget and the retain gradient become one.", tuple(COMBINERS))
    forget_weight: float = setting(1.0, "gamma, the weight of the forget gradient: a number > 0.")
    retain_weight: float = setting(1.0, "alpha, the weight of the retain gradient: a number > 0.")
    retain_budget: float | None = setting(
        None,
        "The mean retain loss to stay within, in the loss's own unit (nats per token): a number >= 0. After each step "
        "the retain weight grows by retain_weight times what the step's retain loss is above it, and falls by what it "
        "is below, at most to 0 (PDU). By default the weight stays.",
    )
    target_forget_loss: float | None = setting(
        None,
        "Stop training at the first evaluation at which the mean cross-entropy on the forget rows reaches this: a "
        "number > 0, nats per token. By default training runs to its end.",
    )
    retain_tolerance: float | None = setting(
        None,
        "Stop training at the first evaluation at which the mean cross-entropy on the held-out retain rows has risen "
        "by more than this since the start, and take the adapter of the evaluation before: a number > 0, nats per "
        "token. By default training runs to its end.",
    )
    relearning_steps: int | None = setting(
        None,
        "Withstand relearning: an attacker's adapter, LoRA on every linear layer, learns the forget rows again, a step "
        "of AdamW after each step of training, and begins anew after so many; the forget gradient is taken with it on. "
        "An integer from 1; one more forward and backward pass over the forget rows. By default there is no attacker.",
    )
    beta: float | None = setting(
        None,
        f"beta of the forget loss: a number > 0, without a unit. By default the loss's own: {_own_values('beta')}.",
    )
    margin: float | None = setting(
        None,
        f"margin of the forget loss: a number, nats per token. By default the loss's own: {_own_values('margin')}.",
    )
    layer: int | None = setting(
        None,
        f"Decoder block whose output hidden states the losses {_STATE_LOSSES} read, counted from 1. By default the "
        "middle block.",
    )
    refusals: list[str] | None = setting(  # noqa: RUF009 - a list, since the parsers of transformers know no tuple
        None,
        f"Completions that the loss {_REFUSAL_LOSSES} prefers to those of the forget rows: one or more texts, given to "
        "the rows in turn. By default the package's own.",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices:
                check_setting(value in choices, field.name, f"one of {list(choices)}", value)
        for name in ("forget_weight", "retain_weight"):
            value = getattr(self, name)
            check_setting(is_number(value) and value > 0, name, "a number > 0", value)
        self._check_goals()
        self._check_loss_parameters()
        self._check_refusals()

    def _check_goals(self) -> None:
        """Check the budget, the target and the tolerance, where they are given."""
        budget = self.retain_budget
        if budget is not None:
            check_setting(is_number(budget) and budget >= 0, "retain_budget", "a number >= 0", budget)
        steps = self.relearning_steps
        check_setting(steps is None or is_count(steps), "relearning_steps", "an integer from 1", steps)
        for name in ("target_forget_loss", "retain_tolerance"):
            value = getattr(self, name)
            if value is not None:
                check_setting(is_number(value) and value > 0, name, "a number > 0", value)

    def _check_loss_parameters(self) -> None:
        """Check beta, margin and layer where they are given: each must be in range, and used by a chosen loss."""
        unused = f"None, since {self.forget_loss!r} has no "
        if self.beta is not None:
            check_setting(is_number(self.beta) and self.beta > 0, "beta", "a number > 0", self.beta)
            check_setting(self.losses["forget"].beta is not None, "beta", unused + "beta", self.beta)
        if self.margin is not None:
            check_setting(is_number(self.margin), "margin", "a number", self.margin)
            check_setting(self.losses["forget"].margin is not None, "margin", unused + "margin", self.margin)
        if self.layer is not None:
            check_setting(is_count(self.layer), "layer", "an integer from 1", self.layer)
            check_setting(self.needs_states, "layer", "None, since neither loss reads hidden states", self.layer)

    def _check_refusals(self) -> None:
        refusals = self.refusals
        if refusals is not None:
            are_texts = isinstance(refusals, list) and all(isinstance(text, str) and text.strip() for text in refusals)
            check_setting(are_texts and len(refusals) > 0, "refusals", "a list of one or more texts", refusals)
            unused = f"None, since {self.forget_loss!r} uses no refusals"
            check_setting(self.losses["forget"].reads_refusals, "refusals", unused, refusals)

    @property
    def losses(self) -> dict[str, Loss]:
        """The loss of each set: 'forget' and 'retain'."""
        return {"forget": FORGET_LOSSES[self.forget_loss], "retain": RETAIN_LOSSES[self.retain_loss]}

    @property
    def loss_parameters(self) -> tuple[float, float]:
        """beta and margin of the forget loss: as set, else the loss's own, else 0."""
        loss = self.losses["forget"]
        beta = loss.beta if self.beta is None else self.beta
        margin = loss.margin if self.margin is None else self.margin
        return beta or 0.0, margin or 0.0

    @property
    def has_goal(self) -> bool:
        """Whether training stops where an evaluation meets a goal."""
        return self.target_forget_loss is not None or self.retain_tolerance is not None

    @property
    def used_refusals(self) -> list[str]:
        """The refusals that the forget completions are compared with, as set or the package's own; mostly none."""
        return (self.refusals or list(REFUSALS)) if self.losses["forget"].reads_refusals else []

    @property
    def needs_states(self) -> bool:
        """Whether a loss reads hidden states."""
        return any(loss.needs_states for loss in self.losses.values())

    @property
    def reads_origin(self) -> bool:
        """Whether a loss reads the origin's outputs."""
        return any(ForwardPass.ORIGIN in loss.reads for loss in self.losses.values())

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON. Refusals are included only if the forget loss uses them."""
        values = {**dataclasses.asdict(self), "refusals": self.used_refusals}
        return {name: value for name, value in values.items() if name != "refusals" or value}


def _modules(value: str | tuple[str, ...]) -> str | list[str]:
    """Names as a list, since PEFT reads a text as a regular expression; 'all-linear' and an expression as they are."""
    text = (value if isinstance(value, str) else " ".join(value)).strip()
    names = [name for name in re.split(r"[,\s]+", text) if name]
    are_names = all(re.fullmatch(r"[\w.-]+", name) for name in names)
    return names if are_names and names != ["all-linear"] else text


def _check_modules(name: str, value: object) -> None:
    texts = [value] if isinstance(value, str) else value
    are_texts = isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text.strip(", ") for text in texts)
    check_setting(are_texts and len(texts) > 0, name, _NAMES, value)  # type: ignore[arg-type]
    modules = _modules(value)  # type: ignore[arg-type]
    if isinstance(modules, str):
        check_setting(_compiles(modules), name, _NAMES, modules)


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return True
