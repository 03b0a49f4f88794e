"""The whole job from one recipe: what it refuses, what it does, how it goes on, and what it says in the end."""

import argparse
import dataclasses
import hashlib
import html
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

import builders
import pytest
import torch
import yaml
from test_cli import as_arguments

from peft_perta import ConfigError, DataError, load_base, unlearn
from peft_perta.cli import command_parser, main
from peft_perta.comparison import METHODS
from peft_perta.data import claimed_directory
from peft_perta.job import RECOMMENDATIONS, Job, _judge, read_recipe, recipe_of, recommend
from peft_perta.job._record import Record
from peft_perta.job.recipe import SECTIONS, Request
from peft_perta.job.recommendation import PREFERENCES, Known

HELD_OUT = [{"question": "What colour is snow?", "answer": "White."}, {"question": "Is ice hot?", "answer": "No."}]
QUICK = {"judging": {"attacked_rows": 0, "max_new_tokens": 2}, "retain_tolerance": 100.0}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A task adapter that knows both sets, and the rows."""
    place = tmp_path_factory.mktemp("intact")
    forget, retain = builders.forget_rows(), builders.retain_rows()
    for name, rows in {"forget": forget, "retain": retain}.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = builders.trained(builders.adapted_saved_llama(), "task", [*forget, *retain])
    model.save_pretrained(place, selected_adapters=["task"])
    return place


@pytest.fixture
def place(intact, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(intact, tmp_path / "place"))
    return tmp_path / "place"


def values(**more):
    return {
        "model": str(builders.llama_directory()),
        "forget": "forget.jsonl",
        "retain": "retain.jsonl",
        "task_adapter": "task",
        "output": "out",
        **QUICK,
        **more,
    }


def written(place, **more):
    (place / "recipe.yaml").write_text(yaml.safe_dump(values(**more)))
    return "recipe.yaml"


def files(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


NEGATION = {"method": "negation", "forget_training": {"epochs": 4, "rank": 2, "learning_rate": 0.01, "batch_size": 4}}
REFINED = {"method": "rmu+directions", "train": {"epochs": 2, "rank": 2, "batch_size": 2, "learning_rate": 0.05}}


@pytest.fixture
def offline(monkeypatch):
    """The adapter is not loaded in a fresh process, which takes seconds; tests of ``verify`` do it."""
    from_files = _judge.verify_adapter
    monkeypatch.setattr(_judge, "verify_adapter", lambda directory, base, *, revision: from_files(directory))


# The recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: M", "has no key 'modle'; did you mean 'model'\\?"),
        ("train: {lerning_rate: 1}", "the recipe, train has no key 'lerning_rate'; did you mean 'learning_rate'\\?"),
        ("zzz: 1", "has no key 'zzz'; expected some of model, "),
        ("seed: many", "the recipe: seed: .*found 'many'"),
        ("model: 3", "the recipe: model: .*found 3"),
        ("four_bit: 1", "the recipe: four_bit: .*found 1"),
        ("train: [1]", "the recipe: train: "),
        ("train: {epochs: .inf}", "the recipe: train.*epochs"),
        ("train: {rank: 1000000}", "the recipe: train.rank: expected an integer from 1 to 256, found 1000000"),
        (f"seed: {'9' * 400}", "the recipe: seed"),
        (f"seed: {'9' * 5000}", "is no YAML"),
        ("retain_tolerance: 0", "the recipe: a goal is either"),
        ("prefer: fame", "the recipe: prefer: expected one of"),
        ("a: &a [x]\nb: [*a, *a]", "holds an alias"),
        ("seed: 1\nseed: 2", "holds the key 'seed' twice"),
        ("seed: [", "is no YAML"),
        ("!!python/object/apply:os.system ['false']", "is no YAML"),
        ("model: 2026-13-45", "is no YAML"),
        ("model: 2026-11-27", "neither text, number, list nor mapping"),
        ("- a", "holds a list, expected lines of"),
        ("", "holds a NoneType, expected lines of"),
        ("[" * 5000, "is nested too deeply"),
        ("#" * 2**17, "expected a recipe of a few lines"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        recipe_of(read_recipe(tmp_path / "recipe.yaml"))


def test_a_number_in_scientific_notation_is_a_number(tmp_path):
    (tmp_path / "recipe.yaml").write_text("train: {learning_rate: 1e-3, refusals: [No.], forget_loss: dpo}")
    train = recipe_of(read_recipe(tmp_path / "recipe.yaml")).train
    assert train.learning_rate == 1e-3
    assert train.refusals == ["No."]


STEPS = {"forget": "forget_training", "unlearn": "unlearn", "train": "train", "refine": "refine"}
JOBS_OWN = {  # options of the single commands that say which files they read and write, and how: the job knows
    "help", "adapter", "start_adapter", "html_report", "columns",
}  # fmt: skip


@pytest.mark.parametrize(("command", "section"), STEPS.items())
def test_every_option_of_a_step_has_its_place(command, section):
    options = {action.dest for action in command_parser(command)._actions} - JOBS_OWN
    places = {field.name for kind in (Request, SECTIONS[section]) for field in dataclasses.fields(kind)}
    assert options <= places


@pytest.mark.parametrize(("command", "section"), STEPS.items())
def test_a_section_has_the_defaults_of_its_command(command, section):
    defaults = {action.dest: action.default for action in command_parser(command)._actions}
    for field in dataclasses.fields(SECTIONS[section]):
        if defaults.get(field.name, argparse.SUPPRESS) is not argparse.SUPPRESS:
            assert field.default == defaults[field.name], field.name


# The method


def test_the_table_names_methods_of_compare_and_each_row_can_be_taken():
    kinds = [Known(prefer, knows, has) for prefer in PREFERENCES for knows in (True, False) for has in (True, False)]
    assert {recommend(known) for known in kinds} == set(RECOMMENDATIONS)
    assert all(METHODS[row.method].step is not None for row in RECOMMENDATIONS)


@pytest.mark.parametrize(
    ("known", "method"),
    [
        (Known("keep", False, False), "sago+directions"),
        (Known("keep", True, False), "rmu+directions"),
        (Known("time", False, False), "perta-grad"),
        (Known("robustness", False, False), "sago+attacker+directions"),
        (Known("keep", False, True), "perta-grad"),
    ],
)
def test_the_recommendation_is_that_of_the_measurements(known, method):
    assert recommend(known).method == method


def test_the_page_has_the_table():
    page = (Path(__file__).parents[1] / "docs/run.md").read_text()
    rows = re.findall(r"^\| (.*) \| `(.*)` \| (.*) \|$", page, re.MULTILINE)
    assert rows[-len(RECOMMENDATIONS) :] == [(row.when, row.method, row.because) for row in RECOMMENDATIONS]


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.step is not None])
def test_a_recipe_of_every_method_reads_back_as_itself(method, place):
    job = Job.of(values(method=method))
    again = yaml.safe_load(job.recipe.to_yaml())
    assert recipe_of(again) == job.recipe
    assert Job.of(again).recipe == job.recipe
    settings = {"train": job.recipe.train, "unlearn": job.recipe.unlearn}[METHODS[method].step]
    for name, value in METHODS[method].options.items():
        assert getattr(settings, name) == value


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "llmeraser"}, "method: expected 'auto' or one of "),
        ({"method": "negation", "train": {}}, "train: expected none with the method negation"),
        ({"method": "npo", "refine": {}}, "refine: expected none with the method npo"),
        ({"method": "npo", "forget_adapter": "task"}, "forget_adapter: expected none with the method npo"),
        ({"model": None}, "model: expected one, found none"),
        ({"method": "negation", "held_out": "retain.jsonl"}, "held_out: expected none with the method negation"),
        (
            {"method": "negation", "forget_adapter": "task", "report_to": "trackio"},
            "report_to: expected none with the method negation on a forget adapter",
        ),
        ({"report_to": "stdout"}, "the recipe: report_to: expected one of"),
    ],
)
def test_what_the_method_does_not_use_is_refused(more, message, place):
    with pytest.raises(ConfigError, match=message):
        Job.of(values(**more))


# The run


def test_run_from_end_to_end(place, offline, capsys):
    """Every step writes what the single command of that step writes, and the recipe as run makes all of it again."""
    assert main(["run", written(place, **REFINED)]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith("The goal was met.")
    sets = {"model": builders.llama_directory(), "forget": "forget.jsonl", "retain": "mine.jsonl"}
    (place / "mine.jsonl").write_text("\n".join(map(json.dumps, builders.retain_rows()[::2])))
    (place / "unseen.jsonl").write_text("\n".join(map(json.dumps, builders.retain_rows()[1::2])))
    train = "--forget-loss rmu --retain-loss embed-diff --retain-weight 30 --combiner sum --learning-rate 0.05"
    schedule = f"--epochs 2 --rank 2 --batch-size 2 --warmup-steps 0.05 {train}"
    target = json.loads((place / "out/before.json").read_text())["yardstick"]["forget"]
    for command, options in (
        ("train", {**sets, "task_adapter": "task", "output": "trained"}),
        ("refine", {**sets, "task_adapter": "task", "adapter": "trained", "output": "refined"}),
        (
            "extrapolate",
            {**sets, "retain": "unseen.jsonl", "task_adapter": "task", "adapter": "refined", "output": "adapter"}
            | {"target_forget_loss": target},
        ),
    ):
        more = schedule.split() if command == "train" else []
        assert main([command, *as_arguments(options), *more]) == 0
        assert files(place / "out" / options["output"]) == files(place / options["output"]), command
    assert main(["run", "out/recipe.yaml", "--output", "again"]) == 0
    unequal = ("job.json", "recipe.yaml", "report.html")  # they name the output
    first, second = files(place / "out"), files(place / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name] and name not in unequal] == []


def test_the_training_of_a_job_is_evaluated_on_rows_held_out_and_reports(place, offline, capsys):
    """It stops at the training's own tolerance, which those rows tell."""
    pytest.importorskip("tensorboardX")
    (place / "held.jsonl").write_text("\n".join(map(json.dumps, HELD_OUT)))
    stopping = {**REFINED, "train": {**REFINED["train"], "epochs": 20, "eval_steps": 1, "retain_tolerance": 0.05}}
    given = ["--held-out", "held.jsonl", "--report-to", "tensorboard"]
    assert main(["run", written(place, **stopping), *given]) in (0, 1)
    assert "out/trained.runs" in capsys.readouterr().out
    assert list((place / "out/trained.runs").glob("events.*"))
    made = json.loads((place / "out/trained/perta_provenance.json").read_text())["trained"]
    assert made["data"]["held-out"]["samples"] == len(HELD_OUT)
    rises = [point["retain"] - made["checks"][0]["retain"] for point in made["checks"]]
    assert max(rises[:-1]) <= 0.05 < rises[-1]


