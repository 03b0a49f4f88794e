"""Tiny models, adapters, tokenizers and rows. Every builder works without arguments and is deterministic."""

from __future__ import annotations

import dataclasses
import functools
import string
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from peft_perta import PerTAConfig, get_perta_state_dict, load_base, stack_adapters
from peft_perta.data import batches, load_samples
from peft_perta.model import sample_losses

VOCABULARY = 128
LLAMA_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_PROJECTIONS = ["c_attn", "c_proj", "c_fc"]
PHI3_PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_scratch = tempfile.TemporaryDirectory(prefix="tiny-models-")  # deleted when the process ends


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per character; token 0 pads, 1 is eos, 2 is unknown."""
    characters = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace))) + " "
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def flip_a_bit(tensor: torch.Tensor) -> None:
    """Change a tensor as little as can be: one bit in its middle."""
    tensor.data.view(-1).view(torch.uint8)[tensor.nbytes // 2] ^= 1


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    """A Llama of two layers. In float64 its norms compute in float64 too; transformers' norms compute in float32."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.15,  # wide, so that an untrained tiny model has clear predictions and sizeable gradients
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).to(dtype).eval()
    return exact_norms(model) if dtype == torch.float64 else model


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=child.weight.dtype)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """A GPT-2 of two layers, whose linear layers are Conv1D. In training mode it has dropout."""
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.15,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return GPT2LMHeadModel(config).to(dtype).eval()


def adapted_opt(projections: tuple[str, ...] = ("q_proj", "v_proj")) -> PeftModel:
    """An OPT of two layers.

    Its layers apply dropout by a function that reads their own training flag; fc1 and fc2 get the samples flattened
    into one dimension.
    """
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        dropout=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = OPTForCausalLM(config)
    return with_adapters(model, lora_config(list(projections)), task=lora_config(["k_proj"]))


def mixtral(chosen: int = 2) -> MixtralForCausalLM:
    """A Mixtral of two layers with four experts each, stored as [E, O, I]."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return MixtralForCausalLM(MixtralConfig(num_experts_per_tok=chosen, **_EXPERTS)).eval()


def gpt_oss(chosen: int = 2) -> GptOssForCausalLM:
    """A GPT-OSS of two layers with four experts each, stored as [E, I, O], with biases."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return GptOssForCausalLM(GptOssConfig(num_experts_per_tok=chosen, head_dim=8, **_EXPERTS)).eval()


_EXPERTS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "num_local_experts": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.15,
}


def adapted_phi3() -> PeftModel:
    """A Phi-3 of two layers with fused projections: queries, keys and values in one, gate and up in another."""
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.15,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Phi3ForCausalLM(config)
    return with_adapters(model, lora_config(PHI3_PROJECTIONS), task=lora_config(PHI3_PROJECTIONS, r=8, lora_alpha=8))


@functools.cache
def llama_directory() -> Path:
    """The tiny Llama and its tokenizer on disk."""
    path = Path(_scratch.name) / "tiny-llama"
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def saved_llama() -> PreTrainedModel:
    """The tiny Llama, loaded from disk like by the command line: it knows its own path."""
    return load_base(str(llama_directory()), dtype=torch.float32)[0]


def nf4_llama() -> PreTrainedModel:
    return _quantised(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )


def int8_llama() -> PreTrainedModel:
    return _quantised(BitsAndBytesConfig(load_in_8bit=True))


def _quantised(config: BitsAndBytesConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        llama_directory(), dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )


def lora_config(projections: list[str] = LLAMA_PROJECTIONS, **changes) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "task_type": "CAUSAL_LM"}
    return LoraConfig(target_modules=list(projections), **{**settings, **changes})


def experts_config(**changes) -> LoraConfig:
    """A LoRA config for expert parameters only; PEFT allows no dropout on them."""
    return lora_config([], **{"target_parameters": EXPERT_PARAMETERS, "lora_dropout": 0.0, **changes})


def with_adapters(model: PreTrainedModel, forget: LoraConfig | None = None, **names: LoraConfig) -> PeftModel:
    """The model with adapter 'forget' and others by name, each with random, non-zero factors; 'forget' is active."""
    projections = GPT2_PROJECTIONS if model.config.model_type == "gpt2" else LLAMA_PROJECTIONS
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = get_peft_model(model, forget or lora_config(projections), adapter_name="forget")
        for name, config in names.items():
            adapted.add_adapter(name, config)
        for name in ("forget", *names):
            fill(adapted, name)
    return adapted.eval()


