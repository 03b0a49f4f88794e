"""Adapter directories are checked before anything is loaded; a pickle is never opened."""

import json
import pickle
import re
import shutil

import builders
import laws
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, CLIPConfig, T5Config, T5ForConditionalGeneration, ViTConfig, WhisperConfig

from peft_perta import AdapterError, ConfigError, attach_adapters, load_base
from peft_perta.model import check_adapter_files, check_decoder, load_skeleton
from peft_perta.model.stack import EXPECTED_DECODER
from peft_perta.training import train_unlearning

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def directory(tmp_path):
    """A valid adapter directory, for the tests to damage."""
    builders.adapted_saved_llama().save_pretrained(tmp_path, selected_adapters=["forget"])
    return tmp_path / "forget"


def refused(directory, message):
    """Both the check and the loader refuse the directory, before the loader touches the model."""
    with pytest.raises(AdapterError, match=message):
        check_adapter_files(directory)
    model = builders.saved_llama()
    with laws.untouched(model), pytest.raises(AdapterError, match=message):
        attach_adapters(model, {"forget": directory})


def test_a_valid_directory_is_loaded(directory):
    model = attach_adapters(builders.saved_llama(), {"forget": directory, "task": directory})
    assert sorted(model.peft_config) == ["forget", "task"]
    assert model.active_adapter == "forget"
    assert not any(p.requires_grad for p in model.parameters())
    original = builders.adapted_saved_llama().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name.replace(".task.", ".forget.")])


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickled_adapter_is_refused_and_never_opened(directory, tmp_path):
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(directory, "only a pickled adapter_model.bin, which is never loaded")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_under_the_safe_name_is_refused_and_never_opened(directory, tmp_path):
    (directory / WEIGHTS).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(directory, "is damaged")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_beside_the_weights_is_never_opened(directory, tmp_path):
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    attach_adapters(builders.saved_llama(), {"forget": directory})
    assert not (tmp_path / "exploded").exists()


def test_a_truncated_file_is_refused(directory):
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])
    refused(directory, f"{WEIGHTS} is damaged .*copy or save it again")


def test_missing_weights_are_refused(directory):
    (directory / WEIGHTS).unlink()
    refused(directory, f"has no {WEIGHTS}; save the adapter with save_pretrained")


def test_a_directory_without_a_config_is_refused(tmp_path):
    refused(tmp_path, "adapter_config.json")


def test_a_missing_path_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere")


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "adapter_config.json")])
def test_a_damaged_config_is_refused(content, message, directory):
    (directory / "adapter_config.json").write_text(content)
    refused(directory, message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_factors_that_are_not_finite_are_refused(value, directory):
    tensors = load_file(directory / WEIGHTS)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key][0, 0] = value
    save_file(tensors, directory / WEIGHTS)
    refused(directory, f"{key} holds NaN or infinite values")


def test_factors_of_another_shape_are_refused(directory):
    tensors = load_file(directory / WEIGHTS)
    save_file({key: torch.zeros(4, 48) if "lora_A" in key else t for key, t in tensors.items()}, directory / WEIGHTS)
    with pytest.raises(AdapterError, match=r"does not fit the model: .*size mismatch.*load the base"):
        attach_adapters(builders.saved_llama(), {"forget": directory})


def test_an_adapter_of_another_architecture_is_refused(directory):
    with pytest.raises(AdapterError, match=r"does not fit the model: .*not found in the base model"):
        attach_adapters(builders.gpt2(), {"forget": directory})


@pytest.mark.parametrize("change", ["missing", "surplus"])
@pytest.mark.parametrize("position", ["first", "second"])
def test_factors_that_are_missing_or_left_over_are_refused(change, position, directory, tmp_path):
    """PEFT only warns, and continues with an untrained layer or without the factors that it cannot place."""
    sound = tmp_path / "sound"
    builders.adapted_saved_llama().save_pretrained(sound, selected_adapters=["task"])
    tensors = load_file(directory / WEIGHTS)
    key = next(key for key in tensors if "layers.1.mlp.up_proj.lora_B" in key)
    tensors[key.replace("layers.1", "layers.9")] = tensors.pop(key) if change == "missing" else tensors[key].clone()
    save_file(tensors, directory / WEIGHTS)
    adapters = {"forget": directory} if position == "first" else {"task": sound / "task", "forget": directory}
    with pytest.raises(AdapterError, match=r"does not fit the model: .*layers\.[19]\.mlp\.up_proj\.lora_B"):
        attach_adapters(builders.saved_llama(), adapters)


@pytest.mark.parametrize("name", ["model", "layers", "q_proj", "lora_A", "train", "keys", "0", "", "a.b", "task"])
def test_a_name_that_peft_would_confuse_is_refused(name, directory):
    model = builders.adapted_saved_llama()
    with laws.untouched(model), pytest.raises(AdapterError, match=r"expected an adapter name|is on the model already"):
        attach_adapters(model, {"first": directory, name: directory})


def test_a_base_is_loaded_with_its_tokenizer():
    model, tokenizer = load_base(str(builders.llama_directory()))
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<eos>"


OTHER_MODELS = {
    "T5": (T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4), "an encoder-decoder model"),
    "BART, of which transformers would load the decoder": (BartConfig(), "an encoder-decoder model"),
    "Whisper": (WhisperConfig(), "an encoder-decoder model"),
    "an image classifier": (ViTConfig(architectures=["ViTForImageClassification"]), r"no causal.*\(ViTForImageClass"),
    "images and texts": (CLIPConfig(), r"no causal language model \(CLIPConfig\)"),
}


