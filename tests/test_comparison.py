"""Methods do what their rows say; a comparison matches forgetting, resumes, and reports what could not be matched."""

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path

import builders
import laws
import pytest
import torch

from peft_perta import (
    ConfigError,
    NumericalError,
    OutputError,
    PerTAConfig,
    attach_adapters,
    load_base,
    refine_adapter,
)
from peft_perta.adapters import add_adapter
from peft_perta.cli import command_parser
from peft_perta.cli import compare as compare_command
from peft_perta.cli import main as command_line
from peft_perta.cli._settings import add_settings, read_settings
from peft_perta.comparison import (
    METHODS,
    ComparisonSettings,
    Testbed,
    _trained,
    bench,
    best_method,
    format_methods,
    format_table,
    kept_against,
    methods,
    read_testbed,
    run_comparison,
    training_schedule,
)
from peft_perta.comparison._picture import STYLES, leaves_at, mean_curve
from peft_perta.comparison.method import Method, MethodAdapter, Setup, once
from peft_perta.comparison.methods import ALPHA, QUICK
from peft_perta.data import load_samples, spread
from peft_perta.evaluation import Match, losses_of
from peft_perta.training import UnlearningSettings, default_lora_config, train_forget_adapter

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import methods as command

ROOT = Path(__file__).parent.parent
TINY = ComparisonSettings(
    methods=("negation", "perta-grad", "uipe"), seeds=(0,), authors=(1,), rank=8, epochs=1, least_steps=40,
    learning_rate=1e-2, weight_samples=8, judged_rows=12, suite_rows=4, max_new_tokens=4, curve=(0.5, 1.0), attacks=(),
)  # fmt: skip


# The methods


def setup(seed: int = 0) -> Setup:
    return Setup(
        builders.adapted_llama(), builders.tokenizer(), builders.forget_rows(), builders.retain_rows(), 4, seed
    )


@pytest.fixture(scope="module")
def made() -> dict[str, MethodAdapter]:
    """The adapter of every method, all on one model."""
    own = setup()
    builders.trained(own.model, "task", [*own.forget_rows, *own.retain_rows])  # LLMEraser erases what 'task' learned
    own.model.set_adapter("forget")
    adapters = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trained, "STEPS", 3)
        for name, method in METHODS.items():
            with laws.untouched(own.model):
                adapters[name] = method.make(own)
    return adapters


def deltas(adapter: MethodAdapter) -> torch.Tensor:
    """The deltas of all layers, concatenated."""
    assert adapter.lora_config.lora_alpha == adapter.lora_config.r
    return torch.cat([delta.flatten() for _, delta in sorted(laws.deltas_of(dict(adapter.state_dict)).items())])


def test_every_row_describes_its_method():
    for name, method in METHODS.items():
        assert method.description, f"METHODS[{name!r}] needs a description"
        assert "\n" not in method.description, f"METHODS[{name!r}]: its description must be one line"
        assert method.family in STYLES, f"_picture.STYLES lacks the family of METHODS[{name!r}]: {method.family!r}"


def test_every_method_makes_an_adapter_that_stacks_on_the_model(made):
    for name, adapter in made.items():
        model = setup().model
        add_adapter(model, adapter.lora_config, adapter.state_dict, "made")
        assert deltas(adapter).norm() > 0, name


def test_only_the_documented_pairs_of_methods_have_the_same_direction(made):
    directions = {name: deltas(adapter) / deltas(adapter).norm() for name, adapter in made.items()}
    same = {"uniform": "negation", "uipe": "perta-grad"}
    names = list(directions)
    for place, name in enumerate(names):
        for other in names[:place]:
            is_same = bool((directions[name] - directions[other]).norm() < 1e-4)
            assert is_same == (same.get(name) == other), (name, other)


def test_uniform_is_half_of_negation_and_uipe_is_perta_times_one_plus_alpha(made):
    torch.testing.assert_close(deltas(made["uniform"]), deltas(made["negation"]) / 2)
    torch.testing.assert_close(deltas(made["uipe"]), deltas(made["perta-grad"]) * (1 + ALPHA))


def test_random_keeps_each_layers_norm_and_depends_on_the_seed(made):
    ours, theirs = (laws.deltas_of(dict(made[name].state_dict)) for name in ("random", "perta-grad"))
    for layer, delta in theirs.items():
        torch.testing.assert_close(ours[layer].norm(), delta.norm(), rtol=1e-4, atol=1e-6)
    assert made["random"].lora_config.r == made["perta-grad"].lora_config.r
    torch.testing.assert_close(deltas(METHODS["random"].make(setup())), deltas(made["random"]))
    other = deltas(METHODS["random"].make(setup(seed=1)))
    assert abs(torch.cosine_similarity(other, deltas(made["random"]), dim=0)) < 0.2


def test_methods_that_use_gradients_cost_forward_equivalents(made):
    free = {name for name, adapter in made.items() if adapter.forward_equivalents == 0}
    assert free == {"negation", "uniform"}
    assert all(adapter.forward_equivalents > 2 for name, adapter in made.items() if name not in free)
    assert made["paper-grad"].forward_equivalents > made["perta-grad-undirected"].forward_equivalents


def test_every_method_is_listed_with_what_it_needs_and_its_description():
    header, *lines = format_methods().splitlines()
    assert header.split() == ["method", "needs", "description"]
    for line, (name, method) in zip(lines, METHODS.items(), strict=True):
        needs = "forget adapter" if method.needs_forget_adapter else "-"
        assert line.startswith(f"{name} ")
        assert re.sub(" +", " ", line) == f"{name} {needs} {method.description}"


