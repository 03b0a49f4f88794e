"""PCGrad with unequal roles: the forget gradient loses its component against the retain gradient.

Reference: arXiv 2604.14808, after Yu et al. 2020, arXiv 2001.06782, where both gradients are projected.
"""

from __future__ import annotations

from torch import Tensor

from .combiner import Combiner, Gradients, dot, inner
from .linear import add


def project_each(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """In each tensor with d = <g_f, g_r> < 0: g_f <- g_f - d / ||g_r||^2 g_r; then gamma g_f + alpha g_r.

    The authors add 1e-10 to ||g_r||^2. It is left out: where d < 0, neither gradient is zero, and with a small retain
    gradient the term would leave a negative inner product.
    """
    projected = {
        name: _projected(forget[name], retain[name], dot(forget[name], retain[name]), dot(retain[name], retain[name]))
        for name in forget
    }
    return add(projected, retain, gamma, alpha)


def project_whole(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """The same with one inner product and one norm, over all parameters."""
    product, square = inner(forget, retain), inner(retain, retain)
    projected = {name: _projected(forget[name], retain[name], product, square) for name in forget}
    return add(projected, retain, gamma, alpha)


def _projected(forget: Tensor, retain: Tensor, product: float, square: float) -> Tensor:
    return forget - product / square * retain if product < 0 and square > 0 else forget


PCGRAD = Combiner(
    "pcgrad",
    "remove the forget gradient's component against the retain gradient, tensor by tensor, then add both",
    project_each,
)
PCGRAD_GLOBAL = Combiner("pcgrad-global", "pcgrad with one projection over all parameters", project_whole)