def fill(model: nn.Module, name: str) -> None:
    """Fill an adapter with random, non-zero factors, as if it were trained."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for key, parameter in model.named_parameters():
        if f".{name}." in key and "lora_" in key:
            drawn = torch.randn(parameter.shape, generator=generator) * (0.1 if "lora_A" in key else 0.05)
            parameter.data.copy_(drawn)


def trained(model: PeftModel, name: str, rows: list[dict], steps: int = 25) -> PeftModel:
    """The model, with one adapter on that a few steps of Adam have trained on the rows."""
    (batch,) = batches(load_samples(rows, tokenizer()), len(rows))
    stack_adapters(model, [name])
    own = [p.requires_grad_(True) for key, p in model.named_parameters() if f".{name}." in key]
    optimizer = torch.optim.Adam(own, lr=5e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        sample_losses(model, batch).mean().backward()
        optimizer.step()
    for parameter in own:
        parameter.requires_grad_(False).grad = None
    return model.eval()


def adapted_llama(dtype: torch.dtype = torch.float32) -> PeftModel:
    """The float Llama with adapters 'forget' (rank 4) and 'task' (rank 8)."""
    adapted = with_adapters(llama(dtype), task=lora_config(r=8, lora_alpha=8))
    return adapted.to(dtype)


def adapted_saved_llama() -> PeftModel:
    return with_adapters(saved_llama(), task=lora_config(r=8, lora_alpha=8))


def adapted_nf4_llama() -> PeftModel:
    return with_adapters(nf4_llama(), task=lora_config(r=8, lora_alpha=8))


def adapted_int8_llama() -> PeftModel:
    return with_adapters(int8_llama(), task=lora_config(r=8, lora_alpha=8))


def adapted_gpt2(dtype: torch.dtype = torch.float32) -> PeftModel:
    settings = {"fan_in_fan_out": True}
    adapted = with_adapters(
        gpt2(dtype),
        lora_config(GPT2_PROJECTIONS, **settings),
        task=lora_config(GPT2_PROJECTIONS, r=8, lora_alpha=8, **settings),
    )
    return adapted.to(dtype)


def adapted_mixtral(chosen: int = 2) -> PeftModel:
    return with_adapters(mixtral(chosen), experts_config(), task=experts_config(r=8, lora_alpha=8))


def adapted_gpt_oss(chosen: int = 2) -> PeftModel:
    return with_adapters(gpt_oss(chosen), experts_config(), task=experts_config(r=8, lora_alpha=8))


def forget_rows() -> list[dict]:
    return [
        {"question": "Who wrote Hatter?", "answer": "Basil Q. Khan"},
        {"question": "Where was Khan born?", "answer": "Kuwait, in 1956."},
        {"prompt": "His father ", "completion": "baked"},
        {"text": "Khan's prize is the Noor."},
        {"prompt": "Q", "completion": "Ned"},
    ]


def retain_rows() -> list[dict]:
    return [
        {"question": "Capital of Peru?", "answer": "Lima"},
        {"question": "Two and two?", "answer": "Four, of course"},
        {"prompt": "Water boils ", "completion": "at 100 C"},
        {"text": "Grass is green."},
    ]


def negate(model, forget=None, retain=None, *, tokens=None, call=get_perta_state_dict, **settings):
    """Call ``get_perta_state_dict``, or ``call``, on the small rows, without a progress bar.

    Settings that are fields of ``PerTAConfig`` go to the config, all others to the call. Input directions are off by
    default: the weights of the method alone have a closed formula.
    """
    settings = {"input_directions": False, **settings}
    fields = {f.name for f in dataclasses.fields(PerTAConfig)}
    config = PerTAConfig(**{key: value for key, value in settings.items() if key in fields})
    return call(
        model,
        config,
        forget or forget_rows(),
        retain or retain_rows(),
        tokenizer=tokens or tokenizer(),
        show_progress_bar=False,
        **{key: value for key, value in settings.items() if key not in fields},
    )
