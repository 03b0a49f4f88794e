"""Gradients, and Hessian- and Gauss-Newton-vector products, with respect to the factors of one adapter.

No [P, P] matrix is formed. All results are for sums over samples of mean token losses, so they do not depend on the
batches. The P numbers of the factors are one vector [P], in float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..data import IGNORED, Batch, Sample, batches
from ..errors import NumericalError, UnsupportedLayerError
from ..gradients import check_losses
from ..model import Target, completion_logits, input_device, sample_losses

Advance = Callable[[int], None]  # is told how many samples are done

_STEP = 1e-3  # of a difference of gradients, as a share of the factors' norm

# How far two computations of one number may differ, relative to it.
_TOLERANCE, _TOLERANCE_16_BIT = 0.05, 0.2

# Curvature -> the derivative that its products need, and what to do where the model has none.
_NEEDS = {
    "hessian": ("double backward", "use curvature='gauss-newton', which needs no double backward"),
    "gauss-newton": ("a forward derivative", "use curvature='hessian', which needs double backward instead"),
}


class AdapterProducts:
    """Products of one adapter, on a model that is ``differentiable`` with the adapter on.

    The model's own factors are never written: during a product, copies stand in for them.

    Args:
        model: carries the adapter.
        targets: the adapter's targets.
        adapter_name: the adapter.
        factors: 'AB' for both factors, 'B' for B alone.
        batch_size: samples per batch.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], adapter_name: str, factors: str, batch_size: int
    ) -> None:
        self.model, self.batch_size = model, batch_size
        wrappers: list[Any] = list({id(target.adapted): target.adapted for target in targets}.values())
        self._keys = [(id(wrapper), factor) for wrapper in wrappers for factor in factors]
        self._slots = [getattr(wrapper, f"lora_{f}")[adapter_name] for wrapper in wrappers for f in factors]
        weights = [slot.weight.detach() for slot in self._slots]
        self.dtype = torch.float32
        for weight in weights:
            self.dtype = torch.promote_types(self.dtype, weight.dtype)
        self._factors = [weight.to(self.dtype) for weight in weights]
        self._device = input_device(model)

    @property
    def count(self) -> int:
        """P, the number of elements of the factors."""
        return sum(factor.numel() for factor in self._factors)

    def by_factor(self, vector: Tensor) -> dict[tuple[int, str], Tensor]:
        """(id of PEFT's wrapper, 'A' or 'B') -> the vector's part for that factor, in the factor's shape."""
        return dict(zip(self._keys, self._split(vector), strict=True))

    def losses(self, samples: list[Sample], name: str, change: Tensor | None = None) -> Tensor:
        """The samples' losses [N], with ``change`` [P] added to the factors."""
        all_losses = torch.empty(len(samples))
        factors = self._factors if change is None else self._sum(self._factors, change)
        with self._substituted(factors), torch.no_grad():
            for batch in batches(samples, self.batch_size):
                losses = sample_losses(self.model, batch.to(self._device))
                check_losses(losses, batch, name)
                all_losses[batch.indices] = losses.float().cpu()
        return all_losses

    def gradient(self, samples: list[Sample], name: str, advance: Advance) -> Tensor:
        """The gradient [P] of the sum of the samples' losses.

        Raises:
            NumericalError: a loss or the gradient is not finite.
        """
        total = self._zeros()
        for batch in batches(samples, self.batch_size):
            leaves = self._leaves()
            with self._substituted(leaves), torch.enable_grad():
                losses = sample_losses(self.model, batch.to(self._device))
                check_losses(losses, batch, name)
                total += self._vector(torch.autograd.grad(losses.sum(), leaves))
            advance(len(batch.indices))
        return _finite(total, f"the gradient on {name}")

    def product(self, curvature: str, samples: list[Sample], vector: Tensor) -> Tensor:
        """H v [P] for the sum of the samples' losses, or its Gauss-Newton part.

        Raises:
            NumericalError: the product is not finite.
        """
        product_of_batch = self._hessian if curvature == "hessian" else self._gauss_newton
        total = self._zeros()
        for batch in batches(samples, self.batch_size):
            total += product_of_batch(batch.to(self._device), vector)
        return _finite(total, "a product with the curvature")

    def _hessian(self, batch: Batch, vector: Tensor) -> Tensor:
        """H v = d/dPhi <dL/dPhi, v>: backward through backward."""
        leaves = self._leaves()
        with self._substituted(leaves), torch.enable_grad():
            loss = sample_losses(self.model, batch).sum()
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            pairs = zip(gradients, self._split(vector), strict=True)
            along: Any = sum((gradient * v).sum().to(self._device) for gradient, v in pairs)
            return self._vector(torch.autograd.grad(along, leaves, materialize_grads=True))

    def _gauss_newton(self, batch: Batch, vector: Tensor) -> Tensor:
        """J^T (sum_t w_t (diag p_t - p_t p_t^T)) J v, with J = d logits / dPhi and w_t = 1 / (tokens of the sample).

        J v is a forward derivative and J^T a backward pass, so no double backward is needed.

        Reference: Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent.
        """
        tangent = self._jacobian_product(batch, vector)
        leaves = self._leaves()
        with self._substituted(leaves), torch.enable_grad():
            logits = completion_logits(self.model, batch)
            wide = logits.detach().to(tangent.dtype)
            p = wide.softmax(1)
            weights = _token_weights(batch).to(wide).unsqueeze(1)
            cotangent = p * (tangent - (p * tangent).sum(1, keepdim=True)) * weights
            return self._vector(torch.autograd.grad(logits, leaves, cotangent.to(logits.dtype)))

    def _jacobian_product(self, batch: Batch, vector: Tensor) -> Tensor:
        """J v [K, V] for the K tokens with a loss, in float32 or wider."""
        with forward_ad.dual_level(), torch.no_grad():
            pairs = zip(self._factors, self._split(vector), strict=True)
            with self._substituted([forward_ad.make_dual(factor, part) for factor, part in pairs]):
                logits = completion_logits(self.model, batch)
            tangent = forward_ad.unpack_dual(logits).tangent
        if tangent is None:
            tangent = torch.zeros_like(logits)
        return tangent.to(torch.promote_types(tangent.dtype, torch.float32))

    def diagonal(self, samples: list[Sample], seed: int, advance: Advance) -> Tensor:
        """An unbiased estimate of the Gauss-Newton matrix's diagonal [P], summed over samples.

        The label of every token is drawn from the model's own prediction. Then e_t = p_t - onehot has mean 0 and
        covariance diag p_t - p_t p_t^T, and tokens are independent, so the squared gradient of sum_t sqrt(w_t) loss_t
        is the diagonal in expectation. Samples are taken one by one, so the batch size does not change the estimate.

        Reference: Martens 2020, arXiv 1412.1193, section 9 (the Fisher matrix is the Gauss-Newton matrix).
        """
        total, generator = self._zeros(), torch.Generator().manual_seed(seed)
        for sample in samples:
            (batch,) = batches([sample], 1)
            leaves = self._leaves()
            with self._substituted(leaves), torch.enable_grad():
                logits = completion_logits(self.model, batch.to(self._device))
                log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
                labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
                loss = -(log_p.gather(1, labels).squeeze(1) * _token_weights(batch).to(log_p).sqrt()).sum()
                total += self._vector(torch.autograd.grad(loss, leaves)).square()
            advance(1)
        return _finite(total, "the curvature's diagonal")

    def check(self, curvature: str, sample: Sample, seed: int) -> None:
        """Check on one sample that this model's products exist and are right: compute one number in two ways.

        Gauss-Newton: |J v|^2 = <J^T J v, v>. Hessian: <H v, H v> is the rate at which <gradient, H v> changes along v,
        which a difference of two gradients shows. 16-bit types are too coarse for that difference; there <H H v, v>
        is the second way.

        Raises:
            UnsupportedLayerError: an operation has no such derivative, or a wrong one.
            NumericalError: a product is not finite.
        """
        (batch,) = batches([sample], 1)
        derivative, remedy = _NEEDS[curvature]
        remedy += "; or load the model with attn_implementation='eager'"
        two_ways = self._two_ways_to_hessian if curvature == "hessian" else self._two_ways_to_jacobian
        try:
            first, second, allowed = two_ways(batch.to(self._device), seed)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedLayerError(
                f"products with the {curvature} curvature need {derivative}, which this model does not have "
                f"({reason}); {remedy}"
            ) from error
        if not (math.isfinite(first) and math.isfinite(second)):
            raise NumericalError(
                f"products with the {curvature} curvature are not finite on the shortest row ({first}, {second}); "
                "check the model's weights and dtype (float16 overflows where bfloat16 does not)"
            )
        if abs(first - second) > allowed:
            raise UnsupportedLayerError(
                f"products with the {curvature} curvature are wrong on this model: expected one number in two ways, "
                f"found {first:.6g} and {second:.6g}, so some operation's {derivative} is wrong; {remedy}"
            )

    @property
    def _is_16_bit(self) -> bool:
        return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.model.parameters())

    def _two_ways_to_jacobian(self, batch: Batch, seed: int) -> tuple[float, float, float]:
        """(|J v|^2, <J^T J v, v>, the difference that is allowed), for a random v of norm 1."""
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(self.count, generator=generator, dtype=self.dtype).to(self._factors[0].device)
        tangent = self._jacobian_product(batch, v / v.norm())
        leaves = self._leaves()
        with self._substituted(leaves), torch.enable_grad():
            logits = completion_logits(self.model, batch)
            back = self._vector(torch.autograd.grad(logits, leaves, tangent.to(logits.dtype)))
        first, second = float(tangent.double().square().sum()), float((back * v).double().sum() / v.norm())
        return first, second, (_TOLERANCE_16_BIT if self._is_16_bit else _TOLERANCE) * first

    def _two_ways_to_hessian(self, batch: Batch, seed: int) -> tuple[float, float, float]:
        """(|H v|, the same in a second way, the difference that is allowed), for v along the gradient."""
        size = math.sqrt(sum(float(factor.double().square().sum()) for factor in self._factors))
        gradient = self._gradient(batch, self._factors)
        v = gradient / gradient.norm().clamp_min(torch.finfo(self.dtype).tiny)
        image = self._hessian(batch, v)
        first = float(image.double().norm())
        along = image / max(first, torch.finfo(self.dtype).tiny)
        if self._is_16_bit:
            return first, float((self._hessian(batch, along) * v).double().sum()), _TOLERANCE_16_BIT * first
        ahead, behind = (self._gradient(batch, self._sum(self._factors, sign * _STEP * size * v)) for sign in (1, -1))
        second = float(((ahead - behind) * along).double().sum()) / (2 * _STEP * size)
        return first, second, _TOLERANCE * (first + float(gradient.norm()) / size)

    def _gradient(self, batch: Batch, factors: Sequence[Tensor]) -> Tensor:
        leaves = [factor.detach().requires_grad_(True) for factor in factors]
        with self._substituted(leaves), torch.enable_grad():
            return self._vector(torch.autograd.grad(sample_losses(self.model, batch).sum(), leaves))

    def _zeros(self) -> Tensor:
        return torch.zeros(self.count, dtype=self.dtype, device=self._factors[0].device)

    def _leaves(self) -> list[Tensor]:
        return [factor.detach().requires_grad_(True) for factor in self._factors]

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([factor.numel() for factor in self._factors])
        return [part.view_as(f).to(f.device) for part, f in zip(parts, self._factors, strict=True)]

    def _sum(self, factors: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
        return [factor + part for factor, part in zip(factors, self._split(vector), strict=True)]

    def _vector(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.detach().flatten().to(self._factors[0].device) for part in parts])

    @contextmanager
    def _substituted(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Within the block, these tensors stand in for the factors, which a layer looks up by name."""
        weights = [slot._parameters["weight"] for slot in self._slots]
        try:
            for slot, value in zip(self._slots, values, strict=True):
                slot._parameters["weight"] = value
            yield
        finally:
            for slot, weight in zip(self._slots, weights, strict=True):
                slot._parameters["weight"] = weight


def _token_weights(batch: Batch) -> Tensor:
    """[K]: for each token with a loss, one over the number of such tokens in its sample."""
    has_loss = batch.labels[:, 1:] != IGNORED
    return (1 / has_loss.sum(1, keepdim=True).double()).expand_as(has_loss)[has_loss]


def _finite(vector: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(vector).all()):
        raise NumericalError(
            f"{name} is not finite; check the rows and the model's dtype (float16 overflows where bfloat16 does not)"
        )
    return vector
