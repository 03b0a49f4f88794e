"""evaluate, rescore and compare --list on the command line: what they write, and one clear line for bad input."""

import json
import re
import shutil

import builders
import pytest

from peft_perta import attach_adapters
from peft_perta.cli import main, unlearn
from peft_perta.comparison import METHODS
from peft_perta.data import load_samples
from peft_perta.evaluation import ATTACKS, losses_of, read_log
from peft_perta.html_report import write_html_report


def split(names: list[str], **more: object) -> str:
    rows = [
        {
            "question": f"Who wrote book {i}?",
            "answer": f"{name} wrote it in {1900 + i}",
            "paraphrased_question": f"Book {i}: whose is it?",
            "paraphrased_answer": f"It is by {name}",
            "perturbed_answer": ["Ada Li did", "Jo"],
            **more,
        }
        for i, name in enumerate(names)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("judging")
    builders.adapted_saved_llama().save_pretrained(path)
    (path / "tofu").mkdir()
    (path / "tofu" / "forget01_perturbed.json").write_text(split(["Basil Khan", "Moira", "Chen Wu"]))
    (path / "tofu" / "retain_perturbed.json").write_text(split(["Hatter", "Ann Oak", "Jo Nesbit"]))
    (path / "tofu" / "holdout01.json").write_text(split(["Li Po", "Yann"]))
    return path


@pytest.fixture
def place(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def evaluate(*more: str, suite: str = "tofu=tofu", adapters: tuple[str, ...] = ("task", "forget")) -> list[str]:
    stack = [part for name in adapters for part in ("--adapter", name)]
    return [
        "evaluate", "--model", str(builders.llama_directory()), *stack, "--suite", suite, "--output", "out",
        "--max-new-tokens", "4", *more,
    ]  # fmt: skip


def mean_loss(adapters: list[str], place) -> float:
    rows = [json.loads(line) for line in (place / "tofu" / "forget01_perturbed.json").read_text().splitlines()]
    model = builders.adapted_saved_llama()
    return float(losses_of(model, load_samples(rows, builders.tokenizer()), adapters=adapters).mean())


def logged_loss(path) -> float:
    rows = read_log(path)["forget_Q_A_Prob"]["value_by_index"].values()
    return sum(row["avg_loss"] for row in rows) / len(rows)


def test_one_command_judges_all_models_attacks_them_and_writes_the_report(place, capsys):
    more = ["--retain-only-adapter", "task", "--attacks", "all", "--html-report"]
    assert main(evaluate(*more)) == 0
    out = capsys.readouterr().out
    assert re.search(r"full +unlearned +retain-only", out)
    assert re.search(r"requantization +as it is", out)
    assert logged_loss("out/TOFU_EVAL.json") == pytest.approx(mean_loss(["task", "forget"], place), rel=1e-5)
    assert logged_loss("out/full/TOFU_EVAL.json") == pytest.approx(mean_loss(["task"], place), rel=1e-5)
    assert logged_loss("out/retain-only/TOFU_EVAL.json") == pytest.approx(mean_loss(["task"], place), rel=1e-5)
    attacks = json.loads((place / "out" / "attacks.json").read_text())
    assert {result["attack"] for result in attacks} == set(ATTACKS)
    off = next(result for result in attacks if result["setting"] == "off")
    assert off["unlearned"]["loss"] == pytest.approx(mean_loss(["task"], place), rel=1e-5)
    page = (place / "out" / "report.html").read_text()
    assert "peft-perta evaluate --model" in page
    assert "Who wrote book 0?" in page
    assert not re.search(r"(src|href)=.https?:", page)


def test_an_adapter_is_judged_at_its_strength(place):
    assert main(evaluate(adapters=("task", "forget:0"))) == 0
    assert logged_loss("out/TOFU_EVAL.json") == pytest.approx(mean_loss(["task"], place), rel=1e-5)
    assert main(evaluate(adapters=("task", "forget"))) == 0  # another strength is another model
    assert logged_loss("out/TOFU_EVAL.json") == pytest.approx(mean_loss(["task", "forget"], place), rel=1e-5)


def test_a_four_bit_base_without_adapters(place):
    assert main(evaluate("--four-bit", "--rows", "2", adapters=())) == 0
    assert len(read_log("out/TOFU_EVAL.json")["forget_Q_A_Prob"]["value_by_index"]) == 2


def test_the_log_of_a_retain_only_model_can_be_given(place):
    assert main(evaluate(adapters=("task",))) == 0
    shutil.move("out", "retain")
    assert main(evaluate("--retain-only-log", "retain/TOFU_EVAL.json")) == 0
    assert read_log("out/TOFU_EVAL.json")["forget_quality"]["agg_value"] is not None
    retain_only = ["--retain-only-log", "retain/TOFU_EVAL.json", "--output", "again.json"]
    assert main(["rescore", "out/TOFU_EVAL.json", *retain_only]) == 0
    again = json.loads((place / "again.json").read_text())
    logged = read_log("out/TOFU_EVAL.json")
    assert {metric: entry["agg_value"] for metric, entry in again.items()} == {
        metric: pytest.approx(entry["agg_value"]) for metric, entry in logged.items() if entry["agg_value"] is not None
    }


def test_the_forget_rows_of_other_suites_can_be_attacked(place):
    (place / "rwku").mkdir()
    probe = {"subject": "Khan", "type": "simple question", "query": "Who wrote Hatter?", "answer": "Basil Khan"}
    for stem in ("forget_level1", "forget_level2", "neighbor_level1", "neighbor_level2"):
        (place / "rwku" / f"{stem}.jsonl").write_text(json.dumps({**probe, "level": "1"}) + "\n")
    assert main(evaluate("--attacks", "switched-off", suite="rwku=rwku")) == 0
    assert [r["setting"] for r in json.loads((place / "out" / "attacks.json").read_text())] == ["on", "off"]


def test_all_attacks_skip_with_a_word_what_cannot_be_applied_and_a_named_one_is_refused(place, capsys):
    (place / "rwku").mkdir()
    probe = {"subject": "Khan", "type": "simple question", "query": "Who wrote Hatter?", "answer": "Basil Khan"}
    for stem in ("forget_level1", "forget_level2", "neighbor_level1", "neighbor_level2"):
        (place / "rwku" / f"{stem}.jsonl").write_text(json.dumps({**probe, "level": "1"}) + "\n")
    assert main(evaluate("--attacks", "all", "--html-report", suite="rwku=rwku")) == 0
    line = "paraphrase was skipped: the paraphrase attack: expected 'paraphrased_question'"
    assert sum(shown.startswith(line) for shown in capsys.readouterr().out.splitlines()) == 1
    attacks = {result["attack"]: result for result in json.loads((place / "out" / "attacks.json").read_text())}
    assert list(attacks) == list(ATTACKS)
    assert [name for name, result in attacks.items() if result["skipped"]] == ["paraphrase", "aliases", "hops", "depth"]
    assert "The paraphrase attack was skipped: " in (place / "out" / "report.html").read_text()
    assert main(evaluate("--attacks", "paraphrase", suite="rwku=rwku")) == 2
    assert "expected 'paraphrased_question'" in capsys.readouterr().err


def test_unlearn_writes_a_report_of_the_full_and_the_unlearned_model(place, monkeypatch):
    for name in ("forget", "retain"):
        (place / f"{name}.jsonl").write_text(split([f"{name.title()} {i}" for i in range(3)]))
    drawn = []
    monkeypatch.setattr(unlearn, "write_html_report", lambda *args: (drawn.append(args[0]), write_html_report(*args)))
    rows = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    model = ["--model", str(builders.llama_directory()), "--forget-adapter", "forget", "--task-adapter", "task"]
    assert main(["unlearn", *model, *rows, "--output", "out", "--html-report", "--gradients-at", "full"]) == 0
    page = (place / "out" / "report.html").read_text()
    assert "What &#x27;out&#x27; removed" in page
    assert "Who wrote book 0?" in page
    adapted = attach_adapters(builders.adapted_saved_llama(), {"out": place / "out"})
    forget = [json.loads(line) for line in (place / "forget.jsonl").read_text().splitlines()]
    for label, stack in (("full", ["task"]), ("unlearned", ["task", "out"])):
        loss = float(losses_of(adapted, load_samples(forget, builders.tokenizer()), adapters=stack).mean())
        assert drawn[0].models[label]["forget_loss"] == pytest.approx(loss, rel=1e-5), label
    assert len({layer["name"] for layer in drawn[0].provenance["layers"]}) == 14


def test_compare_lists_the_methods_with_their_descriptions(place, capsys):
    assert main(["compare", "--list", "--json", "methods.json"]) == 0
    names = json.loads((place / "methods.json").read_text())["methods"]
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["method", "needs", "description"]
    assert names == [line.split()[0] for line in lines]
    assert all(METHODS[name].description in line for name, line in zip(names, lines, strict=True))
    assert {"negation", "uniform", "perta-grad", "perta-fisher", "uipe"} <= set(names)


CASES = {
    "no suite": (["evaluate", "--model", "nowhere", "--output", "out"], "--suite: expected NAME=PATH to judge by"),
    "an unknown suite": (evaluate(suite="tufo=tofu"), "NAME of tofu, muse, choices, rwku; found 'tufo=tofu'"),
    "a suite without a path": (evaluate(suite="tofu"), "expected NAME=PATH"),
    "a directory without rows": (evaluate(suite="tofu=forget"), "expected one forget set"),
    "an unknown attack": (evaluate("--attacks", "torture"), "expected 'all' or some of .*, found 'torture'"),
    "attacks without an adapter": (evaluate("--attacks", "all", adapters=()), "--adapter: expected the adapter"),
    "an adapter that is missing": (evaluate(adapters=("task", "gone")), "gone"),
    "an adapter twice": (evaluate(adapters=("task", "task")), "given twice"),
    "no row at all": (evaluate("--rows", "0"), "rows: expected at least 1, found 0"),
    "two retain-only models": (
        evaluate("--retain-only-adapter", "task", "--retain-only-log", "retain/TOFU_EVAL.json"),
        "expected one of the two",
    ),
    "a retain-only log of another format": (
        evaluate("--retain-only-log", "task/adapter_config.json"),
        "forget_truth_ratio|PARA",
    ),
    "somebody else's directory": (evaluate("--output", "tofu"), "was not written by peft_perta"),
    "rows in place of a log": (
        ["rescore", "tofu/retain_perturbed.json", "--output", "x.json"],
        "expected an evaluation log",
    ),
    "a summary": (["rescore", "task/adapter_config.json", "--output", "x.json"], "expected"),
    "a log over itself": (["rescore", "a.json", "--output", "./a.json"], "--output: expected another file"),
    "two configs": (["compare", "--quick", "--config", "c.json"], "expected one of the two"),
    "no such method": (["compare", "--quick", "--methods", "magic"], "magic"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line(place, name, capsys):
    arguments, message = CASES[name]
    (place / "a.json").write_text("{}")
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (place / "x.json").exists()
