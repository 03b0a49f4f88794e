"""What a training logs goes to trackio, wandb or tensorboard; a report changes nothing of what is trained."""

import importlib.util
import json
import struct

import builders
import pytest
import torch
from transformers import TrainerCallback

from peft_perta import ConfigError, train_forget_adapter, train_unlearning
from peft_perta.cli import main

FORGET, RETAIN, TOKENIZER = builders.forget_rows()[:4], builders.retain_rows(), builders.tokenizer()
OURS = {"forget_loss", "retain_loss", "retain_weight", "conflicting_share", "cosine_forget_retain"}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    for name, lines in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(name, *more):
    rows = ["--forget", "forget.jsonl", *(["--retain", "retain.jsonl"] if name == "train" else [])]
    fixed = ["--model", str(builders.llama_directory()), *rows, "--output", "out", "--epochs", "2"]
    return main([name, *fixed, "--learning-rate", "0.01", *more])


def scalars(directory):
    """(tag, step) -> value, of every event file in the directory, record by record."""
    event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    found = {}
    for file in directory.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            record = event.FromString(data[at + 12 : at + 12 + length])  # a checksum of 4 bytes before, and one after
            found |= {(value.tag, record.step): value.simple_value for value in record.summary.value}
            at += length + 16
    return found


class Log(TrainerCallback):
    def __init__(self):
        self.entries = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        of_step = {(f"train/{name}", state.global_step): value for name, value in logs.items()}
        self.entries |= {key: value for key, value in of_step.items() if isinstance(value, (int, float))}


def run(output, **options):
    pytest.importorskip("tensorboardX")
    return train_unlearning(
        builders.saved_llama(), FORGET, RETAIN, TOKENIZER, output_dir=output, num_train_epochs=2,
        show_progress_bar=False, **options,
    )  # fmt: skip


def test_tensorboard_gets_what_is_logged_and_the_adapter_is_the_same(tmp_path):
    log = Log()
    reported = run(tmp_path / "out", callbacks=[log], report_to="tensorboard").state_dict
    found = scalars(tmp_path / "out.runs")
    assert {name for name, _ in found if not name.endswith(("_hparams_/session_start_info", "text_summary"))} >= {
        f"train/{name}" for name in OURS - {"retain_weight"}
    }
    for key, value in log.entries.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    alone = run(None).state_dict
    assert all(torch.equal(reported[name], value) for name, value in alone.items())


@pytest.mark.slow
def test_the_place_may_be_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    run(None, report_to="tensorboard")
    assert ("train/retain_loss", 1) in scalars(tmp_path / "elsewhere")


def test_a_report_without_a_place_is_refused():
    with pytest.raises(ConfigError, match="report_to='tensorboard': expected an output_dir"):
        run(None, report_to="tensorboard")


@pytest.mark.parametrize("name", [pytest.param("train", marks=pytest.mark.slow), "forget"])
def test_the_commands_say_where_the_report_is(name, rows, capsys):
    pytest.importorskip("tensorboardX")
    assert command(name, "--report-to", "tensorboard") == 0
    assert "What was logged is in out.runs" in capsys.readouterr().out
    assert ("train/loss", 1) in scalars(rows / "out.runs")
    assert not any(path.name.startswith("events") for path in (rows / "out").iterdir())


@pytest.mark.parametrize("reporter", ["trackio", "wandb", "tensorboard"])
@pytest.mark.parametrize("name", ["train", "forget"])
def test_a_reporter_that_is_not_installed_is_refused_before_a_model_is_loaded(
    name, reporter, rows, monkeypatch, capsys
):
    find_spec = importlib.util.find_spec
    packages = ("trackio", "wandb", "tensorboard", "tensorboardX")
    monkeypatch.setattr(importlib.util, "find_spec", lambda of, *more: None if of in packages else find_spec(of, *more))
    monkeypatch.setattr("peft_perta.cli._options.load_base", lambda *_, **__: pytest.fail("the model was loaded"))
    assert command(name, "--report-to", reporter) == 2
    said = capsys.readouterr().err
    assert f"report_to: expected a reporter whose package is installed, found '{reporter}'" in said
    assert f"pip install {reporter}" in said
    assert sorted(path.name for path in rows.iterdir()) == ["forget.jsonl", "retain.jsonl"]


def test_an_unknown_reporter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found 'trakio' \\(trakio is not supported"):
        train_forget_adapter(builders.saved_llama(), FORGET, TOKENIZER, tmp_path / "out", report_to="trakio")
    assert not (tmp_path / "out").exists()
