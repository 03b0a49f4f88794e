"""Methods that edit the forget adapter, and the controls that a claim about them needs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..adapters import add_adapter, extrapolate_adapter
from ..data import load_samples
from ..gradients import choose_plan
from ..model import resolve_targets, row_length
from ..perta import PerTAConfig, get_perta_state_dict, gradient_job, refine_adapter, resolve_weighting
from .method import MakeAdapter, MethodAdapter, Setup, measured

_EXTRAPOLATED, _UNREFINED = "perta_before_extrapolation", "perta_before_refinement"
_REFINEMENT = 2.0  # forward-equivalents: the forward and backward pass that finds the inputs that count


def perta(**options) -> MakeAdapter:
    """PerTA, and plain negation as the weighting 'uniform'. The options are the fields of PerTAConfig."""
    config = PerTAConfig(**options)

    def make(setup: Setup) -> MethodAdapter:
        own = dataclasses.replace(config, seed=setup.seed)
        weighting = resolve_weighting(own.weighting, own.power)
        sets = {} if weighting.statistic is None else {"forget": setup.forget_rows, "retain": setup.retain_rows}
        cost = 0.0
        if weighting.statistic is not None:
            length = row_length(setup.model, own.max_length)
            samples = {n: load_samples(rows, setup.tokenizer, max_length=length, name=n) for n, rows in sets.items()}
            targets = resolve_targets(setup.model, "forget")
            cost = choose_plan(gradient_job(own, weighting.statistic, setup.model, targets, samples)).cost
        lora_config, state_dict, _ = get_perta_state_dict(
            setup.model, own, *sets.values(), tokenizer=setup.tokenizer, show_progress_bar=False
        )
        return MethodAdapter(lora_config, state_dict, cost)

    return make


def extrapolated(make: MakeAdapter, alpha: float) -> MakeAdapter:
    """Another method's adapter, extrapolated to (1 + alpha) times its delta (UIPE)."""

    def make_extrapolated(setup: Setup) -> MethodAdapter:
        start = make(setup)
        add_adapter(setup.model, start.lora_config, start.state_dict, _EXTRAPOLATED)
        try:
            lora_config, state_dict, _ = extrapolate_adapter(setup.model, _EXTRAPOLATED, alpha)
        finally:
            setup.model.delete_adapter(_EXTRAPOLATED)
        return MethodAdapter(lora_config, state_dict, start.forward_equivalents)

    return make_extrapolated


def refined(make: MakeAdapter) -> MakeAdapter:
    """Another method's adapter, weighed along the input directions of its layers. ``make`` is of ``once``."""

    def make_refined(setup: Setup) -> MethodAdapter:
        start = make(setup)
        assert start.effort is not None
        add_adapter(setup.model, start.lora_config, start.state_dict, _UNREFINED)
        try:
            with measured(setup) as effort:
                lora_config, state_dict, _ = refine_adapter(
                    setup.model,
                    _UNREFINED,
                    setup.forget_rows,
                    setup.retain_rows,
                    task_adapter=setup.task_adapter,
                    tokenizer=setup.tokenizer,
                    show_progress_bar=False,
                )
        finally:
            setup.model.delete_adapter(_UNREFINED)
        cost = start.forward_equivalents + _REFINEMENT
        return MethodAdapter(lora_config, state_dict, cost, start.effort.then(effort))

    return make_refined


def random_like(make: MakeAdapter) -> MakeAdapter:
    """Another method's adapter with each layer's delta replaced by a random one of the same rank and Frobenius norm."""

    def make_random(setup: Setup) -> MethodAdapter:
        original = make(setup)
        generator = torch.Generator().manual_seed(setup.seed)
        state_dict = {}
        for key, A in original.state_dict.items():
            if ".lora_A." not in key:
                continue
            key_of_b = key.replace(".lora_A.", ".lora_B.")
            B = original.state_dict[key_of_b]
            random_a, random_b = (
                torch.randn(factor.shape, generator=generator, dtype=torch.float64) for factor in (A, B)
            )
            scale = _delta_norm(A.double(), B.double()) / _delta_norm(random_a, random_b)
            state_dict |= {key: random_a.to(A.dtype), key_of_b: (random_b * scale).to(B.dtype)}
        return dataclasses.replace(original, state_dict=state_dict)

    return make_random


def _delta_norm(A: Tensor, B: Tensor) -> Tensor:
    """The Frobenius norm of B A, without forming it: ||B A||^2 = <B^T B, A A^T>."""
    return (B.T @ B * (A @ A.T)).sum().clamp_min(0).sqrt()
