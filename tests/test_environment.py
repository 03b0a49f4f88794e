"""What the machine refuses, and variables and numbers that cannot be meant: one line each, before any computation."""

import os
import resource
import shutil
import sys
from pathlib import Path

import builders
import pytest
import test_suites_tofu
import torch
from safetensors.torch import load_file, save_file
from test_kill_points import HERE, intact  # noqa: F401 - a fixture
from test_preflight import BOTH, COMMANDS, GROWING, tree

from peft_perta.cli import main

LONG = "a" * 300
FEW = ("evaluate", "run")  # the files of evaluate are smaller; run is made of the other commands
DIGITS = "9" * 400


@pytest.fixture
def place(intact, tmp_path):  # noqa: F811
    return shutil.copytree(intact, tmp_path / "place")


def filled(command, place, output="out", **options):
    texts = HERE[command].format(place=place, adapter=place / "mine").split()
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [
        *command.split(),
        "--model",
        str(builders.llama_directory()),
        *texts,
        *more,
        "--output",
        str(place / output),
    ]


def refusal(arguments, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert "peft-perta: error: " in printed
    return printed


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("command", ["unlearn", "train", "refine"])
def test_a_launchers_variable_that_is_no_number(command, name, place, monkeypatch, capsys):
    monkeypatch.setenv(name, "abc")
    assert f"{name} is 'abc', expected a number" in refusal(filled(command, place), capsys)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("unlearn", "host-memory", DIGITS),
        ("unlearn", "max-memory", f"{DIGITS}GiB"),
        ("unlearn", "rank", DIGITS),
        ("forget", "rank", 10**9),
        ("train", "rank", 10**9),
        ("fuse", "rank", 10**9),
        ("forget", "batch-size", 10**9),
        ("train", "batch-size", 10**9),
        ("forget", "epochs", 1e300),
        ("train", "epochs", 1e300),
        ("forget", "lora-alpha", DIGITS),
    ],
)
def test_a_number_that_cannot_be_meant(command, option, value, place, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    before = tree(place)
    assert "expected" in refusal(filled(command, place, **{option: value}), capsys)
    assert tree(place) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_is_too_long_for_an_output(command, place, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    before = tree(place)
    assert "File name too long; choose a shorter name" in refusal(filled(command, place, LONG), capsys)
    assert tree(place) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["unlearn", "--model", LONG, "--forget-adapter", "forget", *BOTH.format(place=".").split(), "--output", "o"],
        ["verify", LONG],
        ["inspect", LONG],
        ["rescore", LONG, "--output", "o"],
        ["compare", "--list", "--json", LONG],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_is_too_long_for_an_input(arguments, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert "File name too long" in refusal(arguments, capsys)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep a working directory")
def test_a_working_directory_that_is_gone(tmp_path, capsys):
    gone, here = tmp_path / "gone", Path.cwd()
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        assert "the working directory is gone" in refusal(["inspect", "x"], capsys)
    finally:
        os.chdir(here)


@pytest.fixture
def disk():
    """Sets the most bytes that a file may have: the writes beyond it fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "size"),
    [
        *((name, 100 if name in FEW else 1500) for name in COMMANDS),
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name in COMMANDS
            if name not in FEW
            for size in (100, 6000)
        ),
    ],
)
def test_a_full_disk(command, size, place, disk, capsys):
    before = tree(place)
    disk(size)
    status = main(filled(command, place))
    disk(2**40)
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2, printed
    assert "error" in printed
    assert "out" not in {path.name for path in place.iterdir()} or command in GROWING
    kept = {path: content for path, content in tree(place).items() if not path.startswith(str(place / "out"))}
    assert kept == before  # the rest as it was, and nothing half-written beside it
    assert main(filled(command, place)) == 0  # with space, the same command goes on


def test_a_full_disk_at_the_optimisers_file(place, disk, capsys):
    """It is the largest file of a checkpoint, and torch.save writes it."""
    adapter = (place / "mine" / "adapter_model.safetensors").stat().st_size
    disk(adapter + 3000)
    printed = refusal(filled("train", place), capsys)
    disk(2**40)
    assert "could not be written" in printed
    assert "free some space" in printed
    assert main(filled("train", place)) == 0


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA")],
    ids=["python", "host", "gpu"],
)
def test_too_little_memory(error, place, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("peft_perta.cli.fuse.run", fails)
    assert "out of memory" in refusal(filled("fuse", place), capsys)


def test_only_a_cache_of_the_hub_may_link_to_its_blobs(place, tmp_path, capsys):
    """A directory ``snapshots`` of anybody else is none."""
    base = shutil.copytree(builders.llama_directory(), tmp_path / "home" / "snapshots" / "base")
    weights = (base / "model.safetensors").rename(tmp_path / "home" / "secret.safetensors")
    (base / "model.safetensors").symlink_to(weights)
    arguments = ["merge", str(place / "mine"), "--model", str(base), "--output", str(tmp_path / "merged")]
    assert "is not a file of that directory" in refusal(arguments, capsys)


def test_a_base_that_lacks_a_weight_is_not_merged(place, tmp_path, capsys):
    base = shutil.copytree(builders.llama_directory(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    lacking = "model.layers.1.post_attention_layernorm.weight"
    del tensors[lacking]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    arguments = ["merge", str(place / "mine"), "--model", str(base), "--output", str(tmp_path / "merged")]
    assert lacking in refusal(arguments, capsys)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_with_other_metadata_is_the_same_adapter(place, capsys):
    copy = shutil.copytree(place / "mine", place / "copy")
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file(tensors, copy / "adapter_model.safetensors", {"format": "pt", "note": "another file, the same factors"})
    arguments = ["fuse", str(place / "mine"), str(copy), "--model", str(builders.llama_directory())]
    assert "is given twice" in refusal([*arguments, "--output", str(place / "out")], capsys)


def _without_paraphrase(row):
    return {key: value for key, value in row.items() if key != "paraphrased_question"}


def test_an_attack_that_cannot_be_made_is_refused_before_the_suites(place, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    splits = {name: [_without_paraphrase(row) for row in rows] for name, rows in test_suites_tofu.SPLITS.items()}
    test_suites_tofu.write(place / "tofu", splits)
    evaluation = ["--adapter", str(place / "mine"), "--suite", f"tofu={place / 'tofu'}", "--attacks", "paraphrase"]
    arguments = ["evaluate", "--model", str(builders.llama_directory()), *evaluation, "--output", str(place / "out")]
    assert "paraphrase" in refusal(arguments, capsys)
    assert not (place / "out").exists()
