"""Merging models whose files transformers renames, stacks, splits or turns when it loads them."""

import json
import shutil

import builders
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GraniteMoeConfig,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
)
from transformers.modeling_utils import LoadStateDictConfig

from peft_perta import AdapterError, ConfigError, save_perta_adapter
from peft_perta.adapters import _conversion, compare_merged, merge_adapters, verify_adapter
from peft_perta.cli import main
from peft_perta.model import adapter_strength, attach_adapters, load_base, stack_adapters

IDS = torch.arange(3, 23).reshape(2, 10)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": builders.VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.15,
}
DEEPSEEK = {
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def made(config):
    with torch.random.fork_rng():
        torch.manual_seed(8)
        return AutoModelForCausalLM.from_config(config).eval()


def gemma3_for_images():
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = Gemma3TextConfig(**{**SMALL, "head_dim": 8})
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        ).eval()


# Model -> (builder, a key of its files that the model does not know, the parameters of the experts)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES = {
    "mixtral": (builders.mixtral, "model.layers.1.block_sparse_moe.experts.2.w3.weight", EXPERTS),
    "qwen3_moe": (
        lambda: made(Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)),
        "model.layers.1.mlp.experts.2.up_proj.weight",
        EXPERTS,
    ),
    "olmoe": (
        lambda: made(OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)),
        "model.layers.1.mlp.experts.2.up_proj.weight",
        EXPERTS,
    ),
    "deepseek_v3": (
        lambda: made(DeepseekV3Config(**{**SMALL, **DEEPSEEK, "num_key_value_heads": 4})),
        "model.layers.1.mlp.experts.2.up_proj.weight",
        EXPERTS,
    ),
    "granitemoe": (
        lambda: made(GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
        "model.layers.1.block_sparse_moe.input_linear.weight",
        EXPERTS,
    ),
    "gpt_oss": (builders.gpt_oss, None, EXPERTS),
    "gemma3": (gemma3_for_images, "language_model.model.layers.1.mlp.up_proj.weight", None),
}


