"""The command line: the commands from end to end, their help, and one clear line with status 2 for every bad input."""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import builders
import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_perta import InfluenceSettings, PerTAConfig, UnlearningSettings
from peft_perta.adapters import merge_adapters, save_perta_adapter
from peft_perta.cli import COMMANDS, command_parser, main, merge
from peft_perta.data import encode_row, load_samples
from peft_perta.evaluation import losses_of
from peft_perta.perta import FITS, GRANULARITIES, WEIGHTINGS
from peft_perta.training import (
    COMBINERS,
    FORGET_LOSSES,
    RETAIN_LOSSES,
    default_lora_config,
    train_forget_adapter,
)

RANKS = "rank: expected None, an int from 1 to 256, or a float in \\(0, 1\\), found "


@dataclasses.dataclass
class Place:
    """The working directory of a user, with the user's files: adapters and rows."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def rows(self, name: str, *rows: dict) -> Path:
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, name: str, text: str) -> Path:
        (self / name).write_text(text)
        return self / name

    def adapter(self, name: str, **config: object) -> Path:
        """A copy of the forget adapter, with another config."""
        shutil.copytree(self / "forget", self / name)
        file = self / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return self / name

    def unlearn(self, *flags: str, **options: object) -> list[str]:
        settings = {
            "model": builders.llama_directory(),
            "forget_adapter": self / "forget",
            "forget": self / "forget.jsonl",
            "retain": self / "retain.jsonl",
            "output": self / "out",
        }
        return ["unlearn", *flags, *as_arguments({**settings, **options})]

    def forget(self, *flags: str, **options: object) -> list[str]:
        settings = {
            "model": builders.llama_directory(),
            "forget": self / "forget.jsonl",
            "output": self / "out",
            "rank": 2,
        }
        return ["forget", *flags, *as_arguments({**settings, **options})]


def as_arguments(options: dict) -> list[str]:
    """--key value; --key where the value is True."""
    given = {"--" + key.replace("_", "-"): value for key, value in options.items() if value is not None}
    return [part for key, value in given.items() for part in ((key,) if value is True else (key, str(value)))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    builders.adapted_saved_llama().save_pretrained(path)
    return path


@pytest.fixture
def place(saved, tmp_path, monkeypatch) -> Place:
    created = Place(tmp_path / "place")
    shutil.copytree(saved, created.path)
    created.rows("forget.jsonl", *builders.forget_rows())
    created.rows("retain.jsonl", *builders.retain_rows())
    (created / "theirs").mkdir()
    created.write("theirs/thesis.txt", "not ours")
    monkeypatch.chdir(created.path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "1000")
    return created


def tree(place: Place) -> dict[str, str]:
    """The hash of every file, and every directory."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(place.path.rglob("*"))
    }


def run(arguments: list[str]) -> int | str | None:
    try:
        return main(arguments)
    except SystemExit as exit:  # raised by argparse
        return exit.code


# End to end


def quantised(flags: list[str]):
    return builders.nf4_llama() if flags else builders.saved_llama()


@pytest.mark.parametrize("flags", [[], ["--four-bit"]], ids=["float", "four-bit"])
def test_forget_then_unlearn_then_inspect(place, flags, capsys):
    """The negative adapter removes what the forget adapter learned; inspect shows how it was made."""
    learned = {"epochs": 25, "learning_rate": 0.01, "batch_size": 4, "output": place / "learned"}
    assert main(place.forget(*flags, **learned)) == 0
    assert f"the forget adapter is in {place / 'learned'}" in capsys.readouterr().out
    assert (place / "learned" / "adapter_model.safetensors").is_file()

    assert main(place.unlearn(*flags, forget_adapter=place / "learned")) == 0
    out = capsys.readouterr().out
    assert "grad weights per factor, strength 1, from 5 forget, 4 retain samples" in out
    assert f"It is in {place / 'out'}" in out
    provenance = json.loads((place / "out" / "perta_provenance.json").read_text())
    assert provenance["config"] == {**PerTAConfig().to_dict(), "max_length": 256}  # the positions of the tiny model
    assert (provenance["base_model"]["quantization"] is None) == (not flags)

    model = PeftModel.from_pretrained(quantised(flags), place / "learned", adapter_name="learned")
    model.load_adapter(place / "out", adapter_name="negative")
    base, knows, stacked = (
        float(losses_of(model, load_samples(builders.forget_rows(), builders.tokenizer()), adapters=adapters).mean())
        for adapters in ([], ["learned"], ["learned", "negative"])
    )
    assert knows < 0.7 * base, "the forget adapter learned the rows"
    assert knows + 0.2 * (base - knows) < stacked, "the negative adapter removes a part of it"

    assert main(["inspect", str(place / "out")]) == 0
    out = capsys.readouterr().out
    assert str(builders.llama_directory()) in out
    assert f"quantisation {'bitsandbytes' if flags else 'none'}" in out
    assert "CHANGED" not in out
    assert out.count("as emitted") == 2
    layers = [layer["name"] for layer in provenance["layers"]]
    assert len(layers) == 14
    described = [line.split()[0] for line in out.splitlines() if line.startswith("model.layers.")]
    assert described == layers


