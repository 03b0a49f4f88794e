"""Files that would take time or memory without end: they are refused before that."""

import json
import os
import shutil
import threading
import time

import builders
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_perta import attach_adapters, load_base, save_perta_adapter
from peft_perta.cli import main
from peft_perta.data import limits, load_samples, time_limit
from peft_perta.errors import AdapterError, ConfigError, DataError
from peft_perta.evaluation import read_log
from peft_perta.model import check_adapter_files, load_skeleton

ENDLESS_PATTERN = r"(\w+\.?)+!"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.3)


@pytest.fixture
def adapter(tmp_path):
    builders.adapted_saved_llama().save_pretrained(tmp_path, selected_adapters=["forget"])
    return tmp_path / "forget"


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(builders.llama_directory(), tmp_path / "base")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_template_without_end_is_stopped(soon):
    tokenizer = builders.tokenizer(chat=True)
    tokenizer.chat_template = ENDLESS
    with pytest.raises(DataError, match="row 1: the tokenizer's chat template takes more than"):
        load_samples([{"question": "Who?", "answer": "Ned"}], tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ENDLESS_PATTERN},
        {"exclude_modules": ENDLESS_PATTERN},
        {"target_modules": "all-linear", "exclude_modules": ENDLESS_PATTERN},
        {"rank_pattern": {ENDLESS_PATTERN: 4}},
        {"alpha_pattern": {ENDLESS_PATTERN: 4}},
    ],
)
def test_a_pattern_of_exponential_cost_is_stopped(changes, adapter, soon):
    change(adapter / "adapter_config.json", **changes)
    with pytest.raises(AdapterError, match="takes too long to match"):
        check_adapter_files(adapter)


def test_a_pattern_is_tried_on_the_models_modules_before_peft_does(adapter, soon, monkeypatch):
    """It is quick on the names in the file, and slow on another of the model's."""
    change(adapter / "adapter_config.json", target_modules=r".*_proj|lm_(a+)+!")
    check_adapter_files(adapter)
    model = load_base(str(builders.llama_directory()))[0]
    model.add_module("lm_" + "a" * 40, torch.nn.Linear(2, 2))
    names = [name for name, _ in model.named_modules()]
    monkeypatch.setattr("peft_perta.model.loading.PeftModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(AdapterError, match="takes too long to match"):
        attach_adapters(model, {"a": adapter})
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("changes", [{"r": 100_000}, {"rank_pattern": {"q_proj": 100_000}}])
def test_a_rank_that_the_factors_do_not_have_is_refused_before_memory_is_taken(changes, adapter, monkeypatch):
    change(adapter / "adapter_config.json", **changes)
    monkeypatch.setattr("peft_perta.model.loading.PeftModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(AdapterError, match="expected the rank 100000 of adapter_config"):
        attach_adapters(load_base(str(builders.llama_directory()))[0], {"a": adapter})


@pytest.mark.parametrize("load", [load_base, load_skeleton])
def test_a_million_layers_are_refused_before_they_are_built(load, base):
    change(base / "config.json", num_hidden_layers=10**6)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="num_hidden_layers = 1000000, expected at most 2000"):
        load(str(base))
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("load", [load_base, load_skeleton])
def test_a_pipe_in_a_base_is_not_waited_for(load, name, base):
    (base / name).unlink()
    os.mkfifo(base / name)
    with pytest.raises(ConfigError, match=f"{name} is no regular file"):
        load(str(base))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_an_adapter_is_not_waited_for(name, adapter):
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(AdapterError):
        check_adapter_files(adapter)


def test_a_device_is_not_read_without_end():
    with pytest.raises(DataError, match="no regular file"):
        read_log("/dev/zero")
    with pytest.raises(DataError, match="no regular file"):
        load_samples("/dev/zero", builders.tokenizer())


def test_another_thread_has_no_limit(soon):
    """Only the main thread gets signals."""
    ended = []

    def work():
        with time_limit(DataError("late")):
            end = time.thread_time() + 0.5
            while time.thread_time() < end:
                pass
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


def test_what_is_quick_is_left_alone(soon):
    with time_limit(DataError("late")):
        pass
    end = time.process_time() + 0.5
    while time.process_time() < end:  # the limit is off again
        pass


def pickled(base):
    torch.save(builders.llama().state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return str(base)


def test_weights_in_a_pickle_are_read_only_if_that_is_asked_for(base, tmp_path, capsys):
    name = pickled(base)
    with pytest.raises(ConfigError, match="--no-safetensors-only"):
        load_base(name)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        found, expected = load_base(name, safetensors_only=False)[0](ids), builders.llama()(ids)
    torch.testing.assert_close(found.logits, expected.logits)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, builders.forget_rows())))
    command = ["forget", "--model", name, "--forget", str(rows), "--rank", "2", "--epochs", "1"]
    assert main([*command, "--output", str(tmp_path / "one")]) == 2
    assert "--no-safetensors-only" in capsys.readouterr().err
    assert main([*command, "--no-safetensors-only", "--output", str(tmp_path / "one")]) == 0


def test_verify_reads_no_pickle_and_tells_what_a_base_lacks(base, tmp_path, capsys):
    model = builders.adapted_saved_llama()
    save_perta_adapter(tmp_path / "mine", *builders.negate(model, weighting="uniform"))
    assert main(["verify", str(tmp_path / "mine"), "--base", str(base)]) == 0
    assert "whole" in capsys.readouterr().out
    tensors = load_file(base / "model.safetensors")
    lost = "model.layers.0.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != lost}, base / "model.safetensors")
    assert main(["verify", str(tmp_path / "mine"), "--base", str(base)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the base's files" in line]
    assert line.startswith("FAIL")
    assert line.endswith(f"lack {lost}")
    assert main(["verify", str(tmp_path / "mine"), "--base", pickled(base)]) == 1
    assert "model.safetensors" in capsys.readouterr().out
