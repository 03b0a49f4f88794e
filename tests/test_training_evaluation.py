"""Evaluation while an adapter trains: what it measures, that it changes nothing, and where it stops training."""

import json

import builders
import laws
import pytest
import torch
from test_unlearning_trainer import (
    FORGET,
    HELD_OUT,
    RETAIN,
    TOKENIZER,
    Log,
    Stop,
    StopAt,
    StopAtTheEnd,
    mean_loss,
    run,
    stacked,
    trainer_of,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_perta import ConfigError, NumericalError, UnlearningSettings, load_provenance
from peft_perta.cli import main
from peft_perta.data import load_samples
from peft_perta.evaluation import losses_of
from peft_perta.training import evaluation_arguments

ASCENT = {"lr_scheduler_type": "constant", "task_adapter": "task", "num_train_epochs": 6}


def ascent(**goals):
    return UnlearningSettings("gradient-ascent", combiner="sum", **goals)


class Watch(TrainerCallback):
    """The mean losses of the forget and the held-out rows after each step, as one would measure them."""

    def __init__(self, model):
        self.model, self.losses = model, []

    def on_step_end(self, args, state, control, **kwargs):
        means = [float(losses_of(self.model, load_samples(rows, TOKENIZER)).mean()) for rows in (FORGET, HELD_OUT)]
        self.losses.append(means)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


EPOCH, BY_DEFAULT = (pytest.param(strategy, marks=pytest.mark.slow) for strategy in ({"eval_strategy": "epoch"}, {}))


@pytest.mark.parametrize(
    "strategy", [evaluation_arguments(4), EPOCH, BY_DEFAULT], ids=["every 4", "epoch", "by default"]
)
def test_an_evaluation_measures_both_sets_and_changes_nothing(strategy):
    """With held-out rows alone there are four an epoch, or one after each step."""
    model = builders.adapted_saved_llama()
    watch, log = Watch(model), Log()
    with laws.untouched(model):
        evaluated = run(model, settings=ascent(), held_out=HELD_OUT, callbacks=[watch, log], **ASCENT, **strategy)
    steps = [4, 6] if strategy == evaluation_arguments(4) else [1, 2, 3, 4, 5, 6]
    start = [mean_loss(model, rows, ["task"]) for rows in (FORGET, HELD_OUT)]
    expected = [
        {"step": step, "forget": losses[0], "retain": losses[1]}
        for step, losses in enumerate([start, *watch.losses])
        if step in (0, *steps)
    ]
    assert len(evaluated.provenance.checks) == len(expected)
    for point, of_oracle in zip(evaluated.provenance.checks, expected, strict=True):
        assert point == pytest.approx(of_oracle, abs=1e-5)
    logged = [entry for entry in log.entries if "eval_forget_loss" in entry]
    path = [(point["forget"], point["retain"]) for point in evaluated.provenance.checks[1:]]
    assert [(entry["eval_forget_loss"], entry["eval_retain_loss"]) for entry in logged] == path
    assert evaluated.provenance.data["held-out"]["samples"] == 3
    assert "on 4 forget, 4 retain, 3 held-out samples; forget loss" in str(evaluated.provenance)
    alone = run(model, settings=ascent(), **ASCENT)
    assert same(evaluated.state_dict, alone.state_dict)
    assert evaluated.provenance.figures == alone.provenance.figures
    assert alone.provenance.checks == []


@pytest.mark.slow
def test_without_held_out_rows_it_measures_retain_rows_that_are_trained_on():
    model = builders.adapted_saved_llama()
    *_, provenance = run(model, FORGET[:2], settings=ascent(), **ASCENT, **evaluation_arguments(6))
    assert provenance.checks[0]["retain"] == pytest.approx(mean_loss(model, RETAIN[:2], ["task"]), abs=1e-6)
    assert "held-out" not in provenance.data


# The tolerance


@pytest.mark.parametrize(
    ("every", "base"),
    [pytest.param(1, builders.adapted_nf4_llama, marks=pytest.mark.slow), (2, builders.adapted_saved_llama)],
    ids=["nf4", "float"],
)
def test_beyond_the_tolerance_the_adapter_is_that_of_the_last_evaluation_within(every, base):
    model = base()
    watch = Watch(model)
    run(model, settings=ascent(), held_out=HELD_OUT, callbacks=[watch], **ASCENT)
    start = mean_loss(model, HELD_OUT, ["task"])
    rises = [losses[1] - start for losses in watch.losses]
    assert rises == sorted(rises)
    tolerance = (rises[2] + rises[3]) / 2  # within it up to step 3
    taken = max(step for step in (1, 2, 3) if step % every == 0)
    goal = ascent(retain_tolerance=tolerance)
    with laws.untouched(model):
        stopped = run(model, settings=goal, held_out=HELD_OUT, **ASCENT, **evaluation_arguments(every))
    whole = run(model, settings=ascent(), **{**ASCENT, "num_train_epochs": taken})
    assert same(stopped.state_dict, whole.state_dict)
    assert stopped.provenance.figures == whole.provenance.figures
    assert {**stopped.provenance.training} == whole.provenance.training
    assert [point["step"] for point in stopped.provenance.checks] == list(range(0, 5, every))
    said = str(stopped.provenance)
    assert f"at step {taken}; training stopped at step 4, where the retain loss was" in said
    assert f"past the tolerance of {tolerance:g}" in said


@pytest.mark.slow
def test_the_tolerance_goes_before_the_target():
    model = builders.adapted_saved_llama()
    watch = Watch(model)
    run(model, settings=ascent(), held_out=HELD_OUT, callbacks=[watch], **ASCENT)
    rise = watch.losses[3][1] - mean_loss(model, HELD_OUT, ["task"])
    goals = ascent(retain_tolerance=rise - 1e-4, target_forget_loss=watch.losses[3][0] - 1e-4)  # both at step 4
    *_, provenance = run(model, settings=goals, held_out=HELD_OUT, **ASCENT, **evaluation_arguments(1))
    assert provenance.training["steps"] == 3
    assert str(provenance).endswith("the target was NOT reached")


def test_a_first_evaluation_beyond_the_tolerance_is_told():
    model = builders.adapted_saved_llama()
    with (
        laws.untouched(model),
        pytest.raises(NumericalError, match=r"rose from .* up to step 6, the first evaluation.*evaluate more often"),
    ):
        run(model, settings=ascent(retain_tolerance=1e-3), held_out=HELD_OUT, **ASCENT, **evaluation_arguments(6))


EVERY_OTHER = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("stop", "saves"),
    [
        pytest.param(StopAt(5), {}, marks=pytest.mark.slow),
        (StopAt(5), EVERY_OTHER),
        pytest.param(StopAtTheEnd(), {}, marks=pytest.mark.slow),
        pytest.param(StopAtTheEnd(), EVERY_OTHER, marks=pytest.mark.slow),
    ],
    ids=["before", "before, between evaluations", "there", "there, between evaluations"],
)
def test_a_run_that_is_cut_before_it_stops_or_there_resumes_bit_for_bit(stop, saves, tmp_path):
    """The factors to go back to come from the checkpoint: the last evaluation within is before the cut."""

    def trained(directory, *callbacks):
        return run(
            builders.adapted_saved_llama(), settings=ascent(retain_tolerance=0.45), held_out=HELD_OUT,
            callbacks=callbacks, checkpoint_dir=tmp_path / directory, output_dir=tmp_path / f"{directory}-out",
            **{**ASCENT, "num_train_epochs": 9, "learning_rate": 2e-3}, **evaluation_arguments(3), **saves,
        )  # fmt: skip

    expected = trained("whole").provenance
    assert (expected.training["steps"], expected.checks[-1]["step"]) == (3, 6)
    with pytest.raises(Stop):
        trained("cut", stop)
    trained("cut")
    for file in (tmp_path / "whole-out").iterdir():
        assert file.read_bytes() == (tmp_path / "cut-out" / file.name).read_bytes(), file.name


