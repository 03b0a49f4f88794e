"""Sums of products, in chunks and in any place, against einsum in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta.gradients import GradientSums, Outer, gradient_sums
from peft_perta.gradients.gradient_sums import PLACES, add_product, add_squares


def drawn(N: int, T: int, P: int, Q: int, dtype=torch.float32) -> Outer:
    generator = torch.Generator().manual_seed(N + 10 * T + 100 * P + 1000 * Q)
    left, right = (torch.randn(N, T, size, generator=generator, dtype=torch.float64) for size in (P, Q))
    return Outer(left.to(dtype), right.to(dtype))


def per_sample(outer: Outer) -> torch.Tensor:
    return torch.einsum("ntp,ntq->npq", outer.left.double(), outer.right.double())


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 7), st.sampled_from([1, 6, 7, 40, 2**17])
)
def test_sums_are_those_of_einsum(N, T, P, Q, chunk):
    """For every size of a chunk of rows, also one that does not divide them."""
    outer = drawn(N, T, P, Q)
    held, gradient_sums._CPU_CHUNK = gradient_sums._CPU_CHUNK, chunk
    try:
        sums, squares = torch.ones(P, Q), torch.ones(P, Q)
        add_product(sums, outer)
        add_squares(squares, outer)
    finally:
        gradient_sums._CPU_CHUNK = held
    torch.testing.assert_close(sums.double(), 1 + per_sample(outer).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), 1 + per_sample(outer).square().sum(0), rtol=1e-5, atol=1e-5)


def test_16_bit_operands_are_summed_in_float32():
    outer = drawn(3, 50, 6, 5, torch.bfloat16)
    for name, total in (("mean", per_sample(outer).sum(0)), ("squares", per_sample(outer).square().sum(0))):
        sums = GradientSums(name)
        sums.add({"weight": outer}, {}, samples=3)
        assert sums.gradients["weight"].dtype == torch.float32
        torch.testing.assert_close(sums.gradients["weight"].double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "types", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float32")], ids="x".join
)
@pytest.mark.parametrize("name", ["mean", "squares"])
def test_operands_of_two_types_are_summed_in_the_wider(name, types):
    """A projection to the rank is float32 or wider; its other factor may have 16 bits."""
    outer = drawn(3, 20, 6, 5)
    left, right = (getattr(torch, kind) for kind in types)
    outer = Outer(outer.left.to(left), outer.right.to(right))
    total = per_sample(outer).sum(0) if name == "mean" else per_sample(outer).square().sum(0)
    sums = GradientSums(name)
    for _ in range(2):
        sums.add({"A": outer}, {}, samples=3)
    assert sums.gradients["A"].dtype == torch.promote_types(right, torch.float32)
    torch.testing.assert_close(sums.gradients["A"].double(), 2 * total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["mean", "squares"])
def test_16_bit_sums_do_not_stall(name, place):
    """In bfloat16 the 257th sample would be lost."""
    sums = GradientSums(name, place)
    for outer in [Outer(torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.ones(1, 1, 3, dtype=torch.bfloat16))] * 300:
        sums.add({"weight": outer}, {}, samples=1)
    assert torch.equal(sums.gradients["weight"], torch.full((2, 3), 300.0))


@pytest.mark.parametrize("place", PLACES)
def test_float64_stays(place):
    outer = drawn(2, 4, 3, 5, torch.float64)
    for name, total in (("mean", per_sample(outer).sum(0)), ("squares", per_sample(outer).square().sum(0))):
        sums = GradientSums(name, place)
        sums.add({"weight": outer}, {}, samples=2)
        torch.testing.assert_close(sums.gradients["weight"], total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["mean", "squares"])
@pytest.mark.parametrize("form", ["flat", "whole"])
def test_one_sample_in_any_form_gives_the_same(form, name, place):
    """[T, P] and [T, Q], or the product itself, instead of [1, T, P] and [1, T, Q]."""
    expected, found = GradientSums(name), GradientSums(name, place)
    for T in (4, 1, 7):
        outer = drawn(1, T, 6, 5)
        expected.add({"weight": outer}, {}, samples=1)
        left, right = outer.left[0], outer.right[0]
        found.add({"weight": Outer(left, right) if form == "flat" else Outer(None, left.T @ right)}, {}, samples=1)
    assert found.samples == 3
    torch.testing.assert_close(found.gradients["weight"], expected.gradients["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["mean", "squares"])
def test_a_place_changes_nothing(name, place):
    """Over several batches: the first one is summed differently from the others."""
    here, there = GradientSums(name), GradientSums(name, place)
    for N in (2, 1, 3):
        for sums in (here, there):
            sums.add({"A": drawn(N, 4, 3, 5), "B": drawn(N, 4, 6, 2)}, {}, samples=N)
    assert here.samples == there.samples == 6
    for key, total in here.gradients.items():
        torch.testing.assert_close(there.gradients[key], total, rtol=1e-6, atol=1e-6)
        assert total.norm() > 0


def test_a_sum_is_not_its_first_batch_s_own_tensor():
    """A gradient without a left factor is not modified."""
    gradient = torch.randn(3, 5)
    before = gradient.clone()
    sums = GradientSums("mean")
    for _ in range(2):
        sums.add({"weight": Outer(None, gradient)}, {}, samples=1)
    assert torch.equal(gradient, before)
    torch.testing.assert_close(sums.gradients["weight"], 2 * before)


def test_without_a_left_factor_it_is_a_product_with_the_identity():
    gradient = torch.randn(4, 6)
    identity = Outer(torch.eye(4), gradient)
    for name in ("mean", "squares"):
        one, other = GradientSums(name), GradientSums(name)
        one.add({"weight": Outer(None, gradient)}, {}, samples=1)
        other.add({"weight": identity}, {}, samples=1)
        torch.testing.assert_close(one.gradients["weight"], other.gradients["weight"])
    torch.testing.assert_close(identity.product(), Outer(None, gradient).product())


def test_squares_of_a_batch_with_flattened_samples_are_refused():
    outer = Outer(torch.randn(8, 3), torch.randn(8, 4))  # [T, P]: the tokens of two samples
    for several in (outer, Outer(None, outer.product())):
        with pytest.raises(ValueError, match="batches of one sample for statistic 'squares', found 2"):
            GradientSums("squares").add({"weight": several}, {}, samples=2)
        GradientSums("mean").add({"weight": several}, {}, samples=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sums_that_are_not_finite_are_noticed(value):
    sums = GradientSums("mean")
    sums.add({"A": drawn(2, 3, 4, 5), "B": drawn(2, 3, 2, 5)}, {}, samples=2)
    assert sums.is_finite()
    sums.gradients["B"][1, 4] = value
    assert not sums.is_finite()


def test_magnitudes_are_in_one_unit():
    """For a single sample both statistics are the same."""
    outer = drawn(1, 4, 3, 5)
    found = []
    for name in ("mean", "squares"):
        sums = GradientSums(name)
        sums.add({"weight": outer}, {}, samples=1)
        found.append(sums.magnitudes()["weight"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
