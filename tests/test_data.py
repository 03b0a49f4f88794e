"""Rows, samples and batches: every kind of row, every malformed row, and batches that hold every sample."""

import json

import builders
import laws
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from peft_perta import DataError
from peft_perta.data import (
    IGNORED,
    Sample,
    batches,
    completion_text,
    encode_prompt,
    encode_row,
    fingerprint,
    load_samples,
    read_rows,
)

TOKENIZER, CHAT = builders.tokenizer(), builders.tokenizer(chat=True)
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]


def parts(sample):
    """(prompt, completion) as text."""
    has_loss = sample.labels != IGNORED
    assert torch.equal(sample.input_ids[has_loss], sample.labels[has_loss])
    return TOKENIZER.decode(sample.input_ids[~has_loss]), TOKENIZER.decode(sample.input_ids[has_loss])


ROWS = {
    "question": ({"question": "Who?", "answer": "Ned."}, TOKENIZER, "Question: Who?\nAnswer:", " Ned.<eos>"),
    "prompt": ({"prompt": "Who? ", "completion": "Ned"}, TOKENIZER, "Who? ", "Ned<eos>"),
    "text": ({"text": "Ned."}, TOKENIZER, "", "Ned.<eos>"),
    "messages": ({"messages": MESSAGES}, CHAT, "<user>Hi<assistant>", "Yes.<eos>"),
    "question, chat": ({"question": "Who?", "answer": "Ned."}, CHAT, "<user>Who?<assistant>", "Ned.<eos>"),
    "prompt, chat": ({"prompt": "Who? ", "completion": "Ned"}, CHAT, "Who? ", "Ned<eos>"),
    "conversational": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, CHAT, "<user>Hi<assistant>", "Yes.<eos>"),
    "other keys": ({"text": "Ned.", "id": 7, "author": None}, TOKENIZER, "", "Ned.<eos>"),
}


@pytest.mark.parametrize(("row", "tokenizer", "prompt", "completion"), ROWS.values(), ids=ROWS)
def test_every_kind_of_row(row, tokenizer, prompt, completion):
    sample = encode_row(row, tokenizer)
    assert parts(sample) == (prompt, completion)
    assert TOKENIZER.decode(encode_prompt(row, tokenizer)) == prompt
    assert completion_text(row) in completion


