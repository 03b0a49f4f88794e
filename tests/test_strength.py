"""Search for a strength on curves with a known answer; the strength of an adapter and its restoration."""

import math

import builders
import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta import AdapterError, NumericalError
from peft_perta.data import load_samples
from peft_perta.evaluation import Match, losses_of, match_forgetting
from peft_perta.model import adapter_strength

# Forget loss against strength -> the curve, a target, and where they meet.
CURVES = {
    "linear": (lambda s: 0.5 + 2 * s, 4.5, 2.0),
    "linear, target before strength 1": (lambda s: 0.1 + 10 * s, 3.1, 0.3),
    "convex": (lambda s: 0.1 + s**3, 8.1, 2.0),
    "exponential": (lambda s: 0.1 * math.exp(s), 0.1 * math.exp(5), 5.0),
    "flat, then steep": (lambda s: 0.1 + 20 * max(0.0, s - 3), 4.1, 3.2),
    "concave": (lambda s: math.sqrt(s), 3.0, 9.0),
    "saturating": (lambda s: 8 * (1 - math.exp(-s / 3)), 4.0, 3 * math.log(2)),
    "sigmoid": (lambda s: 10 / (1 + math.exp(6 - s)), 5.0, 6.0),
    "far": (lambda s: 0.1 + 0.01 * s, 2.1, 200.0),
    "dips first": (lambda s: 1 - s + s**2, 3.0, 2.0),  # to 3/4 at strength 1/2
}


class Counted:
    """A curve that records its arguments."""

    def __init__(self, curve):
        self.curve, self.asked = curve, []

    def __call__(self, strength):
        self.asked.append(strength)
        return self.curve(strength)


@pytest.mark.parametrize("name", CURVES)
def test_meets_the_target_within_its_budget(name):
    curve, target, expected = CURVES[name]
    counted = Counted(curve)
    match = match_forgetting(counted, target, tolerance=0.001)
    assert abs(match.loss - target) <= 0.001 * target
    assert match.strength == pytest.approx(expected, rel=0.01)
    assert len(counted.asked) <= 14


@pytest.mark.parametrize("name", CURVES)
def test_a_search_for_another_target_goes_on_from_what_is_known(name):
    curve, target, expected = CURVES[name]
    first = match_forgetting(Counted(curve), 0.8 * target, tolerance=0.001)
    counted = Counted(curve)
    match = match_forgetting(counted, target, tolerance=0.001, known=dict(first.evaluated))
    assert abs(match.loss - target) <= 0.001 * target
    assert match.strength == pytest.approx(expected, rel=0.01)
    assert not set(counted.asked) & set(dict(first.evaluated))
    afresh = Counted(curve)
    match_forgetting(afresh, target, tolerance=0.001)
    assert len(counted.asked) < len(afresh.asked)


def test_a_known_point_on_the_target_costs_nothing():
    counted = Counted(lambda s: s)
    assert match_forgetting(counted, 3.0, known={0.0: 0.0, 2.0: 2.0, 3.01: 3.01}).strength == 3.01
    assert counted.asked == []


def test_reports_every_point_that_it_paid_for():
    curve, target, _ = CURVES["sigmoid"]
    counted = Counted(curve)
    match = match_forgetting(counted, target)
    assert match.evaluated == sorted((s, curve(s)) for s in counted.asked)
    assert (match.strength, match.loss) in match.evaluated
    assert abs(match.loss - target) == min(abs(loss - target) for _, loss in match.evaluated)


def test_goes_no_further_than_it_must():
    """A straight line takes strength 0, strength 1, doublings to the bracket and one interpolation."""
    counted = Counted(lambda s: 0.5 + 2 * s)
    assert match_forgetting(counted, 5.5) == Match(
        2.5, 5.5, [(0.0, 0.5), (1.0, 2.5), (2.0, 4.5), (2.5, 5.5), (4.0, 8.5)]
    )
    assert counted.asked == [0, 1, 2, 4, 2.5]


@given(
    start=st.floats(0.01, 1),
    scale=st.floats(0.05, 20),
    exponent=st.floats(1, 4),
    rise=st.floats(0.5, 12),
    share=st.floats(0.05, 0.9),
)
def test_meets_any_target_on_a_growing_curve(start, scale, exponent, rise, share):
    """start + rise * u^k / (1 + u^k), u = s / scale: flat, steep and saturating in turn, as edits are."""

    def curve(strength):
        grown = (strength / scale) ** exponent
        return start + rise * grown / (1 + grown)

    target = start + share * rise
    counted = Counted(curve)
    match = match_forgetting(counted, target)
    assert abs(match.loss - target) <= 0.01 * target
    assert match.loss == curve(match.strength)
    assert len(counted.asked) <= 14
    assert min(counted.asked) >= 0


