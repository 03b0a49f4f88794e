"""Calibration: the search on curves with a known answer, and on models."""

import functools
import json
import math

import builders
import laws
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from peft_perta import ConfigError, DataError, NumericalError, PerTAConfig, attach_adapters, load_base
from peft_perta.comparison import ASSETS
from peft_perta.data import load_samples, read_as, read_rows
from peft_perta.evaluation import Calibration, Goal, calibrate, forget_loss_of_log, losses_of
from peft_perta.evaluation.calibration import MAX_EVALUATIONS
from peft_perta.evaluation.strength import most_forgetting
from peft_perta.html_report import draw_calibration
from peft_perta.model import adapter_strength
from peft_perta.perta import add_perta_adapter, get_perta_state_dict


class Counted:
    def __init__(self, forget, retain):
        self.curve, self.asked = (lambda s: (forget(s), retain(s))), []

    def __call__(self, strength):
        self.asked.append(strength)
        return self.curve(strength)


@given(
    start=st.floats(0.05, 3),
    rise=st.floats(0.02, 2),
    scale=st.floats(0.05, 20),
    exponent=st.floats(1, 3),
)
def test_the_most_forgetting_is_just_below_the_limit_where_both_losses_grow(start, rise, scale, exponent):
    limit = start + rise
    curve = Counted(lambda s: 0.1 + s, lambda s: start + (s / scale) ** exponent)
    strength = most_forgetting(curve, limit)
    retain = curve.curve(strength)[1]
    assert 0.98 * limit <= retain <= limit
    assert len(curve.asked) == len(set(curve.asked)) <= MAX_EVALUATIONS


def test_forgetting_that_has_its_top_below_the_limit_is_taken_there():
    """An inverted U, its top at strength 2, where the limit would allow 6."""
    curve = Counted(lambda s: 4 - (s - 2) ** 2 / 4, lambda s: 1 + s / 2)
    strength = most_forgetting(curve, 4.0)
    assert strength == pytest.approx(2.0, abs=0.15)
    assert len(curve.asked) <= MAX_EVALUATIONS
    points = [{"strength": s, **dict(zip(("forget", "retain"), curve.curve(s), strict=True))} for s in curve.asked]
    (best,) = [point for point in points if point["strength"] == strength]
    goal = {"target_forget_loss": None, "retain_tolerance": 3.0}
    assert Calibration(goal, 4.0, strength, best, points).reached
    assert not Calibration(goal, 4.0, strength, best, [best]).reached


@pytest.mark.parametrize(
    ("curve", "limit", "message"),
    [
        ((lambda s: s, lambda s: 2 + s), 1.5, "2.000 without the edit, not below the limit 1.500"),
        ((lambda s: s, lambda s: 1.0), 1.5, "no strength up to 256 brings the retain loss to 1.500"),
        ((lambda s: s, lambda s: math.nan if s > 1 else 1.0), 1.5, "not finite at strength 2"),
        ((lambda s: s, lambda s: 1.0), math.inf, "expected a finite limit above 0"),
    ],
)
def test_goals_that_cannot_be_met_say_why(curve, limit, message):
    with pytest.raises(NumericalError, match=message):
        most_forgetting(Counted(*curve), limit)


@pytest.mark.parametrize(
    "goal",
    [
        {},
        {"target_forget_loss": 1.0, "retain_tolerance": 1.0},
        {"target_forget_loss": 0.0},
        {"target_forget_loss": math.nan},
        {"retain_tolerance": -1.0},
        {"target_forget_loss": "auto"},
    ],
)
def test_a_goal_is_one_finite_number(goal):
    with pytest.raises(ConfigError, match="either a forget loss or a retain tolerance"):
        Goal(**goal)


@functools.cache
def shipped():
    """The demo's model, whose task adapter is to be taken back, and rows of it; the same for all tests here."""
    base, tokenizer = load_base(f"{ASSETS}/base")
    model = attach_adapters(base, {"task": f"{ASSETS}/task_adapter", "retain-only": f"{ASSETS}/retain_adapter"})
    rows = {name: read_rows(ASSETS / f"{name}.jsonl") for name in ("forget", "retain")}
    return model, tokenizer, rows


def prepared(seed):
    """That model with the task adapter's negation on it, and four rows of each set as samples."""
    model, tokenizer, rows = shipped()
    if "perta_unlearn" not in model.peft_config:
        add_perta_adapter(model, PerTAConfig(weighting="uniform"), forget_adapter="task")
    samples = {name: load_samples(found[seed::8][:4], tokenizer) for name, found in rows.items()}
    return model, samples["forget"], samples["retain"]


def losses_at(model, samples, strength):
    with adapter_strength(model, "perta_unlearn", strength):
        return float(losses_of(model, samples, adapters=["task", "perta_unlearn"]).double().mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["target_forget_loss", "retain_tolerance"])
