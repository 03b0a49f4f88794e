"""Rows as people have them: packed, with tools, in parts, too long, in both sets; and what a template rejects."""

import json

import builders
import pytest
import torch
from datasets import Dataset
from trl import pack_dataset

from peft_perta import DataError, PerTAConfig, UnlearningSettings, add_perta_adapter, get_perta_state_dict
from peft_perta.data import (
    IGNORED,
    Sample,
    check_disjoint,
    completion_text,
    encode_prompt,
    encode_row,
    load_samples,
    note,
)
from peft_perta.evaluation import Goal, Subject, calibrate, evaluate_split
from peft_perta.training import train_forget_adapter, train_unlearning

TOKENIZER, CHAT = builders.tokenizer(), builders.tokenizer(chat=True)
USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ned."}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": {}}}]}
WITH_TOOLS = (
    "{% if tools %}<tools>{{ tools | map(attribute='function') | map(attribute='name') | join }}{% endif %}"
    "{% if loud is defined and loud %}<loud>{% endif %}"
) + builders.CHAT_TEMPLATE


def templated(template):
    tokenizer = builders.tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


def text_of(sample):
    return TOKENIZER.decode(sample.input_ids)


@pytest.fixture(autouse=True)
def _notes():
    note.cache_clear()


# Packed rows


def tokens_of_rows(column):
    samples = load_samples(builders.forget_rows() * 3, TOKENIZER)
    carried = {
        "labels": lambda sample: sample.labels.tolist(),
        "completion_mask": lambda sample: (sample.labels != IGNORED).int().tolist(),
    }[column]
    return Dataset.from_list([{"input_ids": s.input_ids.tolist(), column: carried(s)} for s in samples])


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("column", ["labels", "completion_mask"])
def test_packed_rows_are_refused(strategy, column):
    packed = pack_dataset(tokens_of_rows(column), seq_length=100, strategy=strategy)
    if (strategy, column) == ("wrapped", "labels"):  # such rows look like any others
        assert load_samples(packed)
        return
    with pytest.raises(DataError, match=r"the forget set, row 1: packed batches and rows .* before trl.pack_dataset"):
        load_samples(packed, name="the forget set")


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": [1, 1, 2, 2]},
        {"position_ids": [0, 1, 0, 1]},
        {"seq_idx": [[0, 0, 1, 1]]},
        {"cu_seq_lens_q": [0, 2, 4]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_every_mark_of_a_packed_row_is_known(more):
    with pytest.raises(DataError, match="row 1: packed"):
        load_samples([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], **more}])


def test_a_padded_completion_is_not_packed():
    row = {"input_ids": [5, 6, 7, 0], "completion_mask": [0, 1, 1, 0], "seq_lengths": None}
    assert len(load_samples([row])) == 1


# What a row gives its chat template


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"question": "Who?", "answer": "Ned."},
    ],
    ids=lambda row: next(iter(row)),
)
def test_tools_and_template_arguments_reach_the_template(row, tools):
    tokenizer = templated(WITH_TOOLS)
    row = {**row, "tools": tools, "chat_template_kwargs": {"loud": True}}
    expected = "<tools>find<loud><user>Who?<assistant>"
    assert TOKENIZER.decode(encode_prompt(row, tokenizer)) == expected
    assert text_of(encode_row(row, tokenizer)) == f"{expected}Ned.<eos>"
    plain = {**row, "tools": None, "chat_template_kwargs": None}  # as a Dataset fills what a row lacks
    assert text_of(encode_row(plain, tokenizer)) == text_of(encode_row({**row, "tools": []}, tokenizer)).replace(
        "<loud>", ""
    )


def test_a_refusal_keeps_the_tools():
    from peft_perta.training._pairs import load_forget

    row = {"messages": [USER, ASSISTANT], "tools": TOOLS}
    (sample,) = load_forget([row], templated(WITH_TOOLS), ("No.",))
    assert text_of(sample.refusal) == "<tools>find<user>Who?<assistant>No.<eos>"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": "[{"}, "'tools' is not JSON"),
        ({"tools": {"name": "find"}}, "expected 'tools' as a list of function schemas"),
        ({"chat_template_kwargs": "loud"}, "expected 'chat_template_kwargs' as a mapping"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "rejects this conversation .*multiple values"),
    ],
)
def test_malformed_template_arguments_are_refused(more, message):
    with pytest.raises(DataError, match=f"data, row 1: .*{message}"):
        load_samples([{"messages": [USER, ASSISTANT], **more}], CHAT)


# What a template, a tokenizer or a loss rejects

GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRINGS_ALONE = PARTS.replace("{% for part in m.content %}{{ part.text }}{% endfor %}", "")  # as Qwen3's
KNOWS_CALLS = builders.CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m.tool_calls or m['content'] }}")
METHODS = GEMMA.replace("m['content'] | trim", "m['content'].strip()")
DIVIDES = GEMMA + "{{ 1 // (messages[-1]['content'] | length - 7) }}"
ANSWERED = [USER, CALL, {"role": "tool", "content": "Ned"}, ASSISTANT]


def in_parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


REJECTED = {
    "system": (GEMMA, [{"role": "system", "content": "Be kind."}, USER, ASSISTANT], "TemplateError: System role not"),
    "surrogate": (GEMMA, [{**USER, "content": "Who \ud83d?"}, ASSISTANT], "half of a character"),
    "parts, printed": (GEMMA, [{**USER, "content": in_parts("Who?")}, ASSISTANT], "does not know content that is a li"),
    "parts, left out": (STRINGS_ALONE, [{**USER, "content": in_parts("Who?")}, ASSISTANT], "does not know content th"),
    "an image": (PARTS, [{**USER, "content": [{"type": "image"}]}, ASSISTANT], "message 1: expected content as text"),
    "a number": (PARTS, [{**USER, "content": 7}, ASSISTANT], "message 1: expected content as text"),
    "null, unknown": (METHODS, ANSWERED, r"rejects this conversation \(UndefinedError"),
    "division by zero": (DIVIDES, [USER, {**ASSISTANT, "content": "Nobody."}], r"rejects .*\(ZeroDivisionError"),
    "a call at the end": (KNOWS_CALLS, [USER, CALL], r"last turn is empty \(it only calls a tool\)"),
}


@pytest.mark.parametrize(("template", "messages", "message"), REJECTED.values(), ids=REJECTED)
def test_what_a_template_rejects_is_named_by_file_and_row(template, messages, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": messages}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"^the forget set \(.*rows.jsonl\), row 2(, |: ).*{message}") as raised:
        load_samples(path, templated(template), name="the forget set")
    assert "\n" not in str(raised.value)


def test_text_parts_are_read_where_the_template_knows_them():
    whole = encode_row({"messages": [USER, ASSISTANT]}, templated(PARTS))
    row = {"messages": [{**USER, "content": in_parts("Wh", "o?")}, {**ASSISTANT, "content": in_parts("Ned.")}]}
    assert torch.equal(encode_row(row, templated(PARTS)).input_ids, whole.input_ids)
    assert completion_text(row) == "Ned."


def test_a_tool_call_without_content_is_read():
    for template in (KNOWS_CALLS, GEMMA, builders.CHAT_TEMPLATE):
        assert "None" not in text_of(encode_row({"messages": ANSWERED}, templated(template)))


@pytest.mark.parametrize("row", [{"question": "\udc00?", "answer": "x"}, {"text": "a\ud800b"}])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, CHAT], ids=["plain", "chat"])
def test_a_lone_surrogate_is_refused_in_every_kind_of_row(row, tokenizer):
    with pytest.raises(DataError, match=r"data, row 1: .* is half of a character"):
        load_samples([row], tokenizer)


def test_a_tokenizer_without_eos_and_pad_answers_chats_and_refuses_the_rest():
    tokenizer = builders.tokenizer(chat=True)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.chat_template = PARTS
    row = {"question": "Who?", "answer": "Ned."}
    subject = Subject(builders.llama(), tokenizer, show_progress_bar=False)
    rows = [row, {"question": "Who is that, then?", "answer": "Ned."}]
    assert evaluate_split(subject, rows, is_forget=True, generated=2, max_new_tokens=3).rouge_l_recall is not None
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="rows, row 1: the tokenizer has no eos token"):
        evaluate_split(subject, rows, is_forget=True, generated=2)


# Long rows

LONG = "".join(chr(33 + index % 90) for index in range(101))