def test_of_several_crossings_takes_the_one_nearest_to_no_edit():
    """The curve rises to 5 at strength 2.5, falls to 0 at 5 and rises again: it crosses 3 at 1.03, 3.97 and beyond."""
    match = match_forgetting(lambda s: 2.5 * (1 - math.cos(2 * math.pi * s / 5)), 3.0)
    assert abs(match.loss - 3) <= 0.03
    assert match.strength < 2.5


@pytest.mark.parametrize("loss", [2.99, 3.0, 3.01])
def test_nothing_to_do_is_strength_0(loss):
    """Within the tolerance without the edit, on either side: nothing is searched, and no negative strength is tried."""
    counted = Counted(lambda s: loss + s)
    match = match_forgetting(counted, 3.0)
    assert (match.strength, match.loss) == (0.0, loss)
    assert counted.asked == [0.0]


def test_a_budget_too_small_gives_the_best_that_was_seen():
    counted = Counted(lambda s: 0.0 if s < 3.3 else 10.0)  # a step: the target 4 is never met
    match = match_forgetting(counted, 4.0, max_evaluations=9)
    assert len(counted.asked) == 9
    assert match.loss == 0.0


def test_a_target_below_the_start_is_refused():
    with pytest.raises(NumericalError, match=r"5\.000 without the edit, above the target 3\.000"):
        match_forgetting(lambda s: 5 + s, 3.0)


@pytest.mark.parametrize("curve", [lambda s: 2.0, lambda s: 2 - s, lambda s: 4 * (1 - math.exp(-s))])
def test_a_target_out_of_reach_is_refused(curve):
    counted = Counted(curve)
    with pytest.raises(NumericalError, match=r"no strength up to 256 brings the forget loss to 5\.000 \(at 256 it is"):
        match_forgetting(counted, 5.0)
    assert len(counted.asked) <= 14
    assert max(counted.asked) == 256


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value):
    """An edit that overflows the model. Interpolation would return NaN."""
    with pytest.raises(NumericalError, match=f"the forget loss is {value} at strength 4"):
        match_forgetting(lambda s: s if s < 4 else value, 3.0)


@pytest.mark.parametrize("target", [math.nan, math.inf, 0.0, -1.0])
def test_a_target_that_is_no_loss_is_refused(target):
    with pytest.raises(NumericalError, match="expected a finite target above 0 for the forget loss, found"):
        match_forgetting(lambda s: s, target)


# Strength as a scalar of the layers


def samples():
    return load_samples(builders.forget_rows(), builders.tokenizer())


def test_strength_multiplies_the_delta():
    """Twice the strength is B twice as large; strength 0 is the adapter off."""
    model = builders.adapted_llama()
    with adapter_strength(model, "forget", 2.0):
        doubled = losses_of(model, samples(), adapters=["forget"])
    with adapter_strength(model, "forget", 0.0):
        nothing = losses_of(model, samples(), adapters=["forget"])
    once = losses_of(model, samples(), adapters=["forget"])
    off = losses_of(model, samples(), adapters=[])
    for key, parameter in model.named_parameters():
        if ".lora_B.forget." in key:
            parameter.data *= 2
    torch.testing.assert_close(doubled, losses_of(model, samples(), adapters=["forget"]))
    assert torch.equal(nothing, off)
    assert not torch.allclose(doubled, once)
    assert not torch.allclose(once, off)


def test_strength_leaves_other_adapters_alone():
    model = builders.adapted_llama()
    before = losses_of(model, samples(), adapters=["task"])
    with adapter_strength(model, "forget", 7.0):
        assert torch.equal(losses_of(model, samples(), adapters=["task"]), before)


def test_strength_is_given_back_after_success_and_after_an_exception():
    model = builders.adapted_llama()
    with laws.untouched(model), adapter_strength(model, "forget", 3.0):
        pass
    with (
        laws.untouched(model),
        pytest.raises(RuntimeError, match="the block fails"),
        adapter_strength(model, "forget", 3.0),
        adapter_strength(model, "forget", 0.1),
    ):
        raise RuntimeError("the block fails")


def test_strength_of_an_adapter_that_is_not_there_is_refused():
    model = builders.adapted_llama()
    with pytest.raises(AdapterError, match="no adapter named 'forgot'"), adapter_strength(model, "forgot", 2.0):
        pass
