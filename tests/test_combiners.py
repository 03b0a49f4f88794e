"""Laws of the combiners over the table, and their formulas by hand."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_perta.training import COMBINERS
from peft_perta.training.combiners.agreement import agreement

GUARDING = ["pcgrad", "pcgrad-global", "sago", "sago-prefer-retain"]
ADDING = ["sum", "pcgrad", "pcgrad-global", "sago-prefer-retain"]  # where nothing conflicts, the sum
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


def inner(one, other):
    return sum(float((one[name] * other[name]).sum()) for name in one)


def norm(one):
    return inner(one, one) ** 0.5


@pytest.mark.parametrize("name", GUARDING)
@given(pair=gradients(), gamma=weights, alpha=weights)
def test_the_combined_gradient_never_goes_against_the_retain_gradient(name, pair, gamma, alpha):
    forget, retain = pair
    rounding = 1e-13 * norm(forget) * norm(retain) * gamma
    assert inner(combine(name, forget, retain, gamma, alpha), retain) >= -rounding


@given(pair=gradients(), gamma=weights, more=st.floats(0, 10))
def test_normalised_does_not_either_where_retaining_weighs_as_much(pair, gamma, more):
    forget, retain = pair
    combined = combine("normalised", forget, retain, gamma, gamma + more)
    assert inner(combined, retain) >= -1e-12 * gamma * norm(retain)


def test_a_tiny_retain_gradient_is_not_gone_against_either():
    """With 1e-10 beside ||g_r||^2 the inner product here would be -1e-6."""
    forget, retain = {"a": torch.tensor([-1.0, 1.0])}, {"a": torch.tensor([1e-6, 0.0])}
    for name in ("pcgrad", "pcgrad-global"):
        assert inner(combine(name, forget, retain), retain) >= 0


@pytest.mark.parametrize("name", ["sago", "sago-prefer-retain"])
@given(pair=gradients(), gamma=weights, alpha=weights)
def test_no_element_of_sago_has_the_sign_against_the_retain_gradient(name, pair, gamma, alpha):
    forget, retain = pair
    for key, found in combine(name, forget, retain, gamma, alpha).items():
        assert not bool((found.sign() * retain[key].sign() < 0).any())


@pytest.mark.parametrize("name", ADDING)
@given(pair=gradients(), gamma=weights, alpha=weights)
def test_where_nothing_conflicts_it_is_the_sum(name, pair, gamma, alpha):
    forget, retain = pair[0], {key: found.abs() * pair[0][key].sign() for key, found in pair[1].items()}
    expected = combine("sum", forget, retain, gamma, alpha)
    assert all(torch.equal(found, expected[key]) for key, found in combine(name, forget, retain, gamma, alpha).items())


@pytest.mark.parametrize("name", COMBINERS)
@given(pair=gradients(), gamma=weights, alpha=weights)
def test_the_order_of_the_parameters_has_no_say(name, pair, gamma, alpha):
    forget, retain = pair
    expected = combine(name, forget, retain, gamma, alpha)
    turned = combine(name, *({key: found[key] for key in "cab"} for found in pair), gamma, alpha)
    assert all(torch.equal(turned[key], found) for key, found in expected.items())


@pytest.mark.parametrize("name", COMBINERS)
@given(pair=gradients(), scale=st.sampled_from([2.0**-8, 2.0, 2.0**16]))
def test_a_common_scale_stays_common(name, pair, scale):
    """Loss scaling is undone before: by a power of two, exactly; but to 'normalised' no scale matters."""
    assume(all(norm(found) > 0 for found in pair))
    scaled = combine(name, *({key: scale * value for key, value in found.items()} for found in pair))
    factor = 1.0 if name == "normalised" else scale
    for key, found in combine(name, *pair).items():
        torch.testing.assert_close(scaled[key], factor * found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", COMBINERS)
@given(pair=gradients())
def test_both_gradients_are_only_looked_at(name, pair):
    before = [{key: value.clone() for key, value in found.items()} for found in pair]
    found = combine(name, *pair)
    assert list(found) == ["a", "b", "c"]
    for mapping, copy in zip(pair, before, strict=True):
        assert all(torch.equal(value, copy[key]) for key, value in mapping.items())


# By hand, gamma = 2, alpha = 3. Tensor a conflicts (d = -4 + 1 = -3, ||r||^2 = 5), tensor b does not (d = 6).
FORGET = {"a": torch.tensor([2.0, 1.0, 0.0]), "b": torch.tensor([3.0])}
RETAIN = {"a": torch.tensor([-2.0, 1.0, 0.0]), "b": torch.tensor([2.0])}
GOLDEN = {
    "sum": ({"a": [-2, 5, 0], "b": [12]}, "2 f + 3 r"),
    # f - (-3/5) r = (2 - 6/5, 1 + 3/5, 0) = (4/5, 8/5, 0)
    "pcgrad": ({"a": [8 / 5 - 6, 16 / 5 + 3, 0], "b": [12]}, "a projected alone"),
    # over all: d = -3 + 6 = 3: no conflict
    "pcgrad-global": ({"a": [-2, 5, 0], "b": [12]}, "no conflict over all"),
    "sago": ({"a": [-6, 2, 0], "b": [6]}, "conflict in the first element alone"),
    "sago-prefer-retain": ({"a": [-6, 5, 0], "b": [12]}, "the same, with r where the signs agree"),
    # ||f|| = sqrt(14), ||r|| = 3
    "normalised": (
        {"a": [4 / 14**0.5 - 2, 2 / 14**0.5 + 1, 0], "b": [6 / 14**0.5 + 2]},
        "2 f / sqrt(14) + 3 r / 3",
    ),
}


@pytest.mark.parametrize("name", COMBINERS)
def test_golden(name):
    for key, found in combine(name, FORGET, RETAIN, 2.0, 3.0).items():
        torch.testing.assert_close(found, torch.tensor(GOLDEN[name][0][key], dtype=torch.float32), msg=GOLDEN[name][1])


def test_global_projection_by_hand():
    """f = (1, 0 | 0), r = (-1, 1 | 1): d = -1, ||r||^2 = 3, f - d/3 r = (2/3, 1/3 | 1/3), plus r."""
    forget = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0])}
    retain = {"a": torch.tensor([-1.0, 1.0]), "b": torch.tensor([1.0])}
    found = combine("pcgrad-global", forget, retain)
    torch.testing.assert_close(found["a"], torch.tensor([2 / 3 - 1, 1 / 3 + 1]))
    torch.testing.assert_close(found["b"], torch.tensor([1 / 3 + 1]))
    found = combine("pcgrad", forget, retain)  # in a alone: d = -1, ||r||^2 = 2, f + r/2 = (1/2, 1/2); b stays
    torch.testing.assert_close(found["a"], torch.tensor([-1 / 2, 3 / 2]))
    torch.testing.assert_close(found["b"], torch.tensor([1.0]))


def test_a_gradient_that_is_zero_stays_out_of_normalised():
    zero = {"a": torch.zeros(2)}
    one = {"a": torch.tensor([3.0, 4.0])}
    assert torch.equal(combine("normalised", zero, one)["a"], torch.tensor([0.6, 0.8]))
    assert not combine("normalised", zero, zero)["a"].any()


def test_the_agreement_by_hand():
    found = agreement(FORGET, RETAIN, COMBINERS["sum"].function(FORGET, RETAIN, 1.0, 1.0))
    # <f, r> = 3, sum = (0, 2, 0 | 5): <s, f> = 17, <s, r> = 12, ||s||^2 = 29; one of four elements conflicts
    assert found == pytest.approx({
        "cosine_forget_retain": 3 / (14**0.5 * 3),
        "cosine_combined_forget": 17 / (29**0.5 * 14**0.5),
        "cosine_combined_retain": 12 / (29**0.5 * 3),
        "conflicting_share": 0.25,
    })  # fmt: skip
    assert agreement({"a": torch.zeros(1)}, {"a": torch.ones(1)}, {"a": torch.ones(1)})["cosine_forget_retain"] == 0.0
