"""What the weights multiply, on a layer small enough to check by hand."""

from types import SimpleNamespace

import pytest
import tables
import torch

from peft_perta.adapters import Product
from peft_perta.perta import GRANULARITIES, ratio

TARGET = SimpleNamespace(A=tables.A, B=tables.B, scaling=tables.SCALING)
each = pytest.mark.parametrize(("granularity", "row"), [(GRANULARITIES[k], r) for k, r in tables.GRANULARITIES.items()])


def dense(edit):
    return edit.B @ edit.A if isinstance(edit, Product) else edit


def products(gradients: dict) -> dict:
    return {key: outer.product() for key, outer in gradients.items()}


def same(found: dict, expected: dict):
    assert set(found) == set(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


@each
def test_gradient(granularity, row):
    same(products(granularity.gradient(TARGET, tables.X, tables.G)), row.gradient)


@each
def test_a_whole_weight_gradient_gives_the_same(granularity, row):
    same(products(granularity.gradient(TARGET, tables.G.T @ tables.X, None)), row.gradient)


@each
def test_the_shapes_are_those_of_the_gradient(granularity, row):
    target = SimpleNamespace(A=torch.ones(2, 5), B=torch.ones(3, 2), scaling=1.0)
    found = products(granularity.gradient(target, torch.ones(4, 5), torch.ones(4, 3)))
    assert granularity.shapes(target) == {key: tuple(value.shape) for key, value in found.items()}


@each
def test_arrangement(granularity, row):
    same(granularity.arrange({key: value.abs() for key, value in row.gradient.items()}), row.arranged)


@each
def test_edit(granularity, row):
    torch.testing.assert_close(dense(granularity.edit(TARGET, row.weights, 1.0)), row.edit, msg=row.source)


@each
def test_the_edit_is_linear_in_strength_and_signed(granularity, row):
    torch.testing.assert_close(dense(granularity.edit(TARGET, row.weights, -0.5)), -0.5 * row.edit)
    assert not dense(granularity.edit(TARGET, row.weights, 0.0)).any()


@each
def test_uniform_weights_give_the_negated_task_vector(granularity, row):
    weights = granularity.uniform(TARGET)
    assert {key: value.shape for key, value in weights.items()} == {k: v.shape for k, v in row.weights.items()}
    torch.testing.assert_close(
        dense(granularity.edit(TARGET, weights, 1.0)), torch.tensor([[-2.0, -4.0], [-6.0, -12.0]])
    )


@each
def test_the_inputs_are_not_modified(granularity, row):
    before = [t.clone() for t in (TARGET.A, TARGET.B, *row.weights.values())]
    granularity.edit(TARGET, row.weights, 2.0)
    assert all(map(torch.equal, before, (TARGET.A, TARGET.B, *row.weights.values())))


@pytest.mark.parametrize("name", ["factor", "separable"])
def test_products_never_form_the_matrix(name):
    """The largest tensor of an [O, I] = [300, 400] layer has far fewer than O * I elements."""
    target = SimpleNamespace(A=torch.randn(2, 400), B=torch.randn(300, 2), scaling=1.0)
    granularity = GRANULARITIES[name]
    gradient = products(granularity.gradient(target, torch.randn(5, 400), torch.randn(5, 300)))
    edit = granularity.edit(target, granularity.uniform(target), 1.0)
    assert isinstance(edit, Product)
    assert max(t.numel() for t in (*gradient.values(), edit.A, edit.B)) == 2 * 400


def factor_edit(A, B, forget, retain):
    """The edit of 'factor' at ratio weights, from both sets' weight gradients [O, I]."""
    target, granularity = SimpleNamespace(A=A, B=B, scaling=2.0), GRANULARITIES["factor"]
    f, r = (granularity.arrange({k: v.abs() for k, v in products(granularity.gradient(target, G, None)).items()})
            for G in (forget, retain))  # fmt: skip
    return dense(granularity.edit(target, {key: ratio(f[key], r[key], 1.0) for key in f}, 1.0))


def test_the_edit_depends_on_the_basis_of_the_factors():
    """Reordering and rescaling the rank-one terms changes nothing; rotating their basis changes the edit."""
    generator = torch.Generator().manual_seed(0)
    A, B, forget, retain = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 7), (5, 3), (5, 7), (5, 7))
    )
    edit = factor_edit(A, B, forget, retain)
    scales, order = torch.tensor([0.1, 3.0, -20.0], dtype=torch.float64), torch.tensor([2, 0, 1])
    rewritten = factor_edit((scales[:, None] * A)[order], (B / scales)[:, order], forget, retain)
    torch.testing.assert_close(rewritten, edit)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    assert not torch.allclose(factor_edit(turn @ A, B @ turn.T, forget, retain), edit, rtol=0.05)
