"""The layers that we can read and edit: one file a kind, one row each in ``LAYER_KINDS``.

A layer enters the mathematics through its output only: its gradient is g^T x, with x [.., in] what went in and g [..,
out] the gradient of the loss with respect to what came out. So a kind says which modules it accepts and what must hold
of them. Weights themselves are read (``dense``) only to be rounded anew, never for an edit.

To add a kind: a file with a ``KIND``, a row here (the most special class first), a row in tests/tables.py.
"""

from __future__ import annotations

from torch import nn

from . import conv1d, experts, linear, linear4bit, linear8bit
from .kind import LayerKind

LAYER_KINDS: tuple[LayerKind, ...] = (experts.KIND, linear4bit.KIND, linear8bit.KIND, conv1d.KIND, linear.KIND)


def find_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a base layer (of a wrapper, for experts), or None where no kind accepts it."""
    return next((kind for kind in LAYER_KINDS if kind.accepts(module)), None)


__all__ = ["LAYER_KINDS", "LayerKind", "find_kind"]
