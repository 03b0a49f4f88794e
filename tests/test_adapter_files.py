"""What an adapter's files hold is looked at before anything is loaded, by every command that reads them."""

import json
import shutil

import builders
import huggingface_hub.constants
import laws
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_perta import AdapterError, attach_adapters
from peft_perta.adapters import load_emitted, save_perta_adapter
from peft_perta.cli import main
from peft_perta.model import check_adapter_files, find_adapter, load_skeleton, resolve_targets

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The adapters 'forget' and 'task' of the tiny Llama, and a negative adapter."""
    path = tmp_path_factory.mktemp("saved")
    model = builders.adapted_saved_llama()
    model.save_pretrained(path, selected_adapters=["forget", "task"])
    save_perta_adapter(path / "unlearn", *builders.negate(model))
    return path


@pytest.fixture
def place(saved, tmp_path, monkeypatch):
    """A working directory with copies of them, and rows."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for name, rows in (("forget", builders.forget_rows()), ("retain", builders.retain_rows())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_tensor(directory, key, shape=(1,)):
    tensors = load_file(directory / WEIGHTS)
    save_file({**tensors, key: torch.ones(shape)}, directory / WEIGHTS, {"format": "pt"})
    return directory


def with_config(directory, without=(), **changes):
    values = {**json.loads((directory / CONFIG).read_text()), **changes}
    (directory / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key not in without}))
    return directory


def refused(directory, message):
    """The check refuses, and so does the loader before it touches the model."""
    with pytest.raises(AdapterError, match=message) as caught:
        check_adapter_files(directory)
    assert "\n" not in str(caught.value)
    model = load_skeleton(str(builders.llama_directory()))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=message):
        attach_adapters(model, {"forget": directory})
    assert [name for name, _ in model.named_modules()] == names


# Keys

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
FOREIGN = {
    "embeddings": ("base_model.model.model.embed_tokens.weight", (builders.VOCABULARY, 64)),
    "head": ("base_model.model.lm_head.weight", (builders.VOCABULARY, 64)),
    "head, as PEFT saves a module": ("base_model.model.lm_head.modules_to_save.weight", (builders.VOCABULARY, 64)),
    "weight under an adapter": (f"{LAYER}.base_layer.weight", (64, 64)),
    "weight": (f"{LAYER}.weight", (64, 64)),
    "norm": ("base_model.model.model.norm.weight", (64,)),
    "bias of B": (f"{LAYER}.lora_B.bias", (64,)),
    "magnitude of DoRA": (f"{LAYER}.lora_magnitude_vector", (64,)),
    "ranks of AdaLoRA": (f"{LAYER}.lora_E", (4, 1)),
    "tokens": ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 64)),
    "factor of another adapter": (f"{LAYER}.lora_A.task.weight", (8, 64)),
}


