"""The only code that runs backward and owns hooks.

A 4-bit weight cannot require a gradient, and need not: the gradient of a linear layer's weight is g^T x, with x [T, I]
what went in and g [T, O] the gradient of the loss with respect to what came out. An identity function on the layer's
output keeps x and meets g on the way back. It is exact for float and quantised layers alike.

The tap's output requires a gradient of its own accord (``anchor``), so nothing else in the model must, and backward
stops at the lowest tapped layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .borrow import borrowed
from .data import Sample, batches
from .errors import NumericalError, UnsupportedLayerError
from .granularities import Granularity
from .losses import sample_losses
from .statistics import Statistic, StatisticName
from .targets import Target, base_model

Sink = Callable[[Tensor, Tensor], None]


class _GradientTap(torch.autograd.Function):
    """Identity on a layer's output; on the way back, hands (x, g) to the sink."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer_input: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(layer_input)  # and not a closure: checkpointing must be able to drop and recompute it
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (layer_input,) = ctx.saved_tensors
        ctx.sink(layer_input, output_gradients[0])
        return output_gradients[0], None, None, None


def sweep(
    model: nn.Module,
    targets: Sequence[Target],
    samples: list[Sample],
    granularity: Granularity,
    statistic: StatisticName,
    *,
    adapters: Sequence[str],
    batch_size: int,
    name: str,
    show_progress_bar: bool = True,
) -> dict[str, Statistic]:
    """One pass over the samples: target name -> its statistic, on the target's device.

    The loss is ``losses.sample_losses``, summed over samples. Gradients are taken in eval mode at the model with
    ``adapters`` on; the model goes back as it came.

    Raises:
        NumericalError: a sample's loss, or a layer's statistic, is not finite.
    """
    statistics = {target.name: Statistic(statistic) for target in targets}
    device = base_model(model).get_input_embeddings().weight.device  # type: ignore[operator]
    handles = []
    with borrowed(model, adapters, checkpointing=True):
        try:
            handles += [_tap(target, granularity, statistics[target.name]) for target in targets]
            if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                # Reentrant checkpointing passes gradients only to segments whose input requires one.
                handles.append(
                    base_model(model).get_input_embeddings().register_forward_hook(_require_gradient)  # type: ignore[operator]
                )
            with (
                torch.enable_grad(),
                tqdm(total=len(samples), desc=f"gradients on {name}", disable=not show_progress_bar) as bar,
            ):
                for batch in batches(samples, batch_size):
                    losses = sample_losses(model, batch.to(device))
                    for index, loss in zip(batch.indices, losses.tolist(), strict=True):
                        if not torch.isfinite(torch.tensor(loss)):
                            raise NumericalError(
                                f"{name}, sample {index + 1}: the loss is {loss}; expected a finite one. Look at the "
                                "row, and at the model's dtype (float16 overflows where bfloat16 does not)"
                            )
                    losses.sum().backward()
                    bar.update(len(batch.indices))
        finally:
            for handle in handles:
                handle.remove()
    for target_name, result in statistics.items():
        if result.samples != len(samples):
            raise NumericalError(
                f"{target_name}: gradients of {result.samples} samples arrived, expected {len(samples)}; the layer "
                "takes no part in the loss, or its backward is cut (a quantised layer after an inference forward?)"
            )
        if not all(bool(torch.isfinite(total).all()) for total in result.sums.values()):
            raise NumericalError(f"{target_name}: the gradient on {name} is not finite; look at the model's dtype")
    return statistics


def _require_gradient(module: nn.Module, args: tuple, output: Tensor) -> None:
    output.requires_grad_(True)


def _tap(target: Target, granularity: Granularity, statistic: Statistic) -> Any:
    def sink(layer_input: Tensor, output_gradient: Tensor) -> None:
        if layer_input.dim() != 3:
            raise UnsupportedLayerError(
                f"{target.name}: expected an input of [N, T, in], found {tuple(layer_input.shape)}; samples "
                "cannot be told apart there, train the forget adapter without it (target_modules)"
            )
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        x, g = layer_input.to(dtype), output_gradient.to(dtype)
        if statistic.name == "squares":  # one [O, I] buffer at a time, never [N, O, I]
            for sample in range(len(x)):
                statistic.add(granularity.gradient(target, x[sample], g[sample]), samples=1)
        else:
            statistic.add(granularity.gradient(target, x.flatten(0, -2), g.flatten(0, -2)), samples=len(x))

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        return _GradientTap.apply(output, args[0].detach(), anchor, sink)  # type: ignore[return-value]

    return target.base_layer.register_forward_hook(hook)