def test_the_command_of_each_method_sets_what_the_method_sets(monkeypatch):
    """The fields that the command's options give are those that the method was made of."""
    monkeypatch.setattr(methods, "perta", lambda **options: options)
    monkeypatch.setattr(methods, "trained", lambda **options: options)
    monkeypatch.setattr(methods, "once", lambda make: make)
    cases = {
        "unlearn": (methods._unlearn("x", weighting="fisher", input_directions=False), PerTAConfig),
        "train": (methods._train("x", forget_loss="npo", beta=0.03, combiner="sago"), UnlearningSettings),
    }
    for name, (method, settings) in cases.items():
        command, *flags = shlex.split(method.command)
        assert command == name
        options = argparse.ArgumentParser()
        options.add_argument("--learning-rate", type=float)
        add_settings(options, settings, "settings")
        read = read_settings(settings, options.parse_args(flags))
        given = {key: value for key, value in method.make.items() if key not in ("learning_rate", "rounds")}
        assert read == settings(**given)


@pytest.mark.parametrize(
    ("name", "rounds"), [("sago", 1), ("sago+attacker", 2), ("sago+attacker+directions", 2), ("sago-longer", 3)]
)
def test_a_method_trains_for_its_rounds(name, rounds, monkeypatch):
    class Trained(Exception):
        pass

    def train(*_, max_steps, **__):
        raise Trained(max_steps)

    monkeypatch.setattr(_trained, "train_unlearning", train)
    with pytest.raises(Trained, match=f"^{rounds * _trained.STEPS}$"):
        METHODS[name].make(setup())
    assert METHODS[name].rounds == rounds


def test_a_method_that_trains_for_longer_costs_more_and_its_command_has_more_epochs(made):
    of_sago, of_attacker = (training_schedule(METHODS[name], 40) for name in ("sago", "sago+attacker"))
    assert of_attacker == {**of_sago, "epochs": 2 * of_sago["epochs"]}
    # Of a step, SAGO takes 2 + 1 passes of the forget rows and 2 of the retain rows; the attacker 2 more of the first.
    sago, attacker = (made[name].forward_equivalents for name in ("sago", "sago+attacker"))
    own = setup()
    forget, retain = (
        sum(len(sample.input_ids) for sample in load_samples(rows, own.tokenizer))
        for rows in (own.forget_rows, own.retain_rows)
    )
    steps = 3 * _trained.BATCH
    assert sago == pytest.approx(
        steps * (3 * forget / len(own.forget_rows) + 2 * retain / len(own.retain_rows)) / (forget + retain)
    )
    more = 2 * forget / len(own.forget_rows)
    assert attacker == pytest.approx(2 * (sago + steps * more / (forget + retain)))


def test_every_method_that_a_user_can_run_has_a_command_that_parses():
    for name, method in METHODS.items():
        if method.command is None:
            assert name in {"uipe", "llmeraser", "random", "perta+sago"}
            continue
        command, *flags = shlex.split(method.command)
        options = argparse.ArgumentParser()
        options.add_argument("--learning-rate", type=float)
        add_settings(options, {"unlearn": PerTAConfig, "train": UnlearningSettings}[command], "settings")
        options.parse_args(flags)  # argparse exits on an unknown option


def test_quick_is_a_selection_of_the_methods():
    assert set(QUICK) <= set(METHODS)
    assert {"negation", "perta-grad", "uipe", "random"} <= set(QUICK)


# Settings


def test_settings_are_the_same_after_json(tmp_path):
    settings = dataclasses.replace(TINY, matched=("loss", "first-choice"), attacks=("relearning", "prefix"))
    (tmp_path / "c.json").write_text(json.dumps(settings.to_dict()))
    assert ComparisonSettings.read(tmp_path / "c.json") == settings
    assert ComparisonSettings.from_dict({}) == ComparisonSettings()
    assert ComparisonSettings.quick().methods == QUICK


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": 1}, "no setting 'speed'; expected some of .*'seeds'"),
        ({"methods": ["sago+atacker"]}, r"found 'sago\+atacker'; did you mean 'sago\+attacker'\? --list"),
        ({"methods": ["magic"]}, "methods: expected some of .*'perta-grad'.*found 'magic'"),
        ({"methods": "negation"}, "methods: expected a list, found 'negation'"),
        ({"methods": [3]}, "methods: expected names"),
        ({"methods": []}, "methods: expected at least one value"),
        ({"seeds": [0, 0]}, "seeds: expected each value once"),
        ({"seeds": [-1]}, "seeds: expected ints from 0"),
        ({"seeds": [True]}, "seeds: expected ints from 0"),
        ({"authors": [0]}, "authors: expected ints > 0"),
        ({"curve": [1.0, float("nan")]}, "curve: expected numbers > 0"),
        ({"attacks": ["switched-off"]}, "attacks: expected some of .*'relearning'"),
        ({"rank": 8.0}, "rank: expected an int > 0, found 8.0"),
        ({"judged_rows": 0}, "judged_rows: expected an int > 0"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number > 0"),
        ({"four_bit": 1}, "four_bit: expected true or false"),
        ({"matched": "luck"}, r"matched: expected some of \['loss', 'first-choice', 'options'\], found \('luck',\)"),
        ({"matched": []}, "matched: expected at least one value"),
        ({"suite_rows": -1}, "suite_rows: expected an int >= 0"),
        ({"depth_rows": 1.5}, "depth_rows: expected an int >= 0"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ComparisonSettings.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "expected the settings"), ("{", "is not JSON"), ("[]", "holds a list")]
)
def test_a_bad_config_file_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ComparisonSettings.read(tmp_path / "c.json")


# A comparison


def rows(kind: str, count: int) -> list[dict]:
    """Short rows, each with its own answer; every character is one token."""
    return [
        {
            "question": f"{kind}{number}?",
            "answer": f"{kind[0]}{number * 7 % 90}",
            "paraphrased_answer": f"{kind[0]} {number * 7 % 90}",
            "perturbed_answer": [f"{kind[0]}{number * 7 % 90 + 5}", "no"],
        }
        for number in range(count)
    ]


