"""Adapters that cannot be negated are refused before any compute; the others resolve to targets."""

import bitsandbytes as bnb
import builders
import laws
import oracles
import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn

from peft_perta import AdapterError, NumericalError, PerTAConfig, UnsupportedLayerError, get_perta_state_dict
from peft_perta.model import check_lora_config, check_new_name, hash_targets, resolve_targets


@pytest.fixture(autouse=True)
def _no_compute(monkeypatch):
    """A refusal must come before the first forward pass."""

    def fail(*args, **kwargs):
        raise AssertionError("a refusal must come before any compute")

    for stage in ("choose_plan", "gather"):
        monkeypatch.setattr(f"peft_perta.perta.edited_layers.{stage}", fail)


def refused(model, error, message, **settings):
    """Both the resolver and the whole call refuse the adapter, and the model is as it was."""
    with laws.untouched(model):
        with pytest.raises(error, match=message):
            builders.negate(model, **settings)
        if not settings:
            with pytest.raises(error, match=message):
                resolve_targets(model, "forget")


def adapted(**changes):
    return builders.with_adapters(builders.llama(), builders.lora_config(**changes))


VARIANTS = {
    "DoRA": ({"use_dora": True}, r"LoRA variant \(use_dora=True\)"),
    "lora_bias": ({"lora_bias": True, "bias": "none"}, r"trains biases .*lora_bias=True"),
    "bias": ({"bias": "lora_only"}, r"trains biases \(bias='lora_only'"),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        r"saves whole modules \['lm_head'\].*without modules_to_save",
    ),
    "tokens": ({"trainable_token_indices": [3, 4]}, "trains token embeddings"),
    "ALoRA": ({"alora_invocation_tokens": [3, 4]}, "LoRA variant .alora_invocation_tokens"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "LoRA variant .layer_replication"),
}


@pytest.mark.parametrize(("changes", "message"), VARIANTS.values(), ids=VARIANTS)
def test_a_variant_is_refused(changes, message):
    if "lora_bias" in changes:  # PEFT requires a layer with biases for it
        model = builders.with_adapters(builders.gpt2(), builders.lora_config(["c_fc"], fan_in_fan_out=True, **changes))
    else:
        model = adapted(**changes)
    refused(model, AdapterError, message)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "loftq", "corda", "lora_ga"])
def test_an_init_that_changes_the_base_is_refused(init):
    config = builders.lora_config()
    config.init_lora_weights = init
    with pytest.raises(AdapterError, match=f"initialised with '{init}', which rewrites the base weights"):
        check_lora_config(config, "forget")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changes_the_base_is_refused_on_a_model(init):
    model = adapted(init_lora_weights=init, lora_dropout=0.0)
    refused(model, AdapterError, f"initialised with '{init}'")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_other_inits_are_accepted(init):
    config = builders.lora_config()
    config.init_lora_weights = init
    check_lora_config(config, "forget")


def test_another_kind_of_adapter_is_refused():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    refused(get_peft_model(builders.llama(), config, "forget"), AdapterError, "is IA3Config, expected LoRA")


def test_packed_experts_are_refused():
    model = builders.adapted_mixtral()
    experts = model.get_base_model().model.layers[1].mlp.experts.get_base_layer()
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.uint8), requires_grad=False)
    refused(
        model,
        UnsupportedLayerError,
        r"layers\.1\.mlp\.experts has down_proj in torch\.uint8, expected a floating-point type.*in bfloat16",
    )


@pytest.mark.parametrize("kind", [builders.llama, builders.nf4_llama])
def test_a_merged_adapter_is_refused(kind):
    model = builders.with_adapters(kind())
    model.merge_adapter(["forget"])
    refused(model, AdapterError, r"q_proj: the adapters \['forget'\] are merged.*unmerge_adapter")


def test_another_merged_adapter_is_refused():
    model = builders.adapted_llama()
    model.merge_adapter(["task"])
    refused(model, AdapterError, r"\['task'\] are merged")