@pytest.mark.parametrize("max_length", [2, 3, 7, 34, 35, 50, 51, 101, 102, 103])
def test_a_long_text_is_split_and_every_token_is_predicted_once(max_length, capsys):
    ids = encode_row({"text": LONG}, TOKENIZER).input_ids.tolist()
    samples = load_samples([{"text": "short"}, {"text": LONG}], TOKENIZER, max_length=max_length)
    pieces = [sample for sample in samples if sample.row == 2]
    assert [token for piece in pieces for token in piece.input_ids[1:].tolist()] == ids[1:]
    assert all(2 <= len(piece.input_ids) <= max_length for piece in pieces)
    assert all(torch.equal(piece.labels, piece.input_ids) for piece in pieces)
    lengths = [len(piece.input_ids) for piece in pieces]
    assert max(lengths) - min(lengths) <= 1
    assert len(pieces) == -(-(len(ids) - 1) // (max_length - 1))  # as few as can be
    assert capsys.readouterr().err == ""


def test_what_is_cut_is_said_in_one_line(capsys):
    rows = [{"prompt": "ab", "completion": "c" * 20}, {"prompt": "ab", "completion": "c"}, {"text": LONG}]
    load_samples([*rows, rows[0]], TOKENIZER, max_length=10, name="the retain set")
    expected = "the retain set: 26 tokens of 2 of 4 rows, those after the first 10 (max_length), are left out\n"
    assert capsys.readouterr().err == expected


def test_an_evaluation_cuts_texts_and_says_so(capsys):
    """Published measures have one value for each text."""
    subject = Subject(builders.llama(), TOKENIZER, max_length=20, show_progress_bar=False)
    (sample,) = subject.encode([{"text": LONG}], "texts")
    assert len(sample.input_ids) == 20
    assert capsys.readouterr().err == (
        "texts: 82 tokens of 1 of 1 rows, those after the first 20 (max_length), are left out\n"
    )


def test_training_and_unlearning_read_every_piece(tmp_path):
    rows = [{"text": LONG}, {"question": "Who?", "answer": "Ned."}]
    settings = {"max_length": 30, "show_progress_bar": False}
    model = train_forget_adapter(
        builders.saved_llama(), rows, TOKENIZER, tmp_path, num_train_epochs=1, lora_config=builders.lora_config(),
        **settings,
    )  # fmt: skip
    record = json.loads((tmp_path / "perta_forget.json").read_text())
    assert record["samples"] == 5
    provenance = builders.negate(model, rows, [{"text": "Grass is green."}], max_length=30).provenance
    assert provenance.data["forget"]["samples"] == 5
    assert provenance.config["max_length"] == 30


# Rows in both sets

SHARED = builders.retain_rows()[1:3]


def shared_sets():
    """Two of four retain rows are forget rows; and all, which are a part of a larger forget set."""
    forget = [*builders.forget_rows(), *SHARED]
    return {
        "two": (forget, builders.retain_rows(), "rows 2, 3 of the retain set are also in the forget set"),
        "all": (forget, SHARED, "every row of the retain set is in the forget set"),
    }


def unlearn(forget, retain, **settings):
    builders.negate(builders.adapted_llama(), forget, retain, **settings)


def add(forget, retain):
    add_perta_adapter(builders.adapted_llama(), PerTAConfig(), forget, retain, tokenizer=TOKENIZER)


def train(forget, retain):
    train_unlearning(builders.llama(), forget, retain, TOKENIZER, UnlearningSettings(), show_progress_bar=False)


def search(forget, retain):
    sets = (load_samples(rows, TOKENIZER) for rows in (forget, retain))
    calibrate(builders.adapted_llama(), Goal(3.0), *sets, adapter_name="forget", show_progress_bar=False)


CALLS = {
    "unlearn": unlearn,
    "unlearn, drawn": lambda *sets: unlearn(*sets, max_samples=1),
    "unlearn, uniform": lambda *sets: unlearn(*sets, weighting="uniform"),
    "unlearn, auto": lambda *sets: unlearn(*sets, strength="auto"),
    "add": add,
    "train": train,
    "calibrate": search,
}


@pytest.mark.parametrize("case", ["two", "all"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_row_in_both_sets_is_refused(call, case, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a gradient was taken"))
    forget, retain, message = shared_sets()[case]
    with pytest.raises(DataError, match=message):
        call(forget, retain)


def test_rows_are_compared_as_the_model_sees_them():
    """Another kind of row with the same tokens is the same row; a row of which another part is learned is not."""
    asked = load_samples([{"question": "Who?", "answer": "Ned."}], TOKENIZER)
    written = load_samples([{"prompt": "Question: Who?\nAnswer:", "completion": " Ned."}, {"text": "x"}], TOKENIZER)
    with pytest.raises(DataError, match="row 1 of the retain set is also in the forget set"):
        check_disjoint(asked, written)
    check_disjoint(asked, [Sample(asked[0].input_ids, asked[0].input_ids)])


def test_a_long_text_in_both_sets_is_one_row():
    texts = [{"text": "short"}, {"text": LONG}]
    forget, retain = (load_samples(rows, TOKENIZER, max_length=20) for rows in (texts[1:], texts))
    with pytest.raises(DataError, match="row 2 of the retain set is also in the forget set"):
        check_disjoint(forget, retain)


def test_a_draw_of_rows_is_the_one_of_the_seed():
    rows = [{"text": f"row {index:02d}"} for index in range(40)]
    emitted = get_perta_state_dict(
        builders.adapted_llama(), PerTAConfig(max_samples=3, seed=5), builders.forget_rows(), rows,
        tokenizer=TOKENIZER, show_progress_bar=False,
    )  # fmt: skip
    assert emitted.provenance.data["retain"]["samples"] == 3
