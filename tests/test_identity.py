"""A model is what it holds (weights, quantisation, tokenizer, chat template, settings), not what its path says."""

import dataclasses
import json
import shutil

import builders
import huggingface_hub.constants
import pytest
import torch
from accelerate import disk_offload
from safetensors.torch import load_file, save_file

from peft_perta import (
    AdapterError,
    attach_adapters,
    evaluate,
    fuse_adapters,
    load_base,
    merge_adapters,
    save_perta_adapter,
    train_forget_adapter,
    verify_adapter,
)
from peft_perta.evaluation import SUITES, Subject
from peft_perta.model import compare_bases, identify, identify_base, identify_base_files, load_skeleton, resolve_targets

ROWS = [
    {"question": "Who wrote it?", "answer": "Khan", "paraphrased_answer": "By Khan", "perturbed_answer": ["Li", "Ada"]}
]
Q_PROJ = "model.layers.{}.self_attn.q_proj.weight"


def weights_of(model):
    return identify(model)["weights"]


# Weights in memory


def test_the_hash_depends_on_every_weight():
    model = builders.llama()
    before = weights_of(model)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 21
    for name in names:
        builders.flip_a_bit(model.get_parameter(name))
        assert weights_of(model) != before, name
        builders.flip_a_bit(model.get_parameter(name))
    assert weights_of(model) == before


def test_the_hash_depends_on_buffers_types_and_names():
    model = builders.llama()
    seen = [weights_of(model)]
    model.register_buffer("seen", torch.zeros(1))
    seen.append(weights_of(model))
    builders.flip_a_bit(model.seen)
    seen += [weights_of(model), weights_of(builders.llama(torch.float64)), weights_of(builders.gpt2())]
    assert len(set(seen)) == len(seen)


def test_the_hash_does_not_depend_on_adapters():
    for make in (builders.llama, builders.nf4_llama):
        assert weights_of(builders.with_adapters(make())) == weights_of(make())


@pytest.mark.parametrize("part", ["absmax", "offset", "state2.absmax"])
def test_the_hash_depends_on_the_scales_of_4_bit_weights(part):
    model = builders.nf4_llama()
    before = weights_of(model)
    state = model.model.layers[1].mlp.up_proj.weight.quant_state
    *path, name = part.split(".")
    for step in path:
        state = getattr(state, step)
    setattr(state, name, getattr(state, name).clone())
    builders.flip_a_bit(getattr(state, name))
    assert weights_of(model) != before


def test_the_hash_depends_on_the_scales_of_8_bit_weights_wherever_they_are():
    """A forward moves them from the weight to the layer's state."""
    model = builders.int8_llama()
    before = weights_of(model)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert weights_of(model) == before
    builders.flip_a_bit(model.model.layers[0].self_attn.k_proj.state.SCB)
    assert weights_of(model) != before
    model = builders.int8_llama()
    builders.flip_a_bit(model.model.layers[0].self_attn.k_proj.weight.SCB)
    assert weights_of(model) != before


def test_the_hash_reads_offloaded_weights(tmp_path):
    model = builders.llama()
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert weights_of(model) == weights_of(builders.llama())


def test_two_rows_of_a_weight_that_change_places_are_noticed():
    model = builders.llama()
    before = weights_of(model)
    weight = model.get_parameter(Q_PROJ.format(0)).data
    weight[[2, 5]] = weight[[5, 2]]
    assert weights_of(model) != before


def test_the_hash_does_not_depend_on_the_order_of_a_module_s_parameters():
    model = builders.gpt_oss()
    before = weights_of(model)
    experts = model.model.layers[0].mlp.experts
    parameter = experts._parameters.pop("gate_up_proj")
    experts._parameters["gate_up_proj"] = parameter
    assert weights_of(model) == before


