"""Layers that read the same input (queries, keys and values; gate and up) have the same second moment of inputs, as long
as the loss flows through the same tokens. Its product is then formed once for all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .gradient_sums import GradientSums, Outer, add_gram


class SharedMoments:
    """Second moments on their way to the layers' sums.

    A symmetric moment of a batch waits until a layer with another input comes, or with other tokens. Each layer keeps a
    sum of its own, which has the same bits as without sharing.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None  # which the waiting layers read; held, so that no other tensor takes its place
        self._waiting: dict[str, tuple[Outer, list[GradientSums]]] = {}

    def add(self, layer_input: Tensor, moments: Mapping[str, Outer], sums: GradientSums) -> None:
        """Add one batch of one layer.

        Args:
            layer_input: the layer's input.
            moments: name -> the batch's symmetric moment, x^T x.
            sums: the layer's sums.
        """
        if self._input is None or not _is_same(self._input, layer_input):
            self.flush()
            self._input = layer_input
        for name, outer in moments.items():
            if name in self._waiting:
                of_batch, layers = self._waiting[name]
                if torch.equal(of_batch.right, outer.right):
                    layers.append(sums)
                    continue
                add_gram(layers, name, of_batch)
            self._waiting[name] = outer, [sums]

    def flush(self) -> None:
        """Add what waits."""
        for name, (outer, layers) in self._waiting.items():
            add_gram(layers, name, outer)
        self._waiting.clear()
        self._input = None


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and one.is_set_to(other)
