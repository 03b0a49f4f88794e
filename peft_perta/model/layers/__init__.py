"""The layers that the package can read and edit: one file per kind, one row per kind in ``LAYER_KINDS``.

The method sees a layer only through its output: the gradient of its weight is g^T x, with x [T, I] the layer's input
and g [T, O] the gradient of the loss with respect to its output. So a kind only says which modules it accepts, what
must hold for them, and how their weights are laid out. A weight itself is read (``dense``) only to be rounded again,
never to be edited.

To add a kind: a file with a ``KIND``, a row in ``LAYER_KINDS`` (the more specific class first), a builder in
tests/builders.py, a row in tests/tables.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import conv1d, experts, linear, linear4bit, linear8bit
from .kind import LayerKind

LAYER_KINDS: tuple[LayerKind, ...] = (experts.KIND, linear4bit.KIND, linear8bit.KIND, conv1d.KIND, linear.KIND)


def find_kind(module: nn.Module) -> LayerKind | None:
    """The kind that accepts a module: a base layer, or the wrapper of expert parameters. None if no kind does."""
    return next((kind for kind in LAYER_KINDS if kind.accepts(module)), None)


def wrapped_kind(wrapper: Any) -> LayerKind | None:
    """The kind of what a LoRA wrapper adapts. None if no kind accepts it."""
    return find_kind(wrapper) or find_kind(wrapper.get_base_layer())


__all__ = ["LAYER_KINDS", "LayerKind", "find_kind", "wrapped_kind"]