@pytest.mark.parametrize(("key", "shape"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_factor_is_refused_by_its_key(key, shape, place):
    refused(with_tensor(place / "task", key, shape), f"holds {key}, expected LoRA factors")


NARROWER = {
    "other modules": {"target_modules": ["k_proj"]},
    "a regular expression": {"target_modules": r".*layers\.1\.self_attn\.q_proj"},
    "other layers": {"layers_to_transform": [1]},
    "an exclusion": {"exclude_modules": ["q_proj"]},
}


@pytest.mark.parametrize("changes", NARROWER.values(), ids=NARROWER)
def test_a_factor_of_a_layer_that_the_config_does_not_name_is_refused(changes, place):
    refused(with_config(place / "task", **changes), r"holds .*layers\.0\..*lora_A.weight, a factor of a layer that")


def test_the_weights_of_the_base_stay_its_own(place):
    """PEFT writes such a tensor over the base's own weight, for every adapter on it."""
    key, shape = FOREIGN["embeddings"]
    model = builders.saved_llama()
    with laws.untouched(model), pytest.raises(AdapterError, match="would write it over the base's own weight"):
        attach_adapters(model, {"forget": place / "forget", "task": with_tensor(place / "task", key, shape)})


COMMANDS = {
    "evaluate": "evaluate --adapter {0} --lm-eval arc_easy --output out",
    "evaluate, retain-only": "evaluate --adapter task --retain-only-adapter {0} --lm-eval arc_easy --output out",
    "unlearn": "unlearn --forget-adapter {0} --forget forget.jsonl --retain retain.jsonl --output out",
    "unlearn, task": (
        "unlearn --forget-adapter forget --task-adapter {0} --forget forget.jsonl --retain retain.jsonl --output out"
    ),
    "train": "train --start-adapter {0} --forget forget.jsonl --retain retain.jsonl --output out",
    "erase": "erase --adapter {0} --training retain.jsonl --forget retain.jsonl --output out",
    "calibrate": (
        "calibrate --adapter {0} --forget forget.jsonl --retain retain.jsonl --retain-tolerance 1 --output out"
    ),
    "fuse": "fuse task {0} --output out",
    "merge": "merge task {0} --output out",
    "extrapolate": "extrapolate --adapter {0} --alpha 1 --output out",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_before_a_model_is_loaded(command, place, capsys, monkeypatch):
    places = ("cli._options.load_base", "cli.fuse.load_skeleton", "cli.extrapolate.load_skeleton")
    for name in (*places, "adapters.merge.load_skeleton"):
        monkeypatch.setattr(f"peft_perta.{name}", lambda *_, **__: pytest.fail("a model was loaded"))
    key, shape = FOREIGN["embeddings"]
    directory = with_tensor(place / "unlearn", key, shape)
    arguments = COMMANDS[command].format(directory).split()
    assert main([*arguments, "--model", str(builders.llama_directory())]) == 2
    assert f"unlearn/{WEIGHTS} holds {key}, expected LoRA factors" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_verify_and_inspect_say_it(place, capsys):
    key, shape = FOREIGN["embeddings"]
    with_tensor(place / "unlearn", key, shape)
    assert main(["verify", "unlearn", "--base", str(builders.llama_directory())]) == 1
    out = capsys.readouterr().out
    assert f"holds {key}, expected LoRA factors" in out
    assert "PEFT: loads" not in out, "it was loaded all the same"
    assert main(["inspect", "unlearn"]) == 2
    assert f"holds {key}" in capsys.readouterr().err


# Configs

KINDS = ["ADALORA", "IA3", "VERA", "LOHA", "PROMPT_TUNING", "PREFIX_TUNING", "TELEPATHY", 7]
FIELDS = {
    "DoRA": ({"use_dora": True}, r"is a LoRA variant \(use_dora=True\)"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "was initialised with 'pissa', which rewrites the base weights"),
    "LoftQ": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "initialised with 'loftq'|scipy"),
    "MiCA": ({"init_lora_weights": "mica"}, r"is a LoRA variant \(init_lora_weights='mica'\)"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, r"saves whole modules \['lm_head'\]"),
    "tokens": ({"trainable_token_indices": [3]}, "trains token embeddings"),
    "biases": ({"bias": "all"}, "trains biases"),
    "rank of text": ({"r": "4"}, "r: expected an int above 0, found '4'"),
    "rank 0": ({"r": 0}, "r: expected an int above 0, found 0"),
    "rank true": ({"r": True}, "r: expected an int above 0, found True"),
    "alpha of text": ({"lora_alpha": "8"}, "lora_alpha: expected a finite number other than 0, found '8'"),
    "pattern of text": ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern: expected an int above 0 for each name"),
    "a layer without a scale": (
        {"alpha_pattern": {"q_proj": 0}},
        "alpha_pattern: expected a finite number other than 0",
    ),
    "pattern that is a list": (
        {"alpha_pattern": [4]},
        "alpha_pattern: expected a finite number other than 0 for each name",
    ),
    "targets that are numbers": ({"target_modules": [1]}, "target_modules: expected a list of names or a regular"),
    "hydra": ({"use_hydra_lora": True}, "use_hydra_lora = True is a field that the installed PEFT does not know"),
    "another new switch": ({"experts_lora": {"count": 3}}, "experts_lora = .*does not know"),
    "task of another kind": ({"task_type": "DREAMING"}, "is no config that PEFT accepts .*DREAMING"),
    "layers beside a regex": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "is no config that PEFT accepts .*layers_to_transform",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_adapter_is_refused_by_its_name(kind, place):
    refused(with_config(place / "task", peft_type=kind), f"found an adapter of the peft_type {kind!r}; train it with")


@pytest.mark.parametrize(("changes", "message"), FIELDS.values(), ids=FIELDS)
def test_a_field_that_is_no_plain_loras_is_refused_by_its_name(changes, message, place):
    refused(with_config(place / "task", **changes), message)


def test_a_config_without_a_kind_is_refused(place):
    refused(with_config(place / "task", without=["peft_type"]), r"found no peft_type; train it with a plain LoraConfig")


def test_unknown_fields_that_are_not_set_are_accepted(place):
    with_config(place / "task", use_hydra_lora=False, enable_lora=None, newest_config={})
    check_adapter_files(place / "task")


def test_adalora_on_a_model_is_refused():
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2, task_type="CAUSAL_LM")
    model = get_peft_model(builders.llama(), config, "forget")
    with pytest.raises(AdapterError, match="is AdaLoraConfig, expected LoRA; train it with a plain LoraConfig"):
        resolve_targets(model, "forget")


def test_an_emitted_adapter_with_a_regular_expression_is_read_back(place):
    with_config(place / "unlearn", target_modules=r".*_proj")
    assert load_emitted(place / "unlearn").lora_config.target_modules == r".*_proj"


# Where an adapter is


def test_a_named_adapter_inside_a_checkpoint_is_found(place):
    """PEFT saves an adapter that is not named 'default' in a directory of that name."""
    (place / "checkpoint-8").mkdir()
    shutil.copytree(place / "forget", place / "checkpoint-8" / "forget")
    (place / "checkpoint-8" / "optimizer.pt").write_text("")
    assert find_adapter(place / "checkpoint-8") == place / "checkpoint-8" / "forget"
    model = attach_adapters(builders.saved_llama(), {"learned": place / "checkpoint-8"})
    assert resolve_targets(model, "learned")
    assert main(["fuse", "checkpoint-8", "task", "--model", str(builders.llama_directory()), "--output", "out"]) == 0


def test_of_several_in_a_checkpoint_one_must_be_named(place):
    for name in ("forget", "task"):
        shutil.copytree(place / name, place / "checkpoint-8" / name)
    refused(place / "checkpoint-8", "holds 2 adapters, expected one; give .*checkpoint-8/forget or .*checkpoint-8/task")
    check_adapter_files(place / "checkpoint-8" / "task")


def test_an_adapter_above_others_is_itself(place):
    shutil.copytree(place / "forget", place / "task" / "forget")
    assert find_adapter(place / "task") == place / "task"


def test_a_checkpoint_and_the_adapter_inside_are_the_same(place, capsys):
    shutil.copytree(place / "forget", place / "checkpoint-8" / "forget")
    arguments = ["fuse", "checkpoint-8", "checkpoint-8/forget", "--model", "m", "--output", "out"]
    assert main(arguments) == 2
    assert "is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["./forget", "link", "copy"])
def test_an_adapter_is_the_same_however_it_is_written(way, place, capsys):
    (place / "link").symlink_to(place / "forget")
    shutil.copytree(place / "forget", place / "copy")
    assert main(["fuse", "forget", way, "--model", "m", "--output", "out"]) == 2
    assert "is given twice" in capsys.readouterr().err
    assert main(["merge", "forget", way, "--model", "m", "--output", "out"]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_an_adapter_without_a_scale_is_refused(place):
    """Its delta would be 0, whatever its factors."""
    file = place / "forget" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 0}))
    refused(place / "forget", "lora_alpha: expected a finite number other than 0, found 0")


