"""The benchmarks' code paths, at a tiny size; nothing timed decides."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import builders
import laws
import numpy as np
import pytest
import torch

from peft_perta import refine_adapter
from peft_perta.adapters import add_adapter
from peft_perta.comparison.bench import JUDGED
from peft_perta.comparison.method import Setup
from peft_perta.data import spread
from peft_perta.model import resolve_targets

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import audits, engine, gpu, refinement, retain_sets, scale, scoring
from benchmarks.matched_forgetting import table
from benchmarks.serving import __main__ as serving
from benchmarks.serving.job import Question, scores_of


@pytest.mark.parametrize("granularity", ["delta", "factor"])
def test_the_gpu_benchmark_runs_at_a_tiny_size(granularity, tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    arguments = f"gpu --shape tiny --granularity {granularity} --samples 2 --tokens 16 --profile --json {file}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    gpu.main()
    found = json.loads(file.read_text())
    assert found["shape"] == "tiny"
    assert sum(found["profile"].values()) == pytest.approx(1, abs=1e-3)
    assert found["profile"]["matmul"] > 0
    assert "| tiny |" in capsys.readouterr().out


def test_the_gpu_benchmark_packs_its_weights():
    model = gpu.random_llama("tiny", torch.device("cpu"))
    layer = model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.nested
    assert type(model.get_base_model().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"  # PEFT's own


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"HIDDEN": 64, "LAYERS": 2, "VOCABULARY": 64, "SAMPLES": 4, "TOKENS": 16, "BATCH": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(engine, "apart", lambda *arguments, **_: run_here(arguments))


def run_here(arguments: tuple[str, ...]) -> dict:
    return engine.times(1) if arguments[0] == "--times" else {"beyond": {"ours": 1.0, "dense": 4.0}[arguments[1]]}


def test_the_engine_benchmark_writes_every_ratio(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "svd", lambda rounds: ([0.02] * rounds, 1e-4))
    monkeypatch.setattr(sys, "argv", ["engine", "--rounds", "1", "--json", str(tmp_path / "ratios.json")])
    engine.main()
    ratios = json.loads((tmp_path / "ratios.json").read_text())["ratios"]
    assert set(ratios) == set(engine.GOALS)
    assert all(value > 0 for value in ratios.values())
    assert capsys.readouterr().out.count("| <= ") == len(engine.GOALS)


def test_dense_autograd_is_what_the_engine_sums(tiny):
    """The alternative that is timed computes the same thing."""
    model = engine.adapted_llama()
    targets = engine.resolve_targets(model, "forget")
    samples = engine.drawn_samples(0, 4)
    dense = engine.dense_autograd(model, targets, samples)
    collector = engine.Collector((engine.GRANULARITIES["delta"],))
    job = engine.Job(model, targets, {"forget": samples}, collector, "mean", show_progress_bar=False)
    ours = engine.sweep(job, "forget", 2)
    for name, gradient in dense.items():
        total = ours[name].gradients["weight"]
        assert gradient.norm() > 0
        assert (total - gradient).norm() <= 1e-5 * gradient.norm(), name


# Refinement


def test_each_variant_is_on_the_model_within_its_block_alone():
    model = builders.adapted_llama()
    setup = Setup(model, builders.tokenizer(), builders.forget_rows(), builders.retain_rows(), 4, 0)
    general = [{"text": "A cat sat on the mat."}, {"text": "The old bakery smelled of bread."}]
    bench = SimpleNamespace(setup=setup, judged_rows={"general": general})
    add_adapter(model, *builders.negate(model, weighting="uniform")[:2], refinement._START)
    rows = {None: setup.retain_rows, 4: spread(setup.retain_rows, 4)}
    for variant in refinement.VARIANTS:
        before = set(model.peft_config)
        with refinement.judged(bench, variant) as name:
            assert set(model.peft_config) == before | {name}
            left = {t.name: t.scaling * t.B @ t.A for t in resolve_targets(model, name)}
        assert set(model.peft_config) == before
        if variant.name == refinement.AS_IT_IS:
            assert name == refinement._START
            continue
        expected = refine_adapter(
            model,
            refinement._START,
            setup.forget_rows,
            general if variant.unlike else rows.get(variant.retain_rows, setup.retain_rows),
            variant.settings,
            task_adapter="task",
            tokenizer=setup.tokenizer,
            show_progress_bar=False,
        )
        of_layer = laws.deltas_of(expected.state_dict)
        for layer, delta in left.items():
            found = next(value for key, value in of_layer.items() if layer in key)
            torch.testing.assert_close(delta.double(), found.double(), rtol=1e-4, atol=1e-6)


def test_a_variant_is_compared_with_the_adapter_as_it_is():
    names = [f"sago, {variant.name}" for variant in refinement.VARIANTS]
    assert {refinement.as_it_is(name) for name in names} == {names[0]}
    losses = {"loss": [0.1, 0.2], "missed": [0.5, 0.5]}
    results = [
        {"seed": 0, "edit": name, "matched": "loss", "strength": 1.0, "rows": dict.fromkeys(JUDGED, losses)}
        for name in names
    ]
    lines = table(results, refinement.as_it_is, "as it is").splitlines()
    assert lines[2].endswith("| unseen, against as it is |")
    assert lines[4].endswith("|  |")  # itself
    assert all(line.endswith("+0.000 [+0.000, +0.000] |") for line in lines[5:])


def test_the_two_ends_of_an_audits_scale(tmp_path, monkeypatch, capsys):
    few = ["--rows", "6", "--judged-rows", "2", "--max-new-tokens", "1", "--minutes", "1e-9"]
    monkeypatch.setattr("sys.argv", ["audits", *few, "--output", str(tmp_path)])
    audits.main()
    printed = capsys.readouterr().out
    assert "full: still there: " in printed
    assert "retain-only: forgotten as if never learned: " in printed
    assert (tmp_path / "full" / "audit.html").is_file()
    assert (tmp_path / "table.md").read_text().splitlines()[-1].split(" | ")[1:] == [
        "still there",
        "forgotten as if never learned |",
    ]


def test_the_serving_benchmark_scores_a_token_by_the_logits_before_it():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [1 / 3, 1 / 3, 1 / 3]])
    found = scores_of(logits, [2, 0, 1], 1)
    assert [top for _, top in found] == [True, False]
    assert [value for value, _ in found] == pytest.approx([math.log(0.7), math.log(0.3)])


def test_the_serving_benchmark_says_what_differs_and_what_did_not_run(tmp_path, monkeypatch):
    yardstick = [(-1.0, True), (-2.0, True)]
    of_runtime = {
        "PEFT, no adapter": yardstick,
        "PEFT, stack of two": yardstick,
        "merged": [(-1.5, True), (-2.0, False)],
        "PEFT, one fused": None,
    }
    questions = [Question(kind, [0, 1, 2], 1) for kind in ("forget", "retain", "greedy")]

    def opened(scores):
        if scores is None:
            raise RuntimeError("no AVX512 here")
        return lambda ids, start: scores

    runtimes = [replace(each, open=lambda _, each=each: opened(of_runtime[each.name])) for each in serving.RUNTIMES]
    runtimes = [each if each.name in of_runtime else replace(each, package="no-such-package") for each in runtimes]
    monkeypatch.setattr(serving, "RUNTIMES", runtimes)
    place = serving.Place(*(tmp_path for _ in range(5)))
    for runtime in runtimes:
        serving.run(runtime, place, questions)
    lines = {line.split("|")[1].strip(): line for line in serving.table(place).splitlines()}
    assert "| 1 of 1 | 0.0e+00 | 0.0e+00 | 1.500 | 1.500 |" in lines["PEFT, stack of two"]
    assert "| 0 of 1 | 2.5e-01 | 5.0e-01 | 1.750 | 1.750 |" in lines["merged"]
    assert "RuntimeError: no AVX512 here" in lines["PEFT, one fused"]
    assert "not run: no-such-package is not installed" in lines["vLLM, one fused"]


def test_scoring_is_measured_for_each_number_of_rows_at_once(monkeypatch):
    passes = []
    monkeypatch.setattr(scoring, "losses_of", lambda model, samples, *, batch_size: passes.append(batch_size))
    ratios = scoring.measure("small", 4, 2)
    assert passes == 2 * list(scoring.ROWS_AT_ONCE)
    assert list(ratios) == list(scoring.ROWS_AT_ONCE)
    assert ratios[32] == 1.0


@pytest.mark.parametrize("name", scale.SMALL)
def test_scale_on_paper_is_what_the_engine_finds(name):
    shape, model = scale.small_model(name)
    for what, paper, found in scale.compared(shape, model):
        assert paper == pytest.approx(found, rel=0.01), what


@pytest.mark.parametrize("work", scale.WORK)
def test_scale_plans_a_model_that_fits_and_says_what_another_takes(work):
    kind, plan = scale.planned(scale.SHAPES["meta-llama/Llama-3.1-8B"], work, "80 GB")
    assert kind == "bf16"
    assert plan.fits()
    shown = scale.planned(scale.SHAPES["meta-llama/Llama-3.1-405B"], work, "24 GB")
    assert re.fullmatch(r"\d+ GiB", shown[1])


def test_retain_sets_prints_a_row_for_each_model(tmp_path, monkeypatch, capsys):
    def job(values):
        assert values["retain"] == "self"
        return SimpleNamespace(run=lambda say, *, show_progress_bar: None)

    known = {"forget": (3.0, 0.1), "retain": (0.2, 0.8), "general": (0.5, 0.6)}
    monkeypatch.setattr(retain_sets, "Job", SimpleNamespace(of=job))
    monkeypatch.setattr(retain_sets, "figures", lambda adapters, rows: dict.fromkeys(adapters, known))
    monkeypatch.setattr(sys, "argv", ["retain_sets", "--output", str(tmp_path), "--sets", "self"])
    retain_sets.main()
    assert capsys.readouterr().out.splitlines()[-1] == "| self | 3.00 | 0.200 | 80.0% | 0.500 | 60.0% |"
    assert {name: len(of_set) for name, of_set in retain_sets.judged_rows().items()} == {
        "forget": 100, "retain": 200, "general": 337,
    }  # fmt: skip
