"""Factorizing an edit: the best approximation by a full SVD in float64 (Eckart-Young), and the stated error."""

from contextlib import contextmanager

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_perta.adapters import Factors, Product, factorize


def dense(out: int = 12, columns: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def product(rank: int = 5) -> Product:
    return Product(B=dense(12, rank, 1), A=dense(rank, 9, 2))


@given(rank=st.integers(1, 12), seed=st.integers(0, 50))
def test_a_dense_edit_becomes_its_best_approximation(rank, seed):
    edit = dense(seed=seed).double()  # in float32 two singular values can be too close to tell which one is kept
    fitted = factorize(edit, rank)
    assert fitted.rank == min(rank, 9)
    best = oracles.best_approximation(edit, rank)
    torch.testing.assert_close(fitted.B @ fitted.A, best, rtol=1e-8, atol=1e-10)
    assert fitted.energy == pytest.approx(float(edit.square().sum()))
    assert fitted.energy_kept == pytest.approx(float(best.square().sum() / edit.square().sum()))


@pytest.mark.parametrize("rank", [5, 6, 64])
def test_a_product_of_small_enough_rank_is_returned_unchanged(rank):
    edit = product()
    fitted = factorize(edit, rank)
    assert torch.equal(fitted.A, edit.A)
    assert torch.equal(fitted.B, edit.B)
    assert fitted.energy_kept == 1.0
    assert fitted.energy == pytest.approx(float((edit.B.double() @ edit.A.double()).square().sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncated_product_is_its_best_approximation(rank):
    edit = product()
    fitted = factorize(edit, rank)
    best = oracles.best_approximation(edit.B @ edit.A, rank)
    assert fitted.rank == rank
    torch.testing.assert_close((fitted.B @ fitted.A).double(), best, rtol=1e-4, atol=1e-5)
    assert fitted.energy_kept == pytest.approx(float(best.square().sum()) / fitted.energy, rel=1e-5)


@pytest.mark.parametrize("edit", [dense(), product()], ids=["dense", "product"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_an_energy_share_gives_the_smallest_rank_that_reaches_it(edit, share):
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
    """B^T B equals A A^T, so both factors stay within the range of a 16-bit type."""
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


# Dense edits much larger than their rank: subspace iteration


def dense_edit(kind: str, size: int = 320, rank: int = 12, seed: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind) if seed is None else seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    product = draw(size + 40, rank) @ draw(rank, size)
    forget, retain = draw(size + 40, size).abs(), draw(size + 40, size).abs()
    if kind == "ratio":
        return product * forget / (forget + retain)
    if kind == "binary":
        return product * (forget > retain)
    if kind == "structured":
        rows, columns = draw(size + 40, 1).abs(), draw(1, size).abs()
        return product * (rows * columns) / (rows * columns + retain)
    if kind == "noise":  # no leading subspace at all
        return draw(size + 40, size)
    U, V = (torch.linalg.qr(draw(size, size)).Q for _ in range(2))
    return U * (0.8 ** torch.arange(size)) @ V  # fast decay


@contextmanager
def no_svd_of(size: int):
    """Fail if the fit takes the full decomposition."""
    plain = torch.linalg.svd

    def small_only(matrix, **settings):
        assert min(matrix.shape) < size, "the full decomposition was taken"
        return plain(matrix, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", small_only)
        yield


@pytest.fixture
def no_full_svd():
    with no_svd_of(300):
        yield


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["ratio", "binary", "structured", "decay"]),
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 16),
    wide=st.booleans(),
)
def test_the_excess_error_of_a_random_edit_is_within_its_bound(kind, seed, rank, wide):
    edit = dense_edit(kind, 128, 8, seed)
    edit = edit.T if wide else edit
    with no_svd_of(128):
        fitted = factorize(edit, rank)
    energies = torch.linalg.svdvals(edit.double()).square()
    best, total = float(energies[rank:].sum()), float(energies.sum())
    error = float((edit.double() - fitted.B.double() @ fitted.A.double()).square().sum())
    assert error <= best * (1 + min(fitted.excess_error, 0.01)) + 1e-6 * total
    assert fitted.energy_kept == pytest.approx(1 - error / total, abs=1e-5)


@settings(max_examples=20)
@given(
    kind=st.sampled_from(["ratio", "binary", "structured", "decay"]),
    seed=st.integers(0, 10**6),
    share=st.floats(0.05, 0.6),
)
def test_a_random_edit_reaches_its_energy_share_at_no_more_than_one_extra_rank(kind, seed, share):
    edit = dense_edit(kind, 256, 6, seed)
    with no_svd_of(256):
        fitted = factorize(edit, share)
    energies = torch.linalg.svdvals(edit.double()).square()
    exact = int((energies.cumsum(0) >= share * energies.sum()).int().argmax()) + 1
    assert exact <= fitted.rank <= exact + 1
    kept = 1 - float((edit.double() - fitted.B.double() @ fitted.A.double()).square().sum() / energies.sum())
    assert kept >= share - 1e-5


@pytest.mark.parametrize("kind", ["ratio", "binary", "structured", "decay"])
@pytest.mark.parametrize("rank", [4, 12, 24])
def test_the_excess_error_is_within_its_bound(kind, rank, no_full_svd):
    edit = dense_edit(kind)
    fitted = factorize(edit, rank)
    energies = torch.linalg.svdvals(edit.double()).square()
    best = float(energies[rank:].sum())
    error = float((edit.double() - fitted.B.double() @ fitted.A.double()).square().sum())
    rounding = 1e-6 * float(energies.sum())
    assert error <= best * (1 + fitted.excess_error) + rounding
    assert fitted.excess_error <= 0.01
    assert fitted.rank == rank
    assert fitted.energy == pytest.approx(float(energies.sum()), rel=1e-5)
    assert fitted.energy_kept == pytest.approx(1 - error / float(energies.sum()), abs=1e-5)


def test_noise_without_a_leading_subspace_is_fitted_too():
    """The full decomposition is taken where the iteration does not reach its bound in time."""
    edit = dense_edit("noise")
    fitted = factorize(edit, 12)
    best = float(torch.linalg.svdvals(edit.double()).square()[12:].sum())
    error = float((edit.double() - fitted.B.double() @ fitted.A.double()).square().sum())
    assert error <= best * 1.01


def test_an_edit_of_low_rank_is_exact(no_full_svd):
    edit = torch.randn(400, 9) @ torch.randn(9, 320)
    for rank in (9, 16):
        fitted = factorize(edit, rank)
        assert (fitted.B @ fitted.A - edit).norm() <= 1e-4 * edit.norm()
        assert fitted.excess_error <= 0.01


def test_a_large_edit_of_zeros_is_zero(no_full_svd):
    fitted = factorize(torch.zeros(400, 320), 8)
    assert (fitted.energy, fitted.energy_kept, fitted.excess_error) == (0.0, 1.0, 0.0)
    assert not fitted.A.any()
    assert not fitted.B.any()


@pytest.mark.parametrize("kind", ["ratio", "decay"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_large_edit_reaches_its_energy_share_at_no_more_than_one_extra_rank(kind, share):
    edit = dense_edit(kind)
    fitted = factorize(edit, share)
    energies = torch.linalg.svdvals(edit.double()).square()
    exact = int((energies.cumsum(0) >= share * energies.sum()).int().argmax()) + 1
    assert exact <= fitted.rank <= exact + 1
    kept = 1 - float((edit.double() - fitted.B.double() @ fitted.A.double()).square().sum() / energies.sum())
    assert kept >= share - 1e-5
    assert kept == pytest.approx(fitted.energy_kept, abs=1e-5)


def test_the_fit_is_deterministic():
    edit = dense_edit("ratio")
    one = factorize(edit, 12)
    torch.manual_seed(1)
    other = factorize(edit, 12)
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)