SPLIT_NAMES = ("forget", "retain", "general")
SPLITS = {"forget": 20, "retain": 40, "general": 12, "real_authors": 4, "world_facts": 4, "holdout": 4}


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """A directory as build.py writes it, with a model of two layers: a base, a task adapter that learned both sets, and
    a retain-only adapter that learned the retain set alone."""
    path = tmp_path_factory.mktemp("assets")
    sets = {name: rows(name, count) for name, count in SPLITS.items()}
    for name, split in sets.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))
    builders.llama().save_pretrained(path / "base")
    builders.tokenizer().save_pretrained(path / "base")
    learned = {"task_adapter": sets["forget"] + sets["retain"] + sets["general"],
               "retain_adapter": sets["retain"] + sets["general"]}  # fmt: skip
    for name, learned_rows in learned.items():
        base, tokenizer = load_base(str(path / "base"))
        train_forget_adapter(
            base, learned_rows, tokenizer, path / name, lora_config=default_lora_config(16), num_train_epochs=20,
            learning_rate=1e-2, per_device_train_batch_size=12, logging_strategy="no", show_progress_bar=False,
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def compared(assets, tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison")
    settings = dataclasses.replace(TINY, attacks=("relearning", "sampling"), depth_rows=6)
    testbed = Testbed.of_directory(assets)
    return settings, directory, run_comparison(directory, settings, testbed, show_progress_bar=False)


def of(results: list[dict], name: str) -> dict:
    """The one result of a method."""
    (only,) = [result for result in results if result["method"] == name]
    return only


def test_every_run_is_at_matched_forgetting(compared):
    settings, _, results = compared
    assert [r["method"] for r in results] == ["full model", "retain-only model", "origin", *settings.methods]
    target = of(results, "retain-only model")["losses"]["forget"]
    assert target > 2 * of(results, "full model")["losses"]["forget"]
    for name in settings.methods:
        run = of(results, name)
        assert run["failure"] is None
        assert run["losses"]["forget"] == pytest.approx(target, rel=0.02), name
        half, whole = run["curve"]
        assert (half["factor"], half["strength"]) == (0.5, pytest.approx(run["strength"] / 2))
        assert half["forget"] < target
        assert {split: whole[split] for split in SPLIT_NAMES} == {s: run["losses"][s] for s in SPLIT_NAMES}


def test_forgetting_can_be_matched_by_first_choices(assets, tmp_path):
    """It is the share of answer tokens that are not the model's first choice, as in the log of the same rows."""
    own = dataclasses.replace(TINY, methods=("negation",), matched="first-choice", suite_rows=12)
    results = run_comparison(tmp_path, own, Testbed.of_directory(assets), show_progress_bar=False)
    shares = {r["method"]: 1 - r["scores"]["exact_memorization"] for r in results}
    assert shares["full model"] < 0.1 < 0.5 < shares["retain-only model"]
    assert of(results, "negation")["failure"] is None
    assert shares["negation"] == pytest.approx(shares["retain-only model"], abs=0.05)
    assert (
        "(share of tokens that are not the first choice of the retain-only model): what is kept"
        in (tmp_path / "table.md").read_text()
    )


def test_baselines_are_judged_on_rows_that_no_method_uses(compared, assets):
    _, _, results = compared
    base, tokenizer = load_base(str(assets / "base"))
    model = attach_adapters(base, {"task": assets / "task_adapter", "retain-only": assets / "retain_adapter"})
    judged = {
        "forget": spread(rows("forget", 20), 12),
        "retain": spread(rows("retain", 40)[1::2], 12),
        "general": rows("general", 12),
    }
    for name, adapter in (("full model", "task"), ("retain-only model", "retain-only")):
        for split, wanted in judged.items():
            expected = float(losses_of(model, load_samples(wanted, tokenizer), adapters=[adapter]).mean())
            assert of(results, name)["losses"][split] == pytest.approx(expected, rel=1e-5)


def test_scores_are_measured_against_the_retain_only_model(compared):
    _, _, results = compared
    retain_only = of(results, "retain-only model")["scores"]
    assert retain_only["forget_quality"] == 1
    assert retain_only["privleak"] == pytest.approx(0, abs=1e-6)
    for result in results:
        assert {"model_utility", "extraction_strength", "exact_memorization", "privleak"} <= set(result["scores"])


def test_depth_is_0_for_the_full_model_and_1_for_the_retain_only_model(compared):
    _, directory, results = compared
    depths = {result["method"]: result["depth"] for result in results}
    assert depths["full model"] == pytest.approx(0, abs=1e-3)
    assert depths["retain-only model"] == pytest.approx(1, abs=1e-3)
    assert all(0 <= depths[name] <= 1 for name in ("negation", "perta-grad"))
    assert "| UDS |\n" in (directory / "table.md").read_text()


def test_an_extrapolation_is_the_same_adapter_at_matched_forgetting(compared):
    _, _, results = compared
    further, itself = of(results, "uipe"), of(results, "perta-grad")
    assert further["strength"] * (1 + ALPHA) == pytest.approx(itself["strength"], rel=0.02)
    assert further["losses"]["retain"] == pytest.approx(itself["losses"]["retain"], rel=0.02)
    assert further["as_made"]["loss"] > itself["as_made"]["loss"]


def test_attacks_are_tried_at_matched_forgetting(compared):
    _, directory, results = compared
    for result in results:
        relearned = {a["setting"]: a["loss"] for a in result["attacks"] if a["attack"] == "relearning"}
        assert relearned["0 steps on 6 rows, read on the other 6"] == pytest.approx(result["losses"]["forget"], rel=0.5)
        assert len(relearned) == 4
    assert "(ROUGE-L) |" in (directory / "table.md").read_text()


def test_a_comparison_writes_results_settings_a_table_and_a_picture(compared):
    settings, directory, results = compared
    assert [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()] == results
    assert json.loads((directory / "config.json").read_text())["settings"] == settings.to_dict()
    assert (directory / "table.md").read_text() == format_table(results) + "\n"
    assert (directory / "trade_off.png").read_bytes().startswith(b"\x89PNG")


def refuses(setup: Setup) -> MethodAdapter:
    raise AssertionError("its result is known")


def diverges(setup: Setup) -> MethodAdapter:
    raise NumericalError("the loss is nan at step 3")


def test_a_comparison_resumes_and_takes_new_methods(compared, assets, monkeypatch, tmp_path):
    """A method that fails records its error, and the comparison continues."""
    settings, directory, results = compared
    for name in ("config.json", "results.jsonl"):
        (tmp_path / name).write_text((directory / name).read_text())
    negate, seen = METHODS["negation"].make, []

    def trained(setup: Setup) -> MethodAdapter:
        seen.append(setup)
        return dataclasses.replace(negate(setup), forward_equivalents=40.0)

    def idle(setup: Setup) -> MethodAdapter:
        adapter = negate(setup)
        return dataclasses.replace(adapter, state_dict={k: torch.zeros_like(v) for k, v in adapter.state_dict.items()})

    for name in settings.methods:
        monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], make=refuses))
    own = {"trained": trained, "idle": idle, "diverging": diverges}
    for name, make in own.items():
        monkeypatch.setitem(METHODS, name, Method(name, make, "trained", needs_forget_adapter=name == "idle"))
    more = dataclasses.replace(settings, methods=(*settings.methods, *own))
    resumed = run_comparison(tmp_path, more, Testbed.of_directory(assets), show_progress_bar=False)
    assert resumed[: len(results)] == results
    new = of(resumed, "trained")
    assert new["forward_equivalents"] == {"forget_adapter": 0.0, "edit": 40.0}
    assert new["seconds"]["forget_adapter"] == 0
    assert new["losses"]["forget"] == pytest.approx(of(resumed, "negation")["losses"]["forget"], rel=0.02)
    assert of(resumed, "idle")["failure"].startswith("no strength up to 256")
    assert of(resumed, "diverging")["failure"] == "the loss is nan at step 3"
    assert "- diverging, seed 0: the loss is nan at step 3" in (tmp_path / "table.md").read_text()
    assert seen[0].retain_rows == rows("retain", 40)[::2][:8]
    assert seen[0].forget_rows == rows("forget", 20)


