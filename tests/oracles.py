"""Slow and obvious: what the library computes by clever means, computed by plain ones, in code of its own."""

from __future__ import annotations

import copy
import math

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class PlainLayer(nn.Module):
    """x W^T + bias, plus s (x A^T) B^T for every adapter that is on; W [O, I] can require a gradient."""

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
    """The layer's weight as [O, I] in floating point, whatever it is stored as."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.float() * (scales.float().unsqueeze(1) * (1 / 127))
    return layer.weight.detach().T.clone() if isinstance(layer, Conv1D) else layer.weight.detach().clone()


def adapter_delta(layer: nn.Module, name: str) -> Tensor:
    """s * B @ A of one adapter on one PEFT layer, [O, I], in float64."""
    A, B = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
    return layer.scaling[name] * (B @ A)


def adapted_layers(model: PeftModel, name: str) -> dict[str, nn.Module]:
    """Layer name -> PEFT's wrapper, of every layer that carries the adapter."""
    named = model.get_base_model().named_modules()
    return {key: module for key, module in named if name in getattr(module, "lora_A", {})}


def plain_model(model: PeftModel, adapters: list[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A model without PEFT or packed weights that computes what ``model`` does with these adapters on, and its weights
    [O, I] by layer name."""
    plain = copy.deepcopy(model.get_base_model()).eval().requires_grad_(False)
    weights = {}
    for name, wrapper in list(plain.named_modules()):
        if hasattr(wrapper, "lora_A"):
            layer = PlainLayer(wrapper, adapters)
            weights[name] = layer.weight
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, layer)
    return plain.eval(), weights


def sample_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood of one sample, alone and unpadded, one token at a time."""
    logits = model(input_ids=input_ids.unsqueeze(0)).logits[0]
    losses = []
    for position in range(1, len(labels)):
        if labels[position] != -100:
            log_probabilities = torch.log_softmax(logits[position - 1], dim=-1)
            losses.append(-log_probabilities[labels[position]])
    return torch.stack(losses).mean()


def sample_gradients(model: PeftModel, name: str, samples: list, adapters: list[str]) -> dict[str, Tensor]:
    """Layer name -> [N, O, I]: the gradient of every sample's loss with respect to the weight, one sample at a time."""
    plain, weights = plain_model(model, adapters)
    wanted = {key: weights[key].requires_grad_(True) for key in adapted_layers(model, name)}
    gradients: dict[str, list[Tensor]] = {key: [] for key in wanted}
    for sample in samples:
        loss = sample_loss(plain, sample.input_ids, sample.labels)
        for key, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
            gradients[key].append(gradient)
    return {key: torch.stack(found) for key, found in gradients.items()}


def factor_gradients(layer: nn.Module, name: str, weight_gradients: Tensor) -> dict[str, Tensor]:
    """The chain rule on W + s B A, per sample: A [N, R, I], B [N, O, R] from G [N, O, I]."""
    A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    scaling = layer.scaling[name]
    A, B = A.to(weight_gradients.dtype), B.to(weight_gradients.dtype)
    return {
        "A": torch.stack([scaling * (B.T @ gradient) for gradient in weight_gradients]),
        "B": torch.stack([scaling * (gradient @ A.T) for gradient in weight_gradients]),
    }


def ratio(forget: float, retain: float, power: float) -> float:
    """f^tau / (f^tau + r^tau) of two Python floats, by logarithms."""
    if power == 0:
        return 0.5
    if forget == 0:
        return 0.0
    if retain == 0:
        return 1.0
    difference = power * (math.log(retain) - math.log(forget))
    return 1 / (1 + math.exp(difference)) if difference < 700 else 0.0


def best_approximation(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank in the Frobenius norm, by a full SVD in float64."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=True)
    return sum(
        (S[k] * torch.outer(U[:, k], Vh[k]) for k in range(min(rank, len(S)))), torch.zeros_like(matrix).double()
    )
