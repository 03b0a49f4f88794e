"""What a page is given: each number and each answer is that of the side whose name it bears."""

import builders
import pytest

from peft_perta.evaluation import generate, row_losses
from peft_perta.html_report import report_data_of_logs, report_data_of_rows

STACKS = {"before": ["task"], "after": ["task", "forget"]}
SETS = {"forget": builders.forget_rows(), "retain": builders.retain_rows()}


def test_rows_are_judged_and_answered_by_each_side_on_its_own():
    model, tokens = builders.adapted_llama(), builders.tokenizer()
    found = report_data_of_rows(
        model, tokens, SETS, STACKS, title="T", base_model="B", adapters=["task", "forget"], max_new_tokens=6
    )
    for split, rows in SETS.items():
        for label, stack in STACKS.items():
            losses = row_losses(model, tokens, rows, adapters=stack)
            assert found.models[label][f"{split}_loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
            assert found.models[label][f"{split}_Q_A_Prob"] == pytest.approx(float((-losses).exp().mean()), rel=1e-6)
        asked = [row for row in rows if "text" not in row]
        assert len(found.generations[split]) == len(asked) > 0
        for label, stack in STACKS.items():
            expected = generate(model, tokens, asked, adapters=stack, max_new_tokens=6)
            assert [shown[label] for shown in found.generations[split]] == expected
    assert found.models["before"] != found.models["after"]


def log(value: float, said: str) -> dict:
    row = {"input": "Who?", "ground_truth": "Khan", "generation": said, "rougeL_recall": value}
    return {
        "forget_Q_A_ROUGE": {"agg_value": value, "value_by_index": {"0": row, "1": None}},
        "forget_quality": {"agg_value": None},
    }


def test_logs_are_shown_under_their_side():
    sides = {"before": {"tofu": log(0.9, "Khan")}, "after": {"tofu": log(0.1, "Li")}, "retain-only": {}}
    found = report_data_of_logs(sides, title="T", base_model="B", commands=["peft-perta evaluate"])
    assert found.models == {"before": {"forget_Q_A_ROUGE": 0.9}, "after": {"forget_Q_A_ROUGE": 0.1}}
    assert found.generations == {"forget": [{"prompt": "Who?", "expected": "Khan", "before": "Khan", "after": "Li"}]}
    assert found.provenance is None


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": "Who?", "answer": "A"}, "Who?"),
        ({"prompt": "Say: ", "completion": "A"}, "Say: "),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "A"}]}, "Hi"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]}, "Hi"),
    ],
)
def test_what_a_row_asks_is_shown_as_plain_text(row, asked):
    model, tokens = builders.adapted_llama(), builders.tokenizer(chat=True)
    found = report_data_of_rows(
        model, tokens, {"forget": [row]}, {"after": ["task"]}, title="T", base_model="B", adapters=[], max_new_tokens=2
    )
    assert found.generations["forget"][0]["prompt"] == asked
