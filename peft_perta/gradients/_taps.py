"""The tap: where a weight's gradient is met on the way back.

A 4-bit weight cannot require a gradient, and need not: the gradient of a linear layer's weight is g^T x, with x [T, I]
what went in and g [T, O] the gradient of the loss with respect to what came out. An identity function on the layer's
output keeps x and meets g on the way back. It is exact for float and quantised layers alike.

A parameter that a module's forward reads by itself (experts) is shadowed, for the length of that forward, by an
identity of it, which meets the parameter's whole gradient.

Either identity requires a gradient of its own accord (an anchor), so nothing else in the model must, and backward
stops at the lowest tapped layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import NumericalError, UnsupportedLayerError
from ..model import Target, distributed
from .gradient_sums import GradientSums, Place, StatisticName
from .input_moments import Collector

Sink = Callable[[Tensor, Tensor], None]


class _LayerTap(torch.autograd.Function):
    """Identity on a layer's output; on the way back, hands (x, g) to the sink."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer_input: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(layer_input)  # and not a closure: checkpointing must be able to drop and recompute it
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (layer_input,) = ctx.saved_tensors
        with torch.autocast(layer_input.device.type, enabled=False):
            ctx.sink(layer_input, output_gradients[0])
        # Where nothing below wants it, the gradient's way ends here.
        return (output_gradients[0] if ctx.needs_input_grad[0] else None), None, None, None


class _ParameterTap(torch.autograd.Function):
    """Identity on a parameter; on the way back, hands its gradient to the sink."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, anchor: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
        ctx.sink = sink
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            ctx.sink(gradients[0])
        return None, None, None


class Taps:
    """Taps on some targets, and the statistics that they fill while batches run.

    Attributes:
        statistics: target name -> what has come in so far.
        batch_samples: how many samples the running batch holds; set before its backward.
    """

    def __init__(
        self, targets: Sequence[Target], collector: Collector, statistic: StatisticName, place: Place = "device"
    ) -> None:
        self.statistics = {target.name: GradientSums(statistic, place) for target in targets}
        self.batch_samples = 0
        self._collector = collector
        self._by_hook: dict[tuple[nn.Module, str | None], list[Target]] = {}
        for target in targets:
            self._by_hook.setdefault((target.base_layer, target.parameter), []).append(target)
        self._handles = ExitStack()
        self._cast: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> Taps:
        try:
            for (module, parameter), targets in self._by_hook.items():
                if parameter is None:
                    self._handles.callback(self._tap_layer(module, targets[0]).remove)
                else:
                    self._tap_parameter(module, parameter, targets)
        except BaseException:
            self._handles.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.close()
        self._cast = None

    def add_up(self) -> None:
        """Put the sums of all processes together, where several share the batches."""
        if distributed.count() == 1:
            return
        for targets in self._by_hook.values():
            for target in targets:
                statistic = self.statistics[target.name]
                for key, shape in self._collector.shapes(target).items():
                    if key not in statistic.sums:  # this process had no batch
                        statistic.sums[key] = torch.zeros(shape, dtype=target.A.dtype, device=target.A.device)
                    distributed.add_up(statistic.sums[key])
                statistic.samples = sum(distributed.from_all(statistic.samples))

    def check(self, samples: int, name: str) -> None:
        """Refuse sums that are incomplete or not finite.

        Raises:
            NumericalError: with the layer, and the likely reason.
        """
        for target, statistic in self.statistics.items():
            if statistic.samples != samples:
                raise NumericalError(
                    f"{target}: gradients of {statistic.samples} samples arrived, expected {samples}; the layer takes "
                    "no part in the loss, takes part twice, or its backward is cut (a quantised layer after an "
                    "inference forward?)"
                )
            if not statistic.is_finite():
                raise NumericalError(f"{target}: the gradient on {name} is not finite; look at the model's dtype")

    def _tap_layer(self, module: nn.Module, target: Target) -> Any:
        def sink(layer_input: Tensor, output_gradient: Tensor) -> None:
            if layer_input.dim() != 3:
                if self.statistics[target.name].name == "squares" and self.batch_samples != 1:
                    raise UnsupportedLayerError(
                        f"{target.name}: expected an input of [N, T, in], found {tuple(layer_input.shape)}; samples "
                        "cannot be told apart there, so that squares need batch_size=1"
                    )
                layer_input = layer_input.flatten(0, -2)
                output_gradient = output_gradient.flatten(0, -2)
            self._add(target, layer_input, output_gradient)

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            return _LayerTap.apply(output, self._in_compute_type(args[0], output), anchor, sink)  # type: ignore[return-value]

        return module.register_forward_hook(hook)

    def _in_compute_type(self, layer_input: Tensor, output: Tensor) -> Tensor:
        """The layer's input without its graph; under autocast in the type that the layer computed in, cast once for
        all layers that share it."""
        if output.dtype == layer_input.dtype or not torch.is_autocast_enabled(output.device.type):
            return layer_input.detach()
        if self._cast is None or self._cast[0] is not layer_input:
            self._cast = layer_input, layer_input.detach().to(output.dtype)
        return self._cast[1]

    def _tap_parameter(self, module: nn.Module, name: str, targets: list[Target]) -> None:
        shadowed: list[nn.Module] = []

        def sink(gradient: Tensor) -> None:
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            if gradient.dim() == 2:
                gradient = gradient.unsqueeze(0)
            for target in targets:
                of_expert = gradient[target.expert]
                self._add(target, of_expert.T if target.transposed else of_expert, None)

        def shadow(module: nn.Module, args: tuple) -> None:
            # Under PEFT's own parametrization, which adds an adapter's delta, the parameter is called 'original'.
            adds_delta = parametrize.is_parametrized(module, name)
            holder: Any = module.parametrizations[name] if adds_delta else module  # type: ignore[index]
            key = "original" if adds_delta else name
            parameter = getattr(holder, key)
            anchor = torch.zeros((), device=parameter.device, requires_grad=True)
            vars(holder)[key] = _ParameterTap.apply(parameter, anchor, sink)
            shadowed.append(holder)

        def uncover(*_: object) -> None:
            while shadowed:
                holder = shadowed.pop()
                vars(holder).pop("original" if holder is not module else name, None)

        self._handles.callback(uncover)
        if not hasattr(module, "_hf_hook"):
            self._handles.callback(module.register_forward_pre_hook(shadow).remove)
            self._handles.callback(module.register_forward_hook(uncover, always_call=True).remove)
            return

        # An offloaded parameter is there only within accelerate's forward, which calls this one.
        offloaded: Any = module
        forward = offloaded._old_forward

        def covered(*args: Any, **kwargs: Any) -> Any:
            shadow(module, args)
            try:
                return forward(*args, **kwargs)
            finally:
                uncover()

        offloaded._old_forward = covered
        self._handles.callback(setattr, module, "_old_forward", forward)

    def _add(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> None:
        gradients = self._collector.gradient(target, layer_input, output_gradient)
        self.statistics[target.name].add(gradients, self.batch_samples)
