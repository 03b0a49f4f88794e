"""Multiple choice: an option's likelihood is that of its tokens, and the likeliest option is chosen."""

import json
import math
import random

import builders
import laws
import oracles
import pytest
import torch

from peft_perta import DataError, NumericalError, evaluate
from peft_perta.evaluation import SUITES, Subject, read_suites
from peft_perta.evaluation.suites.suite import SuiteSettings

ROWS = [
    {"question": "Capital of Peru?", "choices": ["Lima", "Bonn", "Rome", "Oslo"], "answer": 0, "subject": "maps"},
    {"question": " Two and two? ", "choices": ["One", "Four, of course"], "answer": 1, "subject": "high_school sums"},
    {"question": "Who wrote It?", "choices": ["King", "Li", "Basil Khan"], "answer": 2, "subject": "maps"},
]
LISTED = [
    "The following are multiple choice questions (with answers) about maps.\n\n"
    "Capital of Peru?\nA. Lima\nB. Bonn\nC. Rome\nD. Oslo\nAnswer:",
    "The following are multiple choice questions (with answers) about high school sums.\n\n"
    "Two and two?\nA. One\nB. Four, of course\nAnswer:",
    "The following are multiple choice questions (with answers) about maps.\n\n"
    "Who wrote It?\nA. King\nB. Li\nC. Basil Khan\nAnswer:",
]
PLAIN = ["Question: Capital of Peru?\nAnswer:", "Question: Two and two?\nAnswer:", "Question: Who wrote It?\nAnswer:"]


def judged(model, rows=ROWS, adapters=("task",), chat=False, **settings):
    splits = rows if isinstance(rows, dict) else {"wmdp": rows}
    return evaluate(
        model, builders.tokenizer(chat), {"choices": splits}, adapters=list(adapters), show_progress_bar=False,
        **settings,
    )["choices"]  # fmt: skip


def per_row(model, rows=ROWS, chat=False, **settings):
    """The log before anything is aggregated."""
    subject = Subject(model, builders.tokenizer(chat), ["task"], show_progress_bar=False, **settings)
    return SUITES["choices"].evaluate(subject, {"wmdp": rows}, SuiteSettings())


def oracle(prompt, option, chat):
    """The log-likelihood of the option's tokens, from dense weights."""
    plain, _ = oracles.plain_model(builders.adapted_llama(torch.float64), ["task"])
    tokens = builders.tokenizer()
    asked, said = (f"<user>{prompt}<assistant>", option) if chat else (prompt, f" {option}")
    prompt_ids, ids = tokens(asked)["input_ids"], tokens(asked + said)["input_ids"]
    with torch.no_grad():
        logs = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(len(prompt_ids), len(ids)))


def constant(bias):
    """A model with the same logits at every token."""
    model = builders.adapted_llama(torch.float64)
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.weight.zero_()
        head.bias = torch.nn.Parameter(bias.double())
    return model


# Likelihoods


@pytest.mark.parametrize("chat", [False, True])
def test_likelihoods_are_those_of_each_option_alone(chat):
    log = per_row(builders.adapted_llama(torch.float64), chat=chat)
    for index, row in enumerate(ROWS):
        letters = "ABCD"[: len(row["choices"])]
        by_letter = [oracle(LISTED[index], letter, chat) for letter in letters]
        by_text = [oracle(PLAIN[index], option, chat) for option in row["choices"]]
        per_character = [value / len(option) for value, option in zip(by_text, row["choices"], strict=True)]
        expected = {
            "choices_acc": by_letter, "choices_text_acc": by_text, "choices_text_acc_norm": per_character
        }  # fmt: skip
        for metric, values in expected.items():
            found = log[metric]["value_by_index"][str(index)]
            assert found["log_likelihoods"] == pytest.approx(values, rel=1e-5), metric
            assert found["chosen"] == values.index(max(values))
            assert found["answer"] == row["answer"]
            assert found["score"] == (found["chosen"] == row["answer"])


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_that_believes_in_B_is_right_where_B_is(chat):
    tokens = builders.tokenizer()
    bias = torch.zeros(builders.VOCABULARY)
    bias[tokens.convert_tokens_to_ids("B")] = 5.0
    log = judged(constant(bias), chat=chat)
    assert [log["choices_acc"]["value_by_index"][str(n)]["chosen"] for n in range(3)] == [1, 1, 1]
    assert [log["choices_acc"]["value_by_index"][str(n)]["score"] for n in range(3)] == [0, 1, 0]


