"""A new adapter has the layers, scaling and dropout that its options say, and every command reads it as PEFT does."""

import json

import builders
import family_models
import laws
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_perta import AdapterError, ConfigError, load_provenance, train_forget_adapter, train_unlearning
from peft_perta.cli import command_parser, main
from peft_perta.cli._settings import read_settings
from peft_perta.training import LoraSettings, default_lora_config

BASE = str(builders.llama_directory())
IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    for name, lines in (("forget", builders.forget_rows()), ("retain", builders.retain_rows())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forget(output, *options, model=BASE):
    training = ["--epochs", "2", "--learning-rate", "0.01", "--batch-size", "2"]
    return main(["forget", "--model", model, "--forget", "forget.jsonl", "--output", output, *training, *options])


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def adapted(directory):
    """The layers that a saved adapter holds factors of."""
    keys = load_file(directory / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# The settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", {"q_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (" q_proj, v_proj ", {"q_proj", "v_proj"}),
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (["q_proj,", "layers.1.mlp.up_proj"], {"q_proj", "layers.1.mlp.up_proj"}),
        (r".*\.0\..*(q|v)_proj", r".*\.0\..*(q|v)_proj"),
        ([r"(.*\.){1,5}q_proj"], r"(.*\.){1,5}q_proj"),
    ],
)
def test_modules_are_names_all_linear_or_a_regex(text, expected):
    assert LoraSettings(target_modules=text).to_lora_config().target_modules == expected
    excluded = LoraSettings(exclude_modules=text).to_lora_config().exclude_modules
    assert excluded == expected


def test_the_defaults_are_those_of_before():
    config = default_lora_config(3)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 6, 0.0, False)
    assert (config.target_modules, config.exclude_modules, config.bias) == ("all-linear", None, "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: expected an integer from 1 to 256, found 0"),
        ({"lora_alpha": 0}, "lora_alpha: expected a number > 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a number > 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected a number in \[0, 1\)"),
        ({"target_modules": ()}, "target_modules: expected names separated"),
        ({"target_modules": " , "}, "target_modules: expected names separated"),
        ({"target_modules": 3}, "target_modules: expected names separated"),
        ({"target_modules": "(q_proj"}, "target_modules: expected names .* or a regular expression"),
        ({"exclude_modules": "*"}, "exclude_modules: expected names .* or a regular expression"),
    ],
)
def test_a_value_out_of_its_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**settings)


@pytest.mark.parametrize("command", ["forget", "train"])
def test_both_commands_take_the_options(command):
    needed = ["--model", "m", "--forget", "f", "--output", "o", *(["--retain", "r"] if command == "train" else [])]
    given = ["--rank", "4", "--lora-alpha", "5", "--lora-dropout", "0.5", "--use-rslora", "--target-modules", "q_proj",
             "v_proj", "--exclude-modules", "layers.0.self_attn.q_proj"]  # fmt: skip
    config = read_settings(LoraSettings, command_parser(command).parse_args([*needed, *given])).to_lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 5, 0.5, True)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.exclude_modules == {"layers.0.self_attn.q_proj"}


# What is made with them


def test_forget_trains_the_layers_that_are_named_as_peft_does(rows):
    options = ["--rank", "3", "--lora-alpha", "5", "--lora-dropout", "0.2", "--use-rslora", "--seed", "4"]
    assert (
        forget("out", *options, "--target-modules", "q_proj,up_proj", "--exclude-modules", "layers.0.mlp.up_proj") == 0
    )
    expected = LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.2, use_rslora=True, target_modules=["q_proj", "up_proj"],
        exclude_modules=["layers.0.mlp.up_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    train_forget_adapter(
        builders.saved_llama(), builders.forget_rows(), builders.tokenizer(), rows / "expected", lora_config=expected,
        num_train_epochs=2, learning_rate=0.01, per_device_train_batch_size=2, seed=4, show_progress_bar=False,
    )  # fmt: skip
    saved, wanted = (load_file(rows / name / "adapter_model.safetensors") for name in ("out", "expected"))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in wanted.items())
    assert adapted(rows / "out") == {
        *(f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)),
        "model.layers.1.mlp.up_proj",
    }
    config = config_of(rows / "out")
    assert (config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (5, 0.2, True)


def test_a_regex_and_all_linear_without_a_layer(rows):
    assert forget("regex", "--target-modules", r".*\.1\..*(k|down)_proj") == 0
    assert adapted(rows / "regex") == {"model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"}
    assert forget("all", "--target-modules", "all-linear", "--exclude-modules", "k_proj", "down_proj") == 0
    kinds = {name.rpartition(".")[2] for name in adapted(rows / "all")}
    assert kinds == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def patterned(path):
    """An adapter that PEFT trained with rank-stabilised scaling, and ranks and alphas of their own for some layers."""
    config = builders.lora_config(
        ["q_proj", "up_proj"], r=4, lora_alpha=6, use_rslora=True, lora_dropout=0.0,
        rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 3},
    )  # fmt: skip
    builders.with_adapters(builders.saved_llama(), config).save_pretrained(path)
    return path / "forget"


