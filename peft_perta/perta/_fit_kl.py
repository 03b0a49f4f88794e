"""How far an adapter is from the edit that it was fitted to, in what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..data import Batch, Sample, batches
from ..errors import UnsupportedLayerError
from ..model import input_device, preserved


def measure_fit_kl(
    model: nn.Module,
    samples: list[Sample],
    edits: Mapping[nn.Module, Tensor | None],
    adapter_name: str,
    *,
    with_adapters: Sequence[str] = (),
    batch_size: int = 8,
) -> float:
    """KL(p || q), mean over the tokens with loss, nats: p the model with the edits on its layers, q with the adapter.

    Args:
        edits: a layer of the base -> its edit [O, I], added to what it computes while p is taken.

    Raises:
        UnsupportedLayerError: an edited weight is no layer's own (experts), whose output could be added to.
    """
    if any(edit is None for edit in edits.values()):
        raise UnsupportedLayerError("the divergence needs the edit of every layer; expert parameters have none to add")
    device = input_device(model)
    total, count = 0.0, 0
    for batch in batches(samples, batch_size):
        with preserved(model, list(with_adapters)), torch.no_grad(), ExitStack() as hooks:
            for layer, edit in edits.items():
                assert edit is not None
                hooks.callback(layer.register_forward_hook(_adding(edit)).remove)
            p = _log_probabilities(model, batch.to(device))
        with preserved(model, [*with_adapters, adapter_name]), torch.no_grad():
            q = _log_probabilities(model, batch.to(device))
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return max(total / max(count, 1), 0.0)


def _adding(edit: Tensor):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (args[0].to(edit.dtype) @ edit.to(output.device).T).to(output.dtype)

    return hook


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[tokens with loss, vocabulary], float32."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return torch.log_softmax(logits[batch.labels[:, 1:] != -100].float(), dim=-1)