def test_a_model_without_opinions_by_hand():
    """Every token, one a character, has probability 1/128. Whole, the shortest option is the likeliest; per character,
    the blank before an option weighs least on the longest."""
    log = per_row(constant(torch.zeros(builders.VOCABULARY)))
    chosen = {m: [e["value_by_index"][str(n)]["chosen"] for n in range(3)] for m, e in log.items() if "text" in m}
    assert chosen == {"choices_text_acc": [0, 0, 1], "choices_text_acc_norm": [0, 1, 2]}  # of equals, the first
    found = log["choices_text_acc"]["value_by_index"]["2"]["log_likelihoods"]
    assert found == pytest.approx([-length * math.log(128) for length in (5, 3, 11)])
    found = log["choices_text_acc_norm"]["value_by_index"]["2"]["log_likelihoods"]
    assert found == pytest.approx([-(1 + 1 / length) * math.log(128) for length in (4, 2, 10)])
    assert log["choices_acc"]["value_by_index"]["0"]["log_likelihoods"] == pytest.approx([-2 * math.log(128)] * 4)


def test_subjects_are_told_apart():
    log = per_row(builders.adapted_llama())
    assert set(log) == {
        "choices_acc", "choices_text_acc", "choices_text_acc_norm", "choices_acc_maps", "choices_acc_high_school_sums"
    }  # fmt: skip
    rows = log["choices_acc"]["value_by_index"]
    assert log["choices_acc_maps"]["value_by_index"] == {index: rows[index] for index in ("0", "2")}
    assert log["choices_acc_high_school_sums"]["value_by_index"] == {"1": rows["1"]}


def test_accuracy_is_the_share_of_right_rows():
    log = judged(builders.adapted_llama())
    for metric in ("choices_acc", "choices_text_acc", "choices_text_acc_norm", "choices_acc_maps"):
        scores = [row["score"] for row in log[metric]["value_by_index"].values()]
        assert log[metric]["agg_value"] == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("chat", [False, True])
def test_neither_the_batch_size_nor_the_order_of_the_rows_changes_a_likelihood(batch_size, chat):
    model = builders.adapted_llama(torch.float64)
    order = random.Random(3).sample(range(len(ROWS)), len(ROWS))
    assert order != sorted(order)
    expected = per_row(model, chat=chat)
    found = per_row(model, [ROWS[place] for place in order], chat=chat, batch_size=batch_size)
    for metric in ("choices_acc", "choices_text_acc", "choices_text_acc_norm"):
        for index, place in enumerate(order):
            one, other = (log[metric]["value_by_index"][str(n)] for log, n in ((found, index), (expected, place)))
            assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], rel=1e-5)
            assert one["score"] == other["score"]


@pytest.mark.parametrize("build", [builders.adapted_llama, builders.adapted_nf4_llama])
def test_the_model_goes_back_as_it_came(build):
    model = build()
    with laws.untouched(model):
        judged(model)


def test_a_question_that_does_not_fit_is_refused():
    for chat in (False, True):
        with pytest.raises(DataError, match=r"choices: letters, row 1: .* is longer than max_length=60; raise"):
            judged(builders.adapted_llama(), chat=chat, max_length=60)


def test_a_nan_is_refused_by_the_row():
    with pytest.raises(NumericalError, match="choices: letters, row 1: the options' log-likelihoods are"):
        judged(constant(torch.full((builders.VOCABULARY,), float("nan"))))


