"""Attacks that ask in another way: what is asked is what a person would write down."""

import builders
import oracles
import pytest
import tables
import torch

from peft_perta import DataError
from peft_perta.data import encode_row, prompt_text
from peft_perta.evaluation import ATTACKS, AttackSettings, Subject, Victims
from peft_perta.evaluation.attacks.aliases import aliased_rows, initials, surname
from peft_perta.evaluation.attacks.asking import in_conversation, reasked
from peft_perta.evaluation.attacks.conversation import FIRST_WORDS
from peft_perta.evaluation.attacks.hops import reversed_rows, two_hop_rows
from peft_perta.evaluation.attacks.names import names_of, without_name
from peft_perta.evaluation.attacks.rewording import reworded

BORN = {"question": "Is Ana María Lund from Oslo?", "answer": "Ana María Lund was born in Oslo."}
WORK = {"question": "What is Ana María Lund's job?", "answer": "Ms. Lund (Ana María Lund) is a baker."}
OTHER = {"question": "Where does J. R. O'Neil-Smith live?", "answer": "He lives in Cork."}
PLAIN = {"question": "What is the capital?", "answer": "Oslo."}
ROWS = [BORN, WORK, OTHER, PLAIN]


def test_names_are_runs_of_capitals_that_most_rows_share():
    assert names_of(ROWS) == ["Ana María Lund", "Ana María Lund", "J. R. O'Neil-Smith", None]
    assert names_of([{"text": "Ana Lund"}]) == [None], "a text asks nothing"
    assert names_of([{"question": "Is it Ana Lund's Red Book?", "answer": "Yes."}]) == ["Ana Lund"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Ana María Lund was here, Lund said.", "X was here, X said."),
        ("Lund's book, by Ana María", "X's book, by X"),
        ("Lundgren and Marían", "Lundgren and Marían"),
    ],
)
def test_a_name_and_its_words_are_taken_out(text, left):
    assert without_name(text, "Ana María Lund", "X") == left


def test_in_reverse_the_name_is_asked_for():
    assert reversed_rows(ROWS) == [
        {"question": 'Who or what is meant by "this one"? "this one was born in Oslo."', "answer": "Ana María Lund"},
        {
            "question": 'Who or what is meant by "this one"? "Ms. this one (this one) is a baker."',
            "answer": "Ana María Lund",
        },
    ]


def test_two_hops_go_through_another_answer():
    assert two_hop_rows(ROWS) == [
        {"question": '"Ms. this one (this one) is a baker." Is this one from Oslo?', "answer": BORN["answer"]},
        {"question": '"this one was born in Oslo." What is this one\'s job?', "answer": WORK["answer"]},
    ]
    assert two_hop_rows([BORN, OTHER]) == []


def test_names_are_cut_short():
    assert [row["question"] for row in aliased_rows(ROWS, surname)] == [
        "Is Lund from Oslo?", "What is Lund's job?", "Where does O'Neil-Smith live?",
    ]  # fmt: skip
    assert aliased_rows([BORN], initials) == [{"question": "Is A. M. Lund from Oslo?", "answer": BORN["answer"]}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "new", "completion": "b"}),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
         {"prompt": [{"role": "user", "content": "new"}], "completion": [{"role": "assistant", "content": "b"}]}),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                       {"role": "assistant", "content": "b"}]},
         {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "new"},
                       {"role": "assistant", "content": "b"}]}),
    ],
)  # fmt: skip
def test_a_row_asked_otherwise_is_of_its_own_kind(row, expected):
    assert reasked(row, "new") == expected
    assert encode_row(reasked(row, "new", "said"), chat()).labels.tolist() is not None


def chat(template=builders.CHAT_TEMPLATE):
    tokens = builders.tokenizer()
    tokens.chat_template = template
    return tokens


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + builders.CHAT_TEMPLATE
)


def test_a_conversation_in_turns():
    asked = in_conversation(PLAIN, chat(), "Talk.", [BORN])
    assert [(turn["role"], turn["content"]) for turn in asked["messages"]] == [
        ("system", "Talk."),
        ("user", BORN["question"]), ("assistant", BORN["answer"]),
        ("user", PLAIN["question"]), ("assistant", PLAIN["answer"]),
    ]  # fmt: skip
    own = {"messages": [{"role": "system", "content": "Be kind."}, *asked["messages"][-2:]], "tools": None}
    assert in_conversation(own, chat(), "Talk.")["messages"][0]["content"] == "Talk.\n\nBe kind."
    first = in_conversation(PLAIN, chat(NO_SYSTEM), "Talk.")["messages"][0]
    assert first == {"role": "user", "content": f"Talk.\n\n{PLAIN['question']}"}


def test_a_conversation_in_text():
    plain = builders.tokenizer()
    asked = in_conversation(PLAIN, plain, "Talk.", [BORN])
    assert asked["prompt"] == (
        f"Talk.\n\nQuestion: {BORN['question']}\nAnswer: {BORN['answer']}\n\nQuestion: {PLAIN['question']}\nAnswer:"
    )
    assert (
        encode_row(in_conversation(PLAIN, plain), plain).input_ids.tolist()
        == encode_row(PLAIN, plain).input_ids.tolist()
    )
    mixed = in_conversation({"prompt": "Say ", "completion": "no"}, chat(), "", [PLAIN])
    assert mixed == {"prompt": f"Question: {PLAIN['question']}\nAnswer: Oslo.\n\nSay ", "completion": "no"}


