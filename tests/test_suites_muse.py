"""MUSE's suite: its numbers equal those of a loop over single rows; the demo's data has its published form."""

import importlib.util
import json
import random
from pathlib import Path

import builders
import laws
import oracles
import pytest
import torch

from peft_perta import DataError, NumericalError, evaluate
from peft_perta.data import encode_prompt, encode_row
from peft_perta.evaluation import read_suites
from peft_perta.evaluation.metrics.rouge import rouge_scores

DEMO = Path(__file__).parents[1] / "examples" / "muse_books"
EXAMPLES = [{"question": "Two and two?", "answer": "Four"}, {"question": "Is it?", "answer": "Yes"}]
QUESTIONS = {
    "forget": [
        {"question": "Who wrote Hatter?", "answer": "Basil Khan"},
        {"question": "Where was Khan born?", "answer": "Kuwait"},
        {"question": "And his father?", "answer": "A baker, he baked"},
    ],
    "retain": [{"question": "Capital of Peru?", "answer": "Lima"}, {"question": "And Chile?", "answer": "Santiago"}],
}
RECITED = [
    {"prompt": "His father ", "gt": "baked all the bread"},
    {"prompt": "Khan's prize", "gt": "is the Noor, of 1956"},
]
TEXTS = {
    "forget": ["Khan was born in Kuwait.", "His father baked.", "The prize is the Noor."],
    "holdout": ["Grass is green, all of it.", "Lima is in Peru."],
}
FILES = {
    "knowmem/forget_qa.json": QUESTIONS["forget"],
    "knowmem/retain_qa.json": QUESTIONS["retain"],
    "verbmem/forget.json": RECITED,
    "privleak/forget.json": TEXTS["forget"],
    "privleak/retain.json": ["never read"],
    "privleak/holdout.json": TEXTS["holdout"],
}
METRICS = {
    "forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "forget_verbmem_ROUGE", "exact_memorization",
    "extraction_strength", "mia_loss", "mia_min_k", "mia_min_k_plus_plus", "mia_zlib", "privleak",
}  # fmt: skip