def rslora(path):
    options = ["--rank", "4", "--lora-alpha", "6", "--use-rslora", "--target-modules", "q_proj", "up_proj"]
    assert forget(str(path / "forget"), *options) == 0
    return path / "forget"


@pytest.mark.parametrize("make", [rslora, patterned])
def test_unlearn_fuse_and_merge_scale_as_peft_does(make, rows):
    """Uniform weights negate the adapter: half of it taken away leaves half, stacked, fused and merged."""
    adapter = str(make(rows / "made"))
    assert main(["unlearn", "--model", BASE, "--forget-adapter", adapter, "--weighting", "uniform",
                 "--strength", "0.5", "--no-input-directions", "--output", "negative"]) == 0  # fmt: skip
    assert main(["fuse", adapter, "negative", "--model", BASE, "--output", "fused"]) == 0
    assert main(["merge", adapter, "negative", "--model", BASE, "--output", "merged"]) == 0
    base = logits(builders.saved_llama())
    half = PeftModel.from_pretrained(builders.saved_llama(), adapter)
    for layer in half.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] *= 0.5
    expected = logits(half)
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(logits(PeftModel.from_pretrained(builders.saved_llama(), rows / "fused")), expected)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(rows / "merged")), expected)


def test_train_makes_plain_lora_of_the_layers_that_are_named(rows):
    assert main(["train", "--model", BASE, "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--output", "out",
                 "--epochs", "1", "--batch-size", "2", "--rank", "3", "--lora-alpha", "5", "--lora-dropout", "0.1",
                 "--use-rslora", "--target-modules", "q_proj", "v_proj"]) == 0  # fmt: skip
    expected = LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    emitted = train_unlearning(
        builders.saved_llama(), rows / "forget.jsonl", rows / "retain.jsonl", builders.tokenizer(),
        lora_config=expected, num_train_epochs=1, per_device_train_batch_size=2, seed=0, show_progress_bar=False,
    )  # fmt: skip
    saved = load_file(rows / "out" / "adapter_model.safetensors")
    assert saved.keys() == emitted.state_dict.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in emitted.state_dict.items())
    assert {name.rpartition(".")[2] for name in adapted(rows / "out")} == {"q_proj", "v_proj"}
    config = config_of(rows / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert load_provenance(rows / "out")[0].rank == 8


# Refusals


@pytest.mark.parametrize("option", ["--lora-alpha=3", "--use-rslora", "--target-modules=q_proj", "--lora-dropout=0.1"])
def test_an_option_beside_a_start_adapter_is_refused(option, rows, capsys):
    arguments = ["--model", BASE, "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--output", "out"]
    assert main(["train", *arguments, "--start-adapter", "x", option]) == 2
    assert f"{option.partition('=')[0]}: expected none with --start-adapter" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Falcon-H1"])
def test_a_layer_that_peft_cannot_adapt_is_left_out_by_the_option_that_the_refusal_names(name, rows, capsys):
    model = str(family_models.directory(name))
    assert forget("out", model=model) == 2
    said = capsys.readouterr().err
    assert "Module 'out_proj' is incompatible with Mamba-based models" in said
    assert "--exclude-modules" in said
    assert forget("out", "--exclude-modules", "out_proj", model=model) == 0
    assert adapted(rows / "out")
    assert not any("out_proj" in name for name in adapted(rows / "out"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["no_proj"]}, "no_proj.*--target-modules"),
        ({"target_modules": "(q_proj"}, "no adapter can be made with this LoraConfig: missing \\)"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "excluded.*--exclude-modules"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(settings, message):
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = builders.saved_llama()
    with laws.untouched(model), pytest.raises(AdapterError, match=message):
        train_forget_adapter(model, builders.forget_rows(), builders.tokenizer(), lora_config=config)
