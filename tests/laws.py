"""Each property of the package as one assertion; the tests apply them to every row of the tables."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy
import oracles
import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_perta import save_perta_adapter
from peft_perta.gradients import Collector, Job, Plan, gather, sweep
from peft_perta.model import resolve_targets
from peft_perta.perta import GRANULARITIES

WeightFunction = Callable[[Tensor, Tensor, float], Tensor]
HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


# Weights


def weights_lie_in_0_1(weigh: WeightFunction, forget: Tensor, retain: Tensor, power: float) -> None:
    weights = weigh(forget, retain, power)
    assert weights.shape == forget.shape
    assert bool(((weights >= 0) & (weights <= 1)).all()), weights  # NaN fails both


def weights_grow_with_forget(weigh: WeightFunction, forget: Tensor, more: Tensor, retain: Tensor, power: float) -> None:
    """More gradient on the forget set never means a smaller weight."""
    tolerance = 4 * torch.finfo(forget.dtype).eps
    assert bool((weigh(forget + more, retain, power) >= weigh(forget, retain, power) - tolerance).all())


def weights_ignore_a_common_scale(
    weigh: WeightFunction, forget: Tensor, retain: Tensor, power: float, scale: float
) -> None:
    torch.testing.assert_close(
        weigh(forget * scale, retain * scale, power), weigh(forget, retain, power), rtol=1e-5, atol=1e-6
    )


def nothing_known_is_nothing_changed(weigh: WeightFunction, power: float) -> None:
    """0/0 is 0."""
    zeros = torch.zeros(3, 2)
    assert not weigh(zeros, zeros, power).any()


def power_0_is_one_half(weigh: WeightFunction, forget: Tensor, retain: Tensor) -> None:
    assert torch.equal(weigh(forget, retain, 0.0), torch.full_like(forget, 0.5))


# Gradients


def hooks_equal_the_loop(
    model: PeftModel,
    samples: list,
    granularity: str,
    statistic: str,
    adapters: list[str],
    tolerance: float,
    batch_size: int = 2,
) -> None:
    """The streamed sums equal those of a loop over the samples with dense autograd."""
    expected = sums_by_the_loop(model, samples, granularity, statistic, adapters)
    sums = swept(model, samples, granularity, statistic, adapters, batch_size)
    sums_are(sums, expected, tolerance)
    assert {of_layer.samples for of_layer in sums.values()} == {len(samples)}


def sums_by_the_loop(
    model: PeftModel, samples: list, granularity: str, statistic: str, adapters: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Layer name -> the sums that the granularity asks for."""
    weight_gradients = oracles.sample_gradients(model, "forget", samples, adapters)
    expected = {}
    for name, adapted in oracles.adapted_weights(model, "forget").items():
        per_sample = {"weight": weight_gradients[name]} if "delta" in granularity else {}
        if granularity != "delta":
            per_sample |= oracles.factor_gradients(adapted, weight_gradients[name])
        expected[name] = {
            key: gradient.sum(0) if statistic == "mean" else gradient.square().sum(0)
            for key, gradient in per_sample.items()
        }
    assert all(total.norm() > 0 for sums in expected.values() for total in sums.values()), (
        "sums of zero would prove nothing"
    )
    return expected


def sums_are(sums: dict[str, Any], expected: dict[str, dict[str, Tensor]], tolerance: float) -> None:
    assert set(sums) == set(expected)
    for name, totals in expected.items():
        assert set(sums[name].gradients) == set(totals)
        for key, total in totals.items():
            assert sums[name].gradients[key].shape == total.shape
            close(sums[name].gradients[key], total, tolerance, f"{name} {key}")


def batches_do_not_matter(model: PeftModel, samples: list, granularity: str, statistic: str, tolerance: float) -> None:
    one, five = (swept(model, samples, granularity, statistic, [], size) for size in (1, 5))
    for name in one:
        for key, total in one[name].gradients.items():
            close(five[name].gradients[key], total, tolerance, f"{name} {key}")


def job_of(
    model: PeftModel,
    sets: dict[str, list],
    granularity: str = "delta",
    statistic: str = "mean",
    adapters: list[str] | None = None,
    **settings: Any,
) -> Job:
    """The sums that a granularity asks for, of every layer of the forget adapter."""
    collector = Collector((GRANULARITIES[granularity],))
    settings = {"show_progress_bar": False, **settings}
    return Job(model, resolve_targets(model, "forget"), sets, collector, statistic, adapters or [], **settings)  # type: ignore[arg-type]


def swept(
    model: PeftModel, samples: list, granularity: str, statistic: str, adapters: list[str], batch_size: int
) -> dict[str, Any]:
    """Layer name -> its sums, by one sweep."""
    return sweep(job_of(model, {"forget": samples}, granularity, statistic, adapters), "forget", batch_size)


