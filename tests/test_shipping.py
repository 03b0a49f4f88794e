"""Fused, merged and stacked models agree, and ``verify`` finds every fault of a directory."""

import json
import shutil
from contextlib import ExitStack

import builders
import oracles
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_perta import AdapterError, ConfigError, NumericalError, OutputError, save_perta_adapter, stack_adapters
from peft_perta.adapters import (
    add_adapter,
    compare_merged,
    format_checks,
    fuse_adapters,
    load_provenance,
    merge_adapters,
    verify_adapter,
)
from peft_perta.adapters.merge import MERGED_NAME
from peft_perta.adapters.merge_check import TOLERANCE
from peft_perta.model import adapter_strength, attach_adapters, hash_file, load_base, load_skeleton, preserved

IDS = torch.arange(3, 23).reshape(2, 10)


def logits(model, adapters=()):
    """Logits with these adapters stacked. Within ``preserved``, 4-bit weights are not repacked."""
    if adapters:
        stack_adapters(model, list(adapters))
    model.eval()
    with torch.no_grad(), preserved(model):
        return model(input_ids=IDS).logits


# Fusing

MODELS = {
    "linear": builders.adapted_llama,
    "linear4bit": builders.adapted_nf4_llama,
    "conv1d": builders.adapted_gpt2,
    "experts": builders.adapted_mixtral,
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_fused_adapter_equals_the_stack(kind):
    """Also on a 4-bit base, where the stack adds both deltas to the same dequantised weights."""
    model = MODELS[kind]()
    names = [name for name in model.peft_config if name != "default"][:2]
    assert len(names) == 2
    config, state_dict, provenance = fuse_adapters(model, dict(zip(names, (1.0, -0.7), strict=True)))
    with adapter_strength(model, names[1], -0.7):
        expected = logits(model, names)
    add_adapter(model, config, state_dict, "fused")
    fused = logits(model, ["fused"])
    assert not torch.allclose(expected, logits(model, names[:1]), atol=1e-3)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    assert provenance.energy_kept == 1.0
    assert [part["strength"] for part in provenance.parts] == [1.0, -0.7]


def test_an_nf4_stack_equals_the_stack_on_the_dequantised_base():
    """Stacking loses nothing beyond the quantisation of the base."""
    model = builders.adapted_nf4_llama()
    plain, _ = oracles.plain_model(model, ["forget", "task"])
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
    torch.testing.assert_close(logits(model, ["forget", "task"]), expected, rtol=1e-4, atol=1e-4)


def test_truncating_is_the_best_approximation_and_states_the_energy_kept():
    model = builders.adapted_llama()
    _, state_dict, provenance = fuse_adapters(model, ["forget", "task"], rank=3)
    kept = whole = 0.0
    for name, adapted in oracles.adapted_weights(model, "forget").items():
        exact = adapted.delta + oracles.adapted_weights(model, "task")[name].delta
        prefix = f"base_model.model.{name}.lora_"
        truncated = state_dict[f"{prefix}B.weight"].double() @ state_dict[f"{prefix}A.weight"].double()
        torch.testing.assert_close(truncated, oracles.best_approximation(exact, 3), rtol=1e-4, atol=1e-5)
        kept, whole = kept + float(truncated.square().sum()), whole + float(exact.square().sum())
    assert provenance.energy_kept == pytest.approx(kept / whole, rel=1e-5)
    assert provenance.rank == 8


def test_fusing_needs_no_weights_of_the_base(tmp_path):
    model = builders.adapted_saved_llama()
    for name in ("forget", "task"):
        model.save_pretrained(tmp_path, selected_adapters=[name])
    skeleton = load_skeleton(str(builders.llama_directory()))
    bare = attach_adapters(skeleton, {name: tmp_path / name for name in ("forget", "task")})
    assert all(p.is_meta for n, p in bare.named_parameters() if "lora" not in n)
    _, fused, _ = fuse_adapters(bare, ["forget", "task"])
    _, expected, _ = fuse_adapters(model, ["forget", "task"])
    assert fused.keys() == expected.keys()
    assert all(torch.equal(fused[key], expected[key]) for key in expected)


def matching(pattern):
    """A config of the modules whose paths match a regular expression."""
    config = builders.lora_config()
    config.target_modules = pattern
    return config


PARTIAL = {  # adapters that cover fewer layers than an adapter on every projection of every layer
    "PEFT's default": lambda: builders.lora_config(["q_proj", "v_proj"]),
    "one layer": lambda: builders.lora_config(layers_to_transform=[1]),
    "a regular expression": lambda: matching(r".*layers\.0\..*\.(o|up)_proj"),
    "excluded modules": lambda: builders.lora_config(exclude_modules=["model.layers.0.mlp.up_proj", "k_proj"]),
    "an init of its own": lambda: builders.lora_config(["q_proj"], init_lora_weights="orthogonal"),
}


@pytest.mark.parametrize("order", ["forget whole", "whole forget", "forget unlearn", "unlearn forget"])
@pytest.mark.parametrize("part", PARTIAL)
def test_an_adapter_of_fewer_layers_is_fused_and_merged_in_any_order(part, order, tmp_path):
    """The negative adapter of such an adapter covers every layer of a projection."""
    order = order.split()
    model = builders.with_adapters(builders.saved_llama(), PARTIAL[part](), whole=builders.lora_config(r=8))
    builders.negate(model, weighting="uniform", input_directions=False).add_to(model, "unlearn")
    model.save_pretrained(tmp_path, selected_adapters=order)
    directories = {name: str(tmp_path / name) for name in order}
    bare = attach_adapters(load_skeleton(str(builders.llama_directory())), directories)
    assert list(bare.peft_config) == order
    assert bare.active_adapter == order[0]
    assert not any(parameter.requires_grad for parameter in bare.parameters())
    _, fused, _ = fuse_adapters(bare, dict(zip(order, (1.0, 0.5), strict=True)))
    config, expected, _ = fuse_adapters(model, dict(zip(order, (1.0, 0.5), strict=True)))
    assert fused.keys() == expected.keys()
    assert all(torch.equal(fused[key], expected[key]) for key in expected)
    strengths = dict(zip(directories.values(), (1.0, 0.5), strict=True))
    merge_adapters(str(builders.llama_directory()), strengths, tmp_path / "merged", show_progress_bar=False)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    add_adapter(model, config, expected, "fused")
    torch.testing.assert_close(merged, logits(model, ["fused"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [None, "a/task"])
def test_the_provenance_and_messages_name_an_adapter_by_its_label(label):
    model = builders.adapted_saved_llama()
    labels = {"task": label} if label else None
    _, _, provenance = fuse_adapters(model, ["task", "forget"], labels=labels)
    assert [part["name"] for part in provenance.parts] == [label or "task", "forget"]
    model.peft_config["task"].base_model_name_or_path = "else/where"
    with pytest.raises(AdapterError, match=f"adapter '{label or 'task'}' was trained on the base 'else/where'"):
        fuse_adapters(model, ["task", "forget"], labels=labels)


@pytest.mark.parametrize(
    ("names", "settings", "error", "message"),
    [
        (["forget"], {}, AdapterError, "at least two adapters to fuse, found"),
        (["forget", "nobody"], {}, AdapterError, "no adapter named 'nobody'"),
        (["forget", "task"], {"rank": 300}, ConfigError, "from 1 to 256, found 300"),
        ({"forget": 1.0, "task": float("inf")}, {}, NumericalError, "factors are not finite"),
    ],
)
def test_bad_requests_to_fuse_are_refused(names, settings, error, message):
    with pytest.raises(error, match=message):
        fuse_adapters(builders.adapted_llama(), names, **settings)


def test_a_sum_of_ranks_above_every_servable_rank_needs_a_rank():
    big = builders.lora_config(r=130)
    model = builders.with_adapters(builders.llama(), big, other=big)
    with pytest.raises(ConfigError, match="add up to 260, expected at most 256; give a rank"):
        fuse_adapters(model, ["forget", "other"])


def test_negative_adapters_stack_and_are_withdrawn_one_by_one():
    """Switching the second of two off gives the first alone; fusing both gives both."""
    model = builders.adapted_llama()
    first, second = builders.forget_rows()[:3], builders.forget_rows()[3:]
    for name, rows in (("first", first), ("second", second)):
        config, state_dict, _ = builders.negate(model, forget=rows)
        add_adapter(model, config, state_dict, name)
    alone, both = logits(model, ["task", "first"]), logits(model, ["task", "first", "second"])
    assert not torch.allclose(alone, both, atol=1e-3)
    torch.testing.assert_close(logits(model, ["task", "first"]), alone, rtol=0, atol=0)
    config, state_dict, _ = fuse_adapters(model, ["task", "first", "second"])
    add_adapter(model, config, state_dict, "whole")
    torch.testing.assert_close(logits(model, ["whole"]), both, rtol=1e-5, atol=1e-5)


# Merging


def saved(model, base, path, shard="5GB"):
    """Save a base and two adapters of it; return the base's directory, and adapter directory -> strength."""
    base.save_pretrained(path / "base", max_shard_size=shard)
    builders.tokenizer().save_pretrained(path / "base")
    names = [name for name in model.peft_config if name != "default"][:2]
    model.save_pretrained(path, selected_adapters=names)
    for name in names:
        config = json.loads((path / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(path / "base")
        (path / name / "adapter_config.json").write_text(json.dumps(config))
    return str(path / "base"), {str(path / name): factor for name, factor in zip(names, (1.0, -0.6), strict=True)}


def stacked(base, adapters):
    names = {f"a{index}": path for index, path in enumerate(adapters)}
    model = attach_adapters(load_base(base, dtype=torch.float32)[0], names)
    with ExitStack() as strengths:
        for name, path in names.items():
            strengths.enter_context(adapter_strength(model, name, adapters[path]))
        return logits(model, list(names))


BASES = {
    "linear": builders.llama,
    "conv1d": builders.gpt2,
    "tied": lambda: builders.llama(tied=True),
    "experts": builders.mixtral,
}
ADAPTED = {**MODELS, "tied": lambda: builders.with_adapters(builders.llama(tied=True), builders.lora_config(),
                                                            task=builders.lora_config())}  # fmt: skip


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("kind", BASES)
def test_the_merged_model_equals_the_stack(kind, shard, tmp_path):
    base, adapters = saved(ADAPTED[kind](), BASES[kind](), tmp_path, shard)
    provenance = merge_adapters(base, adapters, tmp_path / "merged", show_progress_bar=False)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(merged, stacked(base, adapters), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, logits(load_base(base, dtype=torch.float32)[0]), atol=1e-3)
    assert provenance.rounding < 1e-6
    shards = sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard != "5GB")
    assert (
        shards == sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == sorted(provenance.files)
    )
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "merged" / MERGED_NAME).read_text())["weights"] == provenance.weights


def test_merging_in_16_bit_states_the_rounding(tmp_path):
    base, adapters = saved(builders.adapted_llama(), builders.llama().to(torch.bfloat16), tmp_path)
    provenance = merge_adapters(base, adapters, tmp_path / "merged", show_progress_bar=False)
    assert provenance.dtype == "bfloat16"
    assert 1e-4 < provenance.rounding < 0.1
    whole = merge_adapters(base, adapters, tmp_path / "whole", dtype=torch.float32, show_progress_bar=False)
    assert whole.rounding < 1e-6
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118 - no mapping
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), stacked(base, adapters), rtol=1e-5, atol=1e-5)