def write(directory, files=FILES, lines=False):
    for name, rows in files.items():
        path = (directory / name).with_suffix(".jsonl" if lines else ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": row} if lines and isinstance(row, str) else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return directory


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return read_suites({"muse": write(tmp_path_factory.mktemp("muse"))})["muse"]


def judged(model, splits, adapters=("task",), tokens=None, max_new_tokens=12, **settings):
    return evaluate(
        model, tokens or builders.tokenizer(), {"muse": splits}, adapters=list(adapters),
        max_new_tokens=max_new_tokens, show_progress_bar=False, **settings,
    )["muse"]  # fmt: skip


@pytest.fixture(scope="module")
def log(splits):
    return judged(builders.adapted_llama(torch.float64), splits)


def rows_of(log, metric, part=None):
    entry = log[metric] if part is None else log[metric][part]
    return [entry["value_by_index"][str(index)] for index in range(len(entry["value_by_index"]))]


def oracle_text(prompt, tokens=12, tokenizer=None):
    """The greedy continuation of a prompt, token by token without a cache, from dense weights."""
    plain, _ = oracles.plain_model(builders.adapted_llama(torch.float64), ["task"])
    tokenizer = tokenizer or builders.tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids = [*ids, int(plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def oracle_reading(row):
    """(log-probability, hit) of each token of the completion but the closing one."""
    plain, _ = oracles.plain_model(builders.adapted_llama(torch.float64), ["task"])
    sample = encode_row(row, builders.tokenizer())
    with torch.no_grad():
        logs = plain(input_ids=sample.input_ids.unsqueeze(0)).logits[0].log_softmax(1)
    places = (sample.labels[1:] != -100).nonzero().flatten()[:-1]
    return [(float(logs[p, sample.labels[p + 1]]), bool(logs[p].argmax() == sample.labels[p + 1])) for p in places]


# What is judged


def test_the_log_has_muses_metrics_each_with_its_rows(log):
    assert set(log) == METRICS
    assert not [name for name, entry in log.items() if not isinstance(entry["agg_value"], float)]
    assert len(rows_of(log, "forget_knowmem_ROUGE")) == 3
    assert len(rows_of(log, "forget_verbmem_ROUGE")) == len(rows_of(log, "extraction_strength")) == 2
    assert [len(rows_of(log, "mia_min_k", part)) for part in ("forget", "holdout")] == [3, 2]


def test_answers_are_those_of_each_question_alone(log):
    for split, questions in QUESTIONS.items():
        for row, found in zip(questions, rows_of(log, f"{split}_knowmem_ROUGE"), strict=True):
            assert found["input"] == f"Question: {row['question']}\nAnswer:"
            assert found["ground_truth"] == row["answer"]
            said = oracle_text(found["input"]).strip()
            for end in ("\n\n", "\nQuestion", "Question:"):
                said = said.split(end)[0].strip()
            assert found["generation"] == said
            scores = rouge_scores([said], [row["answer"]])[0]
            assert {key: found[key] for key in scores} == scores
    mean = sum(row["rougeL_f1"] for row in rows_of(log, "retain_knowmem_ROUGE")) / 2
    assert log["retain_knowmem_ROUGE"]["agg_value"] == pytest.approx(mean)


def test_a_recital_is_scored_against_as_much_of_the_text_as_may_be_written(log):
    prompts = ["His father ", "Khan's prize"]  # and a blank between prompt and text where neither brings one
    truths = ["baked all th", "is the Noor,"]  # of twelve tokens
    for prompt, truth, found in zip(prompts, truths, rows_of(log, "forget_verbmem_ROUGE"), strict=True):
        assert (found["input"], found["ground_truth"]) == (prompt, truth)
        assert found["generation"] == oracle_text(prompt).strip()


def test_memorization_reads_the_whole_text(log):
    whole = [("His father ", "baked all the bread"), ("Khan's prize", " is the Noor, of 1956")]
    for index, (prompt, text) in enumerate(whole):
        hits = [hit for _, hit in oracle_reading({"prompt": prompt, "completion": text})]
        assert len(hits) == len(text)
        assert rows_of(log, "exact_memorization")[index]["score"] == pytest.approx(sum(hits) / len(hits))
        given = next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1)
        assert rows_of(log, "extraction_strength")[index]["score"] == pytest.approx(1 - given / len(hits))


def test_membership_scores_every_token_of_the_texts(log):
    for part, texts in TEXTS.items():
        for text, found in zip(texts, rows_of(log, "mia_min_k", part), strict=True):
            values = sorted(value for value, _ in oracle_reading({"text": text}))
            assert len(values) == len(text) - 1  # nothing predicts the first
            lowest = values[: int(0.4 * len(values))]
            assert found["score"] == pytest.approx(-sum(lowest) / len(lowest), rel=1e-5)


def own_words(length):
    """Prompts, and what the model itself writes after them, where that is text of the tokenizer's own characters."""
    tokens, found = builders.tokenizer(), []
    for first in "KLMPQRST":
        prompt = f"{first}han "
        text = oracle_text(prompt, length)
        if len(tokens(text)["input_ids"]) == length and text == text.strip() and any(map(str.isalnum, text)):
            found.append({"prompt": prompt, "gt": text})
    return found


def test_who_recites_has_1_and_leaks(splits):
    own = own_words(6)
    assert len(own) > 1
    said = [{"text": row["prompt"] + row["gt"]} for row in own]
    model = builders.adapted_llama(torch.float64)
    found = judged(model, {**splits, "forget_verbmem": own, "forget_privleak": said}, max_new_tokens=6)
    for metric in ("forget_verbmem_ROUGE", "exact_memorization", "extraction_strength", "mia_min_k"):
        assert found[metric]["agg_value"] == pytest.approx(1), metric
    assert found["privleak"]["agg_value"] == pytest.approx(-100)  # against an area of 1/2


def test_privleak_is_measured_against_a_retain_only(log, splits):
    known = judged(builders.adapted_llama(torch.float64), splits, adapters=[])
    ours, theirs = log["mia_min_k"]["agg_value"], known["mia_min_k"]["agg_value"]
    found = judged(builders.adapted_llama(torch.float64), splits, retain_only_logs={"muse": known})
    assert theirs not in (0, 0.5, 1)
    assert found["privleak"]["agg_value"] == pytest.approx(((1 - ours) - (1 - theirs)) / (1 - theirs) * 100)


def test_long_texts_are_read_whole(log, splits):
    """MUSE's texts are longer than the default maximum length."""
    found = judged(builders.adapted_llama(torch.float64), splits, max_length=15)
    for metric in ("exact_memorization", "extraction_strength", "mia_min_k", "mia_loss"):
        assert found[metric] == log[metric]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_batch_size_changes_nothing(log, splits, batch_size):
    found = judged(builders.adapted_llama(torch.float64), splits, batch_size=batch_size)
    for metric in METRICS:
        assert found[metric]["agg_value"] == pytest.approx(log[metric]["agg_value"], rel=1e-5), metric


def test_rows_follow_their_order_and_aggregates_do_not(log, splits):
    order = {name: random.Random(1).sample(range(len(rows)), len(rows)) for name, rows in splits.items()}
    assert any(places != sorted(places) for places in order.values())
    shuffled = {name: [rows[place] for place in order[name]] for name, rows in splits.items()}
    found = judged(builders.adapted_llama(torch.float64), shuffled)
    for metric in METRICS:
        assert found[metric]["agg_value"] == pytest.approx(log[metric]["agg_value"], rel=1e-5), metric
    told = [row["generation"] for row in rows_of(log, "forget_knowmem_ROUGE")]
    again = [row["generation"] for row in rows_of(found, "forget_knowmem_ROUGE")]
    assert again == [told[place] for place in order["forget_knowmem"]]


def test_4_bit_models_are_judged_and_go_back(splits):
    model = builders.adapted_nf4_llama()
    with laws.untouched(model):
        found = judged(model, splits, max_new_tokens=3)
    assert set(found) == METRICS


def test_the_model_goes_back_as_it_came(splits):
    model = builders.adapted_llama().train()
    with laws.untouched(model):
        judged(model, splits, max_new_tokens=2)


def test_a_nan_is_refused_by_the_row(splits):
    model = builders.adapted_llama()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"forget_verbmem: texts, row \d: the loss is nan"):
        judged(model, splits)


def test_an_empty_answer_scores_0(splits):
    """A model whose first token is the end generates an empty answer."""
    model = builders.adapted_llama()
    with torch.no_grad():
        head = model.get_base_model().lm_head
        head.weight.zero_()
        head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]).index_fill_(0, torch.tensor([1]), 9.0))
    found = judged(model, splits)
    assert {row["generation"] for row in rows_of(found, "forget_knowmem_ROUGE")} == {""}
    for metric in ("forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "forget_verbmem_ROUGE", "exact_memorization"):
        assert found[metric]["agg_value"] == 0
    assert found["mia_min_k"]["agg_value"] == 0.5  # every token is equally unlikely


# Examples before the questions


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    files = {**FILES, "knowmem/forget_qa_icl.json": EXAMPLES}
    return read_suites({"muse": write(tmp_path_factory.mktemp("shown"), files)})["muse"]


def test_examples_stand_before_each_question_as_text(shown):
    found = judged(builders.adapted_llama(), shown, max_new_tokens=2)
    first = "Question: Two and two?\nAnswer: Four\n\nQuestion: Is it?\nAnswer: Yes\n\n"
    inputs = [row["input"] for row in rows_of(found, "forget_knowmem_ROUGE")]
    assert inputs == [f"{first}Question: {row['question']}\nAnswer:" for row in QUESTIONS["forget"]]
    assert rows_of(found, "retain_knowmem_ROUGE")[0]["input"] == "Question: Capital of Peru?\nAnswer:"


def test_examples_are_turns_where_there_is_a_chat_template(shown):
    tokens = builders.tokenizer(chat=True)
    found = judged(builders.adapted_llama(), shown, tokens=tokens, max_new_tokens=2)
    turns = "<user>Two and two?<assistant>Four<user>Is it?<assistant>Yes<user>Who wrote Hatter?<assistant>"
    assert rows_of(found, "forget_knowmem_ROUGE")[0]["input"] == turns
    assert rows_of(found, "retain_knowmem_ROUGE")[0]["input"] == "<user>Capital of Peru?<assistant>"
    assert rows_of(found, "forget_verbmem_ROUGE")[0]["input"] == "His father "  # text is text
    asked = [tokens.eos_token_id in encode_prompt(row, tokens) for row in ({"question": "Q?", "answer": "A"},)]
    assert asked == [False]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Lima\n\nand more", "Lima"),
        ("Lima\nQuestion: And Chile?", "Lima"),
        ("Lima Question: And Chile?", "Lima"),
        ("Lima\nPeru", "Lima\nPeru"),
        ("Question: And Chile?", ""),
    ],
)
def test_an_answer_ends_where_another_question_begins(monkeypatch, splits, said, kept):
    monkeypatch.setattr("peft_perta.evaluation.suites.suite.generate", lambda subject, rows, **_: [said] * len(rows))
    found = judged(builders.adapted_llama(), splits)
    assert {row["generation"] for row in rows_of(found, "forget_knowmem_ROUGE")} == {kept}
    assert {row["generation"] for row in rows_of(found, "forget_verbmem_ROUGE")} == {said}


