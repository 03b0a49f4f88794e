"""A strength for the base as it will be served: every loss is of that form, and the adapter stays one of its base."""

import json

import builders
import pytest
import test_gguf
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_gguf import llama, write_gguf
from transformers import AutoModelForCausalLM

from peft_perta import attach_adapters, load_base, save_perta_adapter
from peft_perta.cli import main
from peft_perta.data import load_samples
from peft_perta.evaluation import Goal, calibrate, losses_of
from peft_perta.model import describe_weights, load_served

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def rounded(model):
    """The same model with coarse weights, as a file of few bits has them."""
    for parameter in model.parameters():
        parameter.data = (parameter.data * 64).round() / 64
    return model


@pytest.fixture
def place(tmp_path):
    """A base as a directory and as a coarse GGUF, rows, a retain-only and a task adapter, and a negative one."""
    exact = write_gguf(tmp_path / "exact.gguf", llama())
    write_gguf(tmp_path / "coarse.gguf", rounded(llama()))
    model, tokenizer = load_base(str(exact))
    (tmp_path / "base").mkdir()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name in ("forget", "retain"):
        rows = [{"question": f"{name[0]}{n}?", "answer": f"{name[1]}{n}!"} for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = load_base(str(tmp_path / "base"))[0]
    for name in ("forget", "task", "retain-only"):
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config, name) if name == "forget" else model
        if name != "forget":
            model.add_adapter(name, config)
        builders.fill(model, name)
    model.save_pretrained(tmp_path)
    save_perta_adapter(tmp_path / "negative", *builders.negate(model, weighting="uniform"))
    return tmp_path


