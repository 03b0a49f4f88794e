"""Taps: where the gradient of a weight is computed during the backward pass.

A 4-bit weight cannot require a gradient, and does not need to. The gradient of a linear layer's weight is g^T x, with x
[T, I] the layer's input and g [T, O] the loss's gradient at its output. A tap is an identity function on the layer's
output that keeps x and receives g during backward. It is exact for float and quantised layers alike.

An expert's parameter is read by its module's own forward, which a hook on the output cannot see into. For the length of
that forward the parameter is replaced by an identity of itself, which receives the whole gradient of the parameter.

Both identities require a gradient through an anchor, a scalar of their own. So nothing else in the model has to require
one, and backward stops at the lowest tapped layer.
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
from ._shared_moments import SharedMoments
from .collector import Collector
from .gradient_sums import GradientSums, Gram, Outer, Place, StatisticName

Sink = Callable[[Tensor, Tensor], None]


class _LayerTap(torch.autograd.Function):
    """Identity on a layer's output; its backward passes (x, g) to the sink."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer_input: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(layer_input)  # not in a closure: gradient checkpointing drops and recomputes it
        ctx.sink = sink
        # The same memory, and to autograd no view: a model may modify the output in place (Falcon, Llama 4, Gemma 3n),
        # which autograd forbids for a view that a function of ours returned.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (layer_input,) = ctx.saved_tensors
        with torch.autocast(layer_input.device.type, enabled=False):
            ctx.sink(layer_input, output_gradients[0])
        # If nothing below needs the gradient, backward ends here.
        return (output_gradients[0] if ctx.needs_input_grad[0] else None), None, None, None


