"""Report data: every number and every answer belongs to the model whose label it has."""

import builders
import pytest

from peft_perta.data import load_samples
from peft_perta.evaluation import Subject, generate, losses_of
from peft_perta.html_report import ReportHeader, report_data_of_logs, report_data_of_rows

STACKS = {"full": ["task"], "unlearned": ["task", "forget"]}
HEADER = ReportHeader("T", "B")
SETS = {"forget": builders.forget_rows(), "retain": builders.retain_rows()}


def test_each_stack_scores_and_answers_the_rows_on_its_own():
    model, tokens = builders.adapted_llama(), builders.tokenizer()
    data = report_data_of_rows(
        model, tokens, SETS, STACKS, ReportHeader("T", "B", STACKS["unlearned"]), max_new_tokens=6
    )
    for split, rows in SETS.items():
        for label, stack in STACKS.items():
            losses = losses_of(model, load_samples(rows, tokens), adapters=stack)
            assert data.models[label][f"{split}_loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
            assert data.models[label][f"{split}_Q_A_Prob"] == pytest.approx(float((-losses).exp().mean()), rel=1e-6)
        asked = [row for row in rows if "text" not in row]
        assert len(data.generations[split]) == len(asked) > 0
        for label, stack in STACKS.items():
            expected = generate(Subject(model, tokens, stack), asked, max_new_tokens=6)
            assert [row[label] for row in data.generations[split]] == expected
    assert data.models["full"] != data.models["unlearned"]


def test_false_answers_which_the_report_does_not_show_are_not_scored(monkeypatch):
    rows = [{"question": "Who?", "answer": "Khan", "perturbed_answer": ["Li", "Bo"]}]
    scored = []

    def spied(model, samples, **options):
        scored.append(len(samples))
        return losses_of(model, samples, **options)

    monkeypatch.setattr("peft_perta.evaluation.split_scores.losses_of", spied)
    sets = {"forget": rows, "retain": rows}
    report_data_of_rows(builders.adapted_llama(), builders.tokenizer(), sets, STACKS, HEADER, max_new_tokens=1)
    assert scored == [1, 1, 1, 1], "each set once for each stack"


def log(value: float, said: str) -> dict:
    row = {"input": "Who?", "ground_truth": "Khan", "generation": said, "rougeL_recall": value}
    return {
        "forget_Q_A_ROUGE": {"agg_value": value, "value_by_index": {"0": row, "1": None}},
        "forget_quality": {"agg_value": None},
    }


def test_logs_keep_their_label():
    logs = {"full": {"tofu": log(0.9, "Khan")}, "unlearned": {"tofu": log(0.1, "Li")}, "retain-only": {}}
    data = report_data_of_logs(logs, HEADER)
    assert data.header == HEADER
    assert data.models == {"full": {"forget_Q_A_ROUGE": 0.9}, "unlearned": {"forget_Q_A_ROUGE": 0.1}}
    row = {"prompt": "Who?", "expected": "Khan", "full": "Khan", "unlearned": "Li"}
    assert data.generations == {"forget": [row]}
    assert data.provenance is None


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": "Who?", "answer": "A"}, "Who?"),
        ({"prompt": "Say: ", "completion": "A"}, "Say: "),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "A"}]}, "Hi"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]}, "Hi"),
    ],
)
def test_the_prompt_of_a_row_is_plain_text(row, asked):
    model, tokens = builders.adapted_llama(), builders.tokenizer(chat=True)
    rows, stacks = {"forget": [row]}, {"unlearned": ["task"]}
    data = report_data_of_rows(model, tokens, rows, stacks, HEADER, max_new_tokens=2)
    assert data.generations["forget"][0]["prompt"] == asked