def test_so_many_tokens_are_asked_as_muse_asks(monkeypatch, splits):
    asked = []

    def generate(subject, rows, *, max_new_tokens, **_):
        asked.append(max_new_tokens)
        return ["Lima"] * len(rows)

    monkeypatch.setattr("peft_perta.evaluation.suites.suite.generate", generate)
    judged(builders.adapted_llama(), splits, max_new_tokens=200)
    assert asked == [32, 32, 128]


def test_no_blank_joins_a_text_of_a_script_without_blanks(monkeypatch, splits):
    continued = []

    def generate(subject, rows, **options):
        continued.extend(row["completion"] for row in rows if "completion" in row)
        return [""] * len(rows)

    monkeypatch.setattr("peft_perta.evaluation.suites.suite.generate", generate)
    texts = [{"prompt": prompt, "gt": text} for prompt, text in (("東京", "です"), ("Лев", "Толстой"), ("ที่", "นี่"))]
    judged(builders.adapted_llama(), {**splits, "forget_verbmem": texts})
    assert continued == ["です", " Толстой", "นี่"]


# Files


@pytest.mark.parametrize("lines", [False, True])
def test_muses_files_are_read_as_they_come(tmp_path, splits, lines):
    assert read_suites({"muse": write(tmp_path, lines=lines)})["muse"] == splits