def test_a_search_that_ends_far_from_its_target_is_a_failure(compared, assets, monkeypatch, tmp_path):
    """It also reads the config of a version that had no setting 'matched'."""
    settings, directory, results = compared
    record = json.loads((directory / "config.json").read_text())
    del record["settings"]["matched"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "results.jsonl").write_text((directory / "results.jsonl").read_text())
    target = of(results, "retain-only model")["losses"]["forget"]
    assert of(results, "negation")["forgotten"] == pytest.approx(target, rel=0.02)
    monkeypatch.setattr(bench, "match_forgetting", lambda *_, **__: Match(1.0, 1.05 * target, []))
    more, testbed = dataclasses.replace(settings, methods=("uniform",)), Testbed.of_directory(assets)
    run = of(run_comparison(tmp_path, more, testbed, show_progress_bar=False), "uniform")
    assert run["failure"] == f"the forget loss came to {1.05 * target:.3f} at best, expected {target:.3f} within 2%"
    assert "losses" not in run


def test_results_of_other_settings_or_another_model_are_refused(compared, assets, tmp_path):
    settings, directory, _ = compared
    with pytest.raises(ConfigError, match="holds results with rank = 8, found 4 here; only methods, seeds, authors"):
        run_comparison(directory, dataclasses.replace(settings, rank=4), Testbed.of_directory(assets))
    before = (directory / "config.json").read_text()
    for name in ("config.json", "results.jsonl"):
        (tmp_path / name).write_text((directory / name).read_text())
    (tmp_path / "config.json").write_text(before.replace('"testbed_sha256": "', '"testbed_sha256": "0'))
    with pytest.raises(ConfigError, match="results of another model or other rows"):
        run_comparison(tmp_path, settings, Testbed.of_directory(assets))
    (tmp_path / "config.json").write_text(before)
    (tmp_path / "results.jsonl").write_text('{"method": "negation"')
    with pytest.raises(OutputError, match="damaged comparison"):
        run_comparison(tmp_path, settings, Testbed.of_directory(assets))
    (tmp_path / "config.json").unlink()
    with pytest.raises(OutputError, match="was not written by peft_perta"):
        run_comparison(tmp_path, settings, Testbed.of_directory(assets))


def test_missing_assets_are_refused_before_any_compute(assets, tmp_path):
    with pytest.raises(ConfigError, match=r"testbed: expected base/config\.json in"):
        read_testbed(str(tmp_path))
    with pytest.raises(ConfigError, match="authors: expected at most 1, the number among the forget rows, found 2"):
        run_comparison(tmp_path / "out", dataclasses.replace(TINY, authors=(2,)), Testbed.of_directory(assets))
    assert not (tmp_path / "out").exists()


# Table and picture


