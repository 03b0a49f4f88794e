"""The law of the borrowed model: whatever fails, at whichever function of the package, the model is as it was.

A call is run once to learn which functions it enters, and then once for each of them, which raises when it is entered.
"""

import copy
import functools
import sys
import zlib
from pathlib import Path

import builders
import laws
import pytest

import peft_perta
from peft_perta import (
    Goal,
    PerTAConfig,
    add_perta_adapter,
    attach_adapters,
    calibrate,
    correct_responses,
    erase_instances,
    evaluate,
    extrapolate_adapter,
    fuse_adapters,
    modify_queries,
    refine_adapter,
    train_forget_adapter,
    train_unlearning,
)
from peft_perta.data import load_samples

ROOT = str(Path(peft_perta.__file__).parent)
FORGET, RETAIN = builders.forget_rows(), builders.retain_rows()
CHOICE = {"question": "Who?", "choices": ["Ned", "Bo"], "answer": 0}
QUIET = {"show_progress_bar": False}
# Functions that put a model back: one that fails cannot do it.
RESTORING = ("__exit__", "restore", "remove_adapter", "_set_gradient_flags", "_delete", "preserved", "switch_modules")
SLOW = ("erase_instances", "modify_queries", "correct_responses")  # traced, the solver of linear systems takes minutes


def _changed(key):
    row = next(row for row in FORGET if key in row)
    return [(row, {**row, key: "Some other words."})]


def _samples(rows):
    return load_samples(rows, builders.tokenizer())


CALLS = {
    "attach_adapters": lambda model, place: attach_adapters(model, {"other": place / "forget"}),
    "train_forget_adapter": lambda model, place: train_forget_adapter(
        model, FORGET, builders.tokenizer(), place / "out", adapter_name="new", max_steps=1, **QUIET
    ),
    "add_perta_adapter": lambda model, place: add_perta_adapter(
        model, PerTAConfig(strength="auto", max_samples=4, batch_size=2), FORGET, RETAIN,
        task_adapter="task", tokenizer=builders.tokenizer(), **QUIET,
    ),
    "train_unlearning": lambda model, place: train_unlearning(
        model, FORGET, RETAIN, builders.tokenizer(), task_adapter="task", output_dir=place / "out",
        checkpoint_dir=place / "checkpoint", max_steps=1, logging_strategy="no", **QUIET,
    ),
    "refine_adapter": lambda model, place: refine_adapter(
        model, "forget", FORGET, RETAIN, task_adapter="task", tokenizer=builders.tokenizer(), **QUIET
    ),
    "calibrate": lambda model, place: calibrate(
        model, Goal(retain_tolerance=0.01), _samples(FORGET), _samples(RETAIN), adapter_name="forget",
        with_adapters=["task"], **QUIET,
    ),
    "extrapolate_adapter": lambda model, place: extrapolate_adapter(model, "forget", alpha=0.5),
    "fuse_adapters": lambda model, place: fuse_adapters(model, {"task": 1.0, "forget": 0.5}),
    "erase_instances": lambda model, place: erase_instances(
        model, FORGET + RETAIN, FORGET[:1], builders.tokenizer(), adapter_name="task", **QUIET
    ),
    "modify_queries": lambda model, place: modify_queries(
        model, FORGET + RETAIN, _changed("question"), builders.tokenizer(), adapter_name="task", **QUIET
    ),
    "correct_responses": lambda model, place: correct_responses(
        model, FORGET + RETAIN, _changed("answer"), builders.tokenizer(), adapter_name="task", **QUIET
    ),
    "evaluate": lambda model, place: evaluate(
        model, builders.tokenizer(), {"choices": {"all": [CHOICE]}},
        adapters=["task"], output_dir=place / "out", **QUIET,
    ),
}  # fmt: skip


class Stop(Exception):
    """Raised on purpose."""


def entered(call):
    """The functions of the package that a call enters, in order of their first entries."""
    found = {}

    def tracer(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT) and code.co_name not in RESTORING:
            found.setdefault((code.co_filename[len(ROOT) :], code.co_firstlineno, code.co_name), None)

    traced(tracer, call)
    return [key for key in found if not key[2].startswith("<")]


def failing_at(key, call):
    """Make a call in which the first entry into a function raises."""

    def tracer(frame, event, _):
        code = frame.f_code
        if event == "call" and (code.co_filename[len(ROOT) :], code.co_firstlineno, code.co_name) == key:
            sys.settrace(None)
            raise Stop("on purpose")

    traced(tracer, call)


def traced(tracer, call):
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    model().save_pretrained(place)
    return place


@functools.cache
def model_with_task():
    return builders.trained(builders.adapted_saved_llama(), "task", [*FORGET, *RETAIN])


def model():
    return copy.deepcopy(model_with_task())


def check(name, adapters, tmp_path, chosen):
    """Fail at each of the chosen functions, one after the other."""

    def call(model, place):
        place.mkdir()
        (place / "forget").symlink_to(adapters / "forget")
        CALLS[name](model, place)

    functions = entered(lambda: call(model(), tmp_path / "first"))
    assert len(functions) > 5
    for number, key in enumerate(filter(chosen, functions)):
        borrowed = model()
        before = laws.snapshot(borrowed)
        try:
            failing_at(key, lambda borrowed=borrowed, number=number: call(borrowed, tmp_path / str(number)))
        except Exception as error:  # an error of ours may report it
            if "on purpose" not in f"{error}{error.__cause__}{error.__context__}":
                raise
            try:
                laws.is_as_before(borrowed, before)
            except AssertionError as fault:
                raise AssertionError(f"after a failure at {key}: {fault}") from error


@pytest.mark.parametrize("name", [name for name in CALLS if name not in SLOW])
def test_a_failure_at_some_functions_leaves_the_model_as_it_was(name, adapters, tmp_path):
    check(name, adapters, tmp_path, lambda key: zlib.crc32(repr(key[::2]).encode()) % 16 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_failure_at_any_function_leaves_the_model_as_it_was(name, adapters, tmp_path):
    check(name, adapters, tmp_path, lambda key: True)
