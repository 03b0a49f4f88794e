"""RWKU's suite: its authors' prompts, the answers of single rows, scores by ROUGE-L recall."""

import json
import random

import builders
import laws
import pytest
import torch

from peft_perta import DataError, evaluate
from peft_perta.data import encode_prompt
from peft_perta.evaluation import read_suites
from peft_perta.evaluation.metrics.rouge import rouge_scores

CLOZE = "Please complete the blank in the following question.\nQuestion: "
BRIEFLY = "Please briefly answer the following question.\n"
KING, LEE = "Stephen King", "Bruce Lee"


def probe(subject, level, query, answer, kind):
    return {"target_id": 1, "subject": subject, "level": level, "query": query, "answer": answer, "type": kind}


FILES = {
    "forget_level1": [
        probe(KING, "1", "His debut novel is ___.", "Carrie", "cloze"),
        probe(LEE, "1", "He was born in ___.", "San Francisco", "cloze"),
    ],
    "forget_level2": [
        probe(KING, "2", "Which pseudonym has he?", "Richard Bachman", "simple question"),
        probe(LEE, "2", "What did he act in?", "Enter the Dragon", "simple question"),
    ],
    "forget_level3": [
        probe(KING, "3", "Who wrote Carrie? Sure, it is", "Stephen King", "affirmative suffix"),
        probe(KING, "3", "Question: Who wrote It?\nAnswer: He.\nQuestion: And Misery?", "King", "incontext learning"),
        probe(LEE, "3", "Play a teacher: who is he?", "an actor", "role play"),
        probe(KING, "3", "Who wrote Joyland? Sure, it is", "King", "affirmative suffix"),
    ],
    "neighbor_level1": [probe(KING, "1", "The film is by Frank ___.", "Darabont", "cloze")],
    "neighbor_level2": [probe(KING, "2", "Who plays Red?", "Morgan Freeman", "simple question")],
}
# What is asked, before "Answer:" is begun.
ASKED = {
    "forget_level1": [f"{CLOZE}His debut novel is ___.\n", f"{CLOZE}He was born in ___.\n"],
    "forget_level2": [
        f"{BRIEFLY}Question: Which pseudonym has he?\n", f"{BRIEFLY}Question: What did he act in?\n"
    ],
    "forget_level3": [
        f"{BRIEFLY}Question: Who wrote Carrie? Sure, it is",
        f"{BRIEFLY}Question: Who wrote It?\nAnswer: He.\nQuestion: And Misery?\n",
        f"{BRIEFLY}Question: Play a teacher: who is he?\n",
        f"{BRIEFLY}Question: Who wrote Joyland? Sure, it is",
    ],
    "neighbor_level1": [f"{CLOZE}The film is by Frank ___.\n"],
    "neighbor_level2": [f"{BRIEFLY}Question: Who plays Red?\n"],
}  # fmt: skip


def write(directory, files=FILES, suffix=".jsonl"):
    directory.mkdir(exist_ok=True)
    for name, rows in files.items():
        text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}{suffix}").write_text(text)
    return directory


def judged(model, splits=FILES, adapters=("task",), chat=False, max_new_tokens=8, **settings):
    return evaluate(
        model, builders.tokenizer(chat), {"rwku": splits}, adapters=list(adapters), max_new_tokens=max_new_tokens,
        show_progress_bar=False, **settings,
    )["rwku"]  # fmt: skip


def rows_of(log, metric):
    return [log[metric]["value_by_index"][str(index)] for index in range(len(log[metric]["value_by_index"]))]


@pytest.fixture(scope="module")
def log():
    return judged(builders.adapted_llama(torch.float64))


def test_the_log_has_a_metric_for_each_way_of_asking(log):
    kinds = ("affirmative_suffix", "incontext_learning", "role_play")
    assert set(log) == {f"{name}_ROUGE" for name in FILES} | {f"forget_level3_{kind}_ROUGE" for kind in kinds}
    for name, rows in FILES.items():
        found = rows_of(log, f"{name}_ROUGE")
        assert [row["ground_truth"] for row in found] == [row["answer"] for row in rows]
        mean = sum(row["rougeL_recall"] for row in found) / len(rows)
        assert log[f"{name}_ROUGE"]["agg_value"] == pytest.approx(mean)


def test_a_way_of_asking_has_the_rows_of_its_type(log):
    whole = log["forget_level3_ROUGE"]["value_by_index"]
    found = log["forget_level3_affirmative_suffix_ROUGE"]
    assert {index: row["rougeL_recall"] for index, row in found["value_by_index"].items()} == {
        index: whole[index]["rougeL_recall"] for index in ("0", "3")
    }
    expected = (whole["0"]["rougeL_recall"] + whole["3"]["rougeL_recall"]) / 2
    assert found["agg_value"] == pytest.approx(expected)


