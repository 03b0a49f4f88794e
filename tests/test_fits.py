"""Fits: each is the best in its own measure, against a dense oracle in float64; all are exact if the rank suffices."""

import pytest
import tables
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta.adapters import Product
from peft_perta.errors import UnsupportedLayerError
from peft_perta.gradients import GradientSums
from peft_perta.perta import FITS
from peft_perta.perta._input_directions import DAMPING
from peft_perta.perta.fits.weighted import weighted_factors

each = pytest.mark.parametrize("name", tables.FITS)
HEIGHT, WIDTH, RANK = 24, 40, 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(seed=0, width=WIDTH, height=HEIGHT):
    """Both sets' sums over 50 and 80 tokens whose inputs and gradients have very different sizes."""
    sets = {}
    for index, (name, tokens) in enumerate((("forget", 50), ("retain", 80))):
        x = random(tokens, width, seed=seed + index) * torch.logspace(-1.5, 0.5, width, dtype=torch.float64)
        g = random(tokens, height, seed=seed + index + 7) * torch.logspace(0.5, -1, height, dtype=torch.float64)
        moments = {
            "inputs": x.T @ x,
            "tokens": torch.full((1, 1), float(tokens), dtype=torch.float64),
            "input energy": x.square().sum(0, keepdim=True),
            "output energy": g.square().sum(0, keepdim=True),
        }
        sets[name] = GradientSums("mean", gradients={"weight": g.T @ x}, moments=moments, samples=10)
    return sets


def edits(seed=3):
    dense = random(HEIGHT, WIDTH, seed=seed)
    return {"dense": dense, "product": Product(B=random(HEIGHT, 9, seed=seed), A=random(9, WIDTH, seed=seed + 1))}


def dense_of(edit):
    return edit.B @ edit.A if isinstance(edit, Product) else edit


def metric(name, sets):
    """D -> the squared error that this fit minimises, and (left, right) if that is ||left D right||^2."""
    forget, retain = sets.values()
    identity = torch.eye(WIDTH, dtype=torch.float64), torch.eye(HEIGHT, dtype=torch.float64)
    if name == "weighted":
        H = (retain.gradients["weight"] / 10).square()
        H = H / H.mean() + 0.01
        return (lambda D: float((H * D.square()).sum())), None
    if name == "truncated":
        right, left = identity
    elif name == "kronecker":
        q, p = (
            sum(s.moments[f"{n} energy"][0] / s.moments[f"{n} energy"].mean() for s in (forget, retain)) + 1e-3
            for n in ("input", "output")
        )
        right, left = q.sqrt().diag(), p.sqrt().diag()
    else:
        C = sum(s.moments["inputs"] / s.moments["tokens"] for s in (forget, retain))
        C = C + DAMPING * C.diagonal().mean() * identity[0]
        values, vectors = torch.linalg.eigh(C)
        right, left = vectors @ values.sqrt().diag() @ vectors.T, identity[1]
    return (lambda D: float((left @ D @ right).square().sum())), (left, right)


@each
@pytest.mark.parametrize("kind", ["dense", "product"])
def test_no_factors_of_the_rank_are_closer_in_its_measure(name, kind):
    sets, edit = measured(), edits()[kind]
    found = FITS[name].fit(edit, RANK, sets)
    E = dense_of(edit)
    error_of, scaling = metric(name, sets)
    error = error_of(E - found.B @ found.A)
    assert found.A.shape == (RANK, WIDTH)
    assert found.B.shape == (HEIGHT, RANK)
    if scaling is not None:
        left, right = scaling
        least = float(torch.linalg.svdvals(left @ E @ right)[RANK:].square().sum())
        assert least * (1 - 1e-9) <= error <= least * (1 + 1e-6)
    others = [other.fit(edit, RANK, sets) for key, other in FITS.items() if key != name]
    assert all(error < error_of(E - other.B @ other.A) for other in others), "the measures differ, so the fits do too"
    assert found.metric_error == pytest.approx(error / error_of(E), rel=1e-6)
    kept = 1 - float((E - found.B @ found.A).square().sum() / E.square().sum())
    assert found.energy_kept == pytest.approx(kept, abs=1e-9)


@each
def test_an_edit_that_fits_the_rank_is_passed_on(name):
    edit = edits()["product"]
    found = FITS[name].fit(edit, 9, measured())
    assert torch.equal(found.A, edit.A)
    assert torch.equal(found.B, edit.B)
    assert (found.energy_kept, found.metric_error) == (1.0, 0.0)


@each
def test_an_edit_that_is_zero_stays_zero(name):
    found = FITS[name].fit(torch.zeros(HEIGHT, WIDTH, dtype=torch.float64), RANK, measured())
    assert not (found.B @ found.A).any()
    assert found.energy_kept == 1.0


@each
def test_a_share_instead_of_a_rank(name):
    found = FITS[name].fit(edits()["dense"], 0.8, measured())
    assert 1 < found.rank < HEIGHT
    if name in ("kronecker", "second-moment"):
        assert found.metric_error <= 0.2 + 1e-9


@each
def test_the_inputs_are_not_modified(name):
    sets, edit = measured(), edits()["dense"]
    before = edit.clone(), {name: [total.clone() for total in sums.tensors()] for name, sums in sets.items()}
    FITS[name].fit(edit, RANK, sets)
    assert torch.equal(edit, before[0])
    for name, sums in sets.items():
        assert len(before[1][name]) == 5
        assert all(map(torch.equal, sums.tensors(), before[1][name]))


@given(st.integers(0, 2**16), st.floats(0.0, 3.0))
def test_weighted_factors_converge_to_a_stationary_point(seed, spread):
    """The error is below the start's, and its gradient with respect to the factor solved last is almost zero."""
    E, H = random(12, 15, seed=seed), torch.exp(spread * random(12, 15, seed=seed + 1))
    U, S, Vh = torch.linalg.svd(E)
    start = S[:3].sqrt().unsqueeze(1) * Vh[:3], U[:, :3] * S[:3].sqrt()
    A, B, error = weighted_factors(E, H, *start)
    first = float((H * (E - start[1] @ start[0]).square()).sum())
    assert error <= first * (1 + 1e-12)
    assert error == pytest.approx(float((H * (E - B @ A).square()).sum()), rel=1e-9)
    residual = H * (B @ A - E)
    assert float((residual.T @ B).norm()) <= 1e-3 * float((H * E).norm() * B.norm()) + 1e-9, "A was solved for last"


def test_equal_weights_are_the_truncation():
    E = random(HEIGHT, WIDTH)
    U, S, Vh = torch.linalg.svd(E)
    A, B, error = weighted_factors(
        E, torch.ones_like(E), S[:RANK, None].sqrt() * Vh[:RANK], U[:, :RANK] * S[:RANK].sqrt()
    )
    assert error == pytest.approx(float(S[RANK:].square().sum()), rel=1e-9)
    torch.testing.assert_close(B @ A, (U[:, :RANK] * S[:RANK]) @ Vh[:RANK])


def test_the_second_moment_of_experts_is_refused():
    sets = {name: s.only(["weight"]) for name, s in measured().items()}
    with pytest.raises(UnsupportedLayerError, match="second-moment' needs the layers' inputs"):
        FITS["second-moment"].fit(edits()["dense"], RANK, sets)
