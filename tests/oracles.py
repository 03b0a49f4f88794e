"""Slow and obvious implementations of what the package computes, without its code."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import tables
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn


class PlainLayer(nn.Module):
    """x W^T + bias, plus s (x A^T) B^T for every active adapter; W [O, I] can require a gradient."""

    def __init__(self, wrapper: nn.Module, adapters: list[str]) -> None:
        super().__init__()
        layer = wrapper.get_base_layer()
        self.weight = nn.Parameter(float_weight(layer), requires_grad=False)
        self.bias = None if layer.bias is None else layer.bias.detach().clone()
        self.branches = [
            (wrapper.lora_A[name].weight.detach(), wrapper.lora_B[name].weight.detach(), wrapper.scaling[name])
            for name in adapters
            if name in wrapper.lora_A
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        for A, B, scaling in self.branches:
            y = y + scaling * (x @ A.T @ B.T)
        return y


def float_weight(layer: nn.Module) -> Tensor:
    """The layer's weight [O, I] in floating point, in whatever form it is stored."""
    by_class = {row.layer_class: row.float_weight for row in tables.LAYER_ROWS.values()}
    return next(by_class[ancestor](layer) for ancestor in type(layer).__mro__ if ancestor in by_class)


@dataclass(frozen=True)
class Adapted:
    """One weight [O, I], of a layer or of one expert, with its adapter: s * B @ A, A [R, I], B [O, R]."""

    A: Tensor
    B: Tensor
    scaling: float
    wrapper: nn.Module
    name: str
    expert: int | None = None

    @property
    def delta(self) -> Tensor:
        """[O, I], in float64."""
        return self.scaling * (self.B.double() @ self.A.double())

    @property
    def delta_by_peft(self) -> Tensor:
        """[O, I], as PEFT computes it."""
        delta = self.wrapper.get_delta_weight(self.name)
        if delta.dim() == 3:
            return delta[self.expert].T if _is_transposed(self.wrapper.get_base_layer()) else delta[self.expert]
        return delta.T if getattr(self.wrapper, "fan_in_fan_out", False) else delta


def adapted_layers(model: PeftModel, name: str) -> dict[str, nn.Module]:
    """Layer name -> PEFT's wrapper, for every layer that carries the adapter; an expert parameter counts as a layer."""
    wrappers = {}
    for path, module in model.get_base_model().named_modules():
        if name in getattr(module, "lora_A", {}):
            if isinstance(module, ParamWrapper):  # nested, one per parameter
                path = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            wrappers[path] = module
    return wrappers


def adapted_weights(model: PeftModel, name: str) -> dict[str, Adapted]:
    """Weight name -> the weight's adapter; each expert has a weight of its own."""
    weights = {}
    for path, wrapper in adapted_layers(model, name).items():
        A, B = wrapper.lora_A[name].weight.detach(), wrapper.lora_B[name].weight.detach()
        scaling = wrapper.scaling[name]
        if not isinstance(wrapper, ParamWrapper):
            weights[path] = Adapted(A, B, scaling, wrapper, name)
            continue
        count = wrapper.num_experts
        rank = len(A) // count
        for expert in range(count):
            rows = [expert * rank + k for k in range(rank)]
            columns = [k * count + expert for k in range(rank)]
            weights[f"{path}[{expert}]"] = Adapted(A[rows], B[:, columns], scaling, wrapper, name, expert)
    return weights


def plain_model(model: PeftModel, adapters: list[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A model without PEFT and without packed weights that computes what ``model`` computes with these adapters on.

    Returns:
        The model, and its weights by layer name: [O, I], or as they are stored if a module holds all experts.
    """
    plain = copy.deepcopy(model.get_base_model()).eval().requires_grad_(False)
    plain.config._experts_implementation = "eager"
    weights = {}
    for name, wrapper in list(plain.named_modules()):
        if not hasattr(wrapper, "lora_A") or name.endswith(".base_layer"):
            continue
        if isinstance(wrapper, ParamWrapper):
            layer, parameters = _plain_experts(wrapper, adapters)
            weights |= {f"{name}.{parameter}": weight for parameter, weight in parameters.items()}
        else:
            layer = PlainLayer(wrapper, adapters)
            weights[name] = layer.weight
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer)
    return plain.eval(), weights


def _plain_experts(wrapper: nn.Module, adapters: list[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The module that holds the experts, and its adapted parameters with the adapters' deltas added."""
    experts, parameters = wrapper.get_base_layer(), {}
    while isinstance(wrapper, ParamWrapper):
        weight = wrapper.get_param().detach().clone()
        for name in adapters:
            if name in wrapper.lora_A:
                weight += wrapper.get_delta_weight(name).detach()
        parameters[wrapper.parameter_name] = nn.Parameter(weight, requires_grad=False)
        wrapper = wrapper.base_layer
    for parameter, weight in parameters.items():
        setattr(experts, parameter, weight)
    return experts, parameters


def _is_transposed(experts: nn.Module) -> bool:
    return getattr(experts, "is_transposed", False)


def sample_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The mean next-token negative log-likelihood of one unpadded sample, one token at a time."""
    logits = model(input_ids=input_ids.unsqueeze(0)).logits[0]
    losses = []
    for position in range(1, len(labels)):
        if labels[position] != -100:
            log_probabilities = torch.log_softmax(logits[position - 1], dim=-1)
            losses.append(-log_probabilities[labels[position]])
    return torch.stack(losses).mean()


def sample_gradients(model: PeftModel, name: str, samples: list, adapters: list[str]) -> dict[str, Tensor]:
    """Weight name -> [N, O, I]: the gradient of each sample's loss, one sample at a time."""
    plain, weights = plain_model(model, adapters)
    layers = adapted_layers(model, name)
    wanted = {key: weights[key].requires_grad_(True) for key in layers}
    gradients: dict[str, list[Tensor]] = {}
    for sample in samples:
        loss = sample_loss(plain, sample.input_ids, sample.labels)
        for key, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
            if not isinstance(layers[key], ParamWrapper):
                gradients.setdefault(key, []).append(gradient)
                continue
            transposed = _is_transposed(layers[key].get_base_layer())
            for expert, of_expert in enumerate(gradient if gradient.dim() == 3 else [gradient]):
                gradients.setdefault(f"{key}[{expert}]", []).append(of_expert.T if transposed else of_expert)
    return {key: torch.stack(by_sample) for key, by_sample in gradients.items()}


def factor_gradients(adapted: Adapted, weight_gradients: Tensor) -> dict[str, Tensor]:
    """The chain rule for W + s B A, per sample: A [N, R, I] and B [N, O, R] from G [N, O, I]."""
    scaling = adapted.scaling
    A, B = adapted.A.to(weight_gradients.dtype), adapted.B.to(weight_gradients.dtype)
    return {
        "A": torch.stack([scaling * (B.T @ gradient) for gradient in weight_gradients]),
        "B": torch.stack([scaling * (gradient @ A.T) for gradient in weight_gradients]),
    }


def ratio(forget: float, retain: float, power: float) -> float:
    """f^tau / (f^tau + r^tau) of two Python floats, computed with logarithms."""
    if power == 0:
        return 0.5
    if forget == 0:
        return 0.0
    if retain == 0:
        return 1.0
    difference = power * (math.log(retain) - math.log(forget))
    return 1 / (1 + math.exp(difference)) if difference < 700 else 0.0


def best_approximation(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank in the Frobenius norm, by a full SVD in float64."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=True)
    return sum(
        (S[k] * torch.outer(U[:, k], Vh[k]) for k in range(min(rank, len(S)))), torch.zeros_like(matrix).double()
    )
