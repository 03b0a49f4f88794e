"""PerTA: weigh the forget adapter parameter by parameter, negate it, emit it as plain LoRA.

Reference: Cai et al. 2026, arXiv 2601.22030. With weighting='uniform' this is plain task arithmetic (Ilharco et al.
2023, arXiv 2212.04089).
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..adapter import add_adapter, build_adapter, emitted_dtype
from ..config import PerTAConfig, servable_rank
from ..data import Sample, fingerprint, load_samples
from ..errors import AdapterError, DataError, NumericalError
from ..factorize import Factors, factorize
from ..gradients import sweep
from ..granularities import GRANULARITIES
from ..report import LayerReport, PerTAReport, WeightDistribution
from ..stack import require_adapter
from ..statistics import Statistic
from ..targets import Target, base_model, base_name, check_base, check_new_name, hash_targets, resolve_targets
from ..weightings import Weighting, resolve_weighting, weigh


def add_perta_adapter(
    model: nn.Module,
    config: PerTAConfig,
    forget_dataloader: Any = None,
    retain_dataloader: Any = None,
    *,
    forget_adapter: str = "forget",
    adapter_name: str = "perta_unlearn",
    task_adapter: str | None = None,
    tokenizer: Any = None,
    show_progress_bar: bool = True,
) -> PerTAReport:
    """Put the negative adapter on the model, beside the adapters that it has; turn it on with ``stack_adapters``.

    Arguments, errors and report as for ``get_perta_state_dict``; ``adapter_name`` is the new adapter's name, without
    dots.
    """
    check_new_name(model, adapter_name)
    lora_config, state_dict, report = get_perta_state_dict(
        model,
        config,
        forget_dataloader,
        retain_dataloader,
        forget_adapter=forget_adapter,
        task_adapter=task_adapter,
        tokenizer=tokenizer,
        show_progress_bar=show_progress_bar,
    )
    add_adapter(model, lora_config, state_dict, adapter_name)
    return report


def get_perta_state_dict(
    model: nn.Module,
    config: PerTAConfig,
    forget_dataloader: Any = None,
    retain_dataloader: Any = None,
    *,
    forget_adapter: str = "forget",
    task_adapter: str | None = None,
    tokenizer: Any = None,
    show_progress_bar: bool = True,
) -> tuple[LoraConfig, dict[str, Tensor], PerTAReport]:
    """The negative adapter as a LoRA config and state dict, without touching the model.

    Args:
        model: a model with the forget adapter on it, in float or 4 bit; which adapters are active does not matter.
        config: every knob.
        forget_dataloader: what must go: a dataloader, a ``datasets.Dataset``, a list of rows, or a path to JSON lines.
            Only ``weighting="uniform"`` goes without data.
        retain_dataloader: what must stay, likewise.
        forget_adapter: name of the adapter that was trained on the forget set alone, at theta_0.
        task_adapter: name of the adapter that makes theta_full of theta_0; needed where ``reference_model="full"`` and
            the base alone is not theta_full.
        tokenizer: needed where data is text.

    Raises:
        AdapterError, UnsupportedLayerError: the forget adapter cannot be negated, before any compute.
        DataError: a set is missing, empty or malformed, or the two sets are one.
        NumericalError: a loss, gradient or factor is not finite.
    """
    seconds: dict[str, float] = {}
    weighting = resolve_weighting(config.weighting, config.power)
    targets = resolve_targets(model, forget_adapter)
    if task_adapter is not None:
        if task_adapter == forget_adapter:
            raise AdapterError(f"the task adapter and the forget adapter are both {task_adapter!r}; expected two names")
        require_adapter(model, task_adapter)
        check_base(model, task_adapter)
    fit_rank, emitted_rank = _ranks(config, targets)
    sets = {"forget": forget_dataloader, "retain": retain_dataloader}
    samples = _load_sets(sets, config, weighting, tokenizer)

    adapters = [task_adapter] if config.reference_model == "full" and task_adapter else []
    statistics = {}
    if weighting.statistic is not None:
        for name, found in samples.items():
            with _timed(seconds, f"gradients on {name}"):
                statistics[name] = sweep(
                    model,
                    targets,
                    found,
                    GRANULARITIES[config.granularity],
                    weighting.statistic,
                    adapters=adapters,
                    batch_size=config.batch_size,
                    name=f"the {name} set",
                    show_progress_bar=show_progress_bar,
                )
    with _timed(seconds, "weights and factors"):
        factors, layers = edit_layers(targets, config, weighting, statistics, fit_rank)
    rank = emitted_rank or servable_rank(max(f.rank for f in factors.values()))
    lora_config, state_dict = build_adapter(model, factors, rank, emitted_dtype(config))
    report = PerTAReport(
        config=config.to_dict(),
        base_model=_describe_base(model),
        forget_adapter={"name": forget_adapter, "sha256": hash_targets(targets)},
        task_adapter=task_adapter,
        data={name: {"samples": len(s), "sha256": fingerprint(s)} for name, s in samples.items()},
        rank=rank,
        layers=layers,
        seconds=seconds,
        versions=_versions(),
    )
    return lora_config, state_dict, report


def edit_layers(
    targets: list[Target],
    config: PerTAConfig,
    weighting: Weighting,
    statistics: Mapping[str, MutableMapping[str, Statistic]],
    rank: int | float,
) -> tuple[dict[str, Factors], list[LayerReport]]:
    """Statistics -> weights -> edit -> factors, one layer at a time: layer name -> factors, and what was done.

    ``statistics`` maps 'forget' and 'retain' to a statistic per layer name; it is empty where the weighting needs
    none. It is used up: a layer's statistics are freed as soon as it has its factors.
    """
    factors, layers = {}, []
    for target in targets:
        pair = {name: per_layer.pop(target.name) for name, per_layer in statistics.items()}
        factors[target.name], layer = _edit_layer(target, config, weighting, pair, rank)
        layers.append(layer)
    return factors, layers


def _ranks(config: PerTAConfig, targets: list[Target]) -> tuple[int | float, int | None]:
    """(rank or energy to fit each layer at, rank to emit or None where the energy will tell)."""
    if isinstance(config.rank, float):
        return config.rank, None
    rank = config.rank or max(target.rank for target in targets)
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


def _edit_layer(
    target: Target, config: PerTAConfig, weighting: Weighting, pair: dict[str, Statistic], rank: int | float
) -> tuple[Factors, LayerReport]:
    granularity = GRANULARITIES[config.granularity]
    if weighting.statistic is None:
        weights = granularity.uniform(target)
    else:
        forget, retain = (granularity.arrange(pair[name].magnitudes()) for name in ("forget", "retain"))
        weights = weigh(weighting, forget, retain, target.name)
    edit = granularity.edit(target, {k: w.to(target.A.dtype) for k, w in weights.items()}, config.strength)
    fitted = factorize(edit, rank)
    if not (bool(torch.isfinite(fitted.A).all()) and bool(torch.isfinite(fitted.B).all())):
        raise NumericalError(f"{target.name}: the edit's factors are not finite; train the forget adapter less")
    layer = LayerReport(
        name=target.name,
        kind=target.kind.name,
        shape=[len(target.B), target.A.shape[1]],
        rank=fitted.rank,
        edit_norm=fitted.energy**0.5,
        energy_kept=fitted.energy_kept,
        weights={key: WeightDistribution.of(value) for key, value in weights.items()},
    )
    return fitted, layer


def _describe_base(model: nn.Module) -> dict[str, Any]:
    config = base_model(model).config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        "name": base_name(model),
        "revision": getattr(config, "_commit_hash", None),
        "quantization": quantization
        and {k: v for k, v in quantization.items() if isinstance(v, (str, int, float, bool))},
    }


def _versions() -> dict[str, str]:
    return {
        name.replace("-", "_"): importlib.metadata.version(name)
        for name in ("peft-perta", "torch", "transformers", "peft", "bitsandbytes")
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)
