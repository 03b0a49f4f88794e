"""Every method is what its row says; a comparison meets its own definitions, goes on where it stopped, and says what
could not be matched."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import builders
import laws
import pytest
import torch

from peft_perta import ConfigError, DataError, NumericalError, OutputError, attach_adapters, load_base
from peft_perta.adapters import add_adapter
from peft_perta.comparison import ComparisonSettings, _trained, format_table, method_names, run, run_comparison
from peft_perta.comparison._method import Made, Method, Setup
from peft_perta.comparison._picture import leaves_at, mean_curve
from peft_perta.comparison.methods import ALPHA, METHODS, QUICK
from peft_perta.data import load_samples, spread
from peft_perta.evaluation import Match, losses_of
from peft_perta.training import default_lora_config, train_forget_adapter

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
def made() -> dict[str, Made]:
    own = setup()
    builders.trained(own.model, "task", [*own.forget_rows, *own.retain_rows])  # what is erased was learned
    own.model.set_adapter("forget")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trained, "STEPS", 3)
        for name, method in METHODS.items():
            with laws.untouched(own.model):
                found[name] = method.make(own)
    return found


def deltas(made: Made) -> torch.Tensor:
    """Of all layers, one after the other."""
    assert made.lora_config.lora_alpha == made.lora_config.r
    return torch.cat([delta.flatten() for _, delta in sorted(laws.deltas_of(dict(made.state_dict)).items())])


def test_every_method_gives_an_adapter_that_stacks_on_the_model(made):
    for name, found in made.items():
        model = setup().model
        add_adapter(model, found.lora_config, found.state_dict, "made")
        assert deltas(found).norm() > 0, name


def test_no_two_methods_are_one_but_those_that_say_so(made):
    directions = {name: deltas(found) / deltas(found).norm() for name, found in made.items()}
    same = {"uniform": "negation", "uipe": "perta-grad"}
    names = list(directions)
    for place, name in enumerate(names):
        for other in names[:place]:
            is_same = bool((directions[name] - directions[other]).norm() < 1e-4)
            assert is_same == (same.get(name) == other), (name, other)


def test_uniform_is_half_of_negation_and_uipe_goes_further_by_alpha(made):
    torch.testing.assert_close(deltas(made["uniform"]), deltas(made["negation"]) / 2)
    torch.testing.assert_close(deltas(made["uipe"]), deltas(made["perta-grad"]) * (1 + ALPHA))


def test_random_has_the_norm_of_each_layer_and_its_seed(made):
    ours, theirs = (laws.deltas_of(dict(made[name].state_dict)) for name in ("random", "perta-grad"))
    for layer, delta in theirs.items():
        torch.testing.assert_close(ours[layer].norm(), delta.norm(), rtol=1e-4, atol=1e-6)
    assert made["random"].lora_config.r == made["perta-grad"].lora_config.r
    torch.testing.assert_close(deltas(METHODS["random"].make(setup())), deltas(made["random"]))
    other = deltas(METHODS["random"].make(setup(seed=1)))
    assert abs(torch.cosine_similarity(other, deltas(made["random"]), dim=0)) < 0.2


def test_what_takes_gradients_costs_forwards(made):
    free = {name for name, found in made.items() if found.forward_equivalents == 0}
    assert free == {"negation", "uniform"}
    assert all(found.forward_equivalents > 2 for name, found in made.items() if name not in free)
    assert made["paper-grad"].forward_equivalents > made["perta-grad-undirected"].forward_equivalents


def test_names_and_the_quick_ones():
    assert method_names() == list(METHODS)
    assert set(QUICK) <= set(METHODS)
    assert {"negation", "perta-grad", "uipe", "random"} <= set(QUICK)


# Settings


def test_settings_survive_json(tmp_path):
    settings = dataclasses.replace(TINY, assets="somewhere", attacks=("relearning", "prefix"))
    (tmp_path / "c.json").write_text(json.dumps(settings.to_dict()))
    assert ComparisonSettings.read(tmp_path / "c.json") == settings
    assert ComparisonSettings.from_dict({}) == ComparisonSettings()
    assert ComparisonSettings.quick().methods == QUICK


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": 1}, "no setting 'speed'; expected some of .*'seeds'"),
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
        ({"matched": "luck"}, r"matched: expected one of \['loss', 'first-choice'\], found 'luck'"),
        ({"assets": 5}, "assets: expected nothing, or a path"),
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
    """Short rows, each with its own answer; a character is a token."""
    return [
        {
            "question": f"{kind}{number}?",
            "answer": f"{kind[0]}{number * 7 % 90}",
            "paraphrased_answer": f"{kind[0]} {number * 7 % 90}",
            "perturbed_answer": [f"{kind[0]}{number * 7 % 90 + 5}", "no"],
        }
        for number in range(count)
    ]


SPLITS = {"forget": 20, "retain": 40, "general": 12, "real_authors": 4, "world_facts": 4, "holdout": 4}


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """What build.py leaves, of a model of two layers: a base, a task adapter that learned both sets, a retain-only model that
    learned the retain set alone."""
    path = tmp_path_factory.mktemp("assets")
    sets = {name: rows(name, count) for name, count in SPLITS.items()}
    for name, found in sets.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    builders.llama().save_pretrained(path / "base")
    builders.tokenizer().save_pretrained(path / "base")
    learned = {"task_adapter": sets["forget"] + sets["retain"] + sets["general"],
               "retain_adapter": sets["retain"] + sets["general"]}  # fmt: skip
    for name, found in learned.items():
        base, tokenizer = load_base(str(path / "base"))
        train_forget_adapter(
            base, found, tokenizer, path / name, lora_config=default_lora_config(16), num_train_epochs=20,
            learning_rate=1e-2, per_device_train_batch_size=12, logging_strategy="no", show_progress_bar=False,
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def compared(assets, tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison")
    settings = dataclasses.replace(TINY, assets=str(assets), attacks=("relearning", "sampling"))
    return settings, directory, run_comparison(directory, settings, show_progress_bar=False)


def of(results: list[dict], name: str) -> dict:
    (found,) = [result for result in results if result["method"] == name]
    return found


def test_every_run_is_at_matched_forgetting(compared):
    settings, _, results = compared
    assert [r["method"] for r in results] == ["full model", "retain-only model", *settings.methods]
    target = of(results, "retain-only model")["losses"]["forget"]
    assert target > 2 * of(results, "full model")["losses"]["forget"]
    for name in settings.methods:
        found = of(results, name)
        assert found["failure"] is None
        assert found["losses"]["forget"] == pytest.approx(target, rel=0.02), name
        half, whole = found["curve"]
        assert (half["factor"], half["strength"]) == (0.5, pytest.approx(found["strength"] / 2))
        assert half["forget"] < target
        assert {split: whole[split] for split in found["losses"]} == found["losses"]


def test_forgetting_can_be_matched_by_first_choices(assets, tmp_path):
    """The share of answer tokens that are not the likeliest, as in the log of the same rows."""
    own = {"methods": ("negation",), "matched": "first-choice", "suite_rows": 12, "assets": str(assets)}
    results = run_comparison(tmp_path, dataclasses.replace(TINY, **own), show_progress_bar=False)
    shares = {r["method"]: 1 - r["scores"]["exact_memorization"] for r in results}
    assert shares["full model"] < 0.1 < 0.5 < shares["retain-only model"]
    assert of(results, "negation")["failure"] is None
    assert shares["negation"] == pytest.approx(shares["retain-only model"], abs=0.05)
    assert "(share of tokens that are not the first choice): what is kept" in (tmp_path / "table.md").read_text()


def test_baselines_are_judged_on_the_rows_that_gave_no_gradient(compared, assets):
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


def test_scores_are_measured_against_the_retain_only(compared):
    _, _, results = compared
    retain_only = of(results, "retain-only model")["scores"]
    assert retain_only["forget_quality"] == 1
    assert retain_only["privleak"] == pytest.approx(0, abs=1e-6)
    for result in results:
        assert {"model_utility", "extraction_strength", "exact_memorization", "privleak"} <= set(result["scores"])


def test_an_extrapolation_is_the_same_adapter_at_matched_forgetting(compared):
    _, _, results = compared
    further, itself = of(results, "uipe"), of(results, "perta-grad")
    assert further["strength"] * (1 + ALPHA) == pytest.approx(itself["strength"], rel=0.02)
    assert further["losses"]["retain"] == pytest.approx(itself["losses"]["retain"], rel=0.02)
    assert further["as_made"]["forget"] > itself["as_made"]["forget"]


def test_attacks_are_tried_at_matched_forgetting(compared):
    _, directory, results = compared
    for result in results:
        relearned = {a["setting"]: a["loss"] for a in result["attacks"] if a["attack"] == "relearning"}
        assert relearned["0 steps on 6 rows, read on the other 6"] == pytest.approx(result["losses"]["forget"], rel=0.5)
        assert len(relearned) == 4
    assert "(ROUGE-L) |" in (directory / "table.md").read_text()


def test_it_leaves_results_settings_a_table_and_a_picture(compared):
    settings, directory, results = compared
    assert [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()] == results
    assert json.loads((directory / "config.json").read_text())["settings"] == settings.to_dict()
    assert (directory / "table.md").read_text() == format_table(results) + "\n"
    assert (directory / "trade_off.png").read_bytes().startswith(b"\x89PNG")


def refuses(setup: Setup) -> Made:
    raise AssertionError("it was made already")


def diverges(setup: Setup) -> Made:
    raise NumericalError("the loss is nan at step 3")


def test_a_comparison_goes_on_where_it_stopped_and_takes_new_methods(compared, monkeypatch, tmp_path):
    """A trained method is a row like any other; one that fails says so, and ends nothing."""
    settings, directory, results = compared
    for name in ("config.json", "results.jsonl"):
        (tmp_path / name).write_text((directory / name).read_text())
    negate, seen = METHODS["negation"].make, []

    def trained(setup: Setup) -> Made:
        seen.append(setup)
        return dataclasses.replace(negate(setup), forward_equivalents=40.0)

    def idle(setup: Setup) -> Made:
        made = negate(setup)
        return dataclasses.replace(made, state_dict={k: torch.zeros_like(v) for k, v in made.state_dict.items()})

    for name in settings.methods:
        monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], make=refuses))
    own = {"trained": trained, "idle": idle, "diverging": diverges}
    for name, make in own.items():
        monkeypatch.setitem(METHODS, name, Method(name, make, "trained", needs_forget_adapter=False))
    more = dataclasses.replace(settings, methods=(*settings.methods, *own))
    found = run_comparison(tmp_path, more, show_progress_bar=False)
    assert found[: len(results)] == results
    new = of(found, "trained")
    assert new["forward_equivalents"] == {"forget_adapter": 0.0, "edit": 40.0}
    assert new["seconds"]["forget_adapter"] == 0
    assert new["losses"]["forget"] == pytest.approx(of(found, "negation")["losses"]["forget"], rel=0.02)
    assert of(found, "idle")["failure"].startswith("no strength up to 256")
    assert of(found, "diverging")["failure"] == "the loss is nan at step 3"
    assert "- diverging, seed 0: the loss is nan at step 3" in (tmp_path / "table.md").read_text()
    assert seen[0].retain_rows == rows("retain", 40)[::2][:8]
    assert seen[0].forget_rows == rows("forget", 20)


def test_a_search_that_ends_off_its_target_is_no_match(compared, monkeypatch, tmp_path):
    """In a directory of before there was a choice of what is matched."""
    settings, directory, results = compared
    record = json.loads((directory / "config.json").read_text())
    del record["settings"]["matched"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "results.jsonl").write_text((directory / "results.jsonl").read_text())
    target = of(results, "retain-only model")["losses"]["forget"]
    assert of(results, "negation")["forgotten"] == pytest.approx(target, rel=0.02)
    monkeypatch.setattr(run, "match_forgetting", lambda *_, **__: Match(1.0, 1.05 * target, []))
    more = dataclasses.replace(settings, methods=("uniform",))
    found = of(run_comparison(tmp_path, more, show_progress_bar=False), "uniform")
    assert found["failure"] == f"the forget loss came to {1.05 * target:.3f} at best, expected {target:.3f} within 2%"
    assert "losses" not in found


def test_other_settings_or_another_model_do_not_mix(compared, assets, tmp_path):
    settings, directory, _ = compared
    with pytest.raises(ConfigError, match="holds results with rank = 8, found 4 here; only methods, seeds, authors"):
        run_comparison(directory, dataclasses.replace(settings, rank=4))
    before = (directory / "config.json").read_text()
    for name in ("config.json", "results.jsonl"):
        (tmp_path / name).write_text((directory / name).read_text())
    (tmp_path / "config.json").write_text(before.replace('"assets_sha256": "', '"assets_sha256": "0'))
    with pytest.raises(ConfigError, match="results of another model or other rows"):
        run_comparison(tmp_path, settings)
    (tmp_path / "config.json").write_text(before)
    (tmp_path / "results.jsonl").write_text('{"method": "negation"')
    with pytest.raises(OutputError, match="damaged comparison"):
        run_comparison(tmp_path, settings)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OutputError, match="was not written by peft_perta"):
        run_comparison(tmp_path, settings)


def test_missing_assets_are_refused_before_any_compute(assets, tmp_path):
    with pytest.raises(ConfigError, match=r"assets: expected base/config\.json in"):
        run_comparison(tmp_path / "out", dataclasses.replace(TINY, assets=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"authors: expected at most 1, as many as .*forget\.jsonl holds, found 2"):
        run_comparison(tmp_path / "out", dataclasses.replace(TINY, assets=str(assets), authors=(2,)))
    assert not (tmp_path / "out").exists()


# Table and picture


def result(method: str, seed: int | None, retain: float, **more) -> dict:
    return {
        "method": method, "authors": 2, "seed": seed, "failure": None, "strength": 1.5,
        "losses": {"forget": 3.0, "retain": retain, "general": 1.0}, "scores": {"forget_quality": 0.01},
        "attacks": [{"attack": "relearning", "setting": "1 step", "loss": retain * 2, "probability": 0.1}],
        "rank": 16, "bytes": 2_500_000, "seconds": {"forget_adapter": 10.0, "edit": 2.0},
        "forward_equivalents": {"forget_adapter": 12.0, "edit": 2.0}, **more,
    }  # fmt: skip


def test_the_table_holds_means_and_deviations_over_seeds():
    failed = result("mine", 2, 0.0, failure="no strength is enough", strength=None, losses=None)
    table = format_table([result("mine", 0, 1.0), result("mine", 1, 2.0), failed])
    assert "### 2 forget authors, 3 seeds" in table
    assert "| mine | 1.50 | 3.000 | 1.500 ± 0.707 | 1.000 |" in table
    assert " -2.00 |" in table  # log10 of 0.01
    assert "| mine | 16 | 2.50 | 2.0 | 2.00 | 12.0 | 14.00 |" in table
    assert "| method | relearning: 1 step |" in table
    assert "- mine, seed 2: no strength is enough" in table


def test_one_seed_has_no_deviation_and_baselines_come_first():
    full = {key: result("full model", None, 0.1)[key] for key in ("method", "authors", "seed", "losses", "scores")}
    table = format_table([result("mine", 0, 1.0), full])
    lines = [line for line in table.splitlines() if line.startswith(("| mine", "| full"))]
    assert lines[0].startswith("| full model | - | 3.000 | 0.100 |")
    assert lines[1].startswith("| mine | 1.50 | 3.000 | 1.000 |")
    assert "±" not in table


def test_a_curve_is_the_mean_of_the_matched_seeds():
    def curve(*retain: float) -> list[dict]:
        return [{"factor": f, "strength": f, "forget": f, "retain": r} for f, r in zip((1.0, 0.5), retain, strict=True)]

    both = [result("mine", seed, 0.0, curve=curve(*losses)) for seed, losses in enumerate(((3.0, 1.0), (5.0, 2.0)))]
    failed = result("mine", 2, 0.0, curve=curve(90.0, 90.0), failure="too weak")
    start = {"forget": 0.1, "retain": 0.2}
    found = mean_curve([*both, failed], start)
    assert [(p["forget"], p["retain"]) for p in found] == [(0.1, 0.2), (0.5, 1.5), (1.0, 4.0)]
    assert [p["retain"] for p in mean_curve([failed], None)] == [90.0, 90.0]
    assert mean_curve([], start) == []


@pytest.mark.parametrize(
    ("points", "right", "top", "expected"),
    [
        ([(0, 0), (1, 1), (2, 3)], 1.5, 10, (1.5, 2.0)),
        ([(0, 0), (1, 1), (2, 3)], 10, 2, (1.5, 2.0)),
        ([(0, 0), (1, 3), (2, 1)], 10, 2, (2 / 3, 2.0)),  # it comes back
        ([(0, 0), (1, 1)], 4, 10, (4.0, 4.0)),  # drawn on
        ([(0, 1), (2, 1)], 4, 10, (4.0, 1.0)),
        ([(2, 1), (1, 1)], 4, 10, (1, 1)),  # it never would
        ([(2, 1), (1, 3)], 4, 10, (1, 3)),
        ([(2, 1)], 4, 10, (2, 1)),
    ],
)
def test_a_name_stands_where_its_curve_leaves_the_panel(points, right, top, expected):
    assert leaves_at(points, right, top) == pytest.approx(expected)


# The command and the larger model


@pytest.mark.parametrize(
    ("flags", "settings"),
    [([], ComparisonSettings()), (["--quick"], ComparisonSettings.quick()), (["--config", "c.json"], TINY)],
)
def test_the_command_runs_what_is_asked(flags, settings, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "run_comparison", lambda output, found: asked.append((output, found)) or [RESULT])
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
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("methods_*.json")), ids=lambda path: path.stem)
def test_the_settings_of_a_benchmark_are_over_three_seeds(path):
    assert ComparisonSettings.read(path).seeds == (0, 1, 2)


def test_the_large_model_is_of_some_100_million_parameters_and_keeps_forget10_apart(build):
    with torch.device("meta"):
        model = build.base_model(build.LARGE, {})
    assert 80e6 < sum(parameter.numel() for parameter in model.parameters()) < 120e6
    assert build.LARGE.output.resolve() != build.SMALL.output.resolve()
    settings = ComparisonSettings.read(ROOT / "benchmarks" / "methods_large.json")
    assert settings.assets == str(build.LARGE.output)
    assert max(settings.authors) == len(build.LARGE.forget)
    for size in build.SIZES.values():
        learned = {*size.others, *size.well_known}
        assert not learned & {*size.forget, *size.retain, *size.validation}
        assert not set(size.forget) & set(size.retain)


AUTHORS = {0, 30, 180, 181, 190, 199}


def test_what_build_leaves_can_be_compared(build, tmp_path, monkeypatch):
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
    settings = dataclasses.replace(
        TINY, assets=str(tmp_path / "model"), methods=("negation",), least_steps=1, judged_rows=4, suite_rows=2
    )
    results = run_comparison(tmp_path / "out", settings, show_progress_bar=False)
    assert [r["method"] for r in results] == ["full model", "retain-only model", "negation"]


def test_assets_without_false_answers_are_refused(assets, tmp_path):
    for file in assets.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_text(file.read_text())
    for name in ("base", "task_adapter", "retain_adapter"):
        (tmp_path / name).symlink_to(assets / name)
    plain = [{key: row[key] for key in ("question", "answer")} for row in rows("retain", 40)]
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    with pytest.raises(DataError, match="expected 'perturbed_answer' among every second row"):
        run_comparison(tmp_path / "out", dataclasses.replace(TINY, assets=str(tmp_path)))
