"""PerTA: weigh the forget adapter parameter by parameter, negate it, emit it as plain LoRA.

Reference: Cai et al. 2026, arXiv 2601.22030. With weighting='uniform' this is plain task arithmetic (Ilharco et al.
2023, arXiv 2212.04089).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters import (
    SERVABLE_RANKS,
    EmittedAdapter,
    Factors,
    LayerProvenance,
    PerTAProvenance,
    add_adapter,
    build_adapter,
    describe_base,
    servable_rank,
    torch_dtype,
    versions,
)
from ..data import Sample, fingerprint, load_samples
from ..errors import AdapterError, DataError, UnsupportedLayerError
from ..evaluation import Goal, calibrate
from ..gradients import Checkpoint, Job, choose_plan, gather
from ..model import (
    Target,
    base_model,
    check_base,
    check_new_name,
    distributed,
    hash_model,
    hash_targets,
    require_adapter,
    resolve_layers,
    resolve_targets,
)
from ._fit_kl import measure_fit_kl
from ._rank_allocation import LARGEST, allocate
from .config import PerTAConfig
from .layer import collector_of, edit_copies, edit_layer, limits_of
from .weightings import resolve_weighting
from .weightings.weighting import Weighting

HELD_OUT = "held-out retain"


_FIGURES = ("energy", "energy_kept", "excess_error", "metric_error")


def add_perta_adapter(
    model: nn.Module,
    config: PerTAConfig,
    forget: Any = None,
    retain: Any = None,
    *,
    forget_adapter: str = "forget",
    adapter_name: str = "perta_unlearn",
    task_adapter: str | None = None,
    tokenizer: Any = None,
    checkpoint_dir: str | Path | None = None,
    show_progress_bar: bool = True,
) -> PerTAProvenance:
    """Put the negative adapter on the model, beside the adapters that it has; turn it on with ``stack_adapters``.

    Arguments, errors and report as for ``get_perta_state_dict``; ``adapter_name`` is the new adapter's name, without
    dots.
    """
    check_new_name(model, adapter_name)
    lora_config, state_dict, provenance = get_perta_state_dict(
        model,
        config,
        forget,
        retain,
        forget_adapter=forget_adapter,
        task_adapter=task_adapter,
        tokenizer=tokenizer,
        checkpoint_dir=checkpoint_dir,
        show_progress_bar=show_progress_bar,
    )
    add_adapter(model, lora_config, state_dict, adapter_name)
    return provenance


def get_perta_state_dict(
    model: nn.Module,
    config: PerTAConfig,
    forget: Any = None,
    retain: Any = None,
    *,
    forget_adapter: str = "forget",
    task_adapter: str | None = None,
    tokenizer: Any = None,
    checkpoint_dir: str | Path | None = None,
    show_progress_bar: bool = True,
) -> EmittedAdapter:
    """The negative adapter as a LoRA config and state dict, without touching the model.

    Args:
        model: a model with the forget adapter on it, in float or 4 bit; which adapters are active does not matter.
        config: every knob.
        forget: what must go: a dataloader, a ``datasets.Dataset``, a list of rows, or a path to JSON lines.
            Only ``weighting="uniform"`` goes without data.
        retain: what must stay, likewise.
        forget_adapter: name of the adapter that was trained on the forget set alone, at theta_0.
        task_adapter: name of the adapter that makes theta_full of theta_0; needed where ``gradients_at="full"`` or
            ``strength="auto"``, and the base alone is not theta_full.
        tokenizer: needed where data is text.
        checkpoint_dir: where a run that is cut off leaves what it has; the same call again goes on from there. It stays
            there when the run is done; delete it then.

    Where ``torch.distributed`` is initialised, every process must call this; they share the data, and each gets the
    whole result.

    Raises:
        ConfigError: the run cannot keep within ``max_memory`` and ``host_memory``; the model is sharded.
        AdapterError, UnsupportedLayerError: the forget adapter cannot be negated, before any compute.
        DataError: a set is missing, empty or malformed, or the two sets are one.
        NumericalError: a loss, gradient or factor is not finite.
        OutputError: ``checkpoint_dir`` is another run's, or cannot be written.
    """
    seconds: dict[str, float] = {}
    distributed.refuse_sharded(model)
    weighting = resolve_weighting(config.weighting, config.power)
    targets = resolve_targets(model, forget_adapter)
    if task_adapter is not None:
        if task_adapter == forget_adapter:
            raise AdapterError(f"the task adapter and the forget adapter are both {task_adapter!r}; expected two names")
        require_adapter(model, task_adapter)
        check_base(model, task_adapter)
    _check_inputs(config, targets)
    if config.allocation == "pattern" and any(target.parameter is not None for target in targets):
        raise UnsupportedLayerError("allocation='pattern' knows layers, not expert parameters; use 'padded'")
    fit_rank, emitted_rank = _ranks(config, targets)
    sets = {"forget": forget, "retain": retain}
    samples = _load_sets(sets, config, weighting, tokenizer)
    goal = None
    if config.strength == "auto":
        goal = (
            Goal(config.target_forget_loss)
            if config.target_forget_loss
            else Goal(retain_tolerance=config.retain_tolerance)
        )
        samples = _with_held_out(samples)
        config = dataclasses.replace(config, strength=1.0)
    adapters = [task_adapter] if config.gradients_at == "full" and task_adapter else []
    checkpoint = None
    if checkpoint_dir is not None and weighting.statistic is not None:
        with distributed.failing_together(), _timed(seconds, "hashing the model"):
            run = _describe_run(model, config, targets, samples, adapters)
            checkpoint = Checkpoint(checkpoint_dir, run, writes=distributed.is_main())
    weighed = {name: found for name, found in samples.items() if name != HELD_OUT}
    dense: dict[str, Tensor] | None = {} if config.fit_kl_samples and "retain" in samples else None
    edited = _edit_all(
        model, targets, config, weighting, weighed, adapters, fit_rank, checkpoint, seconds, show_progress_bar, dense
    )
    factors = {target.name: edited[target.name][0] for target in targets}
    layers = [edited[target.name][1] for target in targets]
    if config.allocation != "uniform":
        factors, layers = _allocated(factors, layers, emitted_rank or config.rank or fit_rank)
        emitted_rank = None
    rank = emitted_rank or servable_rank(max(f.rank for f in factors.values()))
    patterned = config.allocation == "pattern"
    lora_config, state_dict = build_adapter(model, factors, rank, torch_dtype(config.dtype), patterned=patterned)
    provenance = PerTAProvenance(
        config=config.to_dict(),
        base_model=describe_base(model),
        forget_adapter={"name": forget_adapter, "sha256": hash_targets(targets)},
        task_adapter=task_adapter,
        data={name: {"samples": len(s), "sha256": fingerprint(s)} for name, s in samples.items()},
        rank=rank,
        layers=layers,
        versions=versions(),
        seconds=seconds,
    )
    if all(factors[name].metric_error == 0 for name in factors):
        provenance.fit_kl = 0.0
    elif dense is not None and all(name in dense for name, f in factors.items() if f.metric_error > 0):
        with _timed(seconds, "fit_kl"), _added(model, lora_config, state_dict, "perta_fit_kl") as name:
            provenance.fit_kl = measure_fit_kl(
                model,
                samples["retain"][: config.fit_kl_samples],
                {target.base_layer: dense.get(target.name) for target in targets},
                name,
                with_adapters=[task_adapter] if task_adapter else [],
                batch_size=config.batch_size,
            )
    if goal is not None:
        with _timed(seconds, "strength"):
            state_dict, provenance = _calibrated(
                model,
                goal,
                samples,
                lora_config,
                state_dict,
                provenance,
                forget_adapter,
                task_adapter,
                show_progress_bar,
            )
    return EmittedAdapter(lora_config, state_dict, provenance)


def _allocated(
    factors: dict[str, Factors], layers: list[LayerProvenance], rank: int | float
) -> tuple[dict[str, Factors], list[LayerProvenance]]:
    """Ranks spread over the layers, and what that made of each."""
    factors = allocate(factors, rank)
    changed = [
        dataclasses.replace(layer, rank=f.rank, energy_kept=f.energy_kept, metric_error=f.metric_error)
        for layer, f in zip(layers, factors.values(), strict=True)
    ]
    return factors, changed


def _with_held_out(samples: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """Every fourth sample of the retain set set aside: it gives no gradient, and judges strengths."""
    missing = [name for name in ("forget", "retain") if name not in samples]
    if missing or len(samples["retain"]) < 4:
        found = "none" if "retain" in missing else f"{len(samples['retain'])}"
        raise DataError(
            "strength='auto' judges on the forget set and on held-out retain samples; expected both sets and at least "
            f"4 retain samples, found {'no forget set' if 'forget' in missing else found + ' retain samples'}"
        )
    retain = samples["retain"]
    held_out = retain[3::4]
    return {**samples, "retain": [s for i, s in enumerate(retain) if i % 4 != 3], HELD_OUT: held_out}


def _calibrated(
    model: nn.Module,
    goal: Goal,
    samples: dict[str, list[Sample]],
    lora_config: LoraConfig,
    state_dict: dict[str, Tensor],
    provenance: PerTAProvenance,
    forget_adapter: str,
    task_adapter: str | None,
    show_progress_bar: bool,
) -> tuple[dict[str, Tensor], PerTAProvenance]:
    """The adapter at the strength that meets the goal; it is on the model only while it is tried."""
    with _added(model, lora_config, state_dict, "perta_strength_search") as name:
        calibration = calibrate(
            model,
            goal,
            samples["forget"],
            samples[HELD_OUT],
            adapter_name=name,
            with_adapters=[task_adapter] if task_adapter else [],
            negated_adapter=forget_adapter,
            show_progress_bar=show_progress_bar and distributed.is_main(),
        )
    scaled = EmittedAdapter(lora_config, state_dict, provenance).scaled(calibration.strength)
    _, state_dict, provenance = scaled.with_calibration(calibration)
    return state_dict, provenance


def _edit_all(
    model: nn.Module,
    targets: list[Target],
    config: PerTAConfig,
    weighting: Weighting,
    samples: dict[str, list[Sample]],
    adapters: list[str],
    rank: int | float,
    checkpoint: Checkpoint | None,
    seconds: dict[str, float],
    show_progress_bar: bool,
    dense: dict[str, Tensor] | None = None,
) -> dict[str, tuple[Factors, LayerProvenance]]:
    """Layer name -> its factors, and what was done. A layer's statistics are freed as soon as it has its factors.

    Edits before they are fitted go into ``dense``, if it is given; an earlier run's are gone.
    """
    if weighting.statistic is None:
        with _timed(seconds, "weights and factors"):
            return {target.name: edit_layer(target, config, weighting, {}, rank, dense) for target in targets}
    edited = _load_edited(checkpoint, targets)
    if len(edited) == len(targets):
        return edited
    with _timed(seconds, "planning"):
        collector = collector_of(config)
        plan = choose_plan(
            model,
            targets,
            samples,
            collector,
            limits_of(config),
            weighting.statistic,
            adapters,
            edit_copies(config),
            checkpoint,
        )
    if show_progress_bar and distributed.is_main():
        resumed = f"\n      {len(edited)} layers are done already, by an earlier run" if edited else ""
        tqdm.write(f"{plan}{resumed}", file=sys.stderr)
    job = Job(
        model,
        {target.name: target for target in targets},
        collector,
        weighting.statistic,
        adapters,
        plan,
        done=set(edited),
        checkpoint=checkpoint,
        show_progress_bar=show_progress_bar,
    )
    with closing(gather(job, samples)) as groups, _timed(seconds, "gradients, weights and factors"):
        for group, found in groups:
            for target in group:
                pair = {name: per_layer.pop(target.name) for name, per_layer in found.items()}
                edited[target.name] = edit_layer(target, config, weighting, pair, rank, dense)
            if checkpoint is not None:
                with distributed.failing_together():
                    _save_edited(checkpoint, [target.name for target in group], edited)
    return edited


def _save_edited(checkpoint: Checkpoint, names: list[str], edited: dict[str, tuple[Factors, LayerProvenance]]) -> None:
    tensors, record = {}, {}
    for name in names:
        factors, layer = edited[name]
        tensors |= {f"{name}|A": factors.A, f"{name}|B": factors.B}
        figures = [getattr(factors, name) for name in _FIGURES]
        record[name] = [figures, dataclasses.asdict(layer)]
    checkpoint.save(f"layers-{len(edited):06d}", tensors, record)
    for entry in checkpoint.names():
        if entry.startswith("sums-"):
            checkpoint.delete(entry)


def _load_edited(checkpoint: Checkpoint | None, targets: list[Target]) -> dict[str, tuple[Factors, LayerProvenance]]:
    edited: dict[str, tuple[Factors, LayerProvenance]] = {}
    with distributed.failing_together():
        if checkpoint is not None and distributed.is_main():
            for entry in checkpoint.names():
                kept = checkpoint.load(entry) if entry.startswith("layers-") else None
                tensors, record = kept or ({}, {})
                for name, (figures, layer) in record.items():
                    factors = Factors(tensors[f"{name}|A"], tensors[f"{name}|B"], *figures)
                    edited[name] = factors, LayerProvenance.from_dict(layer)
    return distributed.from_main({t.name: edited[t.name] for t in targets if t.name in edited})


@contextmanager
def _added(model: nn.Module, lora_config: LoraConfig, state_dict: dict[str, Tensor], name: str) -> Iterator[str]:
    """The adapter on the model, for the length of the block."""
    add_adapter(model, lora_config, state_dict, name)
    try:
        yield name
    finally:
        model.delete_adapter(name)  # type: ignore[operator]


def _describe_run(
    model: nn.Module,
    config: PerTAConfig,
    targets: list[Target],
    samples: dict[str, list[Sample]],
    adapters: list[str],
) -> dict[str, Any]:
    """What two runs must share for one to go on where the other stopped: not the memory that they may take."""
    settings = {k: v for k, v in config.to_dict().items() if k not in ("max_memory", "host_memory")}
    return {
        "format": 1,
        "model": hash_model(base_model(model)),
        "forget adapter": hash_targets(targets),
        "adapters that are on": {name: hash_targets(resolve_layers(model, name)) for name in adapters},
        "data": {name: fingerprint(found) for name, found in samples.items()},
        "config": settings,
        "versions": versions(),
    }


def _ranks(config: PerTAConfig, targets: list[Target]) -> tuple[int | float, int | None]:
    """(rank or energy to fit each layer at, rank to emit or None where the energy will tell)."""
    if isinstance(config.rank, float):
        return config.rank if config.allocation == "uniform" else (1 + config.rank) / 2, None
    rank = config.rank or max(target.rank for target in targets)
    if config.allocation != "uniform":
        return min(LARGEST * rank, SERVABLE_RANKS[-1]), rank
    return rank, servable_rank(rank)


def _load_sets(
    sets: dict[str, Any], config: PerTAConfig, weighting: Weighting, tokenizer: Any
) -> dict[str, list[Sample]]:
    if weighting.statistic is None:
        sets = {name: data for name, data in sets.items() if data is not None}
    samples = {
        name: load_samples(
            data,
            tokenizer,
            max_length=config.max_length,
            max_samples=config.max_samples,
            seed=config.seed,
            name=f"the {name} set",
        )
        for name, data in sets.items()
    }
    if len(samples) == 2 and fingerprint(samples["forget"]) == fingerprint(samples["retain"]):
        raise DataError("the forget set and the retain set are the same samples; nothing tells what to keep")
    return samples


def _check_inputs(config: PerTAConfig, targets: list[Target]) -> None:
    """Refuse what needs the inputs of layers whose inputs are not met."""
    wishes = {
        "input_directions=True": config.input_directions,
        "fit='second-moment'": config.fit == "second-moment",
        "fit_kl_samples": config.fit_kl_samples,
    }
    wish = next((name for name, wished in wishes.items() if wished), None)
    expert = next((target.name for target in targets if target.parameter is not None), None)
    if expert is not None and wish is not None:
        raise UnsupportedLayerError(
            f"{expert}: {wish} needs the layer's inputs, which are not met for expert parameters; leave "
            "input_directions unset (experts then go without), fit_kl_samples at 0, and use fit='truncated' or "
            "'weighted'"
        )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)