def test_only_the_last_turn_is_the_completion():
    row = {"messages": [*MESSAGES, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No."}]}
    assert parts(encode_row(row, CHAT)) == ("<user>Hi<assistant>Yes.<eos><user>So?<assistant>", "No.<eos>")


def test_a_tokenizer_that_ends_every_text_does_not_end_it_twice():
    class Ending:
        eos_token_id, chat_template = 1, None

        def __call__(self, text):
            return {"input_ids": [*TOKENIZER(text)["input_ids"], 1]}

    row = {"prompt": "ab", "completion": "cd"}
    assert torch.equal(encode_row(row, Ending()).input_ids, encode_row(row, TOKENIZER).input_ids)


def test_tokens_that_span_prompt_and_completion_carry_loss():
    """The prompt's tokens are [a, b], those of prompt and completion [a, bc]: the completion begins after a."""

    class Merging:
        eos_token_id, chat_template = 1, None

        def __call__(self, text):
            return {"input_ids": {"ab": [10, 11], "abc": [10, 12]}[text]}

    sample = encode_row({"prompt": "ab", "completion": "c"}, Merging())
    assert sample.input_ids.tolist() == [10, 12, 1]
    assert sample.labels.tolist() == [IGNORED, 12, 1]


MALFORMED = {
    "no known keys": (
        {"query": "x", "reply": "y"},
        r"expected question/answer or .*, found the keys \['query', 'reply'\]",
    ),
    "half a row": ({"question": "x"}, r"found the keys \['question'\]"),
    "null": ({"question": "x", "answer": None}, "found the keys"),
    "empty completion": ({"prompt": "x", "completion": ""}, "'completion' is empty"),
    "blank answer": ({"question": "x", "answer": " \n"}, "'answer' is empty"),
    "empty text": ({"text": ""}, "'text' is empty"),
    "number": ({"question": "x", "answer": 7}, "expected 'answer' as text, found int"),
    "no list": ({"messages": "hi"}, "expected messages as a list"),
    "no role": ({"messages": [{"content": "hi"}, {"content": "yo"}]}, "expected messages as a list"),
    "one turn": ({"messages": MESSAGES[1:]}, "expected at least two messages, the last one the assistant's"),
    "user last": ({"messages": MESSAGES[:1] * 2}, "expected at least two messages, the last one the assistant's"),
    "empty turn": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": ""}]},
        "the assistant's last turn is empty",
    ),
    "no mapping": ("just text", "expected a mapping, found str"),
}


@pytest.mark.parametrize(("row", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_named_by_its_number(row, message):
    with pytest.raises(DataError, match=f"the forget set, row 2.*{message}"):
        load_samples([{"text": "fine"}, row], CHAT, name="the forget set")


def test_messages_need_a_chat_template():
    with pytest.raises(DataError, match="messages need a tokenizer with a chat template"):
        encode_row({"messages": MESSAGES}, TOKENIZER)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = builders.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        encode_row({"text": "x"}, tokenizer)


def test_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="row 1 is text, which needs a tokenizer"):
        load_samples([{"text": "x"}])


def test_a_completion_is_truncated_but_never_removed():
    row = {"prompt": "abcdef", "completion": "ghij"}
    assert parts(encode_row(row, TOKENIZER, max_length=8)) == ("abcdef", "gh")
    with pytest.raises(DataError, match="no token of the completion is left within max_length=6"):
        encode_row(row, TOKENIZER, max_length=6)


def test_a_label_on_the_first_token_alone_is_refused():
    """No token before it predicts it."""
    with pytest.raises(DataError, match="no token of the completion is left"):
        load_samples([{"input_ids": [5, 6], "labels": [5, IGNORED]}])


@pytest.mark.parametrize("data", [[], Dataset.from_list([]), iter(())])
def test_an_empty_set_is_refused(data):
    with pytest.raises(DataError, match="the retain set is empty"):
        load_samples(data, TOKENIZER, name="the retain set")


@pytest.mark.parametrize(("data", "message"), [(None, "found None"), (7, "expected a path, .* found int")])
def test_data_of_another_type_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        load_samples(data, TOKENIZER)


FILES = {
    "missing": (None, "found none; check the path"),
    "empty": (b"", "holds no rows"),
    "blank lines": (b"\n \n", "holds no rows"),
    "no JSON": (b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
    "no object": (b'{"text": "a"}\n["a"]\n', "line 2: expected a JSON object, found a list"),
    "no UTF-8": (b'{"text": "\xff"}\n', "not UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_malformed_line_is_named_by_its_number(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"rows.jsonl.*{message}"):
        load_samples(path, TOKENIZER)


def test_a_row_with_a_line_separator_inside_is_one_row(tmp_path):
    """U+2028 and similar characters are legal inside a JSON string; they do not end a line of JSON."""
    path = tmp_path / "rows.jsonl"
    row = {"text": "one\u2028two\x85three\x0bfour"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path) == [row]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read_rows(path) == [{"text": "a"}, {"text": "b"}]


def collate(samples):
    """A left-padded batch, as some collators return it."""
    length = max(len(s.input_ids) for s in samples) + 3
    batch = {
        "input_ids": torch.zeros(len(samples), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
        "labels": torch.full((len(samples), length), IGNORED),
    }
    for row, sample in enumerate(samples):
        size = len(sample.input_ids)
        batch["input_ids"][row, -size:] = sample.input_ids
        batch["attention_mask"][row, -size:] = 1
        batch["labels"][row, -size:] = sample.labels
    return batch


def test_every_form_of_data_gives_the_same_samples(tmp_path):
    """Lists, files, Datasets of rows or tokens, completion masks and left-padded batches have one fingerprint."""
    rows = builders.forget_rows()
    samples = load_samples(rows, TOKENIZER)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = [{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples]
    masked = [
        {"input_ids": s.input_ids.tolist(), "completion_mask": (s.labels != IGNORED).int().tolist()} for s in samples
    ]
    columns = sorted({key for row in rows for key in row})
    forms = [
        path,
        str(path),
        Dataset.from_list([{key: row.get(key) for key in columns} for row in rows]),
        Dataset.from_list(tokens),
        Dataset.from_list(tokens).with_format("torch"),
        masked,
        DataLoader(samples, batch_size=2, collate_fn=collate),
    ]
    assert [fingerprint(load_samples(data, TOKENIZER)) for data in forms] == [fingerprint(samples)] * len(forms)


@pytest.mark.parametrize("granularity", ["factor", "delta"])
def test_padding_changes_no_gradient_sum(granularity):
    """Left or right, and of any amount; equal bit for bit."""
    model = builders.adapted_llama()
    samples = load_samples(builders.forget_rows(), TOKENIZER)
    padded = load_samples(DataLoader(samples, batch_size=3, collate_fn=collate))
    one, other = (laws.swept(model, data, granularity, "mean", [], 2) for data in (samples, padded))
    assert all(torch.equal(one[n].gradients[k], other[n].gradients[k]) for n in one for k in one[n].gradients)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"input_ids": [1, 2]}, "expected 'labels' or 'completion_mask' beside 'input_ids', found neither"),
        ({"input_ids": [1, 2], "labels": [1]}, "must have the same shape"),
        ({"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0, 0]}, "packed batches"),
    ],
)
def test_malformed_tokens_are_refused(item, message):
    with pytest.raises(DataError, match=f"row 1.*{message}"):
        load_samples([item])


def batch_of(*rows, **more):
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows), **more}


@pytest.mark.parametrize(
    ("batch", "place"),
    [
        (batch_of([5, 6], [7, 8], labels=torch.tensor([[5, 6], [7, IGNORED]])), "batch 2, row 2: no token"),
        (batch_of([5, 6], [7, 8], labels=torch.tensor([[5, 6]])), "batch 2: input_ids"),
        ({"input_ids": torch.tensor([[5, 6, 7, 8]] * 3), "completion_mask": [[0, 1, 1, 1]] * 2 + [[0, 1, 0, 1]]},
         "batch 2, row 3: packed"),
        (batch_of([5, 6], position_ids=torch.tensor([[0, 0]])), "batch 2: packed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_row_of_a_dataloader_is_named_by_its_batch_and_its_place_there(batch, place):
    with pytest.raises(DataError, match=f"^the forget set, {place}"):
        load_samples([batch_of([1, 2]), batch], name="the forget set")


def test_the_rows_of_batches_are_numbered_through(capsys):
    samples = load_samples([batch_of([1, 2, 3], [4, 5, 6]), batch_of([7, 8, 9])], max_length=2)
    assert [sample.row for sample in samples] == [1, 2, 3]
    assert "data: 3 tokens of 3 of 3 rows" in capsys.readouterr().err


def test_a_draw_depends_on_the_seed_and_keeps_the_order():
    rows = [{"text": f"row {index:02d}"} for index in range(40)]
    drawn = [
        [TOKENIZER.decode(s.input_ids) for s in load_samples(rows, TOKENIZER, max_samples=10, seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert len(drawn[0]) == 10
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert drawn[0] != drawn[2]
    assert len(load_samples(rows, TOKENIZER, max_samples=99)) == 40


LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=20)


@given(lengths=LENGTHS, size=st.integers(1, 8))
def test_batches_hold_every_sample_once(lengths, size):
    samples = [Sample(torch.full((n,), i + 1), torch.full((n,), i + 1)) for i, n in enumerate(lengths)]
    seen = []
    for batch in batches(samples, size):
        assert len(batch.indices) <= size
        for row, index in enumerate(batch.indices):
            seen.append(index)
            n = lengths[index]
            assert batch.input_ids[row].tolist()[:n] == [index + 1] * n
            assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
            assert batch.labels[row].tolist() == [index + 1] * n + [IGNORED] * (batch.labels.shape[1] - n)
    assert sorted(seen) == list(range(len(samples)))


def test_the_longest_batch_comes_first():
    samples = [Sample(torch.ones(n, dtype=torch.long), torch.ones(n, dtype=torch.long)) for n in (3, 9, 5, 7)]
    assert [batch.input_ids.shape[1] for batch in batches(samples, 2)] == [9, 5]


def test_a_fingerprint_depends_on_tokens_labels_order_and_boundaries():
    def sample(*ids, labels=None):
        return Sample(torch.tensor(ids), torch.tensor(labels or ids))

    sets = [
        [sample(1, 2), sample(3)],
        [sample(3), sample(1, 2)],
        [sample(1), sample(2, 3)],
        [sample(1, 2, 3)],
        [sample(1, 2, labels=[IGNORED, 2]), sample(3)],
    ]
    assert len({fingerprint(s) for s in sets}) == len(sets)


@pytest.mark.parametrize("missing", ["forget", "retain"])
def test_unlearning_needs_both_sets(missing):
    from peft_perta import PerTAConfig, get_perta_state_dict

    sets = {"forget": builders.forget_rows(), "retain": builders.retain_rows(), missing: None}
    with pytest.raises(DataError, match=f"the {missing} set: expected a data set, found None"):
        get_perta_state_dict(
            builders.adapted_llama(), PerTAConfig(), sets["forget"], sets["retain"], tokenizer=TOKENIZER
        )


def test_equal_forget_and_retain_sets_are_refused():
    with pytest.raises(DataError, match="every row of the retain set is in the forget set"):
        builders.negate(builders.adapted_llama(), retain=builders.forget_rows())