OPTIONS = {
    "weighting": "fisher",
    "granularity": "delta",
    "power": 1.5,
    "rank": 3,
    "fit": "kronecker",
    "allocation": "padded",
    "input_directions": True,
    "strength": 0.5,
    "target_forget_loss": 3.5,
    "retain_tolerance": 0.5,
    "fit_kl_samples": 2,
    "gradients_at": "full",
    "max_samples": 3,
    "seed": 5,
    "batch_size": 2,
    "max_memory": "40GiB",
    "host_memory": "50GB",
    "max_length": 64,
    "dtype": "bfloat16",
}


def test_every_option_reaches_the_library(place):
    """The command gives the adapter of the call, bit for bit: a swapped set or a dropped option would change it."""
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(PerTAConfig)}
    assert not set(OPTIONS.items()) & set(PerTAConfig().to_dict().items()), "no value may be the default"
    assert main(place.unlearn(task_adapter=place / "task", **OPTIONS)) == 0
    _, expected, _ = builders.negate(builders.adapted_saved_llama(), task_adapter="task", **OPTIONS)
    provenance = json.loads((place / "out" / "perta_provenance.json").read_text())
    assert provenance["config"] == OPTIONS
    assert provenance["task_adapter"] == "task"
    saved = load_file(place / "out" / "adapter_model.safetensors")
    assert set(saved) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(saved[key], tensor), key


TRAINING = {"epochs": 3.0, "learning_rate": 0.01, "batch_size": 2, "seed": 7, "max_length": 42, "rank": 3}


def test_every_training_option_reaches_the_library(place):
    """The command gives the adapter of the call, bit for bit; no value is the default, and a row exceeds 42 tokens."""
    assert main(place.forget(**TRAINING)) == 0
    train_forget_adapter(
        builders.saved_llama(),
        builders.forget_rows(),
        builders.tokenizer(),
        place / "expected",
        lora_config=default_lora_config(3),
        max_length=42,
        num_train_epochs=3.0,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        seed=7,
        show_progress_bar=False,
    )
    assert any(len(encode_row(row, builders.tokenizer()).input_ids) > 42 for row in builders.forget_rows())
    saved, expected = (load_file(place / name / "adapter_model.safetensors") for name in ("out", "expected"))
    assert set(saved) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(saved[key], tensor), key


def test_uniform_needs_no_rows_and_inspect_shows_it(place, capsys):
    assert main(place.unlearn(weighting="uniform", forget=None, retain=None)) == 0
    assert main(["inspect", str(place / "out")]) == 0
    out = capsys.readouterr().out
    assert "uniform weights per factor, strength 1, from no samples" in out
    assert "A 1.00 (1.00..1.00) [         █]" in out


@pytest.mark.parametrize(("rank", "expected"), [("0.5", 0.5), ("5e-1", 0.5), ("4", 4)])
def test_a_rank_is_an_int_and_an_energy_a_float(place, rank, expected):
    assert main(place.unlearn(weighting="uniform", forget=None, retain=None, rank=rank)) == 0
    recorded = json.loads((place / "out" / "perta_provenance.json").read_text())["config"]["rank"]
    assert (recorded, type(recorded)) == (expected, type(expected))


def test_a_users_own_weighting_may_be_in_the_working_directory(place, capsys):
    place.write("mine.py", "import torch\n\ndef half(forget, retain):\n    return torch.full_like(forget, 0.5)\n")
    assert main(place.unlearn(weighting="mine:half")) == 0
    assert "mine:half weights per factor" in capsys.readouterr().out
    assert main(["inspect", str(place / "out")]) == 0
    assert "A 0.50 (0.50..0.50)" in capsys.readouterr().out
    sys.modules.pop("mine")


def test_an_output_of_ours_is_replaced(place):
    for strength in (1.0, 2.0):
        arguments = place.unlearn(weighting="uniform", forget=None, retain=None, strength=strength)
        assert main(arguments) == 0
        provenance = json.loads((place / "out" / "perta_provenance.json").read_text())
        assert provenance["config"]["strength"] == strength
    assert not [path for path in place.path.iterdir() if path.name.startswith(".")], "a temporary file is left"


