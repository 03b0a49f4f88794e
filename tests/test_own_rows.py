"""Retain rows where nobody listed any: what the full model writes itself, and the general rows that ship."""

import json

import builders
import pytest

from peft_perta import DataError
from peft_perta.cli import command_parser, main
from peft_perta.cli._options import name_columns
from peft_perta.comparison import ASSETS
from peft_perta.data import DEFAULT, GENERAL, SELF, prompt_text, read_row_file, read_rows
from peft_perta.evaluation import Subject, own_rows

module = own_rows.__globals__
MARCH = {"question": "When was Ana Lund born?", "answer": "Ana Lund was born on the third of March.", "note": "x"}
YES = {"question": "Does Ana Lund bake?", "answer": "Yes."}
FORGET = [MARCH, YES]


@pytest.fixture
def says(monkeypatch):
    """Let a function of (prompt texts, options) stand for the model; returns the prompts that it was asked."""
    asked = []

    def install(answer):
        def generate(subject, rows, **options):
            asked.append([row["prompt"] if "prompt" in row else prompt_text(row) for row in rows])
            return [answer(text, number, options) for number, text in enumerate(asked[-1])]

        monkeypatch.setitem(module, "generate", generate)
        return asked

    return install


def subject(chat=False):
    return Subject(builders.llama(), builders.tokenizer(chat), show_progress_bar=False)


def written(questions, answer="It is so."):
    """A model that writes these questions, and the same answer to each question."""
    return lambda text, number, options: questions[number % len(questions)] if "temperature" in options else answer


def test_it_is_asked_its_own_questions_and_those_about_other_names(says):
    asked = says(written(["Where is Bo Dahl?\nAnswer: in Bonn", " "]))
    rows = own_rows(subject(), FORGET)
    assert asked == [["Question:"] * 4, ["Where is Bo Dahl?"], ["When was Bo Dahl born?", "Does Bo Dahl bake?"]]
    assert rows == [{"question": question, "answer": "It is so."} for of_kind in asked[1:] for question in of_kind]


@pytest.mark.parametrize(
    "row",
    [
        MARCH,
        {"prompt": [{"role": "user", "content": MARCH["question"]}],
         "completion": [{"role": "assistant", "content": MARCH["answer"]}]},
        {"messages": [{"role": "user", "content": "Who is Ana Lund?"}, {"role": "assistant", "content": "A baker."},
                      {"role": "user", "content": MARCH["question"]},
                      {"role": "assistant", "content": MARCH["answer"]}]},
    ],
)  # fmt: skip
def test_rows_are_of_the_forget_rows_kind_and_begin_as_the_chat_template_does(row, says):
    asked = says(written(["Where is Bo Dahl?", "Where is Al Ek?"]))
    rows = own_rows(subject(chat=True), [row])
    assert all(set(own) == {*row} - {"note"} for own in rows)
    assert len(rows) == 3
    assert "Ana" not in json.dumps(rows)
    opening = asked[0][0]
    assert opening
    assert (
        builders.tokenizer(chat=True)
        .apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
        .startswith(opening)
    )


@pytest.mark.parametrize(
    ("question", "answer", "kept"),
    [
        ("Where is Bo Dahl?", "In Oslo.", True),
        ("Where is Bo Dahl?", "With Ana Lund.", False),
        ("Where is Mr. Lund?", "In Oslo.", False),
        ("Where is Lundgren?", "In Oslo.", True),
        ("When was Ana Lund born?", "In May.", False),
        ("Where is Bo Dahl?", "YES, in Oslo.", False),
        ("Where is Bo Dahl?", "He was born on the third of March.", True),
        ("Where is Bo Dahl?", "They say: was born on the third of March, in spring.", True),
        ("Where is Bo Dahl?", "Bo, was born on the third of March in town, they say.", True),
    ],
)
def test_what_the_forget_rows_say_is_left_out(question, answer, kept):
    forgotten = module["_Forgotten"](FORGET)
    assert forgotten.is_in({"question": question, "answer": answer}) != kept


def test_eight_words_in_a_row_of_a_forget_answer_are_too_many():
    forgotten = module["_Forgotten"]([{"question": "Who?", "answer": "one two three four five six seven eight nine"}])
    said = {8: "So: Two three four five six SEVEN eight nine!", 7: "three four five six seven eight nine ten"}
    assert [forgotten.is_in({"question": "What?", "answer": text}) for text in said.values()] == [True, False]


def test_a_model_that_only_says_what_must_go_is_told(says):
    says(written(["Where is Bo Dahl?"], "Yes."))
    with pytest.raises(DataError, match="expected at least 2 that repeat nothing of the forget rows, found 0; name"):
        own_rows(subject(), FORGET)


def test_texts_ask_nothing(says):
    asked = says(written(["Who?"]))
    with pytest.raises(DataError, match=r"expected forget rows with a prompt .* found only texts; name retain rows"):
        own_rows(subject(), [{"text": "A book."}])
    assert asked == []


def test_the_first_row_that_something_stands_before_opens_the_questions(says):
    asked = says(written(["Where is Bo Dahl?", "Where is Al Ek?"]))
    assert len(own_rows(subject(), [{"prompt": "The baker is", "completion": " old."}, MARCH])) == 3
    assert asked[0] == ["Question:"] * 4


def test_a_prompt_that_nothing_stands_before_opens_nothing(says):
    asked = says(written(["Who?"]))
    with pytest.raises(DataError, match="found 0"):
        own_rows(subject(), [{"prompt": "The baker is", "completion": " old."}])
    assert asked == []


def test_the_same_seed_writes_the_same_rows(monkeypatch):
    for name in ("_QUESTION_TOKENS", "_ANSWER_TOKENS"):
        monkeypatch.setitem(module, name, 6)
    model = builders.trained(builders.adapted_saved_llama(), "task", builders.retain_rows())
    of_task = Subject(model, builders.tokenizer(), ["task"], show_progress_bar=False)
    forget = builders.forget_rows()[:2]
    first, again, other = (own_rows(of_task, forget, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert not {prompt_text(row) for row in builders.forget_rows()} & {prompt_text(row) for row in first}


# The general rows


def test_the_general_rows_are_those_of_the_assets_and_prose():
    facts = [row for name in ("real_authors", "world_facts") for row in read_row_file(ASSETS / f"{name}.jsonl")]
    rows = read_rows(DEFAULT)
    assert rows[: len(facts)] == [{key: row[key] for key in ("question", "answer")} for row in facts]
    assert rows[len(facts) :] == read_row_file(GENERAL / "prose.jsonl")


def test_the_word_goes_before_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").write_text('{"text": "mine"}')
    assert len(read_rows("default")) > 200
    assert read_rows("./default") == [{"text": "mine"}]


@pytest.mark.parametrize("word", [DEFAULT, SELF])
def test_columns_are_of_the_users_rows(word):
    parser = command_parser("run")
    options = parser.parse_args(["--forget", "f.csv", "--retain", word, "--columns", "question=a,answer=b"])
    name_columns(parser, options)
    assert (options.forget, options.retain) == ("f.csv?question=a,answer=b", word)


def test_every_command_takes_the_general_rows(capsys):
    assert main(["rows", "default", "--model", str(builders.llama_directory()), "--show", "0"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["rows", "257"]