def result(method: str, seed: int | None, retain: float, **more) -> dict:
    return {
        "method": method, "authors": 2, "seed": seed, "failure": None, "strength": 1.5,
        "matched": None if seed is None else "loss", "probabilities": {"retain": math.exp(-retain), "seen": 0.5},
        "missed": 0.25, "memory": 2**30, "rows": {"retain": {"loss": [retain]}},
        "losses": {"forget": 3.0, "retain": retain, "general": 1.0}, "scores": {"forget_quality": 0.01},
        "attacks": [{"attack": "relearning", "setting": "1 step", "loss": retain * 2, "probability": 0.1}],
        "rank": 16, "bytes": 2_500_000, "seconds": {"forget_adapter": 10.0, "edit": 2.0},
        "forward_equivalents": {"forget_adapter": 12.0, "edit": 2.0}, **more,
    }  # fmt: skip


def test_the_table_holds_means_and_deviations_over_seeds():
    nothing = {"strength": None, "losses": None, "probabilities": None, "missed": None}
    failed = result("mine", 2, 0.0, failure="no strength is enough", **nothing)
    table = format_table([result("mine", 0, 1.0), result("mine", 1, 2.0), failed])
    assert "### 2 forget authors, 3 seeds" in table
    assert "| mine | 1.50 | 3.000 | 0.250 | 0.252 ± 0.164 | 1.500 ± 0.707 | 0.500 | 1.000 |" in table
    assert " -2.00 |" in table  # log10 of 0.01
    assert "| mine | 16 | 2.50 | 2.0 | 2.00 | 1.00 | 12.0 | 14.00 |" in table
    assert "| method | relearning: 1 step |" in table
    assert "- mine, seed 2: no strength is enough" in table


def test_one_seed_has_no_deviation_and_baselines_come_first():
    full = {**result("full model", None, 0.1), "strength": None}
    table = format_table([result("mine", 0, 1.0), full])
    lines = [line for line in table.splitlines() if line.startswith(("| mine", "| full"))]
    assert lines[0].startswith("| full model | - | 3.000 | 0.250 | 0.905 | 0.100 |")
    assert lines[1].startswith("| mine | 1.50 | 3.000 | 0.250 | 0.368 | 1.000 |")
    assert "±" not in table


def test_each_measure_of_forgetting_has_its_own_section():
    table = format_table([result("mine", 0, 1.0), result("mine", 0, 2.0, matched="first-choice")])
    by_loss, by_choice = table.split("### ")[1:]
    assert "(forget loss of the" in by_loss
    assert "(share of tokens that are not the first choice of the" in by_choice
    assert ("| 0.368 |" in by_loss, "| 0.135 |" in by_choice, "| 0.135 |" in by_loss) == (True, True, False)


def test_the_best_method_keeps_most_of_those_that_a_user_can_run():
    results = [
        result("full model", None, 0.0), result("negation", 0, 1.0), result("perta-grad", 0, 0.5),
        result("shuffled", 0, 0.1), result("uipe", 0, 0.1), result("sago", 0, 0.2, failure="it did not get there"),
    ]  # fmt: skip
    assert best_method(results) == "perta-grad"
    results.append(result("perta-grad", 0, 9.0, matched="first-choice"))  # over all measures, it keeps less
    assert best_method(results) == "negation"
    assert best_method([result("full model", None, 0.0)]) is None


def test_without_a_curve_the_matched_point_is_drawn():
    full = result("full model", None, 0.1)["losses"]
    points = mean_curve([result("mine", 0, 1.0), result("mine", 1, 3.0)], full)
    assert points == [full, {"strength": 1.5, "forget": 3.0, "retain": 2.0, "general": 1.0}]


def test_a_curve_is_the_mean_of_the_matched_seeds():
    def curve(*retain: float) -> list[dict]:
        return [{"factor": f, "strength": f, "forget": f, "retain": r} for f, r in zip((1.0, 0.5), retain, strict=True)]

    both = [result("mine", seed, 0.0, curve=curve(*losses)) for seed, losses in enumerate(((3.0, 1.0), (5.0, 2.0)))]
    failed = result("mine", 2, 0.0, curve=curve(90.0, 90.0), failure="too weak")
    start = {"forget": 0.1, "retain": 0.2}
    curve_of_both = mean_curve([*both, failed], start)
    assert [(p["forget"], p["retain"]) for p in curve_of_both] == [(0.1, 0.2), (0.5, 1.5), (1.0, 4.0)]
    assert [p["retain"] for p in mean_curve([failed], None)] == [90.0, 90.0]
    assert mean_curve([], start) == []


@pytest.mark.parametrize(
    ("points", "right", "top", "expected"),
    [
        ([(0, 0), (1, 1), (2, 3)], 1.5, 10, (1.5, 2.0)),
        ([(0, 0), (1, 1), (2, 3)], 10, 2, (1.5, 2.0)),
        ([(0, 0), (1, 3), (2, 1)], 10, 2, (2 / 3, 2.0)),  # it leaves, and returns
        ([(0, 0), (1, 1)], 4, 10, (4.0, 4.0)),  # extended
        ([(0, 1), (2, 1)], 4, 10, (4.0, 1.0)),
        ([(2, 1), (1, 1)], 4, 10, (1, 1)),  # it never leaves
        ([(2, 1), (1, 3)], 4, 10, (1, 3)),
        ([(2, 1)], 4, 10, (2, 1)),
    ],
)
def test_a_name_is_written_where_its_curve_leaves_the_panel(points, right, top, expected):
    assert leaves_at(points, right, top) == pytest.approx(expected)


# The command and the larger model


@pytest.mark.parametrize(
    ("flags", "settings"),
    [([], ComparisonSettings()), (["--quick"], ComparisonSettings.quick()), (["--config", "c.json"], TINY)],
)
def test_the_command_runs_the_given_settings(flags, settings, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "run_comparison", lambda output, given, _: asked.append((output, given)) or [RESULT])
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(json.dumps(TINY.to_dict()))
    monkeypatch.setattr(sys, "argv", ["methods", *flags, "--output", "there", "--json", "results.jsonl"])
    command.main()
    assert asked == [(Path("there"), settings)]
    assert json.loads(Path("results.jsonl").read_text()) == RESULT
    assert "| mine |" in capsys.readouterr().out


