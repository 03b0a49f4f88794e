"""Refine any adapter that was made to forget: weigh its A along the input directions of each layer.

The adapter keeps its rank, its B and most of its effect on the forget rows. Its effect on the retain rows shrinks, also
on those that nobody listed but that look like them. Plain negation refined so is PerTA at power 0.

Reference: ours; see ``_input_directions``.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..adapters import (
    EmittedAdapter,
    Factors,
    Product,
    RefinedProvenance,
    build_adapter,
    describe_base,
    factorize,
    servable_rank,
    torch_dtype,
    versions,
)
from ..data import Sample, check_disjoint, check_setting, explained, fingerprint, is_number, load_samples, setting
from ..errors import AdapterError, NumericalError, UnsupportedLayerError
from ..gradients import Collector, InputMoments, Job, Limits, choose_plan, gather
from ..model import (
    Target,
    changed_targets,
    check_base,
    distributed,
    hash_targets,
    require_adapter,
    resolve_targets,
    row_length,
)
from ._input_directions import COPIES, DAMPING, weigh_input_directions
from .config import PerTAConfig

_OF_PERTA = {field.name: field for field in dataclasses.fields(PerTAConfig)}


def _as_in_perta(name: str) -> Any:
    """The field of PerTAConfig of this name."""
    return dataclasses.field(default=_OF_PERTA[name].default, metadata=_OF_PERTA[name].metadata)


def _positive(default: float, help: str) -> Any:
    valid = lambda value: is_number(value) and value > 0  # noqa: E731
    return setting(default, f"{help} A number > 0.", expected="a number > 0", valid=valid)


@explained
@dataclass(frozen=True)
class RefinementSettings:
    """How ``refine_adapter`` weighs the input directions of an adapter.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    retain_weight: float = _positive(
        1.0, "lambda, the weight of the retain inputs: more keeps more of the retain rows, and forgets less."
    )
    damping: float = _positive(
        DAMPING, "Share of the mean energy of an input direction that is added to the retain side, against noise."
    )
    max_length: int | None = _as_in_perta("max_length")
    batch_size: int = _as_in_perta("batch_size")
    max_memory: int | str | None = _as_in_perta("max_memory")
    host_memory: int | str | None = _as_in_perta("host_memory")
    dtype: str = _as_in_perta("dtype")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_setting(field.metadata["valid"](value), field.name, field.metadata["expected"], value)


def refine_adapter(
    model: nn.Module,
    adapter_name: str,
    forget: Any,
    retain: Any,
    settings: RefinementSettings | None = None,
    *,
    task_adapter: str | None = None,
    tokenizer: Any = None,
    show_progress_bar: bool = True,
) -> EmittedAdapter:
    """A <- A C_f (C_f + lambda C_r + d I)^-1 in every layer of an adapter; the model is left as it was.

    C_f and C_r [I, I] are the second moments of the layer's inputs over both sets' tokens, at the full model. The
    result acts a little less on the forget rows than the adapter did, and far less on the retain rows.
    ``extrapolate_adapter`` then finds the factor that forgets as much as you need.

    Args:
        model: carries the adapter; in float, 8 bit or 4 bit. It does not matter which adapters are active.
        adapter_name: the adapter that makes the model forget: trained by any tool, or negated.
        forget: the data to forget, in any form that ``get_perta_state_dict`` takes.
        retain: the data to keep, likewise.
        settings: by default ``RefinementSettings()``.
        task_adapter: the adapter that makes the base the full model, if any. Inputs are read with it on.
        tokenizer: needed where data is text.
        show_progress_bar: show the plan and progress bars.

    Returns:
        The refined adapter, at the same rank. Its provenance says how much of its output is left on each set's inputs.

    Raises:
        ConfigError: the run does not fit the memory, or the model is sharded.
        AdapterError, UnsupportedLayerError: the adapter is untrained or not plain LoRA, or no layer's inputs are known.
        DataError: a set is missing, empty or malformed, or both are the same.
        NumericalError: a loss or a factor is not finite, or the inputs' spectrum too steep for single precision.
    """
    distributed.check_sharding(model)
    settings = settings or RefinementSettings()
    targets = changed_targets(resolve_targets(model, adapter_name))
    _check_task_adapter(model, task_adapter, adapter_name)
    samples = _loaded({"forget": forget, "retain": retain}, tokenizer, row_length(model, settings.max_length))
    job = refinement_job(model, _with_inputs(targets, adapter_name), samples, task_adapter, settings)
    began = time.perf_counter()
    edits, left = _refined(replace(job, show_progress_bar=show_progress_bar), settings)
    factors = {target.name: _finite_factors(target, edits.get(target.name) or _product(target)) for target in targets}
    rank = servable_rank(max(of_layer.rank for of_layer in factors.values()))
    lora_config, state_dict = build_adapter(model, factors, rank, torch_dtype(settings.dtype))
    provenance = RefinedProvenance(
        base_model=describe_base(model),
        adapter={"name": adapter_name, "sha256": hash_targets(targets)},
        task_adapter=task_adapter,
        data={name: {"samples": len(of_set), "sha256": fingerprint(of_set)} for name, of_set in samples.items()},
        settings=dataclasses.asdict(settings),
        left_on_inputs={target.name: left[target.name] for target in job.targets},
        unchanged=[target.name for target in targets if target.name not in left],
        rank=rank,
        versions=versions(),
        seconds={"inputs and factors": round(time.perf_counter() - began, 3)},
    )
    return EmittedAdapter(lora_config, state_dict, provenance)


