"""Methods that edit the forget adapter, and the controls that any claim on them needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..adapters import add_adapter, extrapolate_adapter
from ..data import load_samples
from ..gradients import choose_plan
from ..model import resolve_targets
from ..perta import PerTAConfig, get_perta_state_dict, gradient_job, resolve_weighting
from ._method import Made, Setup

Make = Callable[[Setup], Made]


_BEFORE = "perta_before_extrapolation"


def perta(**knobs) -> Make:
    """PerTA, plain negation among its rows: the knobs are those of PerTAConfig."""
    config = PerTAConfig(**knobs)

    def make(setup: Setup) -> Made:
        own = dataclasses.replace(config, seed=setup.seed)
        weighting = resolve_weighting(own.weighting, own.power)
        sets = {} if weighting.statistic is None else {"forget": setup.forget_rows, "retain": setup.retain_rows}
        cost = 0.0
        if weighting.statistic is not None:
            samples = {name: load_samples(rows, setup.tokenizer, name=name) for name, rows in sets.items()}
            targets = resolve_targets(setup.model, "forget")
            cost = choose_plan(gradient_job(own, weighting.statistic, setup.model, targets, samples)).cost
        lora_config, state_dict, _ = get_perta_state_dict(
            setup.model, own, *sets.values(), tokenizer=setup.tokenizer, show_progress_bar=False
        )
        return Made(lora_config, state_dict, cost)

    return make


def extrapolated(make: Make, alpha: float) -> Make:
    """UIPE on top: (1 + alpha) times as far."""

    def further(setup: Setup) -> Made:
        made = make(setup)
        add_adapter(setup.model, made.lora_config, made.state_dict, _BEFORE)
        try:
            lora_config, state_dict, _ = extrapolate_adapter(setup.model, _BEFORE, alpha)
        finally:
            setup.model.delete_adapter(_BEFORE)
        return Made(lora_config, state_dict, made.forward_equivalents)

    return further


def random_like(make: Make) -> Make:
    """In place of each layer's delta a random one of its rank and Frobenius norm."""

    def drawn(setup: Setup) -> Made:
        made = make(setup)
        generator = torch.Generator().manual_seed(setup.seed)
        state_dict = {}
        for key, A in made.state_dict.items():
            if ".lora_A." not in key:
                continue
            other = key.replace(".lora_A.", ".lora_B.")
            B = made.state_dict[other]
            C, D = (torch.randn(found.shape, generator=generator, dtype=torch.float64) for found in (A, B))
            norm = _norm(A.double(), B.double()) / _norm(C, D)
            state_dict |= {key: C.to(A.dtype), other: (D * norm).to(B.dtype)}
        return dataclasses.replace(made, state_dict=state_dict)

    return drawn


def _norm(A: Tensor, B: Tensor) -> Tensor:
    """Of B A, without forming it: ||B A||^2 = <B^T B, A A^T>."""
    return (B.T @ B * (A @ A.T)).sum().clamp_min(0).sqrt()