def test_the_goal_is_met_within_2_percent_in_12_evaluations(seed, kind):
    """On real rows, other ones with every seed."""
    model, forget, retain = prepared(seed)
    goal = (
        Goal(target_forget_loss=1.0 + 0.7 * seed)
        if kind == "target_forget_loss"
        else Goal(retain_tolerance=0.1 + 0.5 * seed)
    )
    with laws.untouched(model):
        found = calibrate(
            model, goal, forget, retain, with_adapters=["task"], retain_only=["retain-only"], show_progress_bar=False
        )
    assert found.reached
    assert len(found.points) <= MAX_EVALUATIONS
    judged = {"forget": forget, "retain": retain}
    for name, samples in judged.items():
        assert found.losses[name] == pytest.approx(losses_at(model, samples, found.strength), rel=1e-6)
    if kind == "target_forget_loss":
        assert found.losses["forget"] == pytest.approx(goal.target_forget_loss, rel=0.02)
    else:
        limit = losses_at(model, retain, 0) + goal.retain_tolerance
        assert 0.98 * limit <= found.losses["retain"] <= limit
    assert found.points[0]["strength"] == 0
    assert found.retain_only["forget"] > 2 > found.retain_only["retain"]
    assert read_as(Calibration, json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("goal", [{"retain_tolerance": 0.3}, {"target_forget_loss": 2.5}])
def test_strength_auto_is_found_on_held_out_rows_and_folded_in(goal, tmp_path):
    """Where the base has learned the forget set: what there is to forget is the task adapter itself."""
    model, tokenizer, rows = shipped()
    forget, retain = rows["forget"][:4], rows["retain"][:8]
    base = merged_copy(model)

    def negated(retain, **settings):
        config = PerTAConfig(input_directions=False, **settings)
        return get_perta_state_dict(base, config, forget, retain, tokenizer=tokenizer, show_progress_bar=False)

    with laws.untouched(base):
        _, state_dict, provenance = negated(retain, strength="auto", **goal)
    found = provenance.calibration
    assert found.reached
    assert provenance.config["strength"] == found.strength
    assert provenance.data["retain"]["samples"] == 6
    assert provenance.data["held-out retain"]["samples"] == 2
    assert len(found.negation) > 2
    # The same rows by hand, at strength 1, scaled.
    by_hand = laws.deltas_of(negated([row for index, row in enumerate(retain) if index % 4 != 3])[1])
    for name, delta in laws.deltas_of(state_dict).items():
        laws.close(delta, found.strength * by_hand[name], 1e-5, name)
    draw_calibration(found, tmp_path / "strength.png")
    assert (tmp_path / "strength.png").stat().st_size > 10_000


def merged_copy(model):
    """The full model as a base of its own, with the task adapter as what is to be forgotten beside it."""
    base, _ = load_base(f"{ASSETS}/base")
    merged = PeftModel.from_pretrained(base, f"{ASSETS}/task_adapter").merge_and_unload()
    merged.config._name_or_path = f"{ASSETS}/base"
    return attach_adapters(merged, {"forget": f"{ASSETS}/task_adapter"})


@pytest.mark.parametrize(
    ("retain", "settings", "message"),
    [
        (builders.retain_rows()[:3], {}, "at least 4 retain samples, found 3"),
        (None, {"weighting": "uniform"}, "found no forget set"),
    ],
)
def test_strength_auto_needs_rows_to_judge_by(retain, settings, message):
    config = PerTAConfig(strength="auto", **settings)
    data = (builders.forget_rows(), retain) if retain else ()
    with pytest.raises(DataError, match=message):
        get_perta_state_dict(builders.adapted_llama(), config, *data, tokenizer=builders.tokenizer())


def test_no_rows_are_refused():
    model, forget, _ = prepared(0)
    with pytest.raises(DataError, match="expected retain rows to measure the strengths on, found none"):
        calibrate(model, Goal(1.0), forget, [])


def test_the_forget_loss_of_an_open_unlearning_log(tmp_path):
    rows = {"0": {"prob": 0.1, "avg_loss": 2.0}, "1": {"prob": 0.2, "avg_loss": 4.0}}
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps({"forget_Q_A_Prob": {"agg_value": 0.15, "value_by_index": rows}}))
    assert forget_loss_of_log(path) == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected an evaluation log"),
        ("{}", "forget_Q_A_Prob is missing; expected an evaluation log"),
        ('{"forget_Q_A_Prob": {"value_by_index": {}}}', "no rows with 'avg_loss'"),
        ('{"forget_Q_A_Prob": {"value_by_index": {"0": {"avg_loss": NaN}}}}', "row 0: expected a finite number"),
        (None, "expected an evaluation log at"),
    ],
)
def test_a_malformed_log_is_refused(text, message, tmp_path):
    path = tmp_path / "log.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        forget_loss_of_log(path)
