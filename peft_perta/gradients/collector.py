"""What is summed of each layer: gradients and second moments, from the layer's inputs and output gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from ..model import Target
from .gradient_sums import Moment, Outer

Shape = tuple[int, int]
_Source = TypeVar("_Source")


class GradientSource(Protocol):
    """Gradients of one layer. A granularity is one."""

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """Name -> gradient.

        Args:
            target: the layer.
            layer_input: x [N, T, I].
            output_gradient: g [N, T, O]. None for an expert's parameter, whose inputs are unknown: ``layer_input`` is
                then the gradient of the weight itself, [O, I].
        """
        ...

    def shapes(self, target: Target) -> dict[str, Shape]:
        """Name -> shape of the gradient."""
        ...


class MomentSource(Protocol):
    """Second moments of one layer's inputs or output gradients."""

    def moments(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Moment]:
        """Name -> second moment; the arguments are those of ``GradientSource.gradient``."""
        ...

    def shapes(self, target: Target) -> dict[str, Shape]:
        """Name -> shape of the moment."""
        ...


@dataclass(frozen=True)
class Collector:
    """What is summed of each layer. Two collectors add up; what both ask for is summed once.

    Attributes:
        gradients: the sources of gradients.
        moments: the sources of second moments.
    """

    gradients: tuple[GradientSource, ...] = ()
    moments: tuple[MomentSource, ...] = ()

    def __add__(self, other: Collector) -> Collector:
        return Collector(
            _without_repeats([*self.gradients, *other.gradients]), _without_repeats([*self.moments, *other.moments])
        )

    def gradients_of(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """Name -> gradient, of all sources."""
        gradients: dict[str, Outer] = {}
        for source in self.gradients:
            gradients |= source.gradient(target, layer_input, output_gradient)
        return gradients

    def moments_of(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Moment]:
        """Name -> second moment, of all sources."""
        moments: dict[str, Moment] = {}
        for source in self.moments:
            moments |= source.moments(target, layer_input, output_gradient)
        return moments

    def gradient_shapes(self, target: Target) -> dict[str, Shape]:
        """Name -> shape of every gradient."""
        return {name: shape for source in self.gradients for name, shape in source.shapes(target).items()}

    def moment_shapes(self, target: Target) -> dict[str, Shape]:
        """Name -> shape of every second moment."""
        return {name: shape for source in self.moments for name, shape in source.shapes(target).items()}

    def elements(self, target: Target) -> int:
        """The number of elements in one set's sums of the layer."""
        shapes = [*self.gradient_shapes(target).values(), *self.moment_shapes(target).values()]
        return sum(map(math.prod, shapes))

    def formed(self, target: Target) -> int:
        """The number of elements that are formed of products for one set's sums: of symmetric moments half."""
        gradients, moments = self.gradient_shapes(target).values(), self.moment_shapes(target).values()
        return sum(map(math.prod, gradients)) + sum(map(math.prod, moments)) // 2


def _without_repeats(sources: Iterable[_Source]) -> tuple[_Source, ...]:
    unique: list[_Source] = []
    for source in sources:
        if source not in unique:
            unique.append(source)
    return tuple(unique)
