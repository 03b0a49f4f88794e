"""The description of a run: everything that it is given, checked before any gradient is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..adapters import versions
from ..data import Sample, check_disjoint, drawn, fingerprint, load_samples
from ..errors import AdapterError, DataError, UnsupportedLayerError
from ..evaluation import Goal
from ..gradients import Checkpoint
from ..model import (
    Target,
    changed_targets,
    check_base,
    distributed,
    hash_targets,
    identify,
    require_adapter,
    resolve_layers,
    resolve_targets,
    row_length,
)
from ._rank_allocation import Ranks, ranks_of
from .config import PerTAConfig
from .weighing import resolve_weighting
from .weightings import Weighting

HELD_OUT = "held-out retain"  # the set that judges strengths, in provenance
_HELD_OUT_EVERY = 4  # of the retain samples, one is held out


@dataclass(frozen=True, eq=False)
class Run:
    """One run of PerTA.

    Attributes:
        model: the model, with the forget adapter on it.
        config: the settings; with strength 'auto' their strength is 1, and ``goal`` is set.
        weighting: the config's weighting, resolved.
        targets: the layers that the forget adapter edits.
        ranks: the ranks to fit, to spread and to emit.
        samples: 'forget' and 'retain' -> the samples that give gradients; empty for a weighting without gradients.
        held_out: the retain samples that judge strengths; empty unless there is a goal.
        data: set name -> its sample count and SHA-256, held-out samples included.
        forget_adapter: the name of the forget adapter.
        task_adapter: the name of the task adapter, if any.
        goal: what the strength must reach; None for the config's strength.
        checkpoint: where an interrupted run leaves its results, if anywhere.
        show_progress_bar: whether to show the plan and progress bars.
        seconds: stage -> wall time; filled in by ``timed``.
    """

    model: nn.Module
    config: PerTAConfig
    weighting: Weighting
    targets: list[Target]
    ranks: Ranks
    samples: Mapping[str, list[Sample]]
    held_out: list[Sample]
    data: dict[str, dict[str, Any]]
    forget_adapter: str
    task_adapter: str | None
    goal: Goal | None
    checkpoint: Checkpoint | None = None
    show_progress_bar: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def gradient_adapters(self) -> list[str]:
        """The adapters that are on while gradients are taken."""
        return self.full_adapters if self.config.gradients_at == "full" else []

    @property
    def full_adapters(self) -> list[str]:
        """The adapters that make the full model of the base."""
        return [self.task_adapter] if self.task_adapter else []

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Measure the wall time of a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def describe(
    model: nn.Module,
    config: PerTAConfig,
    data: Mapping[str, Any],
    tokenizer: Any,
    forget_adapter: str,
    task_adapter: str | None,
    show_progress_bar: bool,
) -> Run:
    """Check what the user gave, load the data, and describe the run.

    Args:
        model: the model.
        config: the settings.
        data: 'forget' and 'retain' -> the set, in any form that ``load_samples`` takes, or None.
        tokenizer: needed where data is text.
        forget_adapter: the name of the forget adapter.
        task_adapter: the name of the task adapter, if any.
        show_progress_bar: whether to show the plan and progress bars.

    Raises:
        ConfigError, AdapterError, UnsupportedLayerError, DataError: as ``get_perta_state_dict``.
    """
    distributed.check_sharding(model)
    weighting = resolve_weighting(config.weighting, config.power)
    targets = changed_targets(resolve_targets(model, forget_adapter))
    if task_adapter is not None:
        if task_adapter == forget_adapter:
            raise AdapterError(f"the task adapter and the forget adapter are both {task_adapter!r}; expected two names")
        require_adapter(model, task_adapter)
        check_base(model, task_adapter)
    _check_experts(config, targets)
    _check_sharded_packs(config, targets)
    ranks = ranks_of(config.rank, config.allocation, max(target.rank for target in targets))
    max_length = row_length(model, config.max_length)
    config = replace(config, max_length=max_length)
    samples = _loaded(data, config, max_length, weighting, tokenizer)
    goal, held_out = None, []
    if config.strength == "auto":
        goal = _goal_of(config)
        samples["retain"], held_out = _with_held_out(samples)
        config = replace(config, strength=1.0)
    return Run(
        model=model,
        config=config,
        weighting=weighting,
        targets=targets,
        ranks=ranks,
        samples=samples,
        held_out=held_out,
        data=_fingerprinted({**samples, HELD_OUT: held_out} if held_out else samples),
        forget_adapter=forget_adapter,
        task_adapter=task_adapter,
        goal=goal,
        show_progress_bar=show_progress_bar,
    )


def with_checkpoint(run: Run, checkpoint_dir: str | Path | None) -> Run:
    """The run with its checkpoint opened, if it has one and takes gradients.

    Raises:
        OutputError: the directory belongs to another run, or cannot be written.
    """
    if checkpoint_dir is None or run.weighting.statistic is None:
        return run
    with distributed.failing_together(), run.timed("hashing the model"):
        checkpoint = Checkpoint(checkpoint_dir, _identity(run), writes=distributed.is_main())
    return replace(run, checkpoint=checkpoint)


def _identity(run: Run) -> dict[str, Any]:
    """What two runs must share for one to resume the other: all but memory limits, and the goal of the strength, which
    is sought once all layers are done."""
    left_out = ("max_memory", "host_memory", "target_forget_loss", "retain_tolerance")
    return {
        "format": 3,
        **{f"the model's {part}": value for part, value in identify(run.model).items()},
        "forget adapter": hash_targets(run.targets),
        "adapters that are on": {name: hash_targets(resolve_layers(run.model, name)) for name in run.gradient_adapters},
        "data": {name: of_set["sha256"] for name, of_set in run.data.items()},
        "config": {name: value for name, value in run.config.to_dict().items() if name not in left_out},
        "versions": versions(),
    }


def _check_experts(config: PerTAConfig, targets: list[Target]) -> None:
    """Refuse settings that expert parameters do not support."""
    expert = next((target.name for target in targets if target.parameter is not None), None)
    if expert is None:
        return
    need_inputs = {
        "input_directions=True": config.input_directions,
        "fit='second-moment'": config.fit == "second-moment",
        "fit_kl_samples": config.fit_kl_samples,
    }
    setting = next((name for name, chosen in need_inputs.items() if chosen), None)
    if setting is not None:
        raise UnsupportedLayerError(
            f"{expert}: {setting} needs the layer's inputs, which are unknown for expert parameters; leave "
            "input_directions unset (experts then go without), keep fit_kl_samples at 0, and use fit='truncated' or "
            "'weighted'"
        )
    if config.allocation == "pattern":
        raise UnsupportedLayerError(
            f"{expert}: allocation='pattern' is not possible for expert parameters, which have no rank of their own in "
            "a rank_pattern; use allocation='padded'"
        )


def _check_sharded_packs(config: PerTAConfig, targets: list[Target]) -> None:
    """Refuse settings that put the new adapter on the model, where PEFT cannot put one."""
    packed = [t.name for t in targets if t.kind.name == "linear4bit" and isinstance(t.base_layer.weight, DTensor)]
    if packed and (config.strength == "auto" or config.fit_kl_samples):
        raise UnsupportedLayerError(
            f"{packed[0]} is a 4-bit layer that FSDP2 shards, on which PEFT puts no new adapter; expected a fixed "
            "strength and fit_kl_samples=0: search the strength afterwards with calibrate, on a base that is whole"
        )


def _loaded(
    data: Mapping[str, Any], config: PerTAConfig, max_length: int, weighting: Weighting, tokenizer: Any
) -> dict[str, list[Sample]]:
    """The samples of both sets; without gradients, of the sets that are given."""
    if weighting.statistic is None:
        data = {set_name: of_set for set_name, of_set in data.items() if of_set is not None}
    samples = {
        set_name: load_samples(
            of_set,
            tokenizer,
            max_length=max_length,
            name=f"the {set_name} set",
        )
        for set_name, of_set in data.items()
    }
    check_disjoint(samples.get("forget", []), samples.get("retain", []))
    return {set_name: drawn(of_set, config.max_samples, config.seed) for set_name, of_set in samples.items()}


def _fingerprinted(samples: Mapping[str, list[Sample]]) -> dict[str, dict[str, Any]]:
    return {set_name: {"samples": len(of_set), "sha256": fingerprint(of_set)} for set_name, of_set in samples.items()}


def _goal_of(config: PerTAConfig) -> Goal:
    if config.target_forget_loss:
        return Goal(config.target_forget_loss)
    return Goal(retain_tolerance=config.retain_tolerance)


def _with_held_out(samples: Mapping[str, list[Sample]]) -> tuple[list[Sample], list[Sample]]:
    """(retain samples that give gradients, held-out ones that judge strengths): every fourth sample is held out.

    Raises:
        DataError: a set is missing, or the retain set is too small.
    """
    counts = {set_name: len(samples.get(set_name, ())) for set_name in ("forget", "retain")}
    if not counts["forget"] or counts["retain"] < _HELD_OUT_EVERY:
        missing = f"{counts['retain']} retain samples" if counts["forget"] else "no forget set"
        raise DataError(
            "strength='auto' judges strengths on the forget set and on held-out retain samples: expected a forget set "
            f"and at least {_HELD_OUT_EVERY} retain samples, found {missing}"
        )
    retain = samples["retain"]
    last = _HELD_OUT_EVERY - 1
    given = [sample for index, sample in enumerate(retain) if index % _HELD_OUT_EVERY != last]
    return given, retain[last::_HELD_OUT_EVERY]
