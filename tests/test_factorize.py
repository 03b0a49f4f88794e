"""Edit -> factors: Eckart-Young against a full SVD in float64, and the error as a returned value."""

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta.edit import Product
from peft_perta.factorize import Factors, factorize


def dense(out: int = 12, columns: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def product(rank: int = 5) -> Product:
    return Product(B=dense(12, rank, 1), A=dense(rank, 9, 2))


@given(rank=st.integers(1, 12), seed=st.integers(0, 50))
def test_a_dense_edit_becomes_its_best_approximation(rank, seed):
    edit = dense(seed=seed).double()  # in float32 two singular values can lie too close to tell which one is kept
    fitted = factorize(edit, rank)
    assert fitted.rank == min(rank, 9)
    best = oracles.best_approximation(edit, rank)
    torch.testing.assert_close(fitted.B @ fitted.A, best, rtol=1e-8, atol=1e-10)
    assert fitted.energy == pytest.approx(float(edit.square().sum()))
    assert fitted.energy_kept == pytest.approx(float(best.square().sum() / edit.square().sum()))


@pytest.mark.parametrize("rank", [5, 6, 64])
def test_a_product_of_enough_rank_is_passed_on_as_it_is(rank):
    edit = product()
    fitted = factorize(edit, rank)
    assert torch.equal(fitted.A, edit.A)
    assert torch.equal(fitted.B, edit.B)
    assert fitted.energy_kept == 1.0
    assert fitted.energy == pytest.approx(float((edit.B.double() @ edit.A.double()).square().sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_product_cut_down_is_its_best_approximation(rank):
    edit = product()
    fitted = factorize(edit, rank)
    best = oracles.best_approximation(edit.B @ edit.A, rank)
    assert fitted.rank == rank
    torch.testing.assert_close((fitted.B @ fitted.A).double(), best, rtol=1e-4, atol=1e-5)
    assert fitted.energy_kept == pytest.approx(float(best.square().sum()) / fitted.energy, rel=1e-5)


@pytest.mark.parametrize("edit", [dense(), product()], ids=["dense", "product"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_an_energy_share_takes_the_least_rank_that_reaches_it(edit, share):
    fitted = factorize(edit, share)
    assert fitted.energy_kept >= share * (1 - 1e-9)
    if fitted.rank > 1:
        assert factorize(edit, fitted.rank - 1).energy_kept < share


def test_a_rank_one_edit_needs_rank_one_at_any_energy():
    edit = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4))
    assert factorize(edit, 0.9).rank == 1
    assert factorize(edit, 0.9).energy_kept == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("edit", [torch.zeros(4, 3), Product(torch.zeros(4, 2), torch.zeros(2, 3))])
@pytest.mark.parametrize("rank", [1, 2, 0.5])
def test_an_edit_of_zeros_keeps_all_its_energy(edit, rank):
    fitted = factorize(edit, rank)
    assert (fitted.energy, fitted.energy_kept) == (0.0, 1.0)
    assert not (fitted.B @ fitted.A).any()


def test_singular_values_are_split_evenly():
    """B^T B equals A A^T: neither factor outgrows a 16-bit type before the other."""
    fitted = factorize(1e6 * dense(), 4)
    torch.testing.assert_close(fitted.B.T @ fitted.B, fitted.A @ fitted.A.T, rtol=1e-3, atol=1e2)


def test_padding_keeps_the_product():
    fitted = factorize(dense(), 3)
    padded = fitted.padded(8)
    assert (padded.A.shape, padded.B.shape) == ((8, 9), (12, 8))
    torch.testing.assert_close(padded.B @ padded.A, fitted.B @ fitted.A)
    assert isinstance(padded, Factors)
    assert (padded.energy, padded.energy_kept) == (fitted.energy, fitted.energy_kept)
    assert not padded.A[3:].any()
    assert not padded.B[:, 3:].any()
