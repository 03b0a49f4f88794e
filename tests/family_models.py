"""A tiny random model of every family of models: two layers, width 32. Each builder works without arguments.

``directory(name)`` is the model on disk with a tokenizer beside it, as the command line reads it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from builders import VOCABULARY, tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

_scratch = tempfile.TemporaryDirectory(prefix="families-")  # deleted when the process ends
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # wide, so that an untrained tiny model has clear predictions and sizeable gradients
    **_TOKENS,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {  # DeepSeek's attention through a latent, and its routed experts beside a shared one
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def _built(kind: str, **settings: Any) -> PreTrainedModel:
    """The causal language model ``{kind}ForCausalLM`` of the small settings and these."""
    config = getattr(transformers, f"{kind}Config")(**{**_SMALL, **settings})
    return _random(getattr(transformers, f"{kind}ForCausalLM"), config)


def _random(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():  # left empty or zero for a checkpoint to fill
            if not bool(torch.isfinite(parameter).all()) or ("expert" in name and not bool(parameter.any())):
                parameter.data.normal_(std=0.15)
    model.generation_config.pad_token_id = 0
    return model


def llama3() -> PreTrainedModel:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return _built("Llama", rope_parameters={**rope, "original_max_position_embeddings": 128})


def qwen2() -> PreTrainedModel:
    return _built("Qwen2")


def qwen3() -> PreTrainedModel:
    return _built("Qwen3", head_dim=16)


def qwen2_moe() -> PreTrainedModel:
    return _built("Qwen2Moe", shared_expert_intermediate_size=16, **_EXPERTS)


def qwen3_moe() -> PreTrainedModel:
    return _built("Qwen3Moe", head_dim=16, **_EXPERTS)


def mistral() -> PreTrainedModel:
    return _built("Mistral", sliding_window=64)


def mixtral() -> PreTrainedModel:
    return _built("Mixtral", num_local_experts=4, num_experts_per_tok=2)


def gemma2() -> PreTrainedModel:
    return _built("Gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=64)


def gemma3() -> PreTrainedModel:
    return _random(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**_GEMMA3))


_GEMMA3 = {**_SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}


def gemma3_images() -> PreTrainedModel:
    vision = {**_VISION, "image_size": 28, "patch_size": 14, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.Gemma3Config(
        text_config=_GEMMA3, vision_config=vision, mm_tokens_per_image=4, boi_token_index=120, eoi_token_index=121,
        image_token_index=122,
    )  # fmt: skip
    return _random(transformers.Gemma3ForConditionalGeneration, config)


_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.15}


def gemma3n() -> PreTrainedModel:
    settings = {
        "head_dim": 8,
        "sliding_window": 64,
        "num_hidden_layers": 4,
        "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
    }
    config = transformers.Gemma3nTextConfig(**{**_SMALL, **settings})
    return _random(transformers.Gemma3nForCausalLM, config)


def phi3() -> PreTrainedModel:
    return _built("Phi3")


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.15}
    return _random(transformers.GPT2LMHeadModel, transformers.GPT2Config(**sizes, **_TOKENS))


def gpt_neox() -> PreTrainedModel:
    return _built("GPTNeoX")


def opt() -> PreTrainedModel:
    return _built("OPT", ffn_dim=48, word_embed_proj_dim=32, init_std=0.15)


def falcon() -> PreTrainedModel:
    """Falcon-7B's layout: attention and MLP side by side, one head of keys and values."""
    return _built("Falcon", new_decoder_architecture=False, parallel_attn=True, multi_query=True)


def falcon_new() -> PreTrainedModel:
    """Falcon-40B's layout: several heads of keys and values, two norms."""
    return _built("Falcon", new_decoder_architecture=True, num_kv_heads=2)


def bloom() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.15}
    return _random(transformers.BloomForCausalLM, transformers.BloomConfig(**sizes, **_TOKENS))


def stablelm() -> PreTrainedModel:
    return _built("StableLm")


def olmo2() -> PreTrainedModel:
    return _built("Olmo2")


def olmoe() -> PreTrainedModel:
    return _built("Olmoe", num_experts=4, num_experts_per_tok=2)


def granite() -> PreTrainedModel:
    return _built("Granite")