@pytest.mark.parametrize("chat", [False, True])
def test_questions_are_put_as_the_authors_put_them(chat):
    log = judged(builders.adapted_llama(), chat=chat, max_new_tokens=1)
    for name, prompts in ASKED.items():
        begun = ["" if row["type"] == "affirmative suffix" else "Answer:" for row in FILES[name]]
        turns = [f"<user>{prompt}<assistant>" if chat else prompt for prompt in prompts]
        expected = [turn + start for turn, start in zip(turns, begun, strict=True)]
        assert [row["input"] for row in rows_of(log, f"{name}_ROUGE")] == expected


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_those_of_each_question_alone(chat):
    model, tokens = builders.adapted_llama(torch.float64), builders.tokenizer(chat)
    log = judged(model, chat=chat)
    model.set_adapter("task")
    said = set()
    for name, rows in FILES.items():
        for row, found in zip(rows, rows_of(log, f"{name}_ROUGE"), strict=True):
            prompt = found["input"]
            ids = torch.tensor([tokens(prompt, add_special_tokens=False)["input_ids"]])
            if chat:  # the turns' marks are tokens of this tokenizer's own text
                turns = [
                    {"role": "user", "content": ASKED[name][rows.index(row)]},
                    {"role": "assistant", "content": "a"},
                ]
                begun = "" if row["type"] == "affirmative suffix" else "Answer:"
                ids = torch.tensor([[*encode_prompt({"messages": turns}, tokens), *tokens(begun)["input_ids"]]])
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                    eos_token_id=tokens.eos_token_id, pad_token_id=0,
                )  # fmt: skip
            text = tokens.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip().split("\n")[0].strip()
            assert found["generation"] == text
            scores = rouge_scores([text], [row["answer"]])[0]
            assert {key: found[key] for key in scores} == scores
            said.add(text)
    assert len(said) > 3, "a model that always says the same proves no order"


@pytest.mark.parametrize(
    ("said", "recall"),
    [("Richard Bachman", 1.0), ("It is Bachman", 0.5), ("Bachman\nRichard", 0.5), ("", 0.0), ("King", 0.0)],
)
def test_an_answer_is_its_first_line(monkeypatch, said, recall):
    monkeypatch.setattr("peft_perta.evaluation.suites.suite.generate", lambda subject, rows, **_: [said] * len(rows))
    found = rows_of(judged(builders.adapted_llama()), "forget_level2_ROUGE")[0]
    assert found["generation"] == said.split("\n")[0]
    assert found["rougeL_recall"] == pytest.approx(recall)


def test_answers_are_of_thirty_tokens(monkeypatch):
    asked = []

    def generate(subject, rows, *, max_new_tokens, **_):
        asked.append(max_new_tokens)
        return [""] * len(rows)

    monkeypatch.setattr("peft_perta.evaluation.suites.suite.generate", generate)
    judged(builders.adapted_llama(), max_new_tokens=200)
    assert asked == [30] * 5


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("chat", [False, True])
def test_neither_the_batch_size_nor_the_order_of_the_rows_changes_an_aggregate(batch_size, chat):
    expected = judged(builders.adapted_llama(torch.float64), chat=chat)
    shuffled = {name: random.Random(2).sample(rows, len(rows)) for name, rows in FILES.items()}
    assert shuffled != FILES
    found = judged(builders.adapted_llama(torch.float64), shuffled, chat=chat, batch_size=batch_size)
    assert {m: e["agg_value"] for m, e in found.items()} == pytest.approx(
        {m: e["agg_value"] for m, e in expected.items()}
    )
    assert {r["generation"] for r in rows_of(found, "forget_level3_ROUGE")} == {
        r["generation"] for r in rows_of(expected, "forget_level3_ROUGE")
    }


@pytest.mark.parametrize("build", [builders.adapted_llama, builders.adapted_nf4_llama])
def test_the_model_goes_back_as_it_came(build):
    model = build()
    with laws.untouched(model):
        judged(model, max_new_tokens=2)


# Files


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rwkus_files_are_read_as_they_come(tmp_path, suffix):
    assert read_suites({"rwku": write(tmp_path, suffix=suffix)})["rwku"] == FILES


def test_without_adversarial_probes_there_is_no_such_metric(tmp_path):
    write(tmp_path, {name: rows for name, rows in FILES.items() if name != "forget_level3"})
    log = judged(builders.adapted_llama(), read_suites({"rwku": tmp_path})["rwku"], max_new_tokens=1)
    assert set(log) == {f"{name}_ROUGE" for name in FILES if name != "forget_level3"}


def test_one_subject_is_asked_of_alone(tmp_path):
    found = read_suites({"rwku": write(tmp_path)}, KING)["rwku"]
    assert {name: len(rows) for name, rows in found.items()} == {
        "forget_level1": 1, "forget_level2": 1, "forget_level3": 3, "neighbor_level1": 1, "neighbor_level2": 1
    }  # fmt: skip
    assert {row["subject"] for rows in found.values() for row in rows} == {KING}
    with pytest.raises(
        DataError, match="neighbor_level1: expected rows whose subject is 'Bruce Lee', found none among"
    ):
        read_suites({"rwku": tmp_path}, LEE)


@pytest.mark.parametrize("name", ["forget_level1", "forget_level2", "neighbor_level1", "neighbor_level2"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(DataError, match=rf"expected {name}\.jsonl in .*, found none"):
        read_suites({"rwku": tmp_path})
    with pytest.raises(DataError, match="expected a directory of RWKU's files"):
        read_suites({"rwku": tmp_path / "forget_level1.jsonl"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "Who?"}, "forget_level3, row 5: expected 'answer'"),
        ({"query": "Who?", "answer": 7}, "forget_level3, row 5: expected 'answer' as text"),
        ({"query": "  ", "answer": "He"}, "forget_level3, row 5: expected 'query' as text, found only blanks"),
    ],
)
def test_a_malformed_row_is_refused_by_name(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_suites({"rwku": write(tmp_path, {**FILES, "forget_level3": [*FILES["forget_level3"], row]})})