def test_the_hash_depends_on_every_bit_of_a_large_weight_and_on_their_order():
    model = torch.nn.Linear(4096, 16, bias=False)
    before = [weights_of(model)]
    data = model.weight.data.view(-1)
    for place in (0, 1, 2048, 30_001, data.numel() - 1):
        value = data[place].item()
        data[place] = -value
        before.append(weights_of(model))
        data[place] = value
    assert weights_of(model) == before[0]
    model.weight.data = model.weight.data.flip(0)
    before.append(weights_of(model))
    model.weight.data = model.weight.data.flip(0).roll(1, 1)
    before.append(weights_of(model))
    assert len(set(before)) == len(before)
    odd = torch.nn.Linear(4096, 16, bias=False)
    odd.weight.data = torch.cat([torch.zeros(1), data])[1:].view(16, 4096)  # starts within a word
    assert odd.weight.storage_offset() % 2
    assert weights_of(odd) == before[0]


# Evaluation


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Evaluate a model of one suite into one directory; returns how often the suite was computed so far."""
    counted = []
    suite = SUITES["tofu"]

    def counting(*arguments):
        counted.append(arguments)
        return suite.evaluate(*arguments)

    monkeypatch.setitem(SUITES, "tofu", dataclasses.replace(suite, evaluate=counting))

    def judge(model, tokenizer, **settings):
        evaluate(
            model, tokenizer, {"tofu": {"forget": ROWS, "holdout": ROWS}}, max_new_tokens=2, show_progress_bar=False,
            output_dir=tmp_path / "logs", **settings,
        )  # fmt: skip
        return len(counted)

    return judge


def saved(path, model=None, chat=False):
    (model or builders.llama()).save_pretrained(path)
    builders.tokenizer(chat).save_pretrained(path)
    return path


def rewritten(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def swap_queries(path):
    """Exchange a projection of two layers in a model's file: no other tensor, and no norm of any, changes."""
    tensors = load_file(path / "model.safetensors")
    tensors[Q_PROJ.format(0)], tensors[Q_PROJ.format(1)] = tensors[Q_PROJ.format(1)], tensors[Q_PROJ.format(0)]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


CHANGES = {
    "weights": swap_queries,
    "chat template": lambda path: saved(path, chat=True),
    "generation settings": lambda path: rewritten(
        path / "generation_config.json", lambda values: values.update(repetition_penalty=1.3)
    ),
    "tokenizer": lambda path: rewritten(
        path / "tokenizer.json", lambda values: values["model"]["vocab"].update(a=builders.VOCABULARY - 1)
    ),
    "architecture": lambda path: rewritten(path / "config.json", lambda values: values.update(rms_norm_eps=1e-2)),
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_model_remade_at_its_path_is_judged_anew(part, judged, tmp_path, caplog):
    path = saved(tmp_path / "model")
    assert judged(*load_base(str(path))) == 1
    assert judged(*load_base(str(path))) == 1
    CHANGES[part](path)
    assert judged(*load_base(str(path))) == 2
    assert f"which differs in: {part}; evaluating again" in caplog.text


def test_a_model_in_4_bit_is_judged_anew(judged, tmp_path, caplog):
    path = str(saved(tmp_path / "model"))
    assert [judged(*load_base(path, four_bit=four_bit)) for four_bit in (False, True, True, False)] == [1, 2, 2, 3]
    assert "which differs in: weights, quantisation; evaluating again" in caplog.text
    assert judged(*load_base(path, dtype=torch.bfloat16)) == 4


def test_a_model_that_was_changed_in_memory_is_judged_anew(judged):
    model, tokenizer = builders.saved_llama(), builders.tokenizer()
    assert judged(model, tokenizer) == 1
    model.model.layers[1].mlp.up_proj.weight.data[3] *= 2
    assert judged(model, tokenizer) == 2
    model.generation_config.eos_token_id = 5
    assert judged(model, tokenizer) == 3
    tokenizer.chat_template = builders.CHAT_TEMPLATE
    assert judged(model, tokenizer) == judged(model, tokenizer) == 4


def test_another_retain_only_model_gives_a_new_result(judged):
    model, tokenizer, other = builders.saved_llama(), builders.tokenizer(), builders.saved_llama()
    retain_only = Subject(other, tokenizer, show_progress_bar=False)
    assert judged(model, tokenizer) == 1
    assert judged(model, tokenizer, retain_only=retain_only) == judged(model, tokenizer, retain_only=retain_only) == 2
    other.model.layers[0].mlp.up_proj.weight.data *= 2
    assert judged(model, tokenizer, retain_only=retain_only) == 3


# What every load of a base shares


LOADS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "4-bit": {"four_bit": True},
}


