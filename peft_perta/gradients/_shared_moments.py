"""Second moments that layers share: those of queries, keys and values, and those of gate and up.

Layers that read the same input have the same moment where the loss flows through the same tokens. Its product is formed
once for all of them.
"""

from __future__ import annotations

from .gradient_sums import GradientSums, Gram, add_gram


class SharedMoments:
    """Symmetric moments on their way to the layers' sums.

    A moment of a batch waits until a layer with another input comes, or with other tokens. Each layer keeps a sum of
    its own, which has the same bits as without sharing.
    """

    def __init__(self) -> None:
        # The input is held with its moment, so that no other tensor takes its memory meanwhile.
        self._waiting: dict[str, tuple[Gram, list[GradientSums]]] = {}

    def add(self, name: str, gram: Gram, sums: GradientSums) -> None:
        """Add one batch of one layer.

        Args:
            name: the moment's name.
            gram: the batch's moment.
            sums: the layer's sums.
        """
        if name in self._waiting:
            waiting, layers = self._waiting[name]
            if waiting.equals(gram):
                layers.append(sums)
                return
            add_gram(layers, name, waiting)
        self._waiting[name] = gram, [sums]

    def flush(self) -> None:
        """Add what waits."""
        while self._waiting:
            name, (gram, layers) = self._waiting.popitem()
            add_gram(layers, name, gram)