def saved(family, path, shard="5GB"):
    """The family's base on disk, and the directory of an adapter that PEFT's all-linear and the experts make."""
    build, _, experts = FAMILIES[family]
    build().save_pretrained(path / "base", max_shard_size=shard)
    builders.tokenizer().save_pretrained(path / "base")
    base, _ = load_base(str(path / "base"), dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", target_parameters=experts, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = get_peft_model(base, config, adapter_name="forget")
        builders.fill(adapted, "forget")
    adapted.save_pretrained(path)
    return str(path / "base"), str(path / "forget")


def logits(model, names=()):
    if names:
        stack_adapters(model, list(names))
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def stacked(base, adapter, strength):
    model = attach_adapters(load_base(base, dtype=torch.float32)[0], {"a": adapter})
    with adapter_strength(model, "a", strength):
        return logits(model, ["a"])


def contents(directory):
    """File -> key -> (dtype, shape)."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            found[path.name] = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in keys.items()}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_equals_the_stack_and_its_files_are_laid_out_as_the_bases(family, tmp_path):
    base, adapter = saved(family, tmp_path, "20KB")
    merge_adapters(base, {adapter: -0.7}, tmp_path / "merged", show_progress_bar=False)
    merged = logits(load_base(str(tmp_path / "merged"), dtype=torch.float32)[0])
    torch.testing.assert_close(merged, stacked(base, adapter, -0.7), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, logits(load_base(base, dtype=torch.float32)[0]), atol=1e-3)
    files = contents(tmp_path / "base")
    assert len(files) > 3
    assert contents(tmp_path / "merged") == files
    key = FAMILIES[family][1]
    assert key is None or any(key in keys for keys in files.values())


def test_an_adapter_of_this_package_merges_with_the_task_adapter_in_16_bit(tmp_path):
    """The experts' weights of one layer stand in several shards."""
    base, task = saved("qwen3_moe", tmp_path, "8KB")
    model = attach_adapters(load_base(base, dtype=torch.float32)[0], {"forget": task})
    negative = str(save_perta_adapter(tmp_path / "unlearn", *builders.negate(model)))
    adapters = {task: 1.0, negative: 0.5}
    provenance = merge_adapters(base, adapters, tmp_path / "merged", dtype=torch.bfloat16, show_progress_bar=False)
    assert provenance.dtype == "bfloat16"
    assert 1e-4 < provenance.rounding < 0.1
    assert {dtype for keys in contents(tmp_path / "merged").values() for dtype, _ in keys.values()} == {"BF16"}
    check = compare_merged(base, adapters, tmp_path / "merged", builders.forget_rows(), answered=2)
    assert check.largest_difference < 0.1
    merge_adapters(base, adapters, tmp_path / "exact", show_progress_bar=False)
    exact = compare_merged(base, adapters, tmp_path / "exact", builders.forget_rows(), answered=2)
    assert exact.largest_difference < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_verify_says_that_servers_do_not_support_packed_experts(family, tmp_path, capsys):
    base, task = saved(family, tmp_path)
    model = attach_adapters(load_base(base, dtype=torch.float32)[0], {"forget": task})
    negative = save_perta_adapter(tmp_path / "unlearn", *builders.negate(model))
    assert main(["verify", str(negative), "--base", base]) == 0
    lines = capsys.readouterr().out.partition("\nRuntimes")[0].splitlines()
    about_servers = [line for line in lines if any(server in line for server in ("vLLM", "llama.cpp", "TGI"))]
    assert [line.split()[0] for line in about_servers] == ["n/a", "every"]
    assert "not supported: base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight" in about_servers[0]
    assert about_servers[1] == "every check passed; not supported by vLLM, llama.cpp, TGI"
    assert any(line.startswith("pass  PEFT: loads in a fresh process") for line in lines)


def test_an_adapter_of_one_kind_of_expert_parameter_is_packed_as_well(tmp_path):
    """Its key ends in ``experts`` alone, without ``base_layer``."""
    model = builders.with_adapters(
        builders.mixtral(), builders.experts_config(target_parameters=["mlp.experts.down_proj"])
    )
    negative = save_perta_adapter(tmp_path / "unlearn", *builders.negate(model))
    (unsupported,) = [check for check in verify_adapter(negative) if check.passed is None]
    assert "layers.0.mlp.experts.lora_A.weight packs the factors of all experts" in unsupported.found


def test_files_without_the_prefix_of_the_model_are_merged(tmp_path):
    """As a model without its head saves them."""
    base, adapters = tmp_path / "base", tmp_path / "forget"
    builders.llama(tied=True).save_pretrained(base)
    builders.tokenizer().save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    bare = {key.removeprefix("model."): value for key, value in tensors.items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    builders.with_adapters(load_base(str(base), dtype=torch.float32)[0]).save_pretrained(tmp_path)
    merge_adapters(str(base), {str(adapters): 1.0}, tmp_path / "merged", show_progress_bar=False)
    merged = logits(load_base(str(tmp_path / "merged"), dtype=torch.float32)[0])
    torch.testing.assert_close(merged, stacked(str(base), str(adapters), 1.0), rtol=1e-5, atol=1e-5)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == bare.keys()


# Conversions


class Twice(ConversionOps):
    """A conversion that computes with the weights, as dequantising does."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        ((value,),) = input_dict.values()
        return {target_patterns[0]: 2 * value}


class Doubled(ConversionOps):
    """A conversion that gives one element of the files to two elements of the parameter."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        ((value,),) = input_dict.values()
        return {target_patterns[0]: torch.cat([value, value])}


class Shifted(ConversionOps):
    """A conversion that turns each row by another amount, so that neither rows nor columns stay together."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        ((value,),) = input_dict.values()
        return {target_patterns[0]: torch.stack([row.roll(index) for index, row in enumerate(value)])}


class Converted(PreTrainedModel):
    """A model of parameters alone."""

    config_class = LlamaConfig

    def __init__(self, shapes):
        super().__init__(LlamaConfig(num_attention_heads=2))
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))


# Name -> (shapes of the files' tensors, shapes of the parameters, the transforms)
STACKED = {f"e.{index}.{half}": (3, 4) for index in range(12) for half in ("up", "gate")}
CONVERSIONS = {
    "renamed": ({"old": (3, 4)}, {"new": (3, 4)}, lambda: [WeightRenaming("old", "new")]),
    "stacked": (
        STACKED,
        {"both": (12, 6, 4)},
        lambda: [WeightConverter(["e.*.gate", "e.*.up"], "both", [MergeModulelist(0), Concatenate(1)])],
    ),
    "stacked and transposed": (
        STACKED,
        {"both": (12, 4, 6)},
        lambda: [
            WeightConverter(["e.*.gate", "e.*.up"], "both", [MergeModulelist(0), Concatenate(1), Transpose(1, 2)])
        ],
    ),
    "joined": (
        {"q": (4, 6), "k": (2, 6), "v": (2, 6)},
        {"qkv": (8, 6)},
        lambda: [WeightConverter(["q", "k", "v"], "qkv", [Concatenate(0)])],
    ),
    "split": (
        {"fused": (12, 5)},
        {"q": (4, 5), "k": (4, 5), "v": (4, 5)},
        lambda: [WeightConverter("fused", ["q", "k", "v"], [Chunk(0)])],
    ),
    "permuted": ({"a": (8, 3)}, {"b": (8, 3)}, lambda: [WeightConverter("a", "b", [PermuteForRope()])]),
    "interleaved": ({"a": (3, 6, 2)}, {"b": (3, 6, 2)}, lambda: [WeightConverter("a", "b", [Interleave(1)])]),
}


def conversion_of(name, monkeypatch):
    files, parameters, transforms = CONVERSIONS[name]
    monkeypatch.setattr(_conversion, "get_model_conversion_mapping", lambda model: transforms())
    model = Converted(parameters)
    return _conversion.Conversion(model, files), model, files


def loaded(model, tensors, transforms):
    """What transformers' loader puts in the parameters."""
    settings = LoadStateDictConfig(weight_mapping=transforms)
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings, None)
    assert [*info.missing_keys, *info.conversion_errors, *info.mismatched_keys] == []
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_adding_in_the_files_and_loading_equals_loading_and_adding(name, monkeypatch):
    conversion, model, files = conversion_of(name, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in files.items()}
    before = loaded(model, tensors, CONVERSIONS[name][2]())
    deltas = {name: torch.randn(value.shape, generator=generator) for name, value in before.items()}
    for parameter, delta in deltas.items():
        matrices = delta if delta.dim() == 3 else [delta]
        for index, (matrix, parts) in enumerate(zip(matrices, conversion.stored(parameter), strict=True)):
            for key, part in parts:
                if part is None:
                    tensors[key] += delta if delta.dim() == 2 or index == 0 else 0
                else:
                    part.add(matrix, tensors[key])
    after = loaded(model, tensors, CONVERSIONS[name][2]())
    for parameter, delta in deltas.items():
        torch.testing.assert_close(after[parameter], before[parameter] + delta, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("operation", "shape", "reason"),
    [
        (Twice(), (3, 4), "computes with the weights|not moved by whole rows"),
        (Doubled(), (6, 4), "several of its elements come from the same one"),
        (Shifted(), (3, 4), "not moved by whole rows and columns"),
        (Transpose(0, 1), (3, 4), r"1 tensors make it \(4, 3\), expected \(3, 4\)"),
        (Concatenate(7), (3, 4), "IndexError"),
    ],
)
def test_a_conversion_that_does_more_than_moving_elements_is_refused_by_name(operation, shape, reason, monkeypatch):
    mapping = [WeightConverter("a", "b", [operation])]
    monkeypatch.setattr(_conversion, "get_model_conversion_mapping", lambda model: mapping)
    conversion = _conversion.Conversion(Converted({"b": shape}), {"a": (3, 4)})
    with pytest.raises(AdapterError, match=f"b is adapted, but how transformers makes it .*({reason})"):
        conversion.stored("b")


def test_a_tensor_of_another_shape_is_refused(monkeypatch):
    monkeypatch.setattr(_conversion, "get_model_conversion_mapping", lambda model: [])
    conversion = _conversion.Conversion(Converted({"b": (3, 4)}), {"b": (4, 4)})
    with pytest.raises(AdapterError, match=r"the tensor b \(4, 4\) is not of its shape \(3, 4\)"):
        conversion.stored("b")


def test_missing_experts_are_refused_before_anything_is_written(tmp_path):
    base, adapter = saved("mixtral", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if ".1.block_sparse_moe.experts.3." not in key}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.experts.*3 tensors make it .*, expected \(4, "):
        merge_adapters(base, {adapter: 1.0}, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# What merge reads and copies


@pytest.fixture
def sharded(tmp_path):
    """A tiny Llama in several shards, and a task adapter of it."""
    base = tmp_path / "base"
    builders.llama().save_pretrained(base, max_shard_size="50KB")
    builders.tokenizer().save_pretrained(base)
    assert (base / INDEX).is_file()
    builders.adapted_saved_llama().save_pretrained(tmp_path, selected_adapters=["task"])
    return tmp_path


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("way", ["absolute", "up", "link"])
def test_an_index_that_leads_out_of_the_directory_is_refused(way, sharded):
    secret = sharded / "secret.safetensors"
    base = sharded / "base"
    index = json.loads((base / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    shutil.copy(base / first, secret)
    name = {"absolute": str(secret), "up": "../secret.safetensors", "link": "linked.safetensors"}[way]
    if way == "link":
        (base / name).symlink_to(secret)
    index["weight_map"] = {key: name if shard == first else shard for key, shard in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="is not a file of that directory"):
        merge_adapters(str(base), {str(sharded / "task"): 1.0}, sharded / "merged")
    assert not (sharded / "merged").exists()


def test_only_what_a_model_consists_of_is_copied(sharded):
    base = sharded / "base"
    for name in ("modeling_x.py", "optimizer.pkl", "notes.csv", "weights.bin"):
        (base / name).write_text("x")
    (sharded / "passwords.txt").write_text("x")
    (base / "passwords.txt").symlink_to(sharded / "passwords.txt")
    for name in ("LICENSE", "chat_template.jinja"):
        (base / name).write_text("x")
    merge_adapters(str(base), {str(sharded / "task"): 1.0}, sharded / "merged", show_progress_bar=False)
    written = {file.name for file in (sharded / "merged").iterdir()}
    assert {"LICENSE", "chat_template.jinja", "tokenizer.json", "config.json", INDEX} <= written
    assert not written & {"modeling_x.py", "optimizer.pkl", "notes.csv", "weights.bin", "passwords.txt"}


def test_beside_a_single_file_the_index_is_not_read(tmp_path):
    """As transformers has it."""
    base = tmp_path / "base"
    builders.llama().save_pretrained(base)
    builders.tokenizer().save_pretrained(base)
    (base / INDEX).write_text(json.dumps({"weight_map": {"x": "other.safetensors"}}))
    builders.adapted_saved_llama().save_pretrained(tmp_path, selected_adapters=["task"])
    merge_adapters(str(base), {str(tmp_path / "task"): 1.0}, tmp_path / "merged", show_progress_bar=False)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