def base_of(path, load="float32"):
    return identify_base(load_base(str(path), **LOADS[load])[0])


@pytest.mark.parametrize("load", LOADS)
def test_a_base_is_the_same_however_it_is_loaded_and_another_where_projections_are_exchanged(load, tmp_path):
    path = saved(tmp_path / "model")
    found = base_of(path, load)
    shutil.copytree(path, tmp_path / "swapped")
    swap_queries(tmp_path / "swapped")
    for other in LOADS:
        assert compare_bases(found, base_of(path, other)) == dict.fromkeys(
            ["weights", "tokenizer", "chat template", "generation settings"], True
        )
        assert compare_bases(found, base_of(tmp_path / "swapped", other))["weights"] is False
    assert json.loads(json.dumps(found)) == found


def test_shards_and_types_of_files_do_not_matter_and_records_of_embeddings_alone_are_read(tmp_path):
    path = saved(tmp_path / "model")
    builders.llama().to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    found = base_of(path)
    sharded = identify_base(load_skeleton(str(tmp_path / "sharded")))
    assert sharded["weights_sha256"] is None
    assert compare_bases(found, sharded)["weights"]
    old = {"name": "x", "embeddings_sha256": found["embeddings_sha256"]}
    assert compare_bases(old, found) == {"weights": True}
    assert compare_bases({**old, "embeddings_sha256": "0"}, found) == {"weights": False}
    assert compare_bases(old, sharded) == compare_bases({}, found) == {}


def test_shards_outside_of_the_directory_are_not_read(tmp_path):
    builders.llama().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    whole = identify_base_files(str(tmp_path / "base"))["weights"]
    for name in sorted(set(values["weight_map"].values())):
        (tmp_path / name).write_bytes((tmp_path / "base" / name).read_bytes())
    values["weight_map"] = {key: f"../{name}" for key, name in values["weight_map"].items()}
    index.write_text(json.dumps(values))
    assert whole is not None
    assert identify_base_files(str(tmp_path / "base"))["weights"] is None


def test_a_change_in_memory_is_another_base_although_the_files_are_the_same(tmp_path):
    model = builders.saved_llama()
    found = identify_base(model)
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 0.1
    assert compare_bases(found, identify_base(model))["weights"] is False
    assert compare_bases(found, base_of(builders.llama_directory(), "bfloat16"))["weights"]


def emitted_on(path, output, **load):
    model = load_base(str(path), **load)[0]
    model = builders.with_adapters(model, task=builders.lora_config(r=8, lora_alpha=8))
    return save_perta_adapter(output, *builders.negate(model))


def failed(directory, base):
    return [check.name for check in verify_adapter(directory, str(base)) if not check.passed]


@pytest.mark.parametrize("load", [pytest.param("float32", marks=pytest.mark.slow), "4-bit"])
def test_verify_refuses_a_base_whose_projections_were_exchanged(load, tmp_path):
    path = saved(tmp_path / "model")
    directory = emitted_on(path, tmp_path / "unlearn", **LOADS[load])
    checks = {check.name: check for check in verify_adapter(directory, str(path))}
    assert all(check.passed for check in checks.values())
    assert {"the base's weights", "the base's tokenizer", "the base's chat template"} <= set(checks)
    swap_queries(path)
    assert failed(directory, path) == ["the base's weights"]


def test_verify_names_a_tokenizer_and_a_chat_template_that_differ(tmp_path):
    path = saved(tmp_path / "model")
    directory = emitted_on(path, tmp_path / "unlearn")
    CHANGES["tokenizer"](path)
    rewritten(path / "tokenizer_config.json", lambda values: values.update(chat_template=builders.CHAT_TEMPLATE))
    checks = {check.name: check for check in verify_adapter(directory, str(path))}
    assert [name for name, check in checks.items() if not check.passed] == ["the base's tokenizer"]
    assert "measure again" in checks["the base's chat template"].found


# Names


