"""Streamed gradient statistics: sums over samples, never the samples themselves."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

StatisticName = Literal["mean", "squares"]


Place = Literal["device", "host", "disk"]


PLACES: tuple[Place, ...] = ("device", "host", "disk")


# Elements of a sum that are worked on at once: on a CPU they and what is added to them stay in its cache, on a GPU the
# buffer beside the sum stays small.
_CPU_CHUNK, _GPU_CHUNK = 2**17, 2**24


# Keys that begin so are second moments of activations: products of two already, summed as they are by either statistic.
MOMENT = "moment of "


@dataclass(frozen=True)
class Outer:
    """A gradient as the product that it is: left^T @ right [P, Q], summed over tokens.

    Attributes:
        left: [N, T, P], or [T, P] where the samples cannot be told apart; None stands for the identity.
        right: [N, T, Q] or [T, Q].
    """

    left: Tensor | None
    right: Tensor

    def product(self) -> Tensor:
        """Summed over samples too: [P, Q]."""
        if self.left is None:
            return self.right
        return self.left.flatten(0, -2).T @ self.right.flatten(0, -2)


@dataclass
class GradientSums:
    """One layer's gradients over one data set.

    ``mean`` sums gradients, ``squares`` sums squared per-sample gradients (the diagonal of the empirical Fisher). They
    are different statistics: the square of the first, at N = 4, is about a fifth of the second.

    Attributes:
        name: which of the two.
        place: where the sums live: the layer's device, the host's memory, or a file mapped into it.
        sums: per tensor of the granularity, the running sum, float32 or wider.
        samples: how many samples are in.
    """

    name: StatisticName
    place: Place = "device"
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0

    def add(self, gradients: dict[str, Outer], samples: int) -> None:
        """Take in the gradients of ``samples`` samples.

        Raises:
            ValueError: squares of several samples whose gradients cannot be told apart.
        """
        for key, outer in gradients.items():
            squared = self.name == "squares" and not key.startswith(MOMENT)
            if squared and outer.right.dim() == 2 and samples != 1:
                raise ValueError(f"squares of samples that cannot be told apart come one at a time, found {samples}")
            if key not in self.sums:
                if not squared and self.place == "device" and _is_plain(outer):
                    self.sums[key] = outer.product()
                    continue
                self.sums[key] = self._zeros(outer)
            accumulate = add_squares if squared else add_product
            total = self.sums[key]
            if total.device == outer.right.device:
                accumulate(total, outer)
            else:  # formed where the activations are; one addition per batch crosses over
                formed = torch.zeros(total.shape, dtype=total.dtype, device=outer.right.device)
                accumulate(formed, outer)
                total.add_(formed.to(total.device))
        self.samples += samples

    def is_finite(self) -> bool:
        """Whether every sum is; in one pass, without a mask of their size."""
        bounds = [bound for total in self.sums.values() if total.numel() for bound in total.aminmax()]
        return all(math.isfinite(float(bound)) for bound in bounds)

    def magnitudes(self) -> dict[str, Tensor]:
        """|mean gradient|, or the root mean square gradient: in one unit, so that one power suits both."""
        gradients = {key: total for key, total in self.sums.items() if not key.startswith(MOMENT)}
        if self.name == "squares":
            return {key: (total / self.samples).sqrt_() for key, total in gradients.items()}
        return {key: (total / self.samples).abs_() for key, total in gradients.items()}

    def only(self, keys: Collection[str]) -> GradientSums:
        """The same sums, of some keys."""
        return GradientSums(self.name, self.place, {k: self.sums[k] for k in keys if k in self.sums}, self.samples)

    def moments(self) -> dict[str, Tensor]:
        """Sums of second moments, by what they are moments of."""
        return {k.removeprefix(MOMENT): total for k, total in self.sums.items() if k.startswith(MOMENT)}

    def _zeros(self, outer: Outer) -> Tensor:
        rows = outer.right.shape[-2] if outer.left is None else outer.left.shape[-1]
        shape = (rows, outer.right.shape[-1])
        dtype = torch.promote_types(outer.right.dtype, torch.float32)
        if self.place == "device":
            return torch.zeros(shape, dtype=dtype, device=outer.right.device)
        if self.place == "host":
            return torch.zeros(shape, dtype=dtype)
        # The file has no name any more when it is mapped: it goes with the tensor, or with the process.
        with tempfile.NamedTemporaryFile(prefix="perta-statistic-") as file:
            size = shape[0] * shape[1]
            file.truncate(size * torch.empty((), dtype=dtype).element_size())
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).reshape(shape)


def _is_plain(outer: Outer) -> bool:
    """Whether the product of its parts is already of a sum's type."""
    wide = torch.promote_types(outer.right.dtype, torch.float32)
    return outer.left is not None and outer.left.dtype == outer.right.dtype == wide


def add_product(total: Tensor, outer: Outer) -> None:
    """total [P, Q] += left^T right, over all tokens of all samples, in total's dtype: one matrix product."""
    if outer.left is None:
        total.add_(outer.right)
        return
    left, right = outer.left.flatten(0, -2), outer.right.flatten(0, -2)
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda and left.dtype == right.dtype:  # 16-bit operands, summed and returned in float32
        rows = max(1, _GPU_CHUNK // total.shape[1])
        for start in range(0, len(total), rows):
            part = left[:, start : start + rows].T
            total[start : start + rows].add_(torch.mm(part, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def add_squares(total: Tensor, outer: Outer) -> None:
    """total [P, Q] += (left_n^T right_n)^2, elementwise, over samples n; never [N, P, Q].

    Rows are taken in chunks and the samples within a chunk, so that sum and product stay in the cache.
    """
    if outer.left is None:
        total.addcmul_(outer.right, outer.right)
        return
    left, right = outer.left, outer.right
    if right.dim() == 2:
        left, right = left.unsqueeze(0), right.unsqueeze(0)
    mixed = left.is_cuda and left.dtype == right.dtype != total.dtype
    if not mixed:
        left, right = left.to(total.dtype), right.to(total.dtype)
    chunk = _GPU_CHUNK if left.is_cuda else _CPU_CHUNK
    if total.numel() * len(right) <= chunk and not mixed:
        total.add_(torch.bmm(left.mT, right).square_().sum(0))
        return
    rows = max(1, chunk // total.shape[1])
    buffer = torch.empty(min(rows, len(total)), total.shape[1], dtype=total.dtype, device=total.device)
    for start in range(0, len(total), rows):
        part = total[start : start + rows]
        product = buffer[: len(part)]
        for of_left, of_right in zip(left, right, strict=True):
            columns = of_left[:, start : start + rows].T
            if mixed:
                product = torch.mm(columns, of_right, out_dtype=total.dtype)
            else:
                torch.mm(columns, of_right, out=product)
            part.addcmul_(product, product)