def test_the_check_compares_merged_and_stacked(tmp_path):
    base, adapters = saved(builders.adapted_llama(), builders.llama(), tmp_path)
    merge_adapters(base, adapters, tmp_path / "merged", show_progress_bar=False)
    check = compare_merged(base, adapters, tmp_path / "merged", builders.forget_rows(), answered=3)
    assert (check.rows, check.same_answers) == (3, 3)
    assert check.largest_difference < 1e-5
    assert check.agrees
    assert "rounding" not in str(check)
    wrong = compare_merged(base, dict.fromkeys(adapters, 0.0), tmp_path / "merged", builders.forget_rows(), answered=3)
    assert wrong.unexplained_difference == wrong.largest_difference > 1e-2
    assert not wrong.agrees
    assert "They DISAGREE: beyond what rounding the merged weights explains, " in str(wrong)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "experts"])
def test_the_check_measures_what_the_dtype_explains(kind, tmp_path):
    """Rounding to bfloat16 moves losses by more than the tolerance; a weak adapter left out moves them by no more."""
    base, adapters = saved(MODELS[kind](), BASES[kind](), tmp_path)
    merge_adapters(base, adapters, tmp_path / "merged", dtype=torch.bfloat16, show_progress_bar=False)
    check = compare_merged(base, adapters, tmp_path / "merged", builders.forget_rows(), answered=3)
    assert check.unexplained_difference < TOLERANCE < check.largest_difference
    assert check.agrees
    assert str(check).endswith("which rounding the merged weights explains")
    first = next(iter(adapters))
    weaker = {**adapters, first: adapters[first] - 0.05}
    wrong = compare_merged(base, weaker, tmp_path / "merged", builders.forget_rows(), answered=3)
    assert wrong.unexplained_difference > TOLERANCE
    assert not wrong.agrees


