"""Gradient sums: what is summed over samples while batches run backward. No sample's own gradient is kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

StatisticName = Literal["mean", "squares"]
Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")


# Elements of a sum that one step works on. On a CPU the chunk and its addend stay in the cache; on a GPU the buffer
# beside the sum stays small.
_CPU_CHUNK, _GPU_CHUNK = 2**17, 2**24
# A Gram matrix is formed in at least so many blocks of rows, of at most so many elements each.
_GRAM_BLOCKS, _GRAM_CHUNK = 8, 2**22


@dataclass(frozen=True)
class Outer:
    """A matrix held as the product left^T @ right [P, Q], summed over tokens.

    Attributes:
        left: [N, T, P], or [T, P] where the samples of a batch are flattened into one dimension; None stands for the
            identity.
        right: [N, T, Q] or [T, Q].
    """

    left: Tensor | None
    right: Tensor

    def product(self) -> Tensor:
        """The product summed over samples and tokens, [P, Q]."""
        if self.left is None:
            return self.right
        return self.left.flatten(0, -2).T @ self.right.flatten(0, -2)


@dataclass(frozen=True)
class Gram:
    """The symmetric matrix sum_t x_t x_t^T [I, I], over the tokens that count.

    Attributes:
        x: [N, T, I] or [T, I].
        counted: whether each token counts, [N, T, 1] or [T, 1].
    """

    x: Tensor
    counted: Tensor

    def equals(self, other: Gram) -> bool:
        """Whether the other one is of the same memory and the same tokens."""
        one, two = self.x, other.x
        if one.device != two.device or one.dtype != two.dtype or not one.is_set_to(two):
            return False
        return torch.equal(self.counted, other.counted)


Moment = Outer | Gram


@dataclass
class GradientSums:
    """One layer's sums over one data set.

    ``mean`` sums gradients; ``squares`` sums squared per-sample gradients (the diagonal of the empirical Fisher). They
    are different statistics: at N = 4, the square of the first is about a fifth of the second.

    Attributes:
        statistic: 'mean' or 'squares': what is summed of the gradients.
        place: where the sums live: on the layer's device, in the host's memory, or in a memory-mapped file.
        gradients: name of a gradient ('weight', 'A', 'B') -> its running sum, in float32 or wider.
        moments: name of a second moment ('inputs', 'tokens') -> its running sum. Moments are products of two
            activations already, so both statistics sum them unsquared.
        samples: the number of samples summed so far.
        halves: names of the moments that are summed above the diagonal alone, until ``complete`` fills in the rest.
    """

    statistic: StatisticName
    place: Place = "device"
    gradients: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    halves: set[str] = field(default_factory=set)

    def add(self, gradients: Mapping[str, Outer], moments: Mapping[str, Moment], samples: int) -> None:
        """Add one batch; after the last one, call ``complete``.

        Args:
            gradients: name -> the batch's gradient.
            moments: name -> the batch's second moment.
            samples: the number of samples in the batch.

        Raises:
            ValueError: the statistic is 'squares', and a batch of several samples does not say which token belongs to
                which sample.
        """
        for name, outer in gradients.items():
            squared = self.statistic == "squares"
            if squared and outer.right.dim() == 2 and samples != 1:
                raise ValueError(
                    f"expected batches of one sample for statistic 'squares', found {samples}: the gradient does not "
                    "say which token belongs to which sample"
                )
            self._accumulate(self.gradients, name, outer, squared)
        for name, moment in moments.items():
            if isinstance(moment, Gram):
                add_gram([self], name, moment)
            else:
                self._accumulate(self.moments, name, moment, squared=False)
        self.samples += samples

    def complete(self) -> None:
        """Fill in symmetric moments below the diagonal."""
        while self.halves:
            total = self.moments[self.halves.pop()]
            for rows in _gram_blocks(len(total)):
                total[rows.stop :, rows].copy_(total[rows, rows.stop :].T)

    def tensors(self) -> Iterator[Tensor]:
        """All sums."""
        yield from self.gradients.values()
        yield from self.moments.values()

    def is_finite(self) -> bool:
        """Whether all sums are finite. One pass, without a mask of their size."""
        bounds = [bound for total in self.tensors() if total.numel() for bound in total.aminmax()]
        return all(math.isfinite(float(bound)) for bound in bounds)

    def magnitudes(self) -> dict[str, Tensor]:
        """|mean gradient|, or the root mean square of the per-sample gradients. Both have the gradient's unit, so a
        power means the same for both."""
        if self.statistic == "squares":
            return {name: (total / self.samples).sqrt_() for name, total in self.gradients.items()}
        return {name: (total / self.samples).abs_() for name, total in self.gradients.items()}

    def only(self, gradients: Collection[str] = (), moments: Collection[str] = ()) -> GradientSums:
        """The same sums, restricted to these names; a name without a sum is left out."""
        return GradientSums(
            self.statistic,
            self.place,
            {name: self.gradients[name] for name in gradients if name in self.gradients},
            {name: self.moments[name] for name in moments if name in self.moments},
            self.samples,
        )

    def _accumulate(self, sums: dict[str, Tensor], name: str, outer: Outer, squared: bool) -> None:
        if name not in sums:
            if not squared and self.place == "device" and _has_the_type_of_a_sum(outer):
                sums[name] = outer.product()
                return
            rows = outer.right.shape[-2] if outer.left is None else outer.left.shape[-1]
            sums[name] = self._zeros(rows, outer.right)
        add = add_squares if squared else add_product
        total = sums[name]
        if total.device == outer.right.device:
            add(total, outer)
        else:  # computed on the activations' device; one addition per batch crosses over
            addend = torch.zeros(total.shape, dtype=total.dtype, device=outer.right.device)
            add(addend, outer)
            total.add_(addend.to(total.device))

    def _zeros(self, rows: int, right: Tensor) -> Tensor:
        """A sum of products with ``right`` on their right, where sums live."""
        shape = (rows, right.shape[-1])
        dtype = torch.promote_types(right.dtype, torch.float32)
        if self.place == "device":
            return torch.zeros(shape, dtype=dtype, device=right.device)
        if self.place == "host":
            return torch.zeros(shape, dtype=dtype)
        # The file is unlinked as soon as it is mapped: its space is freed with the tensor, or with the process.
        with tempfile.NamedTemporaryFile(prefix="perta-gradient-sums-") as file:
            size = shape[0] * shape[1]
            file.truncate(size * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).reshape(shape)


def _has_the_type_of_a_sum(outer: Outer) -> bool:
    """Whether the product comes out in the dtype that its sum has."""
    wide = torch.promote_types(outer.right.dtype, torch.float32)
    return outer.left is not None and outer.left.dtype == outer.right.dtype == wide


def add_gram(layers: Sequence[GradientSums], name: str, gram: Gram) -> None:
    """Add one batch's second moment to the sums of all layers that share it. Each product is formed once.

    Only blocks of rows from the diagonal on are formed, which is little more than half of the work. A sum has the same
    bits whether its products are shared or not.
    """
    x, counted = gram.x.flatten(0, -2), gram.counted.flatten(0, -2)
    for sums in layers:
        sums.halves.add(name)
        if name not in sums.moments:
            sums.moments[name] = sums._zeros(x.shape[1], x)
    totals = [sums.moments[name] for sums in layers]
    mixed = x.is_cuda and x.dtype != totals[0].dtype
    x = x if mixed else x.to(totals[0].dtype)
    with torch.autocast(x.device.type, enabled=False):
        for rows in _gram_blocks(x.shape[1]):
            left, right = (x[:, rows] * counted).T, x[:, rows.start :]
            product = torch.mm(left, right, out_dtype=totals[0].dtype) if mixed else torch.mm(left, right)
            for total in totals:
                total[rows, rows.start :].add_(product.to(total.device))


def _gram_blocks(width: int) -> Iterator[slice]:
    """The blocks of rows of a Gram matrix [I, I]. They depend on nothing else: the same rows are filled in later."""
    size = rows_of_a_gram_block(width)
    for start in range(0, width, size):
        yield slice(start, min(start + size, width))


def rows_of_a_gram_block(width: int) -> int:
    """The number of rows of a Gram matrix [I, I] that are formed at once."""
    return max(1, min(math.ceil(width / _GRAM_BLOCKS), _GRAM_CHUNK // width))


def add_product(total: Tensor, outer: Outer) -> None:
    """total [P, Q] += left^T right, over all tokens of all samples, in total's dtype: one matrix product."""
    if outer.left is None:
        total.add_(outer.right)
        return
    left, right = outer.left.flatten(0, -2), outer.right.flatten(0, -2)
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda and left.dtype == right.dtype:  # 16-bit operands, accumulated and returned in float32
        rows = max(1, _GPU_CHUNK // total.shape[1])
        for start in range(0, len(total), rows):
            columns = left[:, start : start + rows].T
            total[start : start + rows].add_(torch.mm(columns, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def add_squares(total: Tensor, outer: Outer) -> None:
    """total [P, Q] += (left_n^T right_n)^2, elementwise, over samples n. [N, P, Q] is never formed.

    The outer loop goes over chunks of rows, the inner one over samples: the sum's chunk and the product stay in the
    cache.
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
        chunk_of_total = total[start : start + rows]
        product = buffer[: len(chunk_of_total)]
        for left_n, right_n in zip(left, right, strict=True):
            columns = left_n[:, start : start + rows].T
            if mixed:
                product = torch.mm(columns, right_n, out_dtype=total.dtype)
            else:
                torch.mm(columns, right_n, out=product)
            chunk_of_total.addcmul_(product, product)
