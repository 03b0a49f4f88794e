"""The fit's KL: how far the fitted adapter's next-token distributions are from those of the edit itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..data import IGNORED, Batch, Sample, batches
from ..model import input_device, preserved


def measure_fit_kl(
    model: nn.Module,
    samples: list[Sample],
    edits: Mapping[nn.Module, Tensor],
    adapter_name: str,
    *,
    with_adapters: Sequence[str] = (),
    batch_size: int = 8,
) -> float:
    """KL(p || q), the mean over tokens with loss, in nats.

    p is the model with the edits on its layers, q the model with the adapter.

    Args:
        model: the model, with the adapter on it.
        samples: the samples to measure on.
        edits: a layer of the base -> its edit [O, I], which is added to the layer's output while p is computed.
        adapter_name: the adapter.
        with_adapters: adapters that are on for both p and q.
        batch_size: samples per forward pass.
    """
    device = input_device(model)
    total, count = 0.0, 0
    for batch in batches(samples, batch_size):
        with preserved(model, list(with_adapters)), torch.no_grad(), ExitStack() as hooks:
            for layer, edit in edits.items():
                hooks.callback(layer.register_forward_hook(_adding(edit)).remove)
            p = _log_probabilities(model, batch.to(device))
        with preserved(model, [*with_adapters, adapter_name]), torch.no_grad():
            q = _log_probabilities(model, batch.to(device))
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return max(total / max(count, 1), 0.0)


def _adding(edit: Tensor):
    """A forward hook that adds E x to a layer's output."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (args[0].to(edit.dtype) @ edit.to(output.device).T).to(output.dtype)

    return hook


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[tokens with loss, vocabulary], float32."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return torch.log_softmax(logits[batch.labels[:, 1:] != IGNORED].float(), dim=-1)