@pytest.mark.parametrize("load", [load_base, load_skeleton])
@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_model_that_does_not_continue_text_is_refused_for_what_it_is(kind, load, tmp_path):
    config, message = OTHER_MODELS[kind]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"is {message}.*; {re.escape(EXPECTED_DECODER)}$"):
        load(str(tmp_path))


def test_a_model_in_memory_is_refused_in_the_words_of_one_in_files():
    with pytest.raises(ConfigError, match=f"T5.* is an encoder-decoder model; {re.escape(EXPECTED_DECODER)}$"):
        check_decoder(T5ForConditionalGeneration(OTHER_MODELS["T5"][0]))


def test_a_base_is_loaded_in_four_bit():
    model, _ = load_base(str(builders.llama_directory()), four_bit=True)
    assert model.is_loaded_in_4bit
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("damage", ["absent", "empty", "config", "weights", "no tokenizer"])
def test_a_base_that_cannot_be_read_is_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "base"
    if damage != "absent":
        path.mkdir()
    if damage in ("config", "weights", "no tokenizer"):
        builders.llama().save_pretrained(path)
    if damage == "config":
        (path / "config.json").write_text("{")
    if damage == "weights":
        builders.tokenizer().save_pretrained(path)
        (path / "model.safetensors").write_bytes(b"\x10" * 50)
    with pytest.raises(ConfigError, match=r"the model .*base' cannot be loaded: ") as caught:
        load_base(str(path))
    assert "\n" not in str(caught.value)


# The borrowed model

STEPS = {  # what loading an adapter goes through
    "the wrapping": "peft.tuners.lora.LoraModel.inject_adapter",
    "the first loading": "peft.peft_model.load_peft_weights",
    "the second loading": "peft.PeftModel.load_adapter",
    "the base's identity": "peft_perta.model.loading.adopt_base",
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model", [builders.saved_llama, builders.adapted_saved_llama], ids=["plain", "with adapters"])
def test_an_adapter_that_fails_at_any_step_leaves_the_model_as_it_was(model, step, directory, monkeypatch):
    model = model()

    def fails(*_, **__):
        raise MemoryError("on purpose")

    monkeypatch.setattr(STEPS[step], fails)
    with laws.untouched(model), pytest.raises(MemoryError, match="on purpose"):
        attach_adapters(model, {"other": directory})


def test_the_second_of_two_adapters_does_not_fit_and_the_first_goes_too(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "other")
    tensors = load_file(directory / WEIGHTS)
    narrow = {key: factor[:, :5].clone() if "lora_A" in key else factor for key, factor in tensors.items()}
    save_file(narrow, tmp_path / "other" / WEIGHTS)
    for model in (builders.saved_llama(), builders.adapted_saved_llama()):
        with laws.untouched(model), pytest.raises(AdapterError, match="size mismatch"):
            attach_adapters(model, {"first": directory, "second": tmp_path / "other"})


def test_training_leaves_the_gradients_that_were_there():
    model = builders.adapted_saved_llama()
    kept = [parameter for name, parameter in model.named_parameters() if "norm" in name or ".task." in name]
    for parameter in kept:
        parameter.grad = torch.ones_like(parameter)
    rows = builders.forget_rows(), builders.retain_rows()
    train_unlearning(model, *rows, builders.tokenizer(), show_progress_bar=False, max_steps=1, logging_strategy="no")
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in kept)


# The base's files


@pytest.fixture
def base(tmp_path):
    builders.llama().save_pretrained(tmp_path / "base")
    builders.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def altered(base, change):
    """The base with other tensors in its file."""
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return str(base)


LAYER = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_base_that_lacks_a_weight_is_refused(four_bit, base):
    """transformers would draw it at random, and differently in each run."""
    with pytest.raises(ConfigError, match=rf"lacks {LAYER} \(of 1 such weights\); expected files that were saved with"):
        load_base(altered(base, lambda tensors: tensors.pop(LAYER)), four_bit=four_bit)


def test_a_weight_of_another_shape_is_refused(base):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base(altered(base, lambda tensors: tensors.update({LAYER: tensors[LAYER][:5].clone()})))


def test_a_config_with_fewer_blocks_than_the_files_is_refused(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match=r"holds model\.layers\.1\..*, beyond the blocks that its config names"):
        load_base(str(base))


def test_a_weight_that_no_model_uses_is_said(base, capsys):
    model, _ = load_base(altered(base, lambda tensors: tensors.update({"value_head.weight": torch.ones(2)})))
    assert "1 weights that the model does not use, such as value_head.weight" in capsys.readouterr().err
    assert torch.equal(model.lm_head.weight, builders.llama().lm_head.weight)


def test_tied_weights_and_a_task_adapters_files_are_no_false_alarm(tmp_path):
    builders.llama(tied=True).save_pretrained(tmp_path)
    builders.tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = load_base(str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("load", [load_base, load_skeleton])
def test_too_little_memory_is_no_fault_of_the_files(load, monkeypatch):
    def full(*_, **__):
        raise MemoryError("on purpose")

    monkeypatch.setattr("peft_perta.model.loading.AutoConfig.from_pretrained", full)
    with pytest.raises(MemoryError, match="on purpose"):
        load(str(builders.llama_directory()))