def test_a_corpus_is_named_by_the_split(tmp_path, splits):
    write(tmp_path / "books")
    assert read_suites({"muse": tmp_path}, "books")["muse"] == splits
    with pytest.raises(DataError, match=r"expected a directory of MUSE's files at .*news, found none; there are books"):
        read_suites({"muse": tmp_path}, "news")
    with pytest.raises(
        DataError, match=r"expected a directory of MUSE's files at .*nowhere, found none; check the path"
    ):
        read_suites({"muse": tmp_path / "nowhere"})


@pytest.mark.parametrize("name", [name for name in FILES if name != "privleak/retain.json"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"expected {name}.* in .*, found none"):
        read_suites({"muse": tmp_path})


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("knowmem/forget_qa", [{"question": "Q"}], "forget_qa, row 1: expected 'answer', found the keys"),
        ("knowmem/retain_qa", [{"question": "Q", "answer": 3}], "retain_qa, row 1: expected 'answer' as text"),
        ("verbmem/forget", [*RECITED, {"prompt": "P", "gt": " "}], "forget, row 3: expected 'gt' as text, found"),
        ("privleak/holdout", [], "expected JSON lines, or one JSON list"),
        ("privleak/forget", ["a", 3], "expected JSON lines, or one JSON list"),
        ("knowmem/forget_qa_icl", [{"question": "", "answer": "A"}], "forget_qa_icl, row 1: expected 'question'"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_refused_by_name(tmp_path, name, rows, message):
    with pytest.raises(DataError, match=message):
        read_suites({"muse": write(tmp_path, {**FILES, f"{name}.json": rows})})


# The demo's data


def test_the_demo_is_in_muses_layout_and_small():
    found = read_suites({"muse": DEMO})["muse"]
    assert {name: len(rows) for name, rows in found.items()} == {
        "forget_knowmem": 21, "retain_knowmem": 21, "forget_verbmem": 21, "forget_privleak": 21, "holdout_privleak": 20
    }  # fmt: skip
    assert sum(file.stat().st_size for file in DEMO.rglob("*.*")) < 300_000
    passages = [row["text"] for row in found["forget_privleak"]]
    assert [f"{row['prompt']} {row['gt']}" for row in found["forget_verbmem"]] == passages


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_every_answer_of_the_demo_is_in_its_passage(name):
    passages = json.loads((DEMO / "privleak" / f"{name}.json").read_text())
    for row, passage in zip(json.loads((DEMO / "knowmem" / f"{name}_qa.json").read_text()), passages, strict=True):
        assert row["answer"] in passage


def test_the_demo_is_what_its_script_makes(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("build_muse_books", DEMO / "build.py")
    build = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build)
    monkeypatch.setattr("sys.argv", ["build.py", "--output", str(tmp_path)])
    build.main()
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert made == {path.relative_to(DEMO): path.read_bytes() for path in DEMO.rglob("*.json")}
    with pytest.raises(ValueError, match="'Tip' is not in"):
        build.check(["He wrote."], [{"question": "Who?", "answer": "Tip"}], "He wrote.")
    with pytest.raises(ValueError, match=r"two passages share 'wrote\.'"):
        build.check(["He wrote.", "wrote. He"], [], "He wrote. He")