RESULT = result("mine", 0, 1.0)


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_demo_model", ROOT / "examples" / "demo_model" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("methods_*.json")), ids=lambda path: path.stem)
def test_the_settings_of_a_benchmark_are_over_three_seeds(path):
    assert ComparisonSettings.read(path).seeds == (0, 1, 2)


def test_the_large_model_has_about_100_million_parameters_and_its_base_never_sees_forget10(build):
    with torch.device("meta"):
        model = build.base_model(build.LARGE, {})
    assert 80e6 < sum(parameter.numel() for parameter in model.parameters()) < 120e6
    assert build.LARGE.output.resolve() != build.SMALL.output.resolve()
    settings = ComparisonSettings.read(ROOT / "benchmarks" / "methods_large.json")
    assert max(settings.authors) == len(build.LARGE.forget)
    for size in build.SIZES.values():
        learned = {*size.others, *size.well_known}
        assert not learned & {*size.forget, *size.retain, *size.validation}
        assert not set(size.forget) & set(size.retain)


AUTHORS = {0, 30, 180, 181, 190, 199}


def test_the_output_of_build_can_be_compared(build, tmp_path, monkeypatch):
    """All stages at a tiny size."""
    data = tmp_path / "data"
    data.mkdir()
    few = [row for row in build.read_rows(build.DATA / "tofu_authors.jsonl") if row["author"] in AUTHORS]
    books = build.read_rows(build.DATA / "books.jsonl")[:4]
    build.write_rows(data / "tofu_authors.jsonl", few)
    build.write_rows(data / "tofu_facts.jsonl", build.read_rows(build.DATA / "tofu_facts.jsonl"))
    build.write_rows(data / "books.jsonl", [{"text": book["text"][:3000]} for book in books])
    monkeypatch.setattr(build, "DATA", data)
    size = dataclasses.replace(
        build.LARGE, retain=[0, 30], forget=[199], well_known=[180], validation=[190], others=[180, 181],
        model={**build.LARGE.model, "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64,
               "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        base_epochs=1, book_tokens=1000, adapter_epochs=1, lora={"r": 4, "lora_alpha": 8}, rehearsed=(2, 2),
        general_repeats=1, on_gpu=False,
    )  # fmt: skip
    build.build(size, tmp_path / "model")
    judged = build.read_rows(tmp_path / "model" / "retain_perturbed.jsonl")
    assert len(judged) == 20  # TOFU has no false answers for author 30
    settings = dataclasses.replace(TINY, methods=("negation",), least_steps=1, judged_rows=4, suite_rows=2)
    testbed = read_testbed(str(tmp_path / "model"))
    results = run_comparison(tmp_path / "out", settings, testbed, show_progress_bar=False)
    assert [r["method"] for r in results] == ["full model", "retain-only model", "origin", "negation"]


# A user's own model


def written(path: Path, kept: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return str(path)


@pytest.fixture
def own(assets, tmp_path) -> dict[str, str]:
    """The options of a user's own model and plain rows, without false answers."""
    plain = {
        name: [{key: row[key] for key in ("question", "answer")} for row in rows(name, count)]
        for name, count in (("forget", 20), ("retain", 40))
    }
    files = {name: written(tmp_path / f"{name}.jsonl", split) for name, split in plain.items()}
    return {"model": str(assets / "base"), **files, "task-adapter": str(assets / "task_adapter")}


def compare(output: Path, own: dict[str, str], **more: str) -> int:
    settings = dataclasses.replace(TINY, methods=("negation", "perta-grad"), curve=(), suite_rows=2)
    config = output.parent / "own.json"
    config.write_text(json.dumps(settings.to_dict()))
    flags = [part for name, value in {**own, **more}.items() for part in (f"--{name.replace('_', '-')}", value)]
    return command_line(["compare", *flags, "--config", str(config), "--output", str(output)])


def test_a_users_own_model_is_matched_to_the_base_and_the_best_method_is_named(own, assets, tmp_path, capsys):
    general = written(tmp_path / "general.jsonl", rows("general", 12))
    assert compare(tmp_path / "out", own, general=general) == 0
    printed = capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [r["method"] for r in results] == ["full model", "origin", "negation", "perta-grad"]
    target = of(results, "origin")["losses"]["forget"]
    matched = [r for r in results if r["seed"] is not None]
    for run in matched:
        assert run["losses"]["forget"] == pytest.approx(target, rel=0.02)
        assert run["authors"] is None
        assert run["memory"] > 0
        assert len(run["rows"]["retain"]["loss"]) == 12
    best = max(matched, key=lambda run: run["probabilities"]["retain"])
    assert f"{best['method']} keeps most on the unseen retain rows" in printed
    assert f"--strength {best['strength']:.4g}" in printed
    assert "all forget rows, 1 seed" in printed


@pytest.mark.parametrize(
    ("method", "names", "tolerance"),
    [  # rounding grows in training
        ("perta-grad", ["unlearn"], 1e-3),
        pytest.param("gradient-ascent", ["train", "extrapolate"], 0.05, marks=pytest.mark.slow),
        ("gradient-ascent+directions", ["train", "refine", "extrapolate"], 0.05),
    ],
)
def test_the_recommended_commands_make_the_adapter_that_was_compared(
    method, names, tolerance, own, tmp_path, capsys, monkeypatch
):
    general = written(tmp_path / "general.jsonl", rows("general", 12))
    assert compare(tmp_path / "out", own, general=general, methods=method) == 0
    commands = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("  peft-perta ")]
    assert [line[0] for line in commands] == names
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    monkeypatch.chdir(tmp_path)
    for one in commands:
        assert command_line(one) == 0
    base, tokenizer = load_base(own["model"])
    model = attach_adapters(base, {"task": own["task-adapter"], "unlearn": "unlearn_adapter"})
    loss = losses_of(model, load_samples(spread(rows("forget", 20), 12), tokenizer), adapters=["task", "unlearn"])
    assert float(loss.mean()) == pytest.approx(of(results, method)["losses"]["forget"], rel=tolerance)


def test_without_another_model_forgetting_is_matched_to_chance(own, assets, tmp_path, capsys):
    """The oracle scores each answer by itself. The base here is a model that knows the rows."""
    base, tokenizer = load_base(own["model"])
    merged = attach_adapters(base, {"task": assets / "task_adapter"}).merge_and_unload()
    merged.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"forget": 20, "retain": 40, "general": 4}
    files = {name: written(tmp_path / f"{name}.jsonl", rows(name, size)) for name, size in sizes.items()}
    testbed = Testbed.of_user(str(tmp_path / "base"), **files)
    few = dataclasses.replace(TINY, methods=("negation",), matched="options", authors=(), suite_rows=0, curve=())
    results = run_comparison(tmp_path / "out", few, testbed, show_progress_bar=False)
    full, negated = of(results, "full model"), of(results, "negation")
    judged, model = spread(rows("forget", 20), 12), merged.eval()
    for row, found in zip(judged, full["rows"]["forget"]["misled"], strict=True):
        options = [{"question": row["question"], "answer": a} for a in (row["answer"], *row["perturbed_answer"])]
        right, *false = (math.exp(-float(losses_of(model, load_samples([o], tokenizer)))) for o in options)
        assert found == pytest.approx(sum(false) / (right + sum(false)), abs=1e-4)
    assert full["rows"]["forget"]["misled"] != negated["rows"]["forget"]["misled"]
    assert negated["target"] == pytest.approx(2 / 3)  # two false answers beside each
    assert negated["forgotten"] == pytest.approx(2 / 3, rel=0.02)
    assert "misled" in negated["rows"]["retain"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "At matched forgetting (probability of false options, by chance): what is kept" in table
    assert "| unseen retain, right option |" in table
    with pytest.raises(ConfigError, match=r"matched: expected some of \['options'\], which have a target here, found"):
        run_comparison(tmp_path / "other", dataclasses.replace(few, matched="loss"), testbed)


def test_what_is_kept_is_judged_by_options_where_they_were_scored():
    plain, asked = (dict(result(name, 0, 1.0)) for name in ("negation", "perta-grad"))
    asked["rows"] = {"retain": {"loss": [9.0], "misled": [0.1]}}
    assert best_method([plain, asked]) == "perta-grad"
    assert "| unseen retain, right option |" in format_table([plain, asked])
    assert "| unseen retain, right option |" not in format_table([plain])


@pytest.mark.parametrize(
    ("yardstick", "matched"),
    [
        ({"retain_only_adapter": Path("x"), "task_adapter": Path("y")}, ("loss", "first-choice")),
        ({"task_adapter": Path("y")}, ("loss", "first-choice")),
        ({"target_forget_loss": 2.0}, ("loss",)),
        ({}, ("options",)),
    ],
)
def test_a_users_comparison_is_matched_in_every_measure_that_has_a_target(yardstick, matched):
    testbed = Testbed("m", {"forget": rows("forget", 20), "retain": [], "general": []}, **yardstick)
    options = command_parser("compare").parse_args(["--model", "m"])
    settings = compare_command._settings(options, testbed)
    assert (settings.matched, settings.authors) == (matched, ())


def test_a_testbed_with_fewer_authors_than_the_default_is_one_set():
    options = command_parser("compare").parse_args([])
    for count, authors in ((100, (1, 2, 5)), (40, ()), (12, ())):
        testbed = Testbed("m", {"forget": rows("forget", count)}, task_adapter=Path("y"))
        assert compare_command._settings(options, testbed).authors == authors


# Intervals


def of_rows(seed: int, losses: list[float]) -> dict:
    return {"seed": seed, "rows": {"retain": {"loss": losses}}}


def test_a_difference_is_paired_by_row_and_averaged_over_common_seeds():
    """Rows that differ by the same amount leave no width, however much they differ among each other."""
    probabilities = [0.9, 0.5, 0.2, 0.7]
    runs = [of_rows(seed, [-math.log(p) for p in probabilities]) for seed in (0, 1, 2)]
    controls = [of_rows(seed, [-math.log(p - 0.1) for p in probabilities]) for seed in (0, 1)]
    assert str(kept_against(runs, [*controls, of_rows(3, [1.0] * 4)])) == "+0.100 [+0.100, +0.100]"
    assert str(kept_against(controls, runs)) == "-0.100 [-0.100, -0.100]"
    assert kept_against(runs, []) is None
    assert kept_against(runs, [{"seed": 0, "failure": "not matched"}]) is None


def test_the_interval_is_that_of_the_mean_over_rows():
    """Against the normal approximation, on many rows."""
    generator = torch.Generator().manual_seed(0)
    run, control = (torch.rand(2000, generator=generator, dtype=torch.float64).log().neg().tolist() for _ in range(2))
    found = kept_against([of_rows(0, run)], [of_rows(0, control)])
    differences = torch.tensor(run).neg().exp() - torch.tensor(control).neg().exp()
    width = 1.96 * float(differences.std()) / math.sqrt(2000)
    assert found.mean == pytest.approx(float(differences.mean()), abs=1e-6)
    assert found.low == pytest.approx(found.mean - width, abs=0.1 * width)
    assert found.high == pytest.approx(found.mean + width, abs=0.1 * width)


def test_the_table_holds_the_differences(compared):
    _, _, results = compared
    own = {r["method"]: r for r in results if r["seed"] is not None}
    expected = kept_against([own["perta-grad"]], [own["negation"]])
    table = format_table(results)
    assert "| method | against plain negation | against itself, not refined |" in table
    assert f"| perta-grad | {expected} | - |" in table
    assert "| negation | - | - |" in table


def test_an_adapter_is_trained_once_for_the_methods_that_build_on_it():
    trainings = []

    def train(setup):
        trainings.append(setup)
        lora_config, state_dict, _ = builders.negate(setup.model, weighting="uniform")
        return MethodAdapter(lora_config, state_dict, 4.0)

    plain = Method("x", once(train), "trained", needs_forget_adapter=False)
    own, names = setup(), list(setup().model.peft_config)
    first, refined = plain.make(own), methods._refined(plain, "x").make(own)
    assert len(trainings) == 1
    assert list(own.model.peft_config) == names
    assert refined.forward_equivalents == 4.0 + 2.0
    assert refined.effort.seconds >= first.effort.seconds > 0
    assert refined.effort.memory >= first.effort.memory > 0
    expected = refine_adapter(
        own.model, "forget", own.forget_rows, own.retain_rows, tokenizer=own.tokenizer, task_adapter="task"
    )
    negated, along = laws.deltas_of(refined.state_dict), laws.deltas_of(expected.state_dict)
    for key, delta in along.items():
        torch.testing.assert_close(negated[key], -delta, rtol=1e-4, atol=1e-6)


def test_a_resumed_comparison_takes_the_forget_adapter_that_it_trained(compared, assets, tmp_path):
    """Bit for bit: a method that is added later gives what it gives in one go."""
    settings, _, _ = compared
    testbed = Testbed.of_directory(assets)
    few = dataclasses.replace(settings, attacks=(), suite_rows=0, methods=("negation",))
    both = dataclasses.replace(few, methods=("negation", "perta-grad"))
    whole = run_comparison(tmp_path / "whole", both, testbed, show_progress_bar=False)
    run_comparison(tmp_path / "parts", few, testbed, show_progress_bar=False)
    parts = run_comparison(tmp_path / "parts", both, testbed, show_progress_bar=False)
    for run in (of(whole, "perta-grad"), of(parts, "perta-grad")):
        del run["seconds"], run["memory"]
    assert of(whole, "perta-grad") == of(parts, "perta-grad")
    assert of(parts, "negation")["scores"] == {}


def test_no_forget_adapter_is_trained_for_methods_that_need_none(compared, assets, tmp_path, monkeypatch):
    settings, _, _ = compared
    monkeypatch.setattr(bench, "train_forget_adapter", lambda *_, **__: pytest.fail("a forget adapter was trained"))
    monkeypatch.setattr(_trained, "STEPS", 2)
    alone = dataclasses.replace(settings, attacks=("relearning",), suite_rows=0, curve=(), methods=("rmu",))
    results = run_comparison(tmp_path / "out", alone, Testbed.of_directory(assets), show_progress_bar=False)
    assert of(results, "rmu")["seconds"]["forget_adapter"] == 0.0
    assert {of_attack["attack"] for of_attack in of(results, "full model")["attacks"]} == {"relearning"}
    assert not (tmp_path / "out" / "forget_adapters").exists()


@pytest.mark.parametrize(
    ("left_out", "more", "message"),
    [
        ("task-adapter", {}, "needs a target of forgetting: expected --task-adapter"),
        ("retain", {}, "--model: expected --retain with it, found none"),
        ("model", {}, "--task-adapter: expected --model with it"),
        (None, {"testbed": "small"}, "--model and --testbed: expected one of the two"),
        (None, {"target-forget-loss": "2", "retain-only-log": "x.json"}, "expected one target of forgetting"),
        (None, {"retain-only-log": "missing.json"}, "missing.json"),
    ],
)
def test_a_comparison_that_cannot_be_made_gets_one_line(left_out, more, message, own, tmp_path, capsys):
    given = {name: value for name, value in own.items() if name != left_out}
    assert compare(tmp_path / "out", given, **more) != 0
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_given_loss_is_the_target_and_allows_no_other_measure(own, tmp_path, capsys):
    general = written(tmp_path / "general.jsonl", rows("general", 12))
    assert compare(tmp_path / "out", own, general=general, target_forget_loss="1.5", methods="negation") == 0
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert of(results, "negation")["losses"]["forget"] == pytest.approx(1.5, rel=0.02)


def test_a_model_that_must_forget_without_a_task_adapter(own, assets, tmp_path):
    """The base itself is the full model; methods that need a task adapter say so."""
    general = written(tmp_path / "general.jsonl", rows("general", 12))
    testbed = Testbed.of_user(own["model"], own["forget"], own["retain"], general=general, retain_only=5.5)
    few = dataclasses.replace(TINY, methods=("negation", "llmeraser"), authors=(), suite_rows=0, curve=())
    results = run_comparison(tmp_path / "out", few, testbed, show_progress_bar=False)
    assert [r["method"] for r in results] == ["full model", "negation", "llmeraser"]
    assert of(results, "negation")["losses"]["forget"] == pytest.approx(5.5, rel=0.02)
    assert of(results, "llmeraser")["failure"] == "it removes rows from a task adapter, and there is none"


def test_a_single_retain_row_is_refused(own, tmp_path):
    single = written(tmp_path / "single.jsonl", [{"question": "a?", "answer": "b"}])
    testbed = Testbed.of_user(own["model"], own["forget"], single, retain_only=2.0)
    with pytest.raises(ConfigError, match="at least 2 retain rows"):
        run_comparison(tmp_path / "out", dataclasses.replace(TINY, authors=()), testbed)