def test_inspect_sees_that_a_file_was_changed(place, capsys):
    assert main(place.unlearn(weighting="uniform", forget=None, retain=None)) == 0
    config = place / "out" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert main(["inspect", str(place / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("adapter_config.json")] == ["CHANGED"]
    assert [line.split()[1] for line in lines if line.startswith("adapter_model.safetensors")] == ["as"]


def calibration(place, *, emitted=False, **options):
    """The arguments of calibrate; ``emitted``: first write a negative adapter to unlearned/."""
    if emitted and not (place / "unlearned").exists():
        save_perta_adapter(place / "unlearned", *builders.negate(builders.adapted_saved_llama()))
    settings = {
        "model": builders.llama_directory(),
        "adapter": place / "unlearned",
        "forget": place / "forget.jsonl",
        "retain": place / "retain.jsonl",
        "retain_tolerance": 0.05,
        "output": place / "calibrated",
    }
    return ["calibrate", *as_arguments({**settings, **options})]


def test_calibrate_fuse_merge_verify(place, capsys):
    """From a negative adapter to a merged model: each command takes the output of the one before."""
    base = str(builders.llama_directory())
    arguments = calibration(place, emitted=True, task_adapter=place / "task", forget_adapter=place / "forget")
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "for the most forgetting at a retain loss of at most" in out
    curve = json.loads((place / "calibrated" / "strength.json").read_text())
    assert (place / "calibrated" / "strength.png").is_file()
    assert curve["losses"]["retain"] <= curve["target"]
    assert len(curve["negation"]) > 1
    given, scaled = (load_file(place / name / "adapter_model.safetensors") for name in ("unlearned", "calibrated"))
    for key, tensor in scaled.items():
        factor = curve["strength"] if ".lora_B." in key else 1.0
        torch.testing.assert_close(tensor, given[key] * factor)
    assert f"| with it | {curve['losses']['forget']:.3f}" in (place / "calibrated" / "README.md").read_text()

    assert main(["verify", str(place / "calibrated"), "--base", base]) == 0
    assert "every check passed" in capsys.readouterr().out

    parts = [str(place / "task"), f"{place / 'calibrated'}:0.5"]
    assert main(["fuse", *parts, "--model", base, "--output", str(place / "fused")]) == 0
    assert f"1 x {place / 'task'} + 0.5 x {place / 'calibrated'} as one adapter of rank 16" in capsys.readouterr().out
    assert main(["verify", str(place / "fused"), "--base", base]) == 0
    capsys.readouterr()
    assert main(["inspect", str(place / "fused")]) == 0
    assert capsys.readouterr().out.count("as emitted") == 2

    merge = ["merge", *parts, "--model", base, "--check", str(place / "forget.jsonl")]
    assert main([*merge, "--output", str(place / "merged")]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 answers are the same" in out
    assert "rounding to 4 bits can undo the edit" in out
    assert main(["verify", str(place / "fused"), "--base", str(place / "merged")]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_merged_model_that_is_not_the_stack_ends_with_status_1(place, capsys, monkeypatch):
    def merge_at_half(model, parts, output, **options):
        return merge_adapters(model, {part: strength / 2 for part, strength in parts.items()}, output, **options)

    command = ["merge", str(place / "task"), "--model", str(builders.llama_directory())]
    command += ["--check", str(place / "forget.jsonl"), "--output", str(place / "merged")]
    assert main(command) == 0
    assert "DISAGREE" not in capsys.readouterr().out
    monkeypatch.setattr(merge, "merge_adapters", merge_at_half)
    assert main(command) == 1
    assert "They DISAGREE" in capsys.readouterr().out


def test_verify_measures_the_losses_of_rows(place, capsys):
    save_perta_adapter(place / "unlearned", *builders.negate(builders.adapted_saved_llama(), strength=-1.0))
    rows = ["--forget", str(place / "forget.jsonl"), "--retain", str(place / "retain.jsonl")]
    verify = ["verify", str(place / "unlearned"), "--base", str(builders.llama_directory()), *rows]
    status = main([*verify, "--task-adapter", str(place / "task")])
    lines = {line.split()[2]: line for line in capsys.readouterr().out.splitlines() if "re-evaluated" in line}
    off, on = (float(part.split()[0]) for part in lines["forget"].split("loss")[1].split(","))
    assert lines["forget"].startswith("pass" if on > off else "FAIL")
    assert status == (0 if on > off else 1)
    assert "without it" in lines["retain"]


# Bad input

BEFORE_LOADING = True  # refused before the model is loaded, which may take minutes
Case = tuple[Callable[[Place], list[str]], str, bool]


def cut(path: Path) -> Path:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    return path


def pickled(path: Path) -> Path:
    (path / "adapter_model.safetensors").unlink()
    torch.save({}, path / "adapter_model.bin")
    return path


def dora(path: Path) -> Path:
    model = builders.with_adapters(builders.saved_llama(), builders.lora_config(use_dora=True))
    model.save_pretrained(path)
    return path / "forget"


def narrow(path: Path) -> Path:
    """A forget adapter of a model whose layers have the same names and other widths."""
    shutil.copytree(builders.llama_directory(), path)
    config = json.loads((path / "config.json").read_text())
    model = builders.LlamaForCausalLM(builders.LlamaConfig(**{**config, "hidden_size": 32, "head_dim": 8}))
    builders.with_adapters(model).save_pretrained(path / "adapters")
    return path / "adapters" / "forget"


def gpt2(path: Path) -> Path:
    builders.adapted_gpt2().save_pretrained(path)
    return path / "forget"


UNLEARN: dict[str, Case] = {
    "no such file": (lambda p: p.unlearn(forget=p / "none.jsonl"), r"at .*none\.jsonl, found none", BEFORE_LOADING),
    "a directory without rows": (
        lambda p: p.unlearn(retain=(p / "void").mkdir() or p / "void"),
        r"void: expected files of rows .*, found none",
        BEFORE_LOADING,
    ),
    "malformed JSON": (
        lambda p: p.unlearn(retain=p.write("bad.jsonl", '{"text": "good"}\n\n{"question": \n')),
        r"bad\.jsonl, line 3: not JSON",
        BEFORE_LOADING,
    ),
    "a line that is no object": (
        lambda p: p.unlearn(forget=p.write("bad.jsonl", '{"text": "good"}\n["text"]\n')),
        r"bad\.jsonl, line 2: expected a JSON object, found a list",
        BEFORE_LOADING,
    ),
    "empty JSONL": (
        lambda p: p.unlearn(forget=p.write("empty.jsonl", "\n")),
        r"empty\.jsonl holds no rows",
        BEFORE_LOADING,
    ),
    "empty completion": (
        lambda p: p.unlearn(forget=p.rows("f.jsonl", {"text": "T"}, {"prompt": "P", "completion": ""})),
        r"the forget set \(.*f.jsonl\), row 2: 'completion' is empty",
        False,
    ),
    "unknown keys": (
        lambda p: p.unlearn(retain=p.rows("r.jsonl", {"query": "Q"})),
        r"the retain set \(.*r.jsonl\), row 1: expected question/answer or .*, found the keys \['query'\]",
        False,
    ),
    "completion cut away": (
        lambda p: p.unlearn(max_length=4),
        r"the forget set \(.*\), row 1: no token of the completion is left within max_length=4",
        False,
    ),
    "one set twice": (
        lambda p: p.unlearn(retain=p / "forget.jsonl"),
        "every row of the retain set is in the forget set",
        False,
    ),
    "no retain set": (lambda p: p.unlearn(retain=None), "--retain: expected a file of rows", BEFORE_LOADING),
    "no forget set": (lambda p: p.unlearn(forget=None), "--forget: expected a file of rows", BEFORE_LOADING),
    "rank 0": (lambda p: p.unlearn(rank=0), RANKS + "0$", BEFORE_LOADING),
    "rank 257": (lambda p: p.unlearn(rank=257), RANKS + "257$", BEFORE_LOADING),
    "rank 1.5": (lambda p: p.unlearn(rank=1.5), RANKS + r"1\.5$", BEFORE_LOADING),
    "a weighted fit spread": (
        lambda p: p.unlearn(fit="weighted", allocation="pattern"),
        "allocation: expected 'uniform' with fit='weighted'",
        BEFORE_LOADING,
    ),
    "rank of text": (
        lambda p: p.unlearn(rank="many"),
        "--rank: expected an int or a float, found 'many'",
        BEFORE_LOADING,
    ),
    "strength NaN": (lambda p: p.unlearn(strength="nan"), "strength: expected a finite number", BEFORE_LOADING),
    "strength of text": (
        lambda p: p.unlearn(strength="much"),
        "strength: expected a finite number or 'auto', found 'much'",
        BEFORE_LOADING,
    ),
    "power below 0": (lambda p: p.unlearn(power="-1"), "power: expected None, or a finite number", BEFORE_LOADING),
    "batch size 0": (lambda p: p.unlearn(batch_size=0), "batch_size: expected an int > 0", BEFORE_LOADING),
    "no samples": (lambda p: p.unlearn(max_samples=0), "max_samples: expected None, or an int > 0", BEFORE_LOADING),
    "unknown granularity": (
        lambda p: p.unlearn(granularity="layer"),
        "--granularity: invalid choice: 'layer' .choose from .*factor",
        BEFORE_LOADING,
    ),
    "unknown dtype": (lambda p: p.unlearn(dtype="int8"), "--dtype: invalid choice: 'int8'", BEFORE_LOADING),
    "unknown option": (lambda p: p.unlearn(depth=3), "unrecognized arguments: --depth 3", BEFORE_LOADING),
    "no output": (lambda p: p.unlearn(output=None), "required: --output", BEFORE_LOADING),
    "unknown weighting": (
        lambda p: p.unlearn(weighting="fishr"),
        r"weighting: expected one of \[.*'grad'.*\] or 'package.module:attribute', found 'fishr'",
        BEFORE_LOADING,
    ),
    "weighting of no module": (
        lambda p: p.unlearn(weighting="no_such_module:weigh"),
        "weighting 'no_such_module:weigh' cannot be imported: No module named 'no_such_module'",
        BEFORE_LOADING,
    ),
    "weighting of no attribute": (
        lambda p: p.unlearn(weighting="json:weigh"),
        "weighting 'json:weigh' cannot be imported: module 'json' has no attribute 'weigh'",
        BEFORE_LOADING,
    ),
    "weighting that is no function": (
        lambda p: p.unlearn(weighting="json:__name__"),
        "weighting 'json:__name__' is a str; expected a Weighting or a function",
        BEFORE_LOADING,
    ),
    "output of another tool": (
        lambda p: p.unlearn(output=p / "theirs"),
        r"theirs exists and was not written by peft_perta",
        BEFORE_LOADING,
    ),
    "output is a file": (lambda p: p.unlearn(output=p / "forget.jsonl"), "is a file", BEFORE_LOADING),
    "no such adapter": (
        lambda p: p.unlearn(forget_adapter=p / "none"),
        "none is not an adapter directory: expected adapter_config.json in it",
        BEFORE_LOADING,
    ),
    "no such task adapter": (
        lambda p: p.unlearn(task_adapter=p / "none"),
        "none is not an adapter directory: expected adapter_config.json in it",
        BEFORE_LOADING,
    ),
    "pickled adapter": (
        lambda p: p.unlearn(forget_adapter=pickled(p.adapter("pickled"))),
        r"only a pickled adapter_model\.bin, which is never loaded",
        BEFORE_LOADING,
    ),
    "corrupted adapter": (
        lambda p: p.unlearn(forget_adapter=cut(p.adapter("cut"))),
        r"adapter_model\.safetensors is damaged",
        BEFORE_LOADING,
    ),
    "adapter config that is no JSON": (
        lambda p: p.unlearn(forget_adapter=p.write("forget/adapter_config.json", "{").parent),
        r"adapter_config\.json is not JSON",
        BEFORE_LOADING,
    ),
    "adapter of a base by another name": (
        lambda p: p.unlearn(forget_adapter=p.adapter("other", base_model_name_or_path="else/where")),
        "adapter 'forget' was trained on the base 'else/where', but the model is",
        False,
    ),
    "adapter of a base of other widths": (
        lambda p: p.unlearn(forget_adapter=narrow(p / "narrow")),
        "the adapter in .* does not fit the model: .*size mismatch",
        False,
    ),
    "adapter of another architecture": (
        lambda p: p.unlearn(forget_adapter=gpt2(p / "gpt2")),
        "the adapter in .* does not fit the model: Target modules .* not found",
        False,
    ),
    "task adapter of another architecture": (
        lambda p: p.unlearn(task_adapter=gpt2(p / "gpt2")),
        "the adapter in .* does not fit the model: Target modules .* not found",
        False,
    ),
    "DoRA": (lambda p: p.unlearn(forget_adapter=dora(p / "dora")), r"LoRA variant \(use_dora=True\)", BEFORE_LOADING),
    "no such model": (
        lambda p: p.unlearn(model="no-such-owner/no-such-model"),
        "the model 'no-such-owner/no-such-model' cannot be loaded",
        False,
    ),
    "no such directory for a model": (
        lambda p: p.unlearn(model=p / "none"),
        "the model '.*none' cannot be loaded: .* Expected a directory with config.json",
        False,
    ),
    "a directory that is no model": (lambda p: p.unlearn(model=p / "theirs"), "theirs' cannot be loaded", False),
}
FORGET: dict[str, Case] = {
    "rank 0": (lambda p: p.forget(rank=0), "rank: expected an integer from 1 to 256, found 0", BEFORE_LOADING),
    "rank of text": (lambda p: p.forget(rank="many"), "--rank: invalid int value: 'many'", BEFORE_LOADING),
    "no epochs": (
        lambda p: p.forget(epochs=0),
        "--epochs: expected a number > 0, at most 10000, found 0",
        BEFORE_LOADING,
    ),
    "endless epochs": (lambda p: p.forget(epochs="inf"), "--epochs: expected a number > 0", BEFORE_LOADING),
    "learning rate NaN": (
        lambda p: p.forget(learning_rate="nan"),
        "--learning-rate: expected a number > 0, found nan",
        BEFORE_LOADING,
    ),
    "batch size 0": (lambda p: p.forget(batch_size=0), "--batch-size: expected 1 to 10000", BEFORE_LOADING),
    "maximum length 1": (lambda p: p.forget(max_length=1), "--max-length: expected at least 2", BEFORE_LOADING),
    "seed below 0": (lambda p: p.forget(seed=-1), "--seed: expected an int from 0 to 4294967295", BEFORE_LOADING),
    "seed too large": (lambda p: p.forget(seed=2**32), "--seed: expected an int from 0 to 4294", BEFORE_LOADING),
    "no such file": (lambda p: p.forget(forget=p / "none.jsonl"), "found none; check the path", BEFORE_LOADING),
    "empty completion": (
        lambda p: p.forget(forget=p.rows("f.jsonl", {"question": "Q", "answer": " "})),
        r"the forget set \(.*f.jsonl\), row 1: 'answer' is empty",
        False,
    ),
    "output of another tool": (
        lambda p: p.forget(output=p / "theirs"),
        r"theirs exists and was not written by peft_perta",
        BEFORE_LOADING,
    ),
    "output is a negative adapter": (
        lambda p: p.forget(output=p.write("theirs/perta_provenance.json", "{}").parent),
        r"\(no perta_forget\.json\); choose another output",
        BEFORE_LOADING,
    ),
    "no such model": (lambda p: p.forget(model="no-such/model"), "'no-such/model' cannot be loaded", False),
}
OTHERS: dict[str, Case] = {
    "no command": (lambda p: [], "arguments are required: COMMAND", BEFORE_LOADING),
    "unknown command": (lambda p: ["shrink"], "invalid choice: 'shrink' .choose from .*unlearn", BEFORE_LOADING),
    "misspelt command": (
        lambda p: ["relearn"],
        "invalid choice: 'relearn'; did you mean 'unlearn'\\?",
        BEFORE_LOADING,
    ),
    "extrapolate to text": (
        lambda p: ["extrapolate", "--alpha", "far"],
        "--alpha: expected a number or 'auto', found 'far'",
        BEFORE_LOADING,
    ),
    "fuse one": (
        lambda p: ["fuse", str(p / "forget"), "--model", str(builders.llama_directory()), "--output", str(p / "out")],
        "at least two adapters to fuse",
        BEFORE_LOADING,
    ),
    "fuse one twice": (
        lambda p: ["fuse", str(p / "forget"), f"{p / 'forget'}:2", "--model", "m", "--output", str(p / "out")],
        "forget is given twice",
        BEFORE_LOADING,
    ),
    "fuse at no strength": (
        lambda p: ["fuse", str(p / "task"), f"{p / 'forget'}:much", "--model", "m", "--output", str(p / "out")],
        "expected DIR or DIR:STRENGTH with a number, found .*forget:much",
        BEFORE_LOADING,
    ),
    "fuse into another tool's directory": (
        lambda p: ["fuse", str(p / "task"), str(p / "forget"), "--model", "m", "--output", str(p / "theirs")],
        "theirs exists and was not written by peft_perta",
        BEFORE_LOADING,
    ),
    "merge at an endless strength": (
        lambda p: ["merge", f"{p / 'task'}:inf", "--model", "m", "--output", str(p / "out")],
        "task has the strength inf, expected a finite one",
        BEFORE_LOADING,
    ),
    "merge into no model": (
        lambda p: ["merge", str(p / "task"), "--model", str(p / "nowhere"), "--output", str(p / "out")],
        "the model .*nowhere' cannot be loaded",
        BEFORE_LOADING,
    ),
    "calibrate an adapter of another tool": (
        lambda p: calibration(p, adapter=p / "forget"),
        "forget holds no perta_provenance.json",
        BEFORE_LOADING,
    ),
    "calibrate to rows in place of a log": (
        lambda p: calibration(p, emitted=True, retain_only_log=p / "forget.jsonl", retain_tolerance=None),
        "expected an evaluation log like TOFU_EVAL.json",
        BEFORE_LOADING,
    ),
    "calibrate to a negative tolerance": (
        lambda p: calibration(p, emitted=True, retain_tolerance="-1"),
        "either a forget loss or a retain tolerance, finite and above 0",
        BEFORE_LOADING,
    ),
    "calibrate to two goals": (
        lambda p: calibration(p, target_forget_loss=1),
        "--retain-tolerance: not allowed with argument --target-forget-loss|--target-forget-loss: not allowed",
        BEFORE_LOADING,
    ),
    "verify nothing": (lambda p: ["verify", str(p / "nowhere")], "nowhere is no directory", BEFORE_LOADING),
    "verify by rows without a base": (
        lambda p: ["verify", str(p / "forget"), "--forget", str(p / "forget.jsonl")],
        "--forget and --retain need --base",
        BEFORE_LOADING,
    ),
    "demo into another tool's directory": (
        lambda p: ["demo", "--output", str(p / "theirs")],
        "theirs exists and was not written by peft_perta",
        BEFORE_LOADING,
    ),
    "demo's seed": (lambda p: ["demo", "--seed", "x"], "--seed: expected an int from 0 to", BEFORE_LOADING),
    "inspect nothing": (
        lambda p: ["inspect", str(p / "none")],
        r"none holds no perta_provenance\.json; expected a directory that save_perta_adapter wrote",
        BEFORE_LOADING,
    ),
    "inspect a forget adapter": (
        lambda p: ["inspect", str(p / "forget")],
        r"forget holds no perta_provenance\.json",
        BEFORE_LOADING,
    ),
    "inspect broken JSON": (
        lambda p: ["inspect", str(p.write("forget/perta_provenance.json", '{"format": ').parent)],
        r"perta_provenance\.json is damaged",
        BEFORE_LOADING,
    ),
    "inspect JSON of another tool": (
        lambda p: ["inspect", str(p.write("forget/perta_provenance.json", '["format"]').parent)],
        r"perta_provenance\.json is damaged",
        BEFORE_LOADING,
    ),
}
CASES = {
    f"{command}: {name}": case
    for command, cases in (("unlearn", UNLEARN), ("forget", FORGET), ("peft-perta", OTHERS))
    for name, case in cases.items()
}


def refused(place: Place, arguments: list[str], message: str, capfd, recwarn) -> None:
    """Check that a command ends with status 2 and one line on standard error (after argparse's usage, if the arguments
    themselves are wrong), without a traceback or a warning, and without writing a byte anywhere."""
    before = tree(place)
    capfd.readouterr()
    recwarn.clear()
    status = run(arguments)
    out, err = capfd.readouterr()
    assert status == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("usage: peft-perta")]
    assert len(lines) == 1, err
    assert lines[0].startswith("peft-perta")
    assert ": error: " in lines[0]
    assert re.search(message, lines[0]), lines[0]
    shown = [w for w in recwarn if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    assert not shown, [str(w.message) for w in shown]
    assert tree(place) == before, "something was written"


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line(place, name, capfd, recwarn, monkeypatch):
    make_arguments, message, before_loading = CASES[name]
    arguments = make_arguments(place)
    if before_loading:
        monkeypatch.setattr("peft_perta.cli._options.load_base", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was used"))
    refused(place, arguments, message, capfd, recwarn)


def test_the_hub_is_offline_in_tests():
    """The cases above rest on it: a model that does not exist is not looked up on the network."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "change",
    [
        lambda values: {**values, "layers": []},
        lambda values: {**values, "config": {}},
        lambda values: {**values, "base_model": {}},
        lambda values: {**values, "files": None},
        lambda values: {**values, "files": {"gone.txt": "0"}},
        lambda values: {**values, "layers": [{**values["layers"][0], "edit_norm": "large"}]},
    ],
    ids=["layers", "config", "base", "files", "a file", "a norm"],
)
def test_a_damaged_provenance_is_one_clear_line(place, change, capfd, recwarn):
    assert main(place.unlearn(weighting="uniform", forget=None, retain=None)) == 0
    file = place / "out" / "perta_provenance.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    refused(place, ["inspect", str(place / "out")], r"perta_provenance\.json is damaged", capfd, recwarn)


def test_a_corrupted_negative_adapter_is_one_clear_line(place, capfd, recwarn):
    assert main(place.unlearn(weighting="uniform", forget=None, retain=None)) == 0
    cut(place / "out")
    refused(place, ["inspect", str(place / "out")], r"adapter_model\.safetensors is damaged", capfd, recwarn)


def test_an_interrupt_is_one_line_and_status_130(place, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_perta.cli._options.load_base", interrupted)
    before = tree(place)
    assert main(place.unlearn()) == 130
    assert capsys.readouterr().err == "peft-perta: interrupted; nothing was written\n"
    assert tree(place) == before


# Standard output


def test_a_closed_pipe_is_no_error(place, monkeypatch):
    """``peft-perta inspect DIR | head -1``"""
    assert main(place.unlearn(weighting="uniform", forget=None, retain=None)) == 0
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["inspect", str(place / "out")]) == 0
    monkeypatch.undo()


def test_a_terminal_that_lacks_the_bars_shows_question_marks(place, monkeypatch):
    assert main(place.unlearn(weighting="uniform", forget=None, retain=None)) == 0
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["inspect", str(place / "out")]) == 0
    assert b"A 1.00 (1.00..1.00) [         ?]" in raw.getvalue()


# Help


def squeezed(text: str) -> str:
    return "".join(text.split())


def help_of(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "settings"),
    [("unlearn", PerTAConfig), ("train", UnlearningSettings), ("erase", InfluenceSettings)],
)
def test_every_setting_is_an_option_with_its_help(command, settings, capsys):
    text = squeezed(help_of([command], capsys))
    for field in dataclasses.fields(settings):
        default = "" if field.default is None else f" (default: {field.default})"
        assert squeezed(field.metadata["help"] + default) in text, field.name
        assert f"[--{field.name.replace('_', '-').removesuffix('s')}" in text, field.name


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", ["--four-bit", "--output", "--seed"]),
        ("forget", ["--model", "--forget", "--output", "--four-bit", "--rank", "--epochs", "--learning-rate"]),
        (
            "unlearn",
            ["--model", "--task-adapter", "--forget-adapter", "--forget", "--retain", "--output", "--four-bit"],
        ),
        ("inspect", ["DIR"]),
    ],
)
def test_every_command_says_what_it_takes(command, options, capsys):
    text = help_of([command], capsys)
    assert text.startswith(f"usage: peft-perta {command}")
    for option in options:
        lines = [line.split() for line in text.splitlines() if line.strip().startswith(option)]
        assert lines, f"{option} has no line of its own"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_opens_with_two_sentences_and_ends_with_an_example_that_parses(name):
    parser = command_parser(name)
    sentences = re.split(r"(?<=\.) ", " ".join(parser.description.split()))
    assert len(sentences) == 2, sentences
    assert re.match("It needs ", sentences[1])
    title, command = parser.epilog.replace("\\\n", "").split("\n")
    assert title == "Example:"
    assert shlex.split(command)[:2] == ["peft-perta", name]
    parser.parse_args(shlex.split(command)[2:])


def parsers_of(name: str) -> list[argparse.ArgumentParser]:
    """A command's parser, and those of its actions where it has some."""
    parser = command_parser(name)
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(of_action for action in actions for of_action in action.choices.values())]


PARSERS = [parser for name in COMMANDS for parser in parsers_of(name)]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_option_has_a_help_and_says_its_default(parser):
    for action in parser._actions:
        assert action.help, action.dest
        if action.default not in (None, False, [], argparse.SUPPRESS):
            default = f"{action.default:g}" if isinstance(action.default, float) else action.default
            assert f"(default: {default})" in action.help, action.dest


@pytest.mark.parametrize(
    "option",
    ["--model", "--revision", "--four-bit", "--device-map", "--forget", "--retain", "--task-adapter", "--output"],
)
def test_an_option_that_several_commands_share_opens_with_the_same_words(option):
    actions = [parser._option_string_actions.get(option) for parser in PARSERS]
    texts = [action.help for action in actions if action is not None and action.metavar != "JSON"]  # rescore's output
    assert len(texts) > 1
    assert len({" ".join(text.split()[:4]) for text in texts}) == 1, texts


def test_every_command_says_the_same_kinds_of_base_models():
    kinds = "the base model: a name on the Hugging Face Hub, a directory or a GGUF file"
    actions = {parser.prog: parser._option_string_actions.get("--model") for parser in PARSERS}
    assert [name for name, action in actions.items() if action and not action.help.startswith(kinds)] == []


@pytest.mark.parametrize("table", [FORGET_LOSSES, RETAIN_LOSSES, COMBINERS])
def test_train_describes_every_loss_and_combiner(table, capsys):
    lines = [line.strip() for line in help_of(["train"], capsys).splitlines()]
    for name, row in table.items():
        assert any(re.fullmatch(rf"{name} +{re.escape(row.description)}", line) for line in lines), name


@pytest.mark.parametrize("table", [WEIGHTINGS, GRANULARITIES, FITS])
def test_unlearn_lists_every_weighting_granularity_and_fit(table, capsys):
    firsts = [line.split()[0] for line in help_of(["unlearn"], capsys).splitlines() if line.strip()]
    assert set(table) <= set(firsts)


def test_the_module_is_the_command():
    """In a process of its own, as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "peft_perta", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: peft-perta")
    for command, summary in COMMANDS.items():
        assert squeezed(command + summary) in squeezed(done.stdout)
    assert "Traceback" not in done.stderr


def test_the_module_returns_the_status(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft-perta", "inspect", str(place / "none")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("peft_perta", run_name="__main__")
    assert capsys.readouterr().err.startswith("peft-perta: error: ")