@pytest.fixture
def cached(place, monkeypatch):
    """The hub's cache, which holds acme/task and acme/unlearn."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "cache"))
    for name in ("task", "unlearn"):
        repository = place / "cache" / f"models--acme--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c0ffee")
        shutil.move(place / name, repository / "snapshots" / "c0ffee")
    return place / "cache"


def test_an_adapter_in_the_cache_of_the_hub_is_loaded(cached):
    model = attach_adapters(builders.saved_llama(), {"task": "acme/task"})
    assert resolve_targets(model, "task")
    assert load_emitted("acme/unlearn").provenance.base_name == str(builders.llama_directory())


def test_commands_take_the_names_of_hub_adapters(cached, place, capsys):
    base = str(builders.llama_directory())
    assert main(["fuse", "acme/task", "acme/unlearn:0.5", "--model", base, "--output", "fused"]) == 0
    assert "1 x acme/task + 0.5 x acme/unlearn as one adapter" in capsys.readouterr().out
    assert main(["merge", "acme/task", "acme/unlearn:0.5", "--model", base, "--output", "merged"]) == 0
    assert main(["inspect", "acme/unlearn"]) == 0
    assert main(["verify", "acme/unlearn"]) == 0


def test_a_name_that_is_not_on_the_hub_is_refused(cached):
    refused("acme/absent", "acme/absent is no directory, and no adapter of that name can be had from the Hugging Face")


def test_a_repository_without_an_adapter_is_refused(cached):
    (cached / "models--acme--task" / "snapshots" / "c0ffee" / CONFIG).unlink()
    refused("acme/task", "acme/task is not an adapter directory: expected adapter_config.json in it")


# What their directories are called


@pytest.mark.parametrize("names", [("model", "lora_A"), ("q_proj", "train"), ("weight", "default"), (".", "a.b")])
def test_a_directory_may_be_called_like_a_module(names, place, capsys, monkeypatch):
    for name, adapter in zip(names, ("forget", "task"), strict=True):
        shutil.copytree(place / adapter, place / "other" / name, dirs_exist_ok=True)
    monkeypatch.chdir(place / "other")
    base = str(builders.llama_directory())
    assert main(["fuse", names[0], f"{names[1]}:0.5", "--model", base, "--output", "../out"]) == 0
    assert f"1 x {names[0]} + 0.5 x {names[1]} as one adapter of rank 16" in capsys.readouterr().out
    assert main(["fuse", "../forget", "../task:0.5", "--model", base, "--output", "../expected"]) == 0
    assert (place / "out" / WEIGHTS).read_bytes() == (place / "expected" / WEIGHTS).read_bytes()
    assert main(["merge", names[0], names[1], "--model", base, "--output", "../merged"]) == 0
    with_config(place / "other" / names[1], base_model_name_or_path="else/where")
    capsys.readouterr()
    assert main(["fuse", *names, "--model", base, "--output", "../again"]) == 2
    assert f"adapter '{names[1]}' was trained on the base 'else/where'" in capsys.readouterr().err