# The trainer


def test_the_trainer_evaluates_when_asked_and_knows_the_tokens_of_both_sets(tmp_path):
    trainer = trainer_of(stacked(torch.float32), tmp_path, max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_forget_loss"] == pytest.approx(mean_loss(trainer.model, FORGET, None), abs=1e-6)
    assert metrics["eval_retain_loss"] == pytest.approx(mean_loss(trainer.model, RETAIN, None), abs=1e-6)
    assert trainer.evaluations.points == []
    with pytest.raises(ConfigError, match="eval_dataset: expected None, since the constructor takes the rows"):
        trainer.evaluate(HELD_OUT)


@pytest.mark.slow
def test_early_stopping_of_transformers_reads_the_figures(tmp_path):
    """The forget loss rises from the first evaluation on: the second one is no better."""
    trainer = trainer_of(
        stacked(torch.float32), tmp_path, settings=ascent(), callbacks=[EarlyStoppingCallback(1)], max_steps=9,
        learning_rate=5e-3, metric_for_best_model="eval_forget_loss", greater_is_better=False,
        **evaluation_arguments(1),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


def test_metrics_of_predictions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="compute_metrics: expected None, since an evaluation measures both losses"):
        trainer_of(stacked(torch.float32), tmp_path, options={"compute_metrics": dict})


# The command


def test_the_command_evaluates_and_goes_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("held_out", HELD_OUT)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        *("train", "--model", str(builders.llama_directory()), "--forget", "forget.jsonl", "--retain", "retain.jsonl"),
        *("--held-out", "held_out.jsonl", "--eval-steps", "1", "--retain-tolerance", "0.3", "--epochs", "4"),
        *("--forget-loss", "gradient-ascent", "--learning-rate", "0.003", "--output", "out"),
    ]
    assert main(arguments) == 0
    assert "past the tolerance of 0.3" in capsys.readouterr().out
    provenance, _ = load_provenance("out")
    assert provenance.settings["retain_tolerance"] == 0.3
    within = [point["retain"] - provenance.checks[0]["retain"] <= 0.3 for point in provenance.checks]
    assert within == [True] * (len(within) - 1) + [False]
    monkeypatch.setattr("peft_perta.cli._options.load_base", lambda *_, **__: pytest.fail("the model was loaded"))
    for option, value, message in (
        ("--held-out", "nowhere.jsonl", "nowhere.jsonl"),
        ("--eval-steps", "0", "--eval-steps: expected at least 1, found 0"),
    ):
        arguments[arguments.index(option) + 1] = value
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