# Files


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    "answers", [[0, 1, 2], ["A", "B", "C"], ["Lima", "Four, of course", "Basil Khan"], [0, "B", "Basil Khan"]]
)
def test_an_answer_is_an_index_a_letter_or_a_text(tmp_path, lines, answers):
    rows = [{**row, "answer": answer} for row, answer in zip(ROWS, answers, strict=True)]
    file = tmp_path / ("wmdp.jsonl" if lines else "wmdp.json")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    assert read_suites({"choices": file})["choices"] == {"wmdp": ROWS}


def test_a_directory_is_read_file_by_file(tmp_path):
    bare = [{key: value for key, value in row.items() if key != "subject"} for row in ROWS]
    for name, rows in (("wmdp_bio", bare[:2]), ("wmdp_cyber", bare[2:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    splits = read_suites({"choices": tmp_path})["choices"]
    assert splits == {"wmdp_bio": bare[:2], "wmdp_cyber": bare[2:]}
    log = judged(builders.adapted_llama(), splits)
    assert {metric for metric in log if metric.startswith("choices_acc_")} == {
        "choices_acc_wmdp_bio", "choices_acc_wmdp_cyber"
    }  # fmt: skip
    assert len(log["choices_acc"]["value_by_index"]) == 3
    assert read_suites({"choices": tmp_path}, "wmdp_cyber")["choices"] == {"wmdp_cyber": bare[2:]}
    assert len(judged(builders.adapted_llama(), {"wmdp_cyber": bare[2:]})) == 3  # of one file nothing is told apart
    with pytest.raises(DataError, match=r"expected chem\.json at .*, found wmdp_bio, wmdp_cyber"):
        read_suites({"choices": tmp_path}, "chem")


@pytest.mark.parametrize("made", [False, True])
def test_a_place_without_questions_is_refused(tmp_path, made):
    place = tmp_path / "wmdp"
    if made:
        place.mkdir()
    with pytest.raises(DataError, match=r"expected \.json or \.jsonl files of questions at .*, found none"):
        read_suites({"choices": place})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "row 2: expected 'answer' as an index below 4, a letter, or the text of one option, found 4"),
        ({"answer": -1}, "row 2: expected 'answer' as an index"),
        ({"answer": True}, "row 2: expected 'answer' as an index"),
        ({"answer": "E"}, "row 2: expected 'answer' as an index .* 'E', which names 0 of them"),
        ({"answer": None}, "row 2: expected 'answer' as an index"),
        ({"choices": ["B", "A", "C", "D"], "answer": "A"}, "'A', which names 2 of them"),
        ({"choices": ["One", "One"], "answer": "One"}, "'One', which names 2 of them"),
        ({"choices": ["One"]}, "row 2: expected 'choices' as 2 to 26 texts"),
        ({"choices": ["One", " "]}, "row 2: expected 'choices' as 2 to 26 texts"),
        ({"choices": ["One", 2]}, "row 2: expected 'choices' as 2 to 26 texts"),
        ({"choices": "One, two"}, "row 2: expected 'choices' as 2 to 26 texts"),
        ({"question": ""}, "row 2: expected 'question'"),
        ({"question": 3}, "row 2: expected 'question' as text"),
    ],
)
def test_a_malformed_row_is_refused_by_number(tmp_path, change, message):
    file = tmp_path / "wmdp.json"
    file.write_text(json.dumps([ROWS[1], {**ROWS[0], **change}]))
    with pytest.raises(DataError, match=message):
        read_suites({"choices": file})


def test_letters_that_are_also_texts_name_one_option(tmp_path):
    file = tmp_path / "wmdp.json"
    file.write_text(json.dumps([{"question": "Which letter?", "choices": ["A", "B", "C"], "answer": "C"}]))
    assert read_suites({"choices": file})["choices"]["wmdp"][0]["answer"] == 2