def _check_task_adapter(model: nn.Module, task_adapter: str | None, adapter_name: str) -> None:
    if task_adapter is None:
        return
    if task_adapter == adapter_name:
        raise AdapterError(f"the task adapter and the adapter to refine are both {task_adapter!r}; expected two names")
    require_adapter(model, task_adapter)
    check_base(model, task_adapter)


def _loaded(sets: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[Sample]]:
    samples = {
        name: load_samples(of_set, tokenizer, max_length=max_length, name=f"the {name} set")
        for name, of_set in sets.items()
    }
    check_disjoint(samples["forget"], samples["retain"])
    return samples


def _with_inputs(targets: Sequence[Target], adapter_name: str) -> list[Target]:
    """The targets that are layers: an expert's parameter has no input that a hook could read."""
    layers = [target for target in targets if target.parameter is None]
    if not layers:
        raise UnsupportedLayerError(
            f"adapter {adapter_name!r} sits on expert parameters alone, whose inputs are unknown; expected an adapter "
            "with a layer, such as the attention's projections"
        )
    return layers


def refinement_job(
    model: nn.Module,
    targets: Sequence[Target],
    samples: Mapping[str, list[Sample]],
    task_adapter: str | None,
    settings: RefinementSettings,
) -> Job:
    """The second moments of the layers' inputs over both sets.

    Args:
        model: the model.
        targets: the layers.
        samples: 'forget' and 'retain' -> samples.
        task_adapter: the adapter that is on, if any.
        settings: of the refinement.
    """
    return Job(
        model=model,
        targets=targets,
        samples=samples,
        collector=Collector(moments=(InputMoments(),)),
        statistic="mean",
        adapters=[task_adapter] if task_adapter else [],
        limits=Limits(settings.batch_size, settings.max_memory, settings.host_memory),
        edit_copies=COPIES,
    )


def _refined(job: Job, settings: RefinementSettings) -> tuple[dict[str, Product], dict[str, dict[str, float]]]:
    """Layer -> its refined product, and layer -> set -> the share of the output that is left on its inputs."""
    plan = choose_plan(job)
    if job.show_progress_bar and distributed.is_main():
        tqdm.write(str(plan), file=sys.stderr)
    edits, left = {}, {}
    with closing(gather(job, plan)) as groups:
        for group, sums in groups:
            for target in group:
                forget, retain = (sums[name].pop(target.name).moments for name in ("forget", "retain"))
                edit, left[target.name] = weigh_input_directions(
                    _product(target), forget, retain, retain_weight=settings.retain_weight, damping=settings.damping
                )
                assert isinstance(edit, Product)
                edits[target.name] = Product(edit.B.cpu(), edit.A.cpu())
    return edits, left


def _product(target: Target) -> Product:
    """What the adapter adds to the weight, without its zero padding."""
    used = target.A.any(1) & target.B.any(0)
    return Product(B=target.scaling * target.B[:, used], A=target.A[used])


def _finite_factors(target: Target, edit: Product) -> Factors:
    factors = factorize(edit, max(edit.A.shape[0], 1))
    if not (bool(torch.isfinite(factors.A).all()) and bool(torch.isfinite(factors.B).all())):
        raise NumericalError(f"{target.name}: expected finite factors, found NaN or infinity; check the adapter")
    return replace(factors, A=factors.A.cpu(), B=factors.B.cpu())