def test_a_model_without_adapters_is_refused():
    with pytest.raises(AdapterError, match="found a LlamaForCausalLM without any"):
        get_perta_state_dict(builders.llama(), PerTAConfig(weighting="uniform"))


def test_a_missing_adapter_is_refused():
    model = builders.adapted_llama()
    refused(model, AdapterError, r"no adapter named 'gone'; the model has \['forget', 'task'\]", forget_adapter="gone")
    refused(model, AdapterError, "no adapter named 'gone'", task_adapter="gone")


def test_forget_and_task_adapter_must_differ():
    refused(builders.adapted_llama(), AdapterError, "are both 'forget'", task_adapter="forget")


@pytest.mark.parametrize(
    ("name", "message"),
    [("task", "'task' is on the model already"), ("a.b", "without dots, found 'a.b'"), ("", "without dots, found ''")],
)
def test_an_invalid_or_taken_name_is_refused(name, message):
    with pytest.raises(AdapterError, match=message):
        check_new_name(builders.adapted_llama(), name)


def test_an_untrained_adapter_is_refused():
    model = get_peft_model(builders.llama(), builders.lora_config(), "forget")
    refused(model, AdapterError, "is untrained: every B is zero")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_that_are_not_finite_are_refused(value, factor):
    model = adapted()
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    getattr(layer, factor)["forget"].weight.data[0, 0] = value
    refused(model, NumericalError, r"layers\.1\.mlp\.up_proj: the forget adapter holds NaN or infinite values")


def test_an_adapter_of_another_base_is_refused():
    model = builders.adapted_saved_llama()
    model.peft_config["forget"].base_model_name_or_path = "meta-llama/Llama-3.2-1B"
    refused(model, AdapterError, "trained on the base 'meta-llama/Llama-3.2-1B', but the model is .*tiny-llama")


def test_a_task_adapter_of_another_base_is_refused():
    model = builders.adapted_saved_llama()
    model.peft_config["task"].base_model_name_or_path = "other/model"
    refused(model, AdapterError, "'task' was trained on the base 'other/model'", task_adapter="task")


def test_one_base_may_have_two_names(tmp_path):
    model = builders.adapted_saved_llama()
    link = tmp_path / "link"
    link.symlink_to(builders.llama_directory())
    for name in (str(link), "somebody/tiny-llama", None):
        model.peft_config["forget"].base_model_name_or_path = name
        assert resolve_targets(model, "forget")


@pytest.mark.parametrize(
    "config",
    [builders.lora_config(["q_proj", "lm_head"]), builders.experts_config(target_parameters=["lm_head.weight"])],
    ids=["layer", "parameter"],
)
def test_a_tied_head_is_refused(config):
    model = builders.with_adapters(builders.llama(tied=True), config)
    refused(model, UnsupportedLayerError, r"lm_head shares its weight with model\.embed_tokens")


def test_an_untied_head_is_a_target():
    model = builders.with_adapters(builders.llama(), builders.lora_config(["lm_head"]))
    assert [target.name for target in resolve_targets(model, "forget")] == ["lm_head"]


def test_a_tied_model_without_its_head_is_accepted():
    model = builders.with_adapters(builders.llama(tied=True), builders.lora_config(["q_proj"]))
    assert len(resolve_targets(model, "forget")) == 2


def test_an_embedding_is_refused():
    model = builders.with_adapters(builders.llama(), builders.lora_config(["embed_tokens"]))
    refused(model, UnsupportedLayerError, "embed_tokens: a Embedding layer cannot be edited, expected one of: .*linear")


@pytest.mark.parametrize(("convolution", "name"), [(nn.Conv2d(3, 4, 2), "Conv2d"), (nn.Conv1d(64, 64, 1), "Conv1d")])
def test_a_convolution_is_refused(convolution, name):
    base = builders.llama()
    base.model.extra = convolution
    model = builders.with_adapters(base, builders.lora_config(["q_proj", "extra"]))
    refused(model, UnsupportedLayerError, f"model.extra: a {name} layer cannot be edited")


