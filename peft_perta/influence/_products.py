"""Gradients, and Hessian- and Gauss-Newton-vector products, with respect to one adapter's factors. No [P, P] matrix.

All are sums over samples of mean token losses, whatever the batches; the factors' P numbers stand in one vector [P], in
float32 or wider.
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

Advance = Callable[[int], None]


_STEP = 1e-3  # of the factors' norm


_TRUSTED, _TRUSTED_16_BIT = 0.05, 0.2  # the share by which two ways to one number may differ


class AdapterProducts:
    """Products of one adapter on a model that is ``differentiable``, with the adapter on.

    The model's own factors are never written: for the length of a product, copies stand in their place.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], adapter_name: str, factors: str, batch_size: int
    ) -> None:
        self.model, self.batch_size = model, batch_size
        wrappers: list[Any] = list({id(target.adapted): target.adapted for target in targets}.values())
        self._slots = [getattr(w, f"lora_{factor}")[adapter_name] for w in wrappers for factor in factors]
        found = [slot.weight.detach() for slot in self._slots]
        self.dtype = torch.float32
        for weight in found:
            self.dtype = torch.promote_types(self.dtype, weight.dtype)
        self._factors = [weight.to(self.dtype) for weight in found]
        self._changes = [(wrapper, factor) for wrapper in wrappers for factor in factors]
        self._device = input_device(model)

    @property
    def count(self) -> int:
        return sum(factor.numel() for factor in self._factors)

    def changes(self, vector: Tensor) -> dict[tuple[int, str], Tensor]:
        """(id of PEFT's wrapper, 'A' or 'B') -> its part of the vector, shaped as the factor."""
        parts = zip(self._changes, self._split(vector), strict=True)
        return {(id(wrapper), factor): part for (wrapper, factor), part in parts}

    def losses(self, samples: list[Sample], name: str, change: Tensor | None = None) -> Tensor:
        """[N], with this vector added to the factors."""
        found = torch.empty(len(samples))
        moved = self._factors if change is None else self._sum(self._factors, change)
        with self._held(moved), torch.no_grad():
            for batch in batches(samples, self.batch_size):
                losses = sample_losses(self.model, batch.to(self._device))
                check_losses(losses, batch, name)
                found[batch.indices] = losses.float().cpu()
        return found

    def gradient(self, samples: list[Sample], name: str, advance: Advance) -> Tensor:
        """The gradient of the samples' summed losses: [P].

        Raises:
            NumericalError: a loss, or the gradient, is not finite.
        """
        total = self._zeros()
        for batch in batches(samples, self.batch_size):
            leaves = self._leaves()
            with self._held(leaves), torch.enable_grad():
                losses = sample_losses(self.model, batch.to(self._device))
                check_losses(losses, batch, name)
                total += self._vector(torch.autograd.grad(losses.sum(), leaves))
            advance(len(batch.indices))
        return _finite(total, f"the gradient on {name}")

    def product(self, curvature: str, samples: list[Sample], vector: Tensor) -> Tensor:
        """H v of the samples' summed losses, or its Gauss-Newton part: [P].

        Raises:
            NumericalError: it is not finite.
        """
        by_batch = self._hessian if curvature == "hessian" else self._gauss_newton
        total = self._zeros()
        for batch in batches(samples, self.batch_size):
            total += by_batch(batch.to(self._device), vector)
        return _finite(total, "a product with the curvature")

    def _hessian(self, batch: Batch, vector: Tensor) -> Tensor:
        """H v = d/dPhi <dL/dPhi, v>: backward through backward."""
        leaves = self._leaves()
        with self._held(leaves), torch.enable_grad():
            loss = sample_losses(self.model, batch).sum()
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            pairs = zip(gradients, self._split(vector), strict=True)
            along: Any = sum((g * v).sum().to(self._device) for g, v in pairs)
            return self._vector(torch.autograd.grad(along, leaves, materialize_grads=True))

    def _gauss_newton(self, batch: Batch, vector: Tensor) -> Tensor:
        """J^T (sum_t w_t (diag p_t - p_t p_t^T)) J v, with J = d logits / dPhi and w_t = 1 / (the sample's tokens).

        J v by a forward derivative, J^T by a backward pass: no double backward.

        Reference: Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent.
        """
        moved = self._along(batch, vector)
        leaves = self._leaves()
        with self._held(leaves), torch.enable_grad():
            logits = completion_logits(self.model, batch)
            wide = logits.detach().to(moved.dtype)
            shares = wide.softmax(1)
            pushed = (
                shares * (moved - (shares * moved).sum(1, keepdim=True)) * _token_weights(batch).to(wide).unsqueeze(1)
            )
            return self._vector(torch.autograd.grad(logits, leaves, pushed.to(logits.dtype)))

    def _along(self, batch: Batch, vector: Tensor) -> Tensor:
        """J v: [K, V], float32 or wider."""
        with forward_ad.dual_level(), torch.no_grad():
            pairs = zip(self._factors, self._split(vector), strict=True)
            with self._held([forward_ad.make_dual(factor, part) for factor, part in pairs]):
                logits = completion_logits(self.model, batch)
            tangent = forward_ad.unpack_dual(logits).tangent
        if tangent is None:
            tangent = torch.zeros_like(logits)
        return tangent.to(torch.promote_types(tangent.dtype, torch.float32))

    def diagonal(self, samples: list[Sample], seed: int, advance: Advance) -> Tensor:
        """The Gauss-Newton matrix's diagonal, summed over samples: [P], an unbiased estimate that no batch size moves.

        With every token's label drawn from the model's own prediction, e_t = p_t - onehot has mean 0 and covariance
        diag p_t - p_t p_t^T, and tokens are independent: the squared gradient of sum_t sqrt(w_t) loss_t is in the mean
        the diagonal.

        Reference: Martens 2020, arXiv 1412.1193, section 9 (the Fisher matrix is the Gauss-Newton matrix).
        """
        total, generator = self._zeros(), torch.Generator().manual_seed(seed)
        for sample in samples:
            (batch,) = batches([sample], 1)
            leaves = self._leaves()
            with self._held(leaves), torch.enable_grad():
                logits = completion_logits(self.model, batch.to(self._device))
                logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
                drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
                loss = -(logs.gather(1, drawn).squeeze(1) * _token_weights(batch).to(logs).sqrt()).sum()
                total += self._vector(torch.autograd.grad(loss, leaves)).square()
            advance(1)
        return _finite(total, "the curvature's diagonal")

    def check(self, curvature: str, sample: Sample, seed: int) -> None:
        """Whether this model's products can be had and are right, on one sample: two ways to one number.

        Gauss-Newton: |J v|^2 = <J^T J v, v>. Hessian: <H v, H v> is also how fast <gradient, H v> changes along v,
        which a difference of two gradients shows; or, in 16 bit, too coarse for that, <H H v, v>.

        Raises:
            UnsupportedLayerError: an operation cannot be differentiated so, or wrongly; with what can be done instead.
        """
        (batch,) = batches([sample], 1)
        needs, instead = (
            ("double backward", "use curvature='gauss-newton', which needs none")
            if curvature == "hessian"
            else ("a forward derivative", "use curvature='hessian', which needs double backward in its place")
        )
        instead += "; or load the model with attn_implementation='eager'"
        ways = self._two_ways_to_hessian if curvature == "hessian" else self._two_ways_to_jacobian
        try:
            one, other, allowed = ways(batch.to(self._device), seed)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedLayerError(
                f"products with the {curvature} curvature need {needs}, which this model does not have ({reason}); "
                f"{instead}"
            ) from error
        if not (math.isfinite(one) and math.isfinite(other)):
            raise NumericalError(
                f"products with the {curvature} curvature are not finite on the shortest row ({one}, {other}); look at "
                "the model's weights and dtype (float16 overflows where bfloat16 does not)"
            )
        if abs(one - other) > allowed:
            raise UnsupportedLayerError(
                f"products with the {curvature} curvature are wrong on this model: expected one number by two ways, "
                f"found {one:.6g} and {other:.6g}, so that some operation has no true {needs}; {instead}"
            )

    @property
    def _is_narrow(self) -> bool:
        return any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())

    def _two_ways_to_jacobian(self, batch: Batch, seed: int) -> tuple[float, float, float]:
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(self.count, generator=generator, dtype=self.dtype).to(self._factors[0].device)
        moved = self._along(batch, v / v.norm())
        leaves = self._leaves()
        with self._held(leaves), torch.enable_grad():
            logits = completion_logits(self.model, batch)
            back = self._vector(torch.autograd.grad(logits, leaves, moved.to(logits.dtype)))
        one, other = float(moved.double().square().sum()), float((back * v).double().sum() / v.norm())
        return one, other, (_TRUSTED_16_BIT if self._is_narrow else _TRUSTED) * one

    def _two_ways_to_hessian(self, batch: Batch, seed: int) -> tuple[float, float, float]:
        size = math.sqrt(sum(float(factor.double().square().sum()) for factor in self._factors))
        gradient = self._gradient(batch, self._factors)
        v = gradient / gradient.norm().clamp_min(torch.finfo(self.dtype).tiny)
        image = self._hessian(batch, v)
        one = float(image.double().norm())
        along = image / max(one, torch.finfo(self.dtype).tiny)
        if self._is_narrow:
            return one, float((self._hessian(batch, along) * v).double().sum()), _TRUSTED_16_BIT * one
        ahead, behind = (self._gradient(batch, self._sum(self._factors, sign * _STEP * size * v)) for sign in (1, -1))
        other = float(((ahead - behind) * along).double().sum()) / (2 * _STEP * size)
        return one, other, _TRUSTED * (one + float(gradient.norm()) / size)

    def _gradient(self, batch: Batch, factors: Sequence[Tensor]) -> Tensor:
        leaves = [factor.detach().requires_grad_(True) for factor in factors]
        with self._held(leaves), torch.enable_grad():
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
    def _held(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Within the block these tensors stand in the place of the factors, which a layer looks up by name."""
        before = [slot._parameters["weight"] for slot in self._slots]
        try:
            for slot, value in zip(self._slots, values, strict=True):
                slot._parameters["weight"] = value
            yield
        finally:
            for slot, weight in zip(self._slots, before, strict=True):
                slot._parameters["weight"] = weight


def _token_weights(batch: Batch) -> Tensor:
    """[K]: one over the number of its sample's tokens with loss."""
    taken = batch.labels[:, 1:] != IGNORED
    return (1 / taken.sum(1, keepdim=True).double()).expand_as(taken)[taken]


def _finite(vector: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(vector).all()):
        raise NumericalError(
            f"{what} is not finite; look at the rows and at the model's dtype (float16 overflows where bfloat16 does "
            "not)"
        )
    return vector