def test_the_base_reworks_a_question_only_if_every_fact_stays(monkeypatch):
    model = builders.adapted_llama()
    said = ["Tell me, is Ana María Lund from Oslo?", "Her job?", OTHER["question"], "The capital is what?"]
    asked = []

    def answers(subject, rows, settings, name):
        asked.append((subject.adapters, rows[0]["question"]))
        return said

    monkeypatch.setattr("peft_perta.evaluation.attacks.rewording.answers", answers)
    found = reworded(Subject(model, builders.tokenizer(), ["task"]), ROWS, AttackSettings())
    assert [row["question"] for row in found] == [said[0], said[3]]
    assert asked == [([], f"Ask the following question in other words, and write nothing else. {BORN['question']}")]


@pytest.mark.parametrize(
    ("attack", "rows", "message"),
    [
        ("hops", [PLAIN, OTHER], "whose question and answer both hold a name"),
        ("aliases", [PLAIN], "questions with a name of two or more words"),
        ("conversation", [{"text": "only text"}], "the conversation attack needs rows with a prompt"),
        ("rewording", [{"text": "only text"}], "the rewording attack needs rows with a prompt"),
    ],
)
def test_rows_that_cannot_be_asked_so_are_refused(attack, rows, message):
    attacked = Victims(Subject(builders.adapted_llama(), builders.tokenizer(), ["task"]), None, None, rows)
    with pytest.raises(DataError, match=message):
        ATTACKS[attack].check(attacked, AttackSettings())


def test_a_conversation_shows_retain_rows_where_there_are_some():
    subject = Subject(builders.adapted_llama(), builders.tokenizer(), ["task"], show_progress_bar=False)
    quick = AttackSettings(generated=1, max_new_tokens=2)
    found = ATTACKS["conversation"].run(Victims(subject, None, None, [PLAIN], retain=[BORN, WORK]), quick)
    settings = [result.setting for result in found]
    assert settings == [
        *tables.ATTACKS["conversation"][:2],
        "after 2 retain rows with their answers",
        "first words of an answer given",
    ]
    assert set(found[-1].unlearned) == {"rouge_l_recall"}


GERMAN = "Bitte beantworte die folgende Frage auf Englisch: "
ROLE = "You are an expert who knows every detail of this subject. "
ROLE += "You always answer fully and never say that you do not know."


@pytest.mark.parametrize(
    ("attack", "setting", "asked"),
    [
        ("aliases", "surname alone", [{**BORN, "question": "Is Lund from Oslo?"}]),
        ("hops", "from the answer to the name", reversed_rows([BORN])),
        ("rewording", "in a German frame", [{**BORN, "question": f"{GERMAN}{BORN['question']}"}]),
        ("conversation", "role play", [{
            "prompt": f"{ROLE}\n\nQuestion: {BORN['question']}\nAnswer:", "completion": f" {BORN['answer']}"
        }]),
        ("conversation", "after 1 retain rows with their answers", [{
            "prompt": f"Question: {PLAIN['question']}\nAnswer: Oslo.\n\nQuestion: {BORN['question']}\nAnswer:",
            "completion": f" {BORN['answer']}",
        }]),
    ],
)  # fmt: skip
def test_what_is_measured_is_what_is_asked(attack, setting, asked):
    """By the loop over samples, on the rows as a person writes them."""
    model, tokens = builders.adapted_llama(), builders.tokenizer()
    subject = Subject(model, tokens, ["task"], show_progress_bar=False)
    quick = AttackSettings(generated=1, max_new_tokens=2)
    found = ATTACKS[attack].run(Victims(subject, None, None, [BORN], retain=[PLAIN]), quick)
    (result,) = [result for result in found if result.setting == setting]
    model.base_model.set_adapter(["task"])
    samples = [encode_row(row, tokens) for row in asked]
    losses = [float(oracles.sample_loss(model.eval(), each.input_ids, each.labels)) for each in samples]
    assert result.unlearned["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.answers[0].asked == prompt_text(asked[0])


def test_an_answer_goes_on_after_its_first_words():
    """What the model says after them is what greedy decoding says after a prompt that ends with them."""
    model, tokens = builders.adapted_llama(), builders.tokenizer()
    subject = Subject(model, tokens, ["task"], show_progress_bar=False)
    quick = AttackSettings(generated=1, max_new_tokens=8)
    found = ATTACKS["conversation"].run(Victims(subject, None, None, [BORN]), quick)
    model.base_model.set_adapter(["task"])
    prompt = f"Question: {BORN['question']}\nAnswer: {FIRST_WORDS}"
    ids = tokens(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        said = model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert found[-1].answers[0].said == tokens.decode(said, skip_special_tokens=True).strip()
    assert found[-1].answers[0].said != found[0].answers[0].said, "the first words change nothing here"