class _ParameterTap(torch.autograd.Function):
    """Identity on a parameter; its backward passes the parameter's gradient to the sink."""

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
    """Taps on some layers, and the sums that they fill while batches run. A context manager: taps are on within it.

    Args:
        targets: the layers.
        collector: what is summed of each layer.
        statistic: what is summed of the gradients.
        place: where the sums live.

    Attributes:
        sums: layer name -> its sums so far.
    """

    def __init__(
        self, targets: Sequence[Target], collector: Collector, statistic: StatisticName, place: Place = "device"
    ) -> None:
        self.sums = {target.name: GradientSums(statistic, place) for target in targets}
        self._shared = SharedMoments()
        self._batch_samples = 0
        self._in_batch: set[str] = set()  # names of the layers that have been summed in the running batch
        self._statistic = statistic
        self._collector = collector
        self._by_hook: dict[tuple[nn.Module, str | None], list[Target]] = {}
        for target in targets:
            self._by_hook.setdefault((target.base_layer, target.parameter), []).append(target)
        self._handles = ExitStack()
        self._cast: tuple[Tensor, Tensor] | None = None  # an input, and the same in the type that layers compute in

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

    def begin(self, samples: int) -> None:
        """Begin a batch of this many samples, before its backward pass. Of one of none, nothing is summed."""
        self._shared.flush()
        self._batch_samples = samples
        self._in_batch.clear()

    def complete(self) -> None:
        """Complete the sums after the last batch; if several processes share the batches, add up all of theirs."""
        self._shared.flush()
        for sums in self.sums.values():
            sums.complete()
        if distributed.count() == 1:
            return
        for targets in self._by_hook.values():
            for target in targets:
                sums = self.sums[target.name]
                for totals, shapes in (
                    (sums.gradients, self._collector.gradient_shapes(target)),
                    (sums.moments, self._collector.moment_shapes(target)),
                ):
                    for name, shape in shapes.items():
                        if name not in totals:  # this process had no batch
                            totals[name] = torch.zeros(shape, dtype=target.A.dtype, device=target.A.device)
                        distributed.add_up(totals[name])
                sums.samples = sum(distributed.from_all(sums.samples))

    def check(self, samples: int, name: str) -> None:
        """Check that the sums are complete and finite.

        Args:
            samples: the number of samples expected.
            name: the data set, for the error message.

        Raises:
            NumericalError: with the layer and the likely reason.
        """
        for layer, sums in self.sums.items():
            if sums.samples != samples:
                raise NumericalError(
                    f"{layer}: expected gradients of {samples} samples, found {sums.samples}. Either the layer does "
                    "not contribute to the loss of every sample, or its backward pass is cut (a quantised layer after "
                    "an inference forward?); train the forget adapter without it (exclude_modules)"
                )
            if not sums.is_finite():
                raise NumericalError(f"{layer}: the gradient on {name} is not finite; check the model's dtype")

    def _tap_layer(self, module: nn.Module, target: Target) -> Any:
        def sink(layer_input: Tensor, output_gradient: Tensor) -> None:
            if layer_input.dim() != 3:
                if self._statistic == "squares" and self._batch_samples > 1:
                    raise UnsupportedLayerError(
                        f"{target.name}: expected an input of [N, T, in], found {tuple(layer_input.shape)}, which does "
                        "not say which token belongs to which sample; squares of such a layer need batch_size=1"
                    )
                layer_input = layer_input.flatten(0, -2)
                output_gradient = output_gradient.flatten(0, -2)
            self._add(target, layer_input, output_gradient)

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            return _LayerTap.apply(output, self._in_compute_type(args[0], output), anchor, sink)  # type: ignore[return-value]

        return module.register_forward_hook(hook)

    def _in_compute_type(self, layer_input: Tensor, output: Tensor) -> Tensor:
        """The layer's input without its graph. Under autocast it has the type that the layer computed in, and is cast
        once for all layers that share it."""
        if output.dtype == layer_input.dtype or not torch.is_autocast_enabled(output.device.type):
            return layer_input.detach()
        if self._cast is None or self._cast[0] is not layer_input:
            self._cast = layer_input, layer_input.detach().to(output.dtype)
        return self._cast[1]

    def _tap_parameter(self, module: nn.Module, name: str, targets: list[Target]) -> None:
        replaced: list[nn.Module] = []

        def sink(gradient: Tensor) -> None:
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            if gradient.dim() == 2:
                gradient = gradient.unsqueeze(0)
            for target in targets:
                of_expert = gradient[target.expert]
                self._add(target, of_expert.T if target.transposed else of_expert, None)

        def replace(module: nn.Module, args: tuple) -> None:
            # PEFT's own parametrization, which adds an adapter's delta, calls the parameter 'original'.
            adds_delta = parametrize.is_parametrized(module, name)
            owner: Any = module.parametrizations[name] if adds_delta else module  # type: ignore[index]
            key = "original" if adds_delta else name
            parameter = getattr(owner, key)
            anchor = torch.zeros((), device=parameter.device, requires_grad=True)
            vars(owner)[key] = _ParameterTap.apply(parameter, anchor, sink)  # hides the parameter of that name
            replaced.append(owner)

        def restore(*_: object) -> None:
            while replaced:
                owner = replaced.pop()
                vars(owner).pop("original" if owner is not module else name, None)

        self._handles.callback(restore)
        if not hasattr(module, "_hf_hook"):
            self._handles.callback(module.register_forward_pre_hook(replace).remove)
            self._handles.callback(module.register_forward_hook(restore, always_call=True).remove)
            return

        # accelerate loads an offloaded parameter within its own forward, which calls the module's old one.
        offloaded: Any = module
        forward = offloaded._old_forward

        def tapped_forward(*args: Any, **kwargs: Any) -> Any:
            replace(module, args)
            try:
                return forward(*args, **kwargs)
            finally:
                restore()

        offloaded._old_forward = tapped_forward
        self._handles.callback(setattr, module, "_old_forward", forward)

    def _add(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> None:
        again = target.name in self._in_batch  # the layer runs several times in a forward: its gradient is their sum
        if again and self._statistic == "squares":
            raise UnsupportedLayerError(
                f"{target.name} runs several times in a forward pass, and squares cannot be summed over its calls; use "
                "a weighting of mean gradients (weighting='grad'), or train the forget adapter without it "
                "(exclude_modules)"
            )
        self._in_batch.add(target.name)
        if not self._batch_samples:
            return
        layer = target, layer_input, output_gradient
        gradients, moments = self._collector.gradients_of(*layer), self._collector.moments_of(*layer)
        sums = self.sums[target.name]
        others = {name: moment for name, moment in moments.items() if isinstance(moment, Outer)}
        sums.add(gradients, others, 0 if again else self._batch_samples)
        for name, moment in moments.items():
            if isinstance(moment, Gram):
                self._shared.add(name, moment, sums)