def arguments(place, served_as, goal=None, command="calibrate", output="out"):
    options = {
        "model": place / "base", "adapter": place / "negative", "task-adapter": place / "task",
        "forget": place / "forget.jsonl", "retain": place / "retain.jsonl", "output": place / output,
        "served-as": served_as.format(place=place), **(goal or {"retain-only-adapter": place / "retain-only"}),
    }  # fmt: skip
    return [command, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


FORMS = {"nf4": "NF4", "int8": "int8", "gguf:{place}/coarse.gguf": "float32 of coarse.gguf (weights "}


@pytest.mark.parametrize("served_as", FORMS)
def test_every_loss_of_the_search_is_of_the_served_form_and_the_adapter_of_its_base(served_as, place, capsys):
    model, tokenizer = load_served(str(place / "base"), served_as.format(place=place))
    names = {"unlearn": "negative", "task": "task", "only": "retain-only"}
    model = attach_adapters(model, {name: place / directory for name, directory in names.items()})
    sets = [load_samples(str(place / f"{name}.jsonl"), tokenizer) for name in ("forget", "retain")]
    with_task = {"adapter_name": "unlearn", "with_adapters": ["task"], "show_progress_bar": False}
    goal = Goal(retain_tolerance=0.01)
    expected = calibrate(model, goal, *sets, **with_task)
    assert main(arguments(place, served_as, {"retain-tolerance": 0.01})) == 0
    found = json.loads((place / "out" / "strength.json").read_text())
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert found["measured_on"].startswith(FORMS[served_as])
    exact = attach_adapters(load_base(str(place / "base"))[0], {n: place / d for n, d in names.items()})
    in_float = calibrate(exact, goal, *sets, **with_task)
    assert in_float.measured_on == "float32"
    assert in_float.points[0] != expected.points[0]

    assert f"set for a base in `{FORMS[served_as]}" in (place / "out" / "README.md").read_text()
    assert "on " + found["measured_on"] in capsys.readouterr().out
    before, after = (load_file(place / name / "adapter_model.safetensors") for name in ("negative", "out"))
    for key, value in after.items():
        torch.testing.assert_close(value, before[key] * (found["strength"] if ".lora_B." in key else 1))
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base")
    provenances = [json.loads((place / n / "perta_provenance.json").read_text()) for n in ("negative", "out")]
    assert provenances[0]["base_model"] == provenances[1]["base_model"]


def test_the_yardstick_is_measured_in_the_served_form_too(place):
    """The target is the retain-only adapter's loss on the coarse base, not on the exact one."""
    losses = {}
    for form in ("exact", "coarse"):
        model, tokenizer = load_base(str(place / f"{form}.gguf"))
        model = attach_adapters(model, {"only": place / "retain-only"})
        samples = load_samples(str(place / "forget.jsonl"), tokenizer)
        losses[form] = float(losses_of(model, samples, adapters=["only"]).double().mean())
    assert main(arguments(place, "gguf:{place}/coarse.gguf")) == 0
    found = json.loads((place / "out" / "strength.json").read_text())
    assert found["target"] == found["retain_only"]["forget"] == losses["coarse"]
    assert losses["coarse"] != losses["exact"]


def test_extrapolate_searches_in_the_served_form_and_writes_an_adapter_of_the_base(place):
    """The search is that of calibrate, of an adapter whose training started at zero."""
    options = (place, "gguf:{place}/coarse.gguf", {"retain-tolerance": 0.01})
    assert main(arguments(*options)) == 0
    assert main(arguments(*options, "extrapolate", "further")) == 0
    records = [json.loads((place / name / "perta_provenance.json").read_text()) for name in ("out", "further")]
    assert records[0]["calibration"] == records[1]["fused"]["calibration"]
    factors = [load_file(place / name / "adapter_model.safetensors") for name in ("out", "further")]
    for key in factors[0]:
        if ".lora_A." in key:
            B = key.replace(".lora_A.", ".lora_B.")
            torch.testing.assert_close(*(part[B] @ part[key] for part in factors))
    assert main(["verify", str(place / "further"), "--base", str(place / "base")]) == 0
    assert "set for a base in `float32 of coarse.gguf" in (place / "further" / "README.md").read_text()


def test_a_given_alpha_needs_no_served_form(place, capsys):
    assert main([*arguments(place, "nf4", {"alpha": 1}, "extrapolate")]) == 2
    assert "expected none with --alpha 1, which needs no search" in capsys.readouterr().err


REFUSED = {
    "unknown": ("q4_0", "served as 'q4_0': expected nf4, int8 or gguf:FILE"),
    "no file": ("gguf:", "served as 'gguf:': expected nf4, int8 or gguf:FILE"),
    "missing": ("gguf:{place}/none.gguf", "none.gguf: expected a GGUF file, found none"),
    "a directory of another kind": ("gguf:{place}/base", "expected a GGUF file of the base, found none"),
    "no GGUF": ("gguf:{place}/text.gguf", "text.gguf' cannot be loaded"),
    "other architecture": ("gguf:{place}/qwen2.gguf", "qwen2.gguf: expected the architecture llama, found qwen2; name"),
    "fewer blocks": (
        "gguf:{place}/LAYERS.gguf",
        "model.layers.1.self_attn.q_proj.weight of shape (32, 32), found it absent",
    ),
    "other shapes": ("gguf:{place}/INNER.gguf", "gate_proj.weight of shape (48, 32), found it of shape (64, 32); name"),
}


@pytest.mark.parametrize(("served_as", "message"), REFUSED.values(), ids=REFUSED)
def test_another_form_or_model_is_refused_in_one_line_before_a_weight_is_read(
    served_as, message, place, monkeypatch, capsys
):
    (place / "text.gguf").write_text("no GGUF")
    write_gguf(place / "qwen2.gguf", llama(), architecture="qwen2")
    for name, value in {"LAYERS": 1, "INNER": 64}.items():
        with monkeypatch.context() as patched:
            patched.setattr(test_gguf, name, value)
            write_gguf(place / f"{name}.gguf", llama())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    assert main(arguments(place, served_as)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (place / "out").exists()


def test_two_forms_are_refused(place, capsys):
    assert main([*arguments(place, "int8"), "--four-bit"]) == 2
    assert "--four-bit: expected none with --served-as int8" in capsys.readouterr().err


def test_a_gguf_that_is_replaced_by_the_output_is_refused(place, capsys):
    (place / "out").mkdir()
    write_gguf(place / "out" / "coarse.gguf", llama())
    assert main(arguments(place, "gguf:{place}/out/coarse.gguf")) == 2
    assert "out" in capsys.readouterr().err
    assert (place / "out" / "coarse.gguf").is_file()


@pytest.mark.parametrize(
    ("build", "expected"),
    {builders.saved_llama: "float32", builders.nf4_llama: "NF4", builders.int8_llama: "int8"}.items(),
)
def test_the_form_is_read_from_the_model(build, expected):
    assert describe_weights(build()) == expected


def test_nf4_of_a_gguf_names_both(place):
    assert describe_weights(load_base(str(place / "exact.gguf"), four_bit=True)[0]).startswith("NF4 of exact.gguf (")