def granite_moe() -> PreTrainedModel:
    return _built("GraniteMoe", num_local_experts=4, num_experts_per_tok=2)


def smollm3() -> PreTrainedModel:
    return _built("SmolLM3", no_rope_layers=[1, 0])


def deepseek_v2() -> PreTrainedModel:
    return _built("DeepseekV2", **_LATENT)


def deepseek_v3() -> PreTrainedModel:
    return _built("DeepseekV3", n_group=2, topk_group=1, **_LATENT)


def cohere() -> PreTrainedModel:
    return _built("Cohere")


def gpt_oss() -> PreTrainedModel:
    return _built("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)


def llama4() -> PreTrainedModel:
    settings = {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
    config = transformers.Llama4TextConfig(**{**_SMALL, **settings, "interleave_moe_layer_step": 2})
    return _random(transformers.Llama4ForCausalLM, config)


def mamba() -> PreTrainedModel:
    return _random(transformers.MambaForCausalLM, transformers.MambaConfig(**_STATES, state_size=8))


_STATES = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.15, **_TOKENS}


def mamba2() -> PreTrainedModel:
    settings = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16}
    return _random(transformers.Mamba2ForCausalLM, transformers.Mamba2Config(**_STATES, **settings))


def jamba() -> PreTrainedModel:
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    return _built("Jamba", mamba_d_state=8, **layers, **experts)


def falcon_h1() -> PreTrainedModel:
    heads = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
    return _built("FalconH1", mamba_chunk_size=16, **heads)


def qwen3_next() -> PreTrainedModel:
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }
    return _built("Qwen3Next", head_dim=16, shared_expert_intermediate_size=16, **linear, **_EXPERTS)


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, **{**_TOKENS, "decoder_start_token_id": 0})
    return _random(transformers.T5ForConditionalGeneration, config)


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config={**_SMALL, "rope_parameters": rope}, vision_config=vision, image_token_id=120, video_token_id=121,
        vision_start_token_id=122, vision_end_token_id=123,
    )  # fmt: skip
    return _random(transformers.Qwen2VLForConditionalGeneration, config)


def llava() -> PreTrainedModel:
    vision = {
        **_VISION,
        "model_type": "clip_vision_model",
        "image_size": 28,
        "patch_size": 14,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "projection_dim": 32,
    }
    config = transformers.LlavaConfig(
        text_config={**_SMALL, "model_type": "llama"}, vision_config=vision, image_token_index=120, image_seq_length=4
    )
    return _random(transformers.LlavaForConditionalGeneration, config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama 3": llama3,
    "Qwen2": qwen2,
    "Qwen3": qwen3,
    "Qwen2-MoE": qwen2_moe,
    "Qwen3-MoE": qwen3_moe,
    "Mistral": mistral,
    "Mixtral": mixtral,
    "Gemma2": gemma2,
    "Gemma3": gemma3,
    "Gemma3 for images": gemma3_images,
    "Gemma3n": gemma3n,
    "Phi-3": phi3,
    "GPT-2": gpt2,
    "GPT-NeoX": gpt_neox,
    "OPT": opt,
    "Falcon (7B's layout)": falcon,
    "Falcon (40B's layout)": falcon_new,
    "Bloom": bloom,
    "StableLM": stablelm,
    "OLMo2": olmo2,
    "OLMoE": olmoe,
    "Granite": granite,
    "GraniteMoE": granite_moe,
    "SmolLM3": smollm3,
    "DeepSeek-V2": deepseek_v2,
    "DeepSeek-V3": deepseek_v3,
    "Cohere": cohere,
    "GPT-OSS": gpt_oss,
    "Llama-4": llama4,
    "Mamba": mamba,
    "Mamba2": mamba2,
    "Jamba": jamba,
    "Falcon-H1": falcon_h1,
    "Qwen3-Next": qwen3_next,
    "T5": t5,
    "Qwen2-VL": qwen2_vl,
    "LLaVA": llava,
}


@functools.cache
def directory(name: str) -> Path:
    """The family's model and the tokenizer of one token per character, saved once in this process."""
    path = Path(_scratch.name) / "".join(c if c.isalnum() else "_" for c in name)
    BUILDERS[name]().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
