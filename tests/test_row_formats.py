"""Rows as people have them: every format, the hub, columns, layouts of benchmarks; what lies, bursts or runs code."""

import argparse
import dataclasses
import gzip
import json
import os
import pickle

import builders
import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value

from peft_perta import DataError
from peft_perta.cli import _output, main, rows
from peft_perta.data import IGNORED, fingerprint, limits, load_samples, note, read_rows, row_files

ROWS = [{"question": f"Who is {number}?", "answer": str(number)} for number in range(5)]
TOKENIZER = builders.tokenizer()


def csv_of(rows, separator=","):
    lines = [separator.join(rows[0]), *(separator.join(f'"{value}"' for value in row.values()) for row in rows)]
    return "\n".join(lines).encode()


def parquet_of(rows, path, compression="snappy"):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression=compression)
    return path.read_bytes()


@pytest.fixture
def place(tmp_path):
    """``rows`` in every format, plain and packed."""
    contents = {
        "rows.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
        "lines.json": "\n".join(map(json.dumps, ROWS)).encode(),
        "rows.json": json.dumps(ROWS, indent=1).encode(),
        "rows.csv": csv_of(ROWS),
        "bom.CSV": b"\xef\xbb\xbf" + csv_of(ROWS),
        "rows.parquet": parquet_of(ROWS, tmp_path / "rows.parquet"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    return tmp_path


@pytest.fixture(autouse=True)
def _notes():
    note.cache_clear()


def refused(source, message):
    with pytest.raises(DataError, match=message) as raised:
        read_rows(source)
    assert "\n" not in str(raised.value)


# Formats

FORMATS = ("rows.jsonl", "lines.json", "rows.json", "rows.csv", "bom.CSV", "rows.parquet")


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_rows(name, packed, place):
    assert read_rows(place / f"{name}{packed}") == ROWS
    samples = load_samples(place / f"{name}{packed}", TOKENIZER)
    assert fingerprint(samples) == fingerprint(load_samples(ROWS, TOKENIZER))


def test_a_value_of_csv_stays_a_text_whatever_it_holds(place):
    text = "1.50\n, \u00e4 " + "x" * 2**21  # larger than a block of pyarrow
    (place / "odd.csv").write_text(f'question,answer\nnull,"{text}"\n,true\n', encoding="utf-8")
    assert read_rows(place / "odd.csv") == [
        {"question": "null", "answer": text},
        {"question": "", "answer": "true"},
    ]


def test_texts_are_rows(place):
    folder = place / "texts"
    (folder / "more").mkdir(parents=True)
    for name, text in {"b.txt": "two\nlines", "a.md": "# One", "more/c.txt": "deep", "picture.png": "\x89"}.items():
        (folder / name).write_text(text)
    assert read_rows(folder) == [{"text": "# One"}, {"text": "two\nlines"}, {"text": "deep"}]
    assert read_rows(folder / "b.txt") == [{"text": "two\nlines"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("one", ROWS),
        ("one[train[3:]]", ROWS[3:]),
        ("two[test]", ROWS[:1]),
        ("two[train[:40%]+test]", [*ROWS[:2], *ROWS[:1]]),
        ("rows.csv[train[-1:]]", ROWS[4:]),
        ("files[test]", ROWS[:1]),
        ("files[train[1:3]]", ROWS[1:3]),
        ("files:small", ROWS[:1]),
    ],
)
def test_a_directory_has_splits_as_datasets_writes_them(source, expected, place, monkeypatch):
    Dataset.from_list(ROWS).save_to_disk(place / "one")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(place / "two")
    (place / "files").mkdir()
    for name, of_split in (("train", ROWS), ("test", ROWS[:1])):
        parquet_of(of_split, place / "files" / f"{name}-00000-of-00001.parquet")
    if ":small" in source:
        (place / "files" / "README.md").write_text(
            "---\nconfigs:\n- config_name: small\n  data_files: test-*.parquet\n- config_name: all\n"
            "  data_files: '*.parquet'\n---\n"
        )
    monkeypatch.chdir(place)
    assert read_rows(source) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("two", r"two has the splits train, test, expected the name of one: write 'two\[train\]'"),
        ("two[tran]", "expected a split as datasets writes it, .* did you mean 'train'"),
        ("two[train[:]", "expected a split as datasets writes it"),
        ("two:big[train]", "two has no configurations, found 'big'"),
        ("rows.csv:big", "rows.csv has no configurations"),
        ("empty", "empty: expected files of rows .* found none"),
        ("escaping", "expected only files within it, found .*outside"),
        ("scripted", "datasets cannot load it|expected files of rows"),
        ("rows.csv[train[5:]]", "holds no rows"),
    ],
)
def test_a_directory_that_cannot_be_read_is_refused(source, message, place, monkeypatch):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(place / "two")
    for name in ("empty", "escaping", "scripted", "outside"):
        (place / name).mkdir()
    parquet_of(ROWS, place / "outside" / "rows.parquet")
    parquet_of(ROWS, place / "escaping" / "train.parquet")
    (place / "escaping" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: ../outside/rows.parquet\n---\n"
    )
    (place / "scripted" / "scripted.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(place)
    refused(source, message)


def test_an_image_that_a_row_names_is_not_opened(monkeypatch):
    features = Features({**{key: Value("string") for key in ROWS[0]}, "picture": Image()})
    stored = pyarrow.array([{"bytes": None, "path": "/nowhere.png"}], Image().pa_type)
    table = pyarrow.table({**{key: pyarrow.array([value]) for key, value in ROWS[0].items()}, "picture": stored})
    of_hub = Dataset(table, info=datasets.DatasetInfo(features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: of_hub)
    monkeypatch.setattr(Image, "decode_example", lambda *_, **__: pytest.fail("an image was opened"))
    assert read_rows("org/name")[0]["picture"] == {"bytes": None, "path": "/nowhere.png"}


# The hub


def test_a_name_on_the_hub_goes_to_datasets_and_runs_no_code(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        whole = Dataset.from_list(ROWS)
        return whole if options["split"] else DatasetDict(train=whole)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("locuslab/TOFU:forget01[train[:20]]") == ROWS
    assert read_rows("locuslab/TOFU?question=answer,answer=question")[0] == {"question": "0", "answer": "Who is 0?"}
    assert asked == [
        (("locuslab/TOFU", "forget01"), {"split": "train[:20]"}),
        (("locuslab/TOFU", None), {"split": None}),
    ]


def test_what_the_hub_refuses_is_one_line(monkeypatch):
    def load(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported,\nbut found rows.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    refused("org/name", "org/name: datasets cannot load it .*scripts are no longer supported, but found rows.py")


@pytest.mark.parametrize("name", ["data/forget.jsonl", "forget", "a/b/c", "/tmp/none/x", "x" * 5000])
def test_the_hub_is_asked_only_for_what_is_written_as_its_name(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    refused(name, "expected rows at .*, found none; check the path")


# Columns

COLUMNS = {
    "unknown": ("question=questoin", "expected the column 'questoin', found none; did you mean 'question'"),
    "far off": ("question=zzz", "expected the column 'zzz', found none; there are answer, question"),
    "no pair": ("question", "columns: expected OURS=THEIRS"),
    "twice": ("text=question,text=answer", "columns: expected OURS=THEIRS, each of ours once"),
    "nothing": ("", "columns: expected OURS=THEIRS"),
}


@pytest.mark.parametrize(("columns", "message"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_that_is_not_there_is_refused(columns, message, place):
    refused(f"{place / 'rows.csv'}?{columns}", message)


def test_columns_are_renamed_and_the_others_stay(place):
    (place / "theirs.csv").write_text("id,prompt?,answer,note\n1,Who?,Bo,x\n")
    got = read_rows(f"{place / 'theirs.csv'}[train[:1]]?question=prompt?, answer=note")
    assert got == [{"id": "1", "question": "Who?", "answer": "x"}]


def test_a_command_names_the_columns_of_all_its_sets_that_name_none(place, capsys):
    (place / "theirs.csv").write_bytes(csv_of([{"q": row["question"], "a": row["answer"]} for row in ROWS]))
    (place / "other.csv").write_bytes(csv_of([{"x": row["question"], "y": row["answer"]} for row in ROWS]))
    columns = ["--columns", "question=q,answer=a"]
    printed = [
        preview(capsys, place / "rows.jsonl"),
        preview(capsys, place / "theirs.csv", *columns),
        preview(capsys, f"{place / 'other.csv'}?question=x,answer=y", *columns),
    ]
    assert [status for status, _ in printed] == [0, 0, 0]
    assert len({captured.out for _, captured in printed}) == 1
    status, captured = preview(capsys, place / "rows.jsonl", *columns)
    assert status == 2
    assert "expected the column 'q', found none" in captured.err


def test_a_set_that_is_a_part_of_the_output_is_seen(place):
    file = place / "rows.jsonl"
    options = argparse.Namespace(output="out", forget=f"{file}[train[:2]]?question=q", retain=f"{place}:config[test]")
    assert {path for _, _, path in _output._inputs(options)} >= {file, place}


# Layouts of benchmarks

LAYOUTS = {
    "TOFU": (
        {"question": "Q?", "answer": "A", "paraphrased_answer": "B", "perturbed_answer": ["C"]},
        {"question": "Q?", "answer": "A", "paraphrased_answer": "B", "perturbed_answer": ["C"]},
    ),
    "MUSE": ({"prompt": "P", "gt": "G"}, {"prompt": "P", "completion": "G"}),
    "RWKU": (
        {"query": "Q?", "answer": "A", "level": "2", "subject": "S"},
        {"question": "Q?", "answer": "A"},
    ),
    "WMDP": (
        {"question": "Q?", "choices": ["a", "b", "c"], "answer": 1},
        {"question": "Q?", "answer": "b", "perturbed_answer": ["a", "c"]},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_benchmarks_layout_is_recognised_and_said(name, tmp_path, capsys):
    given, ours = LAYOUTS[name]
    (tmp_path / "rows.json").write_text(json.dumps([given, given]))
    assert read_rows(tmp_path / "rows.json") == [ours, ours]
    assert f"rows.json: rows as {name} has them; " in capsys.readouterr().err
    load_samples(tmp_path / "rows.json", TOKENIZER)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q?", "answer": "A"},
        {"question": "Q?", "choices": ["a"], "answer": 3},
        {"question": "Q?", "choices": ["a", "b"], "answer": True},
        {"text": "T"},
    ],
)
def test_other_rows_stay_as_they_are(row, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert read_rows(tmp_path / "rows.json") == [row]
    assert capsys.readouterr().err == ""


def test_a_texts_list_is_texts(tmp_path):
    (tmp_path / "forget.json").write_text(json.dumps(["a", "b"]))
    assert read_rows(tmp_path / "forget.json") == [{"text": "a"}, {"text": "b"}]


# What lies, is damaged, or runs code

LIES = {
    "script.py": (b"raise SystemExit('ran')", "scripts and pickles can run code"),
    "rows.pkl": (pickle.dumps(ROWS), "scripts and pickles can run code"),
    "rows.pkl.gz": (gzip.compress(pickle.dumps(ROWS)), "scripts and pickles can run code"),
    "rows.jsonl": (gzip.compress(b"{}"), "is gzip, expected JSON lines by its name"),
    "rows.csv": (b"PAR1....", "is Parquet, expected CSV by its name"),
    "rows.json": (b"PK\x03\x04", "is a zip archive, expected JSON by its name"),
    "a.jsonl.gz": (b'{"text": "a"}', "is not gzip, or damaged"),
    "b.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 99)[:-12], "is not gzip, or damaged"),
    "a.parquet": (b"question,answer\na,b\n", "cannot be read as Parquet"),
    "b.parquet": (b"", "cannot be read as Parquet"),
    "a.csv": (b"", "holds no rows"),
    "b.csv": (b"question,answer\n", "holds no rows"),
    "c.csv": (b"question,answer\na\n", "cannot be read as CSV .*Expected 2 columns, got 1"),
    "d.csv": (b"question,question\na,b\n", "expected each column once, found 'question' twice"),
    "e.csv": (b"question,answer\n\xff,b\n", "cannot be read as CSV .*UTF8"),
    "a.json": (b'[{"text": "a"}', "not JSON"),
    "b.json": (b'[{"text": "a"}, 7]', "row 2: expected a JSON object, found a int"),
    "c.json": (b"[]", "holds no rows"),
    "d.json": (b"[" * 10**5, "nested too deeply"),
    "a.txt": (b'{"text": "a"}\n{"text": "b"}\n', "holds JSON lines, expected a text by its name"),
    "b.md": (b" \n", "holds no rows"),
    "c.txt": (b"\xff", "not UTF-8"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_is_not_what_its_name_says_is_refused(name, tmp_path):
    content, message = LIES[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f"{name}.*{message}")


BOMBS = {
    "bomb.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b" " * 10**6)),
    "bomb.csv.gz": lambda path: path.write_bytes(gzip.compress(b"question\n" + b"a\n" * 10**6)),
    "pages.parquet": lambda path: parquet_of([{"text": "a" * 10**7}], path, "zstd"),
    "dictionary.parquet": lambda path: parquet_of([{"text": "a" * 10**4}] * 2000, path),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_bursts_is_refused_before_it_is_held(name, tmp_path, monkeypatch):
    BOMBS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size < 100_000
    monkeypatch.setattr(limits, "ALWAYS_UNPACKED", 100_000)
    monkeypatch.setattr(limits, "LARGEST_EXPANSION", 50)
    refused(tmp_path / name, f"{name} unpacks to more than [0-9,]+ bytes")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_more_rows_than_can_be_held_are_refused(name, place, monkeypatch):
    monkeypatch.setattr(row_files, "MOST_ROWS", 4)
    refused(place / name, "expected at most 4 rows, found more")


@pytest.mark.parametrize("name", ["pipe", "pipe.csv", "pipe.jsonl.gz"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    (tmp_path / "saved").mkdir()
    os.mkfifo(tmp_path / "saved" / name)
    refused(tmp_path / "saved" / name, "no regular file")
    refused(tmp_path / "saved", "no regular file")


# The preview


def preview(capsys, *arguments):
    status = main(["rows", *map(str, arguments), "--model", str(builders.llama_directory())])
    return status, capsys.readouterr()


def test_a_preview_marks_what_carries_loss_and_counts(place, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    monkeypatch.setattr("peft_perta.model.loading.load_base", lambda *_, **__: pytest.fail("the model was loaded"))
    mixed = [{"text": "abcdefgh"}, *ROWS[:2], {"question": "Who?", "answer": "x" * 40}]
    (place / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    status, printed = preview(capsys, place / "mixed.jsonl", "--show", "2", "--max-length", "32")
    assert status == 0
    assert printed.out.startswith("What carries loss is between [[ and ]].\n\nrow 1: 9 tokens, 8 with loss\n")
    assert "\na[[bcdefgh<eos>]]\n" in printed.out, "no token before the first one predicts it"
    assert f"row 4: 32 tokens, 10 with loss\nQuestion: Who?\nAnswer:[[ {'x' * 9}]]\n" in printed.out
    assert "row 2: " not in printed.out
    lines = [" ".join(line.split()) for line in printed.out.splitlines()[-5:]]
    assert lines == [
        "rows 4",
        "samples 4 the longest has 32 tokens",
        f"tokens {9 + 30 + 30 + 32}",
        f"with loss {8 + 3 + 3 + 10}",
        "cut 32 tokens of 1 rows, at --max-length 32",
    ]


def test_a_preview_without_rows_counts_alone(place, capsys):
    status, printed = preview(capsys, place / "rows.csv", "--show", "0")
    assert (status, printed.out.split()[:2]) == (0, ["rows", "5"])
    status, printed = preview(capsys, place / "rows.csv", "--show", "-1")
    assert (status, "--show: expected a number of rows, found -1" in printed.err) == (2, True)


def test_a_preview_is_in_bold_on_a_terminal_and_escapes_what_others_wrote(monkeypatch):
    sample = load_samples([{"prompt": "a", "completion": "b"}], TOKENIZER)[0]
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids, **_: "".join("\x1b[2J" if i == 2 else "x" for i in ids))
    sample = dataclasses.replace(sample, input_ids=torch.tensor([5, 2, 6]), labels=torch.tensor([IGNORED, IGNORED, 6]))
    assert rows._shown(sample, TOKENIZER, rows._BOLD).splitlines()[1] == "x\\x1b[2J\x1b[1mx\x1b[0m"