def test_a_quantised_base_is_refused(tmp_path):
    base, adapters = saved(builders.adapted_llama(), builders.llama(), tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is quantised, and rounding would undo a small edit"):
        merge_adapters(base, adapters, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_weights_under_another_name_are_refused_before_anything_is_written(tmp_path):
    base, adapters = saved(builders.adapted_llama(), builders.llama(), tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = {key.replace("q_proj", "query"): value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"hold no tensor for model\.layers\.0\.self_attn\.q_proj\.weight"):
        merge_adapters(base, adapters, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_bad_merges_are_refused(tmp_path):
    base, adapters = saved(builders.adapted_llama(), builders.llama(), tmp_path)
    with pytest.raises(AdapterError, match="at least one adapter to merge"):
        merge_adapters(base, {}, tmp_path / "merged")
    with pytest.raises(NumericalError, match="the merged weight is not finite"):
        merge_adapters(base, dict.fromkeys(adapters, float("inf")), tmp_path / "merged", show_progress_bar=False)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="was not written by peft_perta"):
        merge_adapters(base, adapters, tmp_path / "mine")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be read"):
        merge_adapters(base, adapters, tmp_path / "merged")


# Verifying


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """A negative adapter for a base on disk, as unlearn writes it."""
    model = builders.adapted_saved_llama()
    path = tmp_path_factory.mktemp("emitted") / "unlearn"
    return save_perta_adapter(path, *builders.negate(model))


def failed(directory, base=None):
    return [check.name for check in verify_adapter(directory, base) if not check.passed]


@pytest.mark.fresh_process
def test_an_emitted_adapter_passes_every_check(emitted):
    checks = verify_adapter(emitted, str(builders.llama_directory()))
    assert all(check.passed for check in checks), format_checks(checks)
    assert len(checks) >= 18
    assert format_checks(checks).endswith("every check passed")


def copied(emitted, path, change_config=None, change_tensors=None):
    """A copy with changed files, and with the hashes in the provenance updated so that only other checks can fail."""
    shutil.copytree(emitted, path)
    if change_config:
        config = json.loads((path / "adapter_config.json").read_text())
        change_config(config)
        (path / "adapter_config.json").write_text(json.dumps(config))
    if change_tensors:
        tensors = load_file(path / "adapter_model.safetensors")
        tensors = change_tensors(tensors) or tensors
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "adapter_model.safetensors", {"format": "pt"})
    provenance = json.loads((path / "perta_provenance.json").read_text())
    provenance["files"] = {name: hash_file(path / name) for name in provenance["files"]}
    (path / "perta_provenance.json").write_text(json.dumps(provenance))
    return path


def infinite(tensors):
    next(iter(tensors.values()))[0, 0] = torch.inf


def without_a_layer(tensors):
    return {key: value for key, value in tensors.items() if "layers.1.self_attn.q_proj" not in key}


def of_rank_12(tensors):
    return {k: torch.cat([v, v[:4]]) if "lora_A" in k else torch.cat([v, v[:, :4]], 1) for k, v in tensors.items()}


def of_two_types(tensors):
    key = next(iter(tensors))
    tensors[key] = tensors[key].half()


FAULTS = {
    "rank of 12": ({"r": 12, "lora_alpha": 12}, of_rank_12, "vLLM: rank"),
    "rank of 12 in the file alone": (None, of_rank_12, "all: rank of the factors"),
    "rsLoRA": ({"use_rslora": True}, None, "all: no rsLoRA"),
    "alpha": ({"lora_alpha": 16}, None, "llama.cpp, TGI: lora_alpha == r"),
    "patterns": ({"rank_pattern": {"q_proj": 4}}, None, "llama.cpp, TGI: no patterns"),
    "bias": ({"bias": "all"}, None, "all: no bias"),
    "DoRA": ({"use_dora": True}, None, "all: plain LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, None, "all: the base as it is"),
    "infinite": (None, infinite, "all: finite"),
    "two types": (None, of_two_types, "all: one type"),
    "half a pair": (None, lambda t: dict(list(t.items())[1:]), "all: factors in pairs"),
    "a strange key": (None, lambda t: {**t, "base_model.model.head.weight": torch.ones(1)}, "vLLM: keys"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_own_check(fault, emitted, tmp_path):
    config, tensors, name = FAULTS[fault]
    directory = copied(emitted, tmp_path / "bad", (lambda c: c.update(config)) if config else None, tensors)
    assert name in failed(directory)


def test_an_adapter_that_changes_nothing_is_found(emitted, tmp_path):
    def silent(tensors):
        return {key: value * ("lora_A" in key) for key, value in tensors.items()}

    directory = copied(emitted, tmp_path / "silent", change_tensors=silent)
    assert failed(directory) == []
    assert failed(directory, str(builders.llama_directory())) == ["PEFT: changes the logits"]


@pytest.mark.fresh_process
def test_a_missing_layer_is_found(emitted, tmp_path):
    directory = copied(emitted, tmp_path / "bad", None, without_a_layer)
    assert failed(directory) == []
    failed_on_base = failed(directory, str(builders.llama_directory()))
    assert failed_on_base == ["TGI: every layer of each projection", "PEFT: loads in a fresh process"]


def test_a_flipped_byte_is_found(emitted, tmp_path):
    shutil.copytree(emitted, tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert failed(tmp_path / "bad") == ["hash of adapter_model.safetensors"]


def test_a_provenance_of_another_adapter_is_found(emitted, tmp_path):
    other = save_perta_adapter(tmp_path / "other", *builders.negate(builders.adapted_saved_llama(), strength=2.0))
    shutil.copytree(emitted, tmp_path / "bad")
    shutil.copy(other / "perta_provenance.json", tmp_path / "bad")
    assert failed(tmp_path / "bad") == ["hash of adapter_model.safetensors"]
    (tmp_path / "bad" / "perta_provenance.json").unlink()
    assert failed(tmp_path / "bad") == ["provenance"]


@pytest.mark.slow
def test_a_base_is_found_by_its_content_and_by_its_name_where_the_record_holds_none(emitted, tmp_path):
    other, own_name = tmp_path / "other-llama", tmp_path / builders.llama_directory().name
    builders.llama().save_pretrained(other)
    assert failed(emitted, str(other)) == []
    model = builders.llama()
    model.get_input_embeddings().weight.data[3] += 0.5
    model.save_pretrained(own_name)
    assert failed(emitted, str(own_name)) == ["the base that it was made for", "the base's weights"]
    # An earlier version recorded the embeddings alone, or nothing.
    directory = copied(emitted, tmp_path / "old", lambda config: config.update(base_model_name_or_path="a/tiny-llama"))
    record = json.loads((directory / "perta_provenance.json").read_text())
    for kept, expected in ((("embeddings_sha256",), ["the base's weights"]), ((), [])):
        record["base_model"] = {name: record["base_model"][name] for name in ("name", "revision", *kept)}
        (directory / "perta_provenance.json").write_text(json.dumps(record))
        assert failed(directory, str(own_name)) == expected
    assert failed(directory, str(other)) == ["the base that it was made for"]


def test_a_fused_adapter_verifies(tmp_path):
    model = builders.adapted_saved_llama()
    path = save_perta_adapter(tmp_path / "fused", *fuse_adapters(model, ["task", "forget"]))
    assert failed(path, str(builders.llama_directory())) == []
    provenance, _ = load_provenance(path)
    assert [part["name"] for part in provenance.parts] == ["task", "forget"]
    assert "Fused adapter" in (path / "README.md").read_text()


def test_damaged_and_missing_files_are_failed_checks(emitted, tmp_path):
    with pytest.raises(AdapterError, match="is no directory"):
        verify_adapter(tmp_path / "nowhere")
    shutil.copytree(emitted, tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").unlink()
    assert {"hash of adapter_model.safetensors", "weights"} <= set(failed(tmp_path / "bad"))
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    assert "vLLM: rank" in failed(tmp_path / "bad")


@pytest.mark.parametrize("pattern", [pytest.param(r".*_proj", marks=pytest.mark.slow), "all-linear"])
def test_the_layers_of_a_pattern_are_those_of_the_file(pattern, emitted, tmp_path):
    """Which layers a pattern names only the keys say; the rule of the servers fails, for they want names."""
    directory = copied(emitted, tmp_path / "pattern", lambda c: c.update(target_modules=pattern))
    checks = {check.name: check for check in verify_adapter(directory, str(builders.llama_directory()))}
    assert not checks["all: target_modules named"].passed
    layers = checks["TGI: every layer of each projection"]
    assert (layers.passed, layers.found) == (True, "14 layers, zeros where nothing changes")
    directory = copied(directory, tmp_path / "less", None, without_a_layer)
    checks = {check.name: check for check in verify_adapter(directory, str(builders.llama_directory()))}
    layers = checks["TGI: every layer of each projection"]
    assert (layers.passed, layers.found) == (False, "model.layers.1.self_attn.q_proj is missing")


def test_hubs_can_read_the_model_card(emitted):
    from huggingface_hub import ModelCard

    data = ModelCard.load(emitted / "README.md").data.to_dict()
    assert data["library_name"] == "peft"
    assert data["license"] == "other"
    assert {"lora", "unlearning", "perta"} <= set(data["tags"])
    assert isinstance(PeftModel.from_pretrained(builders.llama(), emitted), PeftModel)
