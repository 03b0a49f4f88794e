"""Magnitudes -> weights: the laws for every weighting, at the limits of floating point."""

import sys
from types import ModuleType

import laws
import oracles
import pytest
import tables
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta import WEIGHTINGS, ConfigError, NumericalError, Weighting
from peft_perta.perta import resolve_weighting
from peft_perta.perta.weighing import weigh

WITH_GRADIENTS = [name for name, row in tables.WEIGHTINGS.items() if row is not None]
# Including zero, denormal numbers and the extremes of float32.
MAGNITUDES = st.lists(st.floats(0, 2.0**127, width=32), min_size=6, max_size=6).map(
    lambda values: torch.tensor(values).reshape(2, 3)
)
ORDINARY = st.lists(st.floats(0, 1024, width=32, allow_subnormal=False), min_size=6, max_size=6).map(
    lambda values: torch.tensor(values).reshape(2, 3)
)
POWERS = st.one_of(st.just(1.0), st.just(2.0), st.floats(0.01, 64))
each = pytest.mark.parametrize("name", WITH_GRADIENTS)


def function(name: str):
    return WEIGHTINGS[name].function


@each
@given(forget=MAGNITUDES, retain=MAGNITUDES, power=POWERS)
def test_weights_lie_in_0_1(name, forget, retain, power):
    laws.weights_lie_in_0_1(function(name), forget, retain, power)


@each
@given(forget=ORDINARY, more=ORDINARY, retain=ORDINARY, power=POWERS)
def test_weights_grow_with_forget(name, forget, more, retain, power):
    laws.weights_grow_with_forget(function(name), forget, more, retain, power)


@each
@given(forget=ORDINARY, retain=ORDINARY, power=POWERS, exponent=st.integers(-20, 80))
def test_weights_ignore_a_common_scale(name, forget, retain, power, exponent):
    laws.weights_ignore_a_common_scale(function(name), forget, retain, power, 2.0**exponent)


@each
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 50.0])
def test_nothing_known_is_nothing_changed(name, power):
    laws.nothing_known_is_nothing_changed(function(name), power)


@each
def test_power_0_is_one_half(name):
    laws.power_0_is_one_half(function(name), torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.tensor([[0.0, 3.0], [0, 1]]))


@each
def test_golden_values(name):
    row = tables.WEIGHTINGS[name]
    weighting = WEIGHTINGS[name]
    found = weighting.function(torch.tensor(row.forget), torch.tensor(row.retain), weighting.power)
    torch.testing.assert_close(found, torch.tensor(row.weights), msg=row.source)


# Zero, or a magnitude whose ratio to any other here is a normal number.
PLAIN = st.one_of(st.just(0.0), st.floats(1e-30, 1e30))


@given(forget=PLAIN, retain=PLAIN, power=st.floats(0, 8))
def test_the_ratio_is_the_formula(forget, retain, power):
    found = WEIGHTINGS["grad"].function(
        torch.tensor([forget], dtype=torch.float64), torch.tensor([retain], dtype=torch.float64), power
    )
    assert found.item() == pytest.approx(oracles.ratio(forget, retain, power), abs=1e-9)


def test_a_large_power_is_a_hard_mask():
    weights = WEIGHTINGS["grad"].function(torch.tensor([1.1, 1.0]), torch.tensor([1.0, 1.1]), 1e4)
    assert weights.tolist() == [1.0, 0.0]


def test_shuffling_keeps_the_values_and_changes_their_places():
    forget, retain = torch.rand(8, 9), torch.rand(8, 9)
    plain, shuffled = (function(name)(forget, retain, 1.0) for name in ("grad", "grad-shuffled"))
    assert torch.equal(plain.flatten().sort().values, shuffled.flatten().sort().values)
    assert not torch.equal(plain, shuffled)


def test_uniform_needs_no_gradient():
    assert WEIGHTINGS["uniform"].statistic is None


def test_a_power_replaces_the_weightings_own():
    assert resolve_weighting("fisher").power == 2.0
    assert resolve_weighting("fisher", 0.5).power == 0.5


def halves(forget, retain):
    return torch.full_like(forget, 0.5)


def negative(forget, retain):
    return -forget


def flat(forget, retain):
    return torch.zeros(1)


def nan(forget, retain):
    return torch.full_like(forget, torch.nan)


OWN = Weighting("own", lambda forget, retain, power: forget * 0 + 1 / power, "squares", power=4.0)


@pytest.fixture
def package(monkeypatch):
    module = ModuleType("my_weightings")
    vars(module).update(halves=halves, negative=negative, flat=flat, nan=nan, OWN=OWN, seven=7)
    monkeypatch.setitem(sys.modules, "my_weightings", module)


@pytest.mark.usefixtures("package")
def test_a_users_own_function_gets_mean_magnitudes():
    weighting = resolve_weighting("my_weightings:halves")
    assert weighting.statistic == "mean"
    weights = weigh(weighting, {"weight": torch.rand(2)}, {"weight": torch.rand(2)}, "layer")
    assert weights["weight"].tolist() == [0.5, 0.5]


@pytest.mark.usefixtures("package")
def test_a_users_own_weighting_is_used_as_it_is():
    assert resolve_weighting("my_weightings:OWN") is OWN
    assert resolve_weighting("my_weightings:OWN", 2.0).power == 2.0


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", ["negative", "flat", "nan"])
def test_a_users_own_that_leaves_0_1_is_refused(name):
    weighting = resolve_weighting(f"my_weightings:{name}")
    with pytest.raises(NumericalError, match=r"layers\.0: the weighting .* must return weights in \[0, 1\]"):
        weigh(weighting, {"weight": torch.ones(2)}, {"weight": torch.ones(2)}, "layers.0")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gard", "expected one of .*'grad'.*found 'gard'"),
        ("no_such_package:x", "cannot be imported"),
        ("my_weightings:absent", "cannot be imported"),
        (":x", "cannot be imported"),
        ("my_weightings:seven", "is a int; expected a Weighting or a function"),
    ],
)
def test_a_name_without_a_weighting_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve_weighting(name)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (".x:y", ConfigError, "cannot be imported"),
        ("json:dumps", ConfigError, "cannot be called with two tensors"),
        ("builtins:print", NumericalError, "must return a tensor of weights, found a NoneType"),
    ],
)
def test_a_function_that_does_not_weigh_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        weigh(resolve_weighting(name), {"weight": torch.ones(2)}, {"weight": torch.ones(2)}, "layers.0")