def gathered(
    model: PeftModel,
    sets: dict[str, list],
    granularity: str,
    statistic: str,
    plan: Plan,
    adapters: list[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Set name -> layer name -> sums, over all groups of a plan; every layer is in exactly one group."""
    job = job_of(model, sets, granularity, statistic, adapters)
    collected: dict[str, dict[str, Any]] = {name: {} for name in sets}
    with closing(gather(job, plan)) as groups:
        for group, sums in groups:
            names = {target.name for target in group}
            assert names
            for name, of_set in sums.items():
                assert set(of_set) == names
                assert not names & set(collected[name])
                collected[name] |= of_set
    for name, samples in sets.items():
        assert set(collected[name]) == {target.name for target in job.targets}
        assert {s.samples for s in collected[name].values()} == {len(samples)}
    return collected


def close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Equal within a relative error in the Frobenius norm."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:g}"


# Edits


def emitted_delta_is(
    expected: dict[str, Tensor], result: tuple, base: nn.Module, directory: Path, tolerance: float
) -> PeftModel:
    """Saved and then loaded by PEFT alone, the adapter adds the expected [O, I] deltas, and zero elsewhere."""
    save_perta_adapter(directory, *result)
    loaded = PeftModel.from_pretrained(base, directory)
    weights = oracles.adapted_weights(loaded, "default")
    assert set(expected) <= set(weights)
    scale = max(delta.norm() for delta in expected.values())
    for name, adapted in weights.items():
        delta = adapted.delta_by_peft
        if name in expected:
            assert delta.shape == expected[name].shape
            assert (delta.double() - expected[name].double()).norm() <= tolerance * scale, name
        else:
            assert not delta.any(), f"{name} was not to change"
    return loaded


def strength_0_is_no_edit(deltas: Callable[[float], dict[str, Tensor]]) -> None:
    assert not any(delta.any() for delta in deltas(0.0).values())


def edit_is_linear_in_strength(deltas: Callable[[float], dict[str, Tensor]]) -> None:
    once, thrice = deltas(1.0), deltas(-3.0)
    for name, delta in once.items():
        assert delta.any()
        close(thrice[name], -3.0 * delta, 1e-5, name)


def uniform_is_task_arithmetic(deltas: dict[str, Tensor], model: PeftModel, strength: float) -> None:
    """With weights of 1, the negative adapter is the negated forget adapter."""
    for name, adapted in oracles.adapted_weights(model, "forget").items():
        close(deltas[name], -strength * adapted.delta, 1e-5, name)


def deltas_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer name -> B @ A of an emitted state dict; alpha equals the rank, so the scaling is 1."""
    deltas = {}
    for key, A in state_dict.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = state_dict[key.replace(".lora_A.", ".lora_B.")]
            deltas[name] = B.double() @ A.double()
    assert deltas
    return deltas


# The model's state


def snapshot(model: nn.Module, without: str | None = None) -> dict[str, Any]:
    """Everything about a model that a caller could observe; ``without`` names an adapter whose tensors are left out."""
    skipped = f".{without}." if without else None
    state: dict[str, Any] = {}
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if skipped and skipped in name:
                continue
            state[f"{kind} {name}"] = (
                str(tensor.device),
                tensor.dtype,
                tuple(tensor.shape),
                tensor.requires_grad,
                _bytes(tensor),
                None if tensor.grad is None else _bytes(tensor.grad),
            )
            quant_state = getattr(tensor, "quant_state", None)
            if quant_state is not None:
                state[f"quantisation {name}"] = (
                    _bytes(quant_state.absmax),
                    getattr(quant_state, "packing_format_for_cpu", False),
                )
    for name, module in model.named_modules():
        if skipped and (skipped in f"{name}." or name.endswith(f".{without}")):
            continue
        state[f"module {name}"] = (type(module), module.training)
        state[f"hooks {name}"] = [(kind, list(vars(module)[kind].values())) for kind in HOOKS if vars(module)[kind]]
        state[f"attributes {name}"] = sorted(vars(module))
        state[f"children {name}"] = sorted(set(module._modules) - {without})
        for attribute in ("_active_adapter", "_disable_adapters", "merged_adapters", "gradient_checkpointing"):
            if hasattr(module, attribute):
                state[f"{attribute} {name}"] = str(getattr(module, attribute))
        for attribute in ("scaling", "r"):
            if isinstance(getattr(module, attribute, None), dict):
                by_adapter = getattr(module, attribute).items()
                state[f"{attribute} {name}"] = {key: value for key, value in by_adapter if key != without}
        for attribute in ("compute_dtype", "compute_type_is_set"):
            if hasattr(module, attribute):
                state[f"{attribute} {name}"] = getattr(module, attribute)
    for name in ("config", "generation_config"):
        if hasattr(model, name):
            state[name] = str(getattr(model, name))
    state["adapters"] = sorted(set(getattr(model, "peft_config", {})) - {without})
    state["active"] = str(getattr(model, "active_adapter", None))
    state["random"] = (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        numpy.random.get_state()[1].tobytes(),
    )
    return state


@contextmanager
def untouched(model: nn.Module, without: str | None = None) -> Iterator[None]:
    """After the block, with or without an exception, the model and the random state are as before."""
    before = snapshot(model, without)
    try:
        yield
    finally:
        is_as_before(model, before, without)


def is_as_before(model: nn.Module, before: dict[str, Any], without: str | None = None) -> None:
    after = snapshot(model, without)
    changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    assert not changed, f"changed: {changed[:8]}"


def _bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta:  # offloaded
        return b""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