class Router(nn.Linear):
    """A linear layer by its class, but with an output of its own, as Llama-4's router."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Biased(nn.Linear):
    """A linear layer that computes its output by itself, as Falcon's."""

    def forward(self, x):
        return x @ self.weight.T + 1


def test_a_subclass_of_linear_is_judged_by_its_output():
    base = builders.llama()
    base.model.layers[0].mlp.router, base.model.layers[0].mlp.biased = Router(64, 4), Biased(64, 4)
    model = builders.with_adapters(base, builders.lora_config(["q_proj", "biased"]))
    assert "model.layers.0.mlp.biased" in {target.name for target in resolve_targets(model, "forget")}
    model = builders.with_adapters(base, builders.lora_config(["q_proj", "router"]))
    refused(model, UnsupportedLayerError, r"mlp\.router is a Router, whose output is not.*--exclude-modules")


def test_a_four_bit_layer_on_an_unmarked_model_is_refused():
    base = builders.nf4_llama()
    base.is_loaded_in_4bit = False
    model = builders.with_adapters(base)
    refused(
        model, UnsupportedLayerError, r"q_proj is a 4-bit layer that PEFT wrapped as a plain one.*is_loaded_in_4bit"
    )


def test_a_four_bit_layer_that_is_not_quantised_yet_is_refused():
    base = builders.llama()
    base.is_loaded_in_4bit = True
    for name in ("up_proj", "down_proj"):
        plain = getattr(base.model.layers[0].mlp, name)
        setattr(base.model.layers[0].mlp, name, bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False))
    model = builders.with_adapters(base, builders.lora_config(["up_proj"]))
    refused(model, UnsupportedLayerError, "up_proj is a 4-bit layer that is not quantised yet")


def test_a_repacked_four_bit_layer_is_refused():
    """bitsandbytes marks the layers that it repacks for inference. Not every CPU does so: the test sets the mark."""
    model = builders.adapted_nf4_llama()
    model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedLayerError, match=r"up_proj was repacked by an inference forward.*reload the model"):
        resolve_targets(model, "forget")


def test_targets_are_in_the_models_order_and_copy_the_factors():
    model = builders.adapted_llama()
    targets = resolve_targets(model, "forget")
    assert [t.name for t in targets[:4]] == [
        f"model.layers.0.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    with laws.untouched(model):
        for target in targets:
            target.A.zero_()
            target.B.zero_()


@pytest.mark.parametrize(
    ("build", "transposed"),
    [(builders.adapted_mixtral, False), (builders.adapted_gpt_oss, True)],
    ids=["[E, out, in]", "[E, in, out]"],
)
def test_every_expert_is_a_target_with_its_own_factors(build, transposed):
    model = build()
    targets = resolve_targets(model, "forget")
    assert [t.name for t in targets[:8]] == [
        f"model.layers.0.mlp.experts.{parameter}[{e}]" for parameter in ("down_proj", "gate_up_proj") for e in range(4)
    ]
    weights = oracles.adapted_weights(model, "forget")
    assert {t.name for t in targets} == set(weights)
    assert [(t.module_path, t.parameter, t.expert) for t in targets[3:5]] == [
        ("model.layers.0.mlp.experts", "down_proj", 3),
        ("model.layers.0.mlp.experts", "gate_up_proj", 0),
    ]
    for target in targets:
        assert target.transposed is transposed
        assert target.rank == 4
        torch.testing.assert_close(target.scaling * target.B @ target.A, weights[target.name].delta_by_peft)
    with laws.untouched(model):
        for target in targets:
            target.A.zero_()
            target.B.zero_()


def test_the_hash_distinguishes_adapters():
    model = builders.adapted_llama()
    before = hash_targets(resolve_targets(model, "forget"))
    assert before == hash_targets(resolve_targets(builders.adapted_llama(), "forget"))
    next(p for n, p in model.named_parameters() if "lora_B.forget" in n).data[0, 0] += 1e-3
    assert before != hash_targets(resolve_targets(model, "forget"))