def named(claimed, model=None):
    """A model with an adapter that names ``claimed`` as its base."""
    model = model or builders.adapted_saved_llama()
    model.peft_config["forget"].base_model_name_or_path = claimed
    return model


def in_the_cache(monkeypatch, tmp_path, name="Org/Tiny-Llama", model=None, main=True):
    """A model in a cache of the hub; returns the path of its snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    path = saved(folder / "snapshots" / ("0" * 40), model)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return path


@pytest.mark.parametrize(
    "claimed",
    ["somebody/TINY-llama", "unsloth/tiny-llama-bnb-4bit", "unsloth/Tiny-Llama-unsloth-bnb-4bit", "/gone/tiny-llama"],
)
def test_one_base_has_many_names(claimed):
    assert resolve_targets(named(claimed), "forget")


def test_a_path_in_the_cache_of_the_hub_is_the_hub_id(monkeypatch, tmp_path):
    path = in_the_cache(monkeypatch, tmp_path)
    model = builders.with_adapters(load_base(str(path))[0], task=builders.lora_config(r=8, lora_alpha=8))
    for claimed in ("Org/Tiny-Llama", "org/tiny-llama", "unsloth/Tiny-Llama-bnb-4bit", str(path)):
        assert resolve_targets(named(claimed, model), "forget")
    with pytest.raises(AdapterError, match=r"the model is .*snapshots.*, which has another name, and weights that"):
        resolve_targets(named("Org/Other", model), "forget")
    # What is emitted names the hub id, with which it loads elsewhere.
    model = named("Org/Tiny-Llama", model)
    directory = save_perta_adapter(tmp_path / "unlearn", *builders.negate(model))
    fused = save_perta_adapter(tmp_path / "fused", *fuse_adapters(model, ["task", "forget"]))
    for emitted in (directory, fused):
        config = json.loads((emitted / "adapter_config.json").read_text())
        record = json.loads((emitted / "perta_provenance.json").read_text())
        base = record.get("base_model") or record["fused"]["base_model"]
        assert config["base_model_name_or_path"] == base["name"] == "Org/Tiny-Llama"
        assert base["revision"] == "0" * 40
        assert "base_model: Org/Tiny-Llama" in (emitted / "README.md").read_text()
    merged = merge_adapters(str(path), {str(directory): 1.0}, tmp_path / "merged", show_progress_bar=False)
    assert merged.base_model == "Org/Tiny-Llama"


def test_a_forget_adapter_names_the_hub_id(monkeypatch, tmp_path):
    path = in_the_cache(monkeypatch, tmp_path)
    model, tokenizer = load_base(str(path))
    train_forget_adapter(
        model, builders.forget_rows(), tokenizer, tmp_path / "forget", lora_config=builders.lora_config(),
        num_train_epochs=1, show_progress_bar=False,
    )  # fmt: skip
    config = json.loads((tmp_path / "forget" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Org/Tiny-Llama"
    # A copy under another name is known by its weights, here and where the cache is gone.
    copy = saved(tmp_path / "copy")
    for cache in ("hub", "nowhere"):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / cache))
        for base in (load_base(str(copy), dtype=torch.bfloat16)[0], load_skeleton(str(copy))):
            assert resolve_targets(attach_adapters(base, {"forget": tmp_path / "forget"}), "forget")
    swap_queries(copy)
    model = attach_adapters(load_base(str(copy))[0], {"forget": tmp_path / "forget"})
    with pytest.raises(AdapterError, match="which has another name, and weights that cannot be compared"):
        resolve_targets(model, "forget")


def test_where_both_bases_are_here_their_weights_decide(monkeypatch, tmp_path):
    cached = in_the_cache(monkeypatch, tmp_path)
    model = builders.adapted_saved_llama()
    same = saved(tmp_path / "a-copy")
    other = saved(tmp_path / "b" / builders.llama_directory().name)
    swap_queries(other)
    for claimed in ("Org/Tiny-Llama", str(cached), str(same)):
        assert resolve_targets(named(claimed, model), "forget")
    with pytest.raises(AdapterError, match=r"trained on the base '.*b/tiny-llama', but the model is .*, whose weights"):
        resolve_targets(named(str(other), model), "forget")