def test_rows_held_out_are_in_no_other_set(place, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    (place / "held.jsonl").write_text("\n".join(map(json.dumps, [*HELD_OUT, builders.retain_rows()[1]])))
    assert main(["run", written(place, held_out="held.jsonl")]) == 2
    assert "row 3 of the held-out set is also in the retain rows that judge" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_report_that_cannot_be_sent_is_refused_before_a_model_is_loaded(place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match="report_to: expected a reporter whose package is installed, found 'trackio'"):
        Job.of(values(report_to="trackio"))


@pytest.fixture(scope="module")
def finished(intact, tmp_path_factory):
    """A place where plain negation has met its goal."""
    place = tmp_path_factory.mktemp("finished") / "place"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shutil.copytree(intact, place))
        of_files = _judge.verify_adapter
        patch.setattr(_judge, "verify_adapter", lambda directory, base, *, revision: of_files(directory))
        assert main(["run", written(place, **NEGATION)]) == 0
    return place


@pytest.fixture
def done(finished, tmp_path, monkeypatch, offline):
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "done"))
    return tmp_path / "done"


def test_a_finished_job_loads_no_model_again(done, monkeypatch, capsys):
    before = files(done / "out")
    monkeypatch.setattr("peft_perta.job.run.load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["run", written(done, **NEGATION)]) == 0
    assert main(["run", "out/recipe.yaml"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 22
    assert said[10] == "The goal was met."
    assert files(done / "out") == before


def test_only_what_changed_is_made_again(done, capsys):
    before = files(done / "out")
    assert main(["run", written(done, **NEGATION, retain_tolerance=0.001)]) == 1
    said = capsys.readouterr().out
    assert "done already: before.json, forget_adapter, unlearned" in said
    assert "The goal was NOT met. kept: the loss on retain rows rose by" in said
    after = files(done / "out")
    assert all(after[name] == before[name] for name in before if name.startswith(("forget_adapter", "unlearned")))


def test_rows_in_the_output_are_refused(place, capsys):
    (place / "out").mkdir()
    (place / "out/job.json").write_text('{"steps": {}}')
    (place / "out/forget.jsonl").write_text((place / "forget.jsonl").read_text())
    assert main(["run", written(place, forget="out/forget.jsonl")]) == 2
    assert "out/forget.jsonl is in the output" in capsys.readouterr().err


def test_what_the_steps_of_another_recipe_left_is_removed(tmp_path):
    (tmp_path / "unlearned").mkdir()
    (tmp_path / "mine").mkdir()
    record = Record(tmp_path)
    record.end("unlearned", "a")
    record.keep_only(["trained"])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["job.json", "mine"]
    assert not Record(tmp_path).holds("unlearned", "a")


def test_a_step_whose_files_were_changed_is_made_again(done):
    before = files(done / "out")
    weights = done / "out/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert main(["run", written(done, **NEGATION)]) == 0
    assert files(done / "out") == before


def test_a_damaged_record_is_refused(place, capsys):
    (place / "out").mkdir()
    (place / "out/job.json").write_text('{"steps": {"adapter": 3}}')
    assert main(["run", written(place, **NEGATION)]) == 2
    assert "job.json is damaged" in capsys.readouterr().err


def test_a_goal_beyond_every_strength_takes_what_the_tolerance_allows(done, capsys):
    goal = {"target_forget_loss": 1e6, "retain_tolerance": 0.5}
    assert main(["run", written(done, **NEGATION | goal)]) == 1
    said = capsys.readouterr().out
    assert "The goal was NOT met. forgotten: the forget loss is" in said
    calibration = json.loads((done / "out/judged.json").read_text())["calibration"]
    assert calibration["goal"] == {"target_forget_loss": None, "retain_tolerance": 0.5}
    assert "kept: " not in said.splitlines()[-1]


def test_where_no_goal_can_be_met_the_adapter_stays_as_it_was_made(done, capsys):
    assert main(["run", written(done, **NEGATION, target_forget_loss=1e6)]) == 1
    assert "rank 8, as it was made" in capsys.readouterr().out
    assert json.loads((done / "out/judged.json").read_text())["calibration"] is None


def test_nothing_to_forget_is_told_before_training(place, monkeypatch, capsys):
    monkeypatch.setattr("peft_perta.job._steps.train_forget_adapter", lambda *_, **__: pytest.fail("it trained"))
    assert main(["run", written(place, **NEGATION, target_forget_loss=0.01)]) == 2
    assert "there is nothing to forget" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_row_in_both_sets_is_refused_before_anything_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    (place / "retain.jsonl").write_text((place / "forget.jsonl").read_text())
    assert main(["run", written(place, **NEGATION)]) == 2
    assert "is in the forget set" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    before = files(place)
    recipe = written(place)
    assert main(["run", recipe, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for step in ("before.json", "trained", "refined", "adapter", "judged.json", "verified.json"):
        assert f"-> {step}\n" in said
    assert "method: sago+directions" in said
    assert {name: digest for name, digest in files(place).items() if name != recipe} == before


def test_init_writes_a_recipe_that_does_the_same_job(place, capsys):
    given = ["--task-adapter", "task", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--output", "out"]
    model = ["--model", str(builders.llama_directory())]
    assert main(["run", "mine.yaml", "--init", *model, *given]) == 0
    text = (place / "mine.yaml").read_text()
    assert "# the base model: a name on the Hugging Face Hub" in text
    expected = Job.of({key: value for key, value in values().items() if key not in QUICK}).recipe
    assert recipe_of(read_recipe("mine.yaml")) == expected
    assert main(["run", "mine.yaml", "--init", *model, *given]) == 2
    assert "mine.yaml exists" in capsys.readouterr().err


def test_options_take_the_place_of_values(place, capsys):
    assert main(["run", written(place), "--seed", "7", "--method", "npo", "--dry-run"]) == 0
    assert "method: npo" in capsys.readouterr().out


# Rows to keep that nobody listed


def test_the_model_writes_the_rows_to_keep_first(place, offline, monkeypatch, capsys):
    """They are a step of the job: kept once they are written, and the same in the job that its recipe makes."""
    written_rows = builders.retain_rows()
    monkeypatch.setattr("peft_perta.job._steps.own_rows", lambda subject, forget, *, seed: written_rows)
    own = {"method": "negation", "forget_adapter": "task", "retain": "self"}
    assert main(["run", written(place, **own), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "rows: 5 to forget, the full model writes those to keep; planned as 5 to keep for the method" in said
    assert "retain set: 'self' stands for neighbouring things" in said
    assert "nothing guards what nobody listed" in said
    assert not (place / "out").exists()
    assert main(["run", written(place, **own)]) == 0
    said = capsys.readouterr().out
    assert "step 1 of 6: let the full model write the rows to keep" in said
    assert "kept         loss on neighbouring things, as the full model tells of them: rows that no method saw" in said
    assert [json.loads(line) for line in (place / "out/retain.jsonl").open()] == written_rows
    data = json.loads((place / "out/unlearned/perta_provenance.json").read_text())["data"]
    assert data["retain"]["samples"] == 2
    assert main(["run", "out/recipe.yaml", "--output", "again"]) == 0
    assert (place / "again/adapter/adapter_model.safetensors").read_bytes() == (
        place / "out/adapter/adapter_model.safetensors"
    ).read_bytes()
    monkeypatch.setattr("peft_perta.job._steps.own_rows", lambda *_, **__: pytest.fail("they were written again"))
    assert main(["run", written(place, **own, retain_tolerance=50.0)]) == 0
    assert "done already: retain.jsonl, before.json, unlearned\n" in capsys.readouterr().out


def test_general_rows_are_kept_by_name(place, capsys):
    assert main(["run", written(place, retain="default"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "rows: 5 to forget, 129 to keep for the method, 128 to keep that judge" in said
    assert "retain set: 'default' stands for general facts and passages of books" in said


def test_two_jobs_in_one_output_exclude_each_other(done, monkeypatch, capsys):
    """Also where they differ; the one that is refused computes nothing, and changes nothing."""
    before = files(done / "out")
    monkeypatch.setattr("peft_perta.job.run.load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    with claimed_directory(done / "out", "job.json", ""):
        assert main(["run", written(done, **NEGATION, retain_tolerance=0.001)]) == 2
    assert "out is in use by another process" in capsys.readouterr().err
    assert files(done / "out") == before


# In Python


def test_unlearn_on_a_model_in_memory(place, capsys):
    model, tokenizer = load_base(str(builders.llama_directory()), dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = unlearn(
        model, forget=builders.forget_rows(), retain="retain.jsonl", tokenizer=tokenizer, show_progress_bar=False,
        **QUICK, **{**NEGATION, "target_forget_loss": 7.0},
    )  # fmt: skip
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert result.missed == {}
    assert result.evaluation["unlearned"]["forget_loss"] > result.evaluation["full"]["forget_loss"]
    assert "The goal was met." in str(result)
    page = result._repr_html_()
    assert re.findall("<b>(.*?)</b>", page) == [*result.lines]
    assert html.escape(result.lines["forgotten"]) in page
    assert "peft-perta export DIR --base MODEL --output served --to FORMAT (gguf, " in result.summary
    assert tempfile.gettempdir() not in result.summary, "what is gone is not named"
    saved = result.save(place / "saved")
    assert main(["verify", str(saved)]) == 0
    assert (saved / "report.html").is_file()


def test_unlearn_lets_the_model_write_the_rows_to_keep(monkeypatch):
    model, tokenizer = load_base(str(builders.llama_directory()), dtype=torch.float32)
    seen = []

    def own_rows(subject, forget, *, seed):
        seen.append((subject.adapters, forget, seed))
        raise DataError("it wrote none")

    monkeypatch.setattr("peft_perta.job._steps.own_rows", own_rows)
    with pytest.raises(DataError, match="it wrote none"):
        unlearn(
            model, forget=builders.forget_rows(), retain="self", tokenizer=tokenizer, show_progress_bar=False, seed=3
        )
    assert seen == [([], builders.forget_rows(), 3)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output": "x"}, "output: expected none"),
        ({"modle": "x"}, "no key 'modle'"),
        ({"report_to": "tensorboard"}, "expected the environment variable TENSORBOARD_LOGGING_DIR"),
    ],
)
def test_unlearn_refuses_what_it_cannot_take(more, message):
    with pytest.raises(ConfigError, match=message):
        unlearn(None, forget=builders.forget_rows(), retain=builders.retain_rows(), tokenizer=None, **more)
