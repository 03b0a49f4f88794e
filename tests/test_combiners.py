"""Laws of the combiners, over the table, and their values by hand."""

import math

import pytest
import tables
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_perta.training import COMBINERS
from peft_perta.training._agreement import agreement

FORGET, RETAIN = tables.FORGET_GRADIENTS, tables.RETAIN_GRADIENTS
GUARDING = [name for name, row in tables.COMBINERS.items() if row.guards]
ADDING = [name for name, row in tables.COMBINERS.items() if row.adds]
values = st.one_of(st.just(0.0), st.floats(2.0**-40, 2.0**10), st.floats(-(2.0**10), -(2.0**-40)))
weights = st.floats(0.01, 100.0)


@st.composite
def gradients(draw):
    """Two mappings of three tensors each, in float64."""
    shapes = [(3,), (2, 2), (1,)]
    tensors = [
        {
            name: torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64).reshape(shape)
            for name, shape in zip("abc", shapes, strict=True)
            for n in [math.prod(shape)]
        }
        for _ in range(2)
    ]
    return tuple(tensors)


def combine(name, forget, retain, gamma=1.0, alpha=1.0):
    return COMBINERS[name].function(forget, retain, gamma, alpha)


def inner(first, second):
    return sum(float((first[name] * second[name]).sum()) for name in first)


def norm(gradients):
    return inner(gradients, gradients) ** 0.5


@pytest.mark.parametrize("name", GUARDING)
@given(pair=gradients(), gamma=weights, alpha=weights)
def test_the_combined_gradient_never_goes_against_the_retain_gradient(name, pair, gamma, alpha):
    forget, retain = pair
    rounding = 1e-13 * norm(forget) * norm(retain) * gamma
    assert inner(combine(name, forget, retain, gamma, alpha), retain) >= -rounding


@given(pair=gradients(), gamma=weights, more=st.floats(0, 10))
def test_normalised_does_not_either_if_alpha_is_at_least_gamma(pair, gamma, more):
    forget, retain = pair
    combined = combine("normalised", forget, retain, gamma, gamma + more)
    assert inner(combined, retain) >= -1e-12 * gamma * norm(retain)


def test_the_combined_gradient_does_not_go_against_a_tiny_retain_gradient():
    """With 1e-10 added to ||g_r||^2, the inner product would be -1e-6."""
    forget, retain = {"a": torch.tensor([-1.0, 1.0])}, {"a": torch.tensor([1e-6, 0.0])}
    for name in ("pcgrad", "pcgrad-global"):
        assert inner(combine(name, forget, retain), retain) >= 0


@pytest.mark.parametrize("name", ["sago", "sago-prefer-retain"])
@given(pair=gradients(), gamma=weights, alpha=weights)
def test_no_element_of_sago_has_the_opposite_sign_of_the_retain_gradient(name, pair, gamma, alpha):
    forget, retain = pair
    for key, combined in combine(name, forget, retain, gamma, alpha).items():
        assert not bool((combined.sign() * retain[key].sign() < 0).any())


@pytest.mark.parametrize("name", ADDING)
@given(pair=gradients(), gamma=weights, alpha=weights)
def test_without_conflicts_it_is_the_sum(name, pair, gamma, alpha):
    forget, retain = pair[0], {key: value.abs() * pair[0][key].sign() for key, value in pair[1].items()}
    expected = combine("sum", forget, retain, gamma, alpha)
    combined = combine(name, forget, retain, gamma, alpha)
    assert all(torch.equal(value, expected[key]) for key, value in combined.items())


@pytest.mark.parametrize("name", COMBINERS)
@given(pair=gradients(), gamma=weights, alpha=weights)
def test_the_order_of_the_parameters_does_not_matter(name, pair, gamma, alpha):
    forget, retain = pair
    expected = combine(name, forget, retain, gamma, alpha)
    reordered = combine(name, *({key: gradients[key] for key in "cab"} for gradients in pair), gamma, alpha)
    assert all(torch.equal(reordered[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", COMBINERS)
@given(pair=gradients(), scale=st.sampled_from([2.0**-8, 2.0, 2.0**16]))
def test_a_common_scale_of_both_gradients_scales_the_result(name, pair, scale):
    """By a power of two, exactly. 'normalised' does not depend on the scale."""
    assume(all(norm(gradients) > 0 for gradients in pair))
    scaled = combine(name, *({key: scale * value for key, value in gradients.items()} for gradients in pair))
    factor = scale if tables.COMBINERS[name].scales else 1.0
    for key, value in combine(name, *pair).items():
        torch.testing.assert_close(scaled[key], factor * value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", COMBINERS)
@given(pair=gradients())
def test_both_gradients_stay_unchanged(name, pair):
    before = [{key: value.clone() for key, value in gradients.items()} for gradients in pair]
    assert list(combine(name, *pair)) == ["a", "b", "c"]
    for mapping, copy in zip(pair, before, strict=True):
        assert all(torch.equal(value, copy[key]) for key, value in mapping.items())


@pytest.mark.parametrize("name", COMBINERS)
def test_golden(name):
    row = tables.COMBINERS[name]
    for key, value in combine(name, FORGET, RETAIN, 2.0, 3.0).items():
        torch.testing.assert_close(value, torch.tensor(row.combined[key], dtype=torch.float32), msg=row.source)


def test_global_projection_by_hand():
    """f = (1, 0 | 0), r = (-1, 1 | 1): d = -1, ||r||^2 = 3, f - d/3 r = (2/3, 1/3 | 1/3), plus r."""
    forget = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0])}
    retain = {"a": torch.tensor([-1.0, 1.0]), "b": torch.tensor([1.0])}
    combined = combine("pcgrad-global", forget, retain)
    torch.testing.assert_close(combined["a"], torch.tensor([2 / 3 - 1, 1 / 3 + 1]))
    torch.testing.assert_close(combined["b"], torch.tensor([1 / 3 + 1]))
    combined = combine("pcgrad", forget, retain)  # in a alone: d = -1, ||r||^2 = 2, f + r/2 = (1/2, 1/2); b stays
    torch.testing.assert_close(combined["a"], torch.tensor([-1 / 2, 3 / 2]))
    torch.testing.assert_close(combined["b"], torch.tensor([1.0]))


def test_a_zero_gradient_contributes_nothing_to_normalised():
    zero = {"a": torch.zeros(2)}
    retain = {"a": torch.tensor([3.0, 4.0])}
    assert torch.equal(combine("normalised", zero, retain)["a"], torch.tensor([0.6, 0.8]))
    assert not combine("normalised", zero, zero)["a"].any()


def test_the_agreement_by_hand():
    figures = agreement(FORGET, RETAIN, combine("sum", FORGET, RETAIN))
    # <f, r> = 3, sum = (0, 2, 0 | 5): <s, f> = 17, <s, r> = 12, ||s||^2 = 29; one of four elements conflicts
    assert figures == pytest.approx({
        "cosine_forget_retain": 3 / (14**0.5 * 3),
        "cosine_combined_forget": 17 / (29**0.5 * 14**0.5),
        "cosine_combined_retain": 12 / (29**0.5 * 3),
        "conflicting_share": 0.25,
    })  # fmt: skip
    assert agreement({"a": torch.zeros(1)}, {"a": torch.ones(1)}, {"a": torch.ones(1)})["cosine_forget_retain"] == 0.0
