"""Emitted adapters: PEFT computes the edit from them, and every server accepts their form."""

import dataclasses
import json
import math

import builders
import laws
import oracles
import pytest
import tables
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from peft_perta import (
    AdapterError,
    ConfigError,
    NumericalError,
    PerTAConfig,
    add_perta_adapter,
    load_provenance,
    stack_adapters,
)
from peft_perta import save_perta_adapter as save
from peft_perta.adapters import Factors, add_adapter, build_adapter, load_emitted
from peft_perta.adapters.low_rank import EXCESS
from peft_perta.data import load_samples

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
BUILDERS = {**tables.LAYERS, "transposed experts": builders.adapted_gpt_oss}
# The same -> a fresh base to load the emitted adapter on.
BASES = {
    "linear": builders.llama,
    "linear4bit": builders.nf4_llama,
    "linear8bit": builders.int8_llama,
    "conv1d": builders.gpt2,
    "experts": builders.mixtral,
    "transposed experts": builders.gpt_oss,
}
kinds = pytest.mark.parametrize("kind", tables.LAYERS)
granularities = pytest.mark.parametrize("granularity", tables.GRANULARITIES)


def magnitudes(model, rows, granularity, statistic="mean"):
    """Layer -> magnitudes of this granularity's gradients, from the loop oracle."""
    samples = load_samples(rows, builders.tokenizer())
    magnitudes_of = {}
    for name, per_sample in oracles.sample_gradients(model, "forget", samples, []).items():
        parts = {"weight": per_sample} if "delta" in granularity else {}
        if granularity != "delta":
            parts |= oracles.factor_gradients(oracles.adapted_weights(model, "forget")[name], per_sample)
        mean = {key: part.double().mean(0).abs() for key, part in parts.items()}
        if statistic == "squares":
            mean = {key: part.double().square().mean(0).sqrt() for key, part in parts.items()}
        magnitudes_of[name] = mean
    return magnitudes_of


def expected_edit(model, granularity, power=1.0, statistic="mean"):
    """Weight -> the dense edit [O, I] in float64, from the loop oracle's gradients and the paper's formula."""
    forget, retain = (
        magnitudes(model, rows, granularity, statistic) for rows in (builders.forget_rows(), builders.retain_rows())
    )
    edits = {}
    for name, adapted in oracles.adapted_weights(model, "forget").items():
        f, r = forget[name], retain[name]
        if granularity == "separable":
            f = {"rows": f["B"].square().sum(1).sqrt(), "columns": f["A"].square().sum(0).sqrt()}
            r = {"rows": r["B"].square().sum(1).sqrt(), "columns": r["A"].square().sum(0).sqrt()}
        W = {key: f[key] ** power / (f[key] ** power + r[key] ** power) for key in f}
        if granularity == "delta":
            edits[name] = -W["weight"] * adapted.delta
        elif granularity in ("factor", "factor+delta"):
            A, B = adapted.A.double(), adapted.B.double()
            edits[name] = -adapted.scaling * (W["B"].sqrt() * B) @ (W["A"].sqrt() * A)
            if granularity == "factor+delta":
                edits[name] *= W["weight"]
        else:
            both = torch.outer(W["rows"].sqrt(), W["columns"].sqrt())
            edits[name] = -both * adapted.delta
    return edits


@pytest.mark.parametrize("kind", BUILDERS)
@granularities
def test_peft_computes_the_edit_from_the_emitted_directory(kind, granularity, tmp_path):
    """At a rank that holds the whole edit. Tiny gradients of both sets enlarge the rounding of their ratio."""
    model = BUILDERS[kind]()
    expected = expected_edit(model, granularity)
    with laws.untouched(model):
        result = builders.negate(model, weighting="grad", granularity=granularity, rank=64)
    laws.emitted_delta_is(expected, result, BASES[kind](), tmp_path / "out", 3e-5)


@kinds
def test_a_dense_edit_is_truncated_at_the_least_error(kind, tmp_path):
    model = tables.LAYERS[kind]()
    expected = expected_edit(model, "delta")
    path = save(tmp_path / "out", *builders.negate(model, granularity="delta"))
    loaded = oracles.adapted_weights(PeftModel.from_pretrained(BASES[kind](), path), "default")
    for name, edit in expected.items():
        error = (loaded[name].delta_by_peft - edit).square().sum()
        least = (oracles.best_approximation(edit, 4) - edit).square().sum()
        assert (1 - 1e-4) * least <= error <= (1 + EXCESS + 1e-4) * least


@pytest.mark.parametrize(("weighting", "statistic"), [("fisher", "mean"), ("empirical-fisher", "squares")])
@granularities
def test_the_fisher_weightings_follow_the_formula(weighting, statistic, granularity, tmp_path):
    model = builders.adapted_llama()
    expected = expected_edit(model, granularity, 2.0, statistic)
    result = builders.negate(model, weighting=weighting, granularity=granularity, rank=64)
    laws.emitted_delta_is(expected, result, builders.llama(), tmp_path / "out", 1e-5)


@granularities
def test_uniform_is_task_arithmetic(granularity):
    model = builders.adapted_llama()
    deltas = laws.deltas_of(builders.negate(model, weighting="uniform", granularity=granularity, strength=1.7)[1])
    laws.uniform_is_task_arithmetic(deltas, model, 1.7)


def test_uniform_needs_no_data():
    from peft_perta import get_perta_state_dict

    model = builders.adapted_llama()
    _, state_dict, provenance = get_perta_state_dict(model, PerTAConfig(weighting="uniform"))
    laws.uniform_is_task_arithmetic(laws.deltas_of(state_dict), model, 1.0)
    assert provenance.data == {}


@granularities
def test_the_edit_is_linear_in_strength(granularity):
    model = builders.adapted_llama()

    def deltas(strength):
        return laws.deltas_of(builders.negate(model, granularity=granularity, strength=strength)[1])

    laws.strength_0_is_no_edit(deltas)
    laws.edit_is_linear_in_strength(deltas)


PECULIAR = {
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"k_proj": 3}},
    "gaussian init": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("changes", PECULIAR.values(), ids=PECULIAR)
@granularities
def test_scalings_and_ranks_are_read_from_the_live_layers(changes, granularity, tmp_path):
    model = builders.with_adapters(builders.llama(), builders.lora_config(**changes))
    expected = expected_edit(model, granularity)
    result = builders.negate(model, granularity=granularity, rank=64)
    laws.emitted_delta_is(expected, result, builders.llama(), tmp_path / "out", 1e-5)
    assert result[0].r == 64


def test_the_default_rank_is_the_largest_of_the_forget_adapter():
    changes = PECULIAR["patterns"]
    model = builders.with_adapters(builders.llama(), builders.lora_config(**changes))
    config, _, provenance = builders.negate(model, granularity="factor")
    assert {layer.name.rpartition(".")[2]: layer.rank for layer in provenance.layers}["down_proj"] == 7
    assert config.r == provenance.rank == 8


def test_a_scaling_set_by_hand_is_used():
    model = builders.adapted_llama()
    for layer in oracles.adapted_layers(model, "forget").values():
        layer.set_scale("forget", 0.25)
    laws.uniform_is_task_arithmetic(laws.deltas_of(builders.negate(model, weighting="uniform")[1]), model, 1.0)


def test_every_layer_of_a_projection_type_is_present(tmp_path):
    """The forget adapter is on one layer of two: the other layer is emitted as zeros, other projections are not."""
    forget = builders.lora_config(["q_proj", "down_proj"], layers_to_transform=[1])
    model = builders.with_adapters(builders.llama(), forget)
    result = builders.negate(model)
    assert set(result[0].target_modules) == {"q_proj", "down_proj"}
    deltas = laws.deltas_of(result[1])
    assert {name: bool(delta.any()) for name, delta in deltas.items()} == {
        "model.layers.0.self_attn.q_proj": False,
        "model.layers.0.mlp.down_proj": False,
        "model.layers.1.self_attn.q_proj": True,
        "model.layers.1.mlp.down_proj": True,
    }
    edited = {name: delta for name, delta in deltas.items() if ".1." in name}
    laws.emitted_delta_is(edited, result, builders.llama(), tmp_path / "out", 1e-6)


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_directory_is_what_every_server_takes(kind, dtype, tmp_path):
    config, state_dict, provenance = builders.negate(tables.LAYERS[kind](), rank=9, dtype=dtype)
    path = save(tmp_path / "out", config, state_dict, provenance)
    assert sorted(f.name for f in path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "perta_provenance.json",
    ]
    saved = json.loads((path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    assert saved["r"] == saved["lora_alpha"] == 16
    assert (saved["bias"], saved["lora_dropout"], saved["use_rslora"]) == ("none", 0.0, False)
    assert not saved["rank_pattern"]
    assert not saved["alpha_pattern"]
    assert not saved["modules_to_save"]
    assert isinstance(saved["target_modules"], list)
    assert LoraConfig.from_pretrained(path).init_lora_weights is True
    tensors = load_file(path / "adapter_model.safetensors")
    assert {key.rsplit(".", 2)[-2] for key in tensors} == {"lora_A", "lora_B"}
    experts = 4 if kind == "experts" else 1
    for key, tensor in tensors.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.shape[0 if "lora_A" in key else 1] == 16 * experts
        assert torch.isfinite(tensor).all()
        # PEFT orders the rows of A by expert, and the columns of B by rank.
        rows = tensor.unflatten(0, (experts, 16))[:, 9:] if "lora_A" in key else tensor[:, 9 * experts :]
        assert not rows.any(), "the padding is zero"
        assert tensor.any()


@pytest.mark.parametrize(("asked", "emitted"), [(1, 8), (8, 8), (9, 16), (100, 128), (256, 256), (0.5, 8)])
def test_the_rank_is_padded_to_a_servable_one(asked, emitted):
    config, _, provenance = builders.negate(builders.adapted_llama(), granularity="delta", rank=asked)
    assert config.r == config.lora_alpha == provenance.rank == emitted


def test_an_energy_share_is_kept_in_every_layer():
    provenance = builders.negate(builders.adapted_llama(), granularity="delta", rank=0.85)[2]
    assert all(layer.energy_kept >= 0.85 for layer in provenance.layers)
    assert len({layer.rank for layer in provenance.layers}) > 1
    assert provenance.rank >= max(layer.rank for layer in provenance.layers)


def test_a_forget_adapter_above_every_servable_rank_is_refused():
    model = builders.with_adapters(builders.llama(), builders.lora_config(["q_proj"], r=300))
    with pytest.raises(ConfigError, match="would need rank 300, expected at most 256"):
        builders.negate(model)


def test_a_bfloat16_forget_adapter_gives_a_float32_adapter(tmp_path):
    model = builders.adapted_llama()
    model = model.to(torch.bfloat16)
    result = builders.negate(model, weighting="uniform")
    laws.uniform_is_task_arithmetic(laws.deltas_of(result[1]), model, 1.0)
    assert {tensor.dtype for tensor in result[1].values()} == {torch.float32}


def test_a_factor_that_overflows_its_type_is_refused():
    with pytest.raises(NumericalError, match=r"not finite in torch\.float16; use dtype='bfloat16' or 'float32'"):
        builders.negate(builders.adapted_llama(), weighting="uniform", strength=1e7, dtype="float16")


def test_factors_of_another_shape_are_refused():
    factors = {"model.layers.0.mlp.up_proj": Factors(torch.ones(2, 64), torch.ones(64, 2), 1.0, 1.0)}
    with pytest.raises(AdapterError, match=r"up_proj: found a factor of shape \(64, 8\), expected \(128, 8\)"):
        build_adapter(builders.llama(), factors, 8, torch.float32)


@kinds
@pytest.mark.parametrize("active", ["forget", "task"])
def test_adding_touches_nothing_else(kind, active):
    """Weights, active adapters, requires_grad, modes and random states stay; the new adapter is frozen and off."""
    model = tables.LAYERS[kind]()
    model.set_adapter(active)
    model.train()
    with laws.untouched(model, without="perta_unlearn"):
        add_perta_adapter(
            model,
            PerTAConfig(),
            builders.forget_rows(),
            builders.retain_rows(),
            tokenizer=builders.tokenizer(),
            show_progress_bar=False,
        )
    added = [p for name, p in model.named_parameters() if ".perta_unlearn." in name]
    assert len(added) == 2 * len(oracles.adapted_layers(model, "forget"))
    assert not any(p.requires_grad for p in added)


@pytest.mark.parametrize("kind", ["experts", "transposed experts"])
def test_an_adapter_of_experts_stacks(kind):
    model = BUILDERS[kind]()
    settings = {"tokenizer": builders.tokenizer(), "show_progress_bar": False}
    add_perta_adapter(model, PerTAConfig(strength=5.0), builders.forget_rows(), builders.retain_rows(), **settings)
    ids = torch.tensor([[10, 20, 30, 40, 50]])
    with torch.no_grad():
        for names in (["perta_unlearn"], ["task", "perta_unlearn"]):
            stack_adapters(model, names)
            expected = oracles.plain_model(model, names)[0](input_ids=ids).logits
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
            without = oracles.plain_model(model, names[:-1])[0](input_ids=ids).logits
            assert (without - expected).abs().max() > 0.1


def test_adding_leaves_disabled_adapters_disabled():
    model = builders.adapted_llama()
    model.base_model.disable_adapter_layers()
    result = builders.negate(model)
    with laws.untouched(model, without="perta_unlearn"):
        add_adapter(model, result[0], result[1], "perta_unlearn")


def test_a_transformers_model_with_adapters_is_accepted(tmp_path):
    """Adapters attached by transformers' own integration, without a PeftModel."""
    directory = tmp_path / "forget"
    adapted = builders.with_adapters(builders.llama())
    adapted.save_pretrained(directory, selected_adapters=["forget"])
    model = builders.llama()
    model.load_adapter(str(directory / "forget"), adapter_name="forget")
    with laws.untouched(model, without="perta_unlearn"):
        add_perta_adapter(
            model,
            PerTAConfig(weighting="uniform", strength=2.0),
            show_progress_bar=False,
        )
    expected = laws.deltas_of(builders.negate(adapted, weighting="uniform", strength=2.0)[1])
    for name, layer in oracles.adapted_layers(_AsPeft(model), "perta_unlearn").items():
        laws.close(layer.get_delta_weight("perta_unlearn"), expected[name], 1e-6, name)


class _AsPeft:
    def __init__(self, model):
        self.get_base_model = lambda: model


def test_an_adapter_of_another_architecture_is_refused_and_leaves_no_trace():
    config, state_dict, _ = builders.negate(builders.adapted_llama())
    bad = {key.replace("layers.1", "layers.7"): value for key, value in state_dict.items()}
    model = builders.adapted_llama()
    with laws.untouched(model), pytest.raises(AdapterError, match="does not fit this model"):
        add_adapter(model, config, bad, "perta_unlearn")


def test_an_adapter_of_another_width_is_refused_and_leaves_no_trace():
    config, state_dict, _ = builders.negate(builders.adapted_llama())
    bad = {key: torch.zeros(8, 48) if "lora_A" in key else value for key, value in state_dict.items()}
    model = builders.adapted_llama()
    with laws.untouched(model), pytest.raises(AdapterError, match="does not fit this model"):
        add_adapter(model, config, bad, "perta_unlearn")


def test_the_provenance_records_the_run(tmp_path):
    model = builders.adapted_saved_llama()
    config, state_dict, provenance = builders.negate(
        model, weighting="fisher", gradients_at="full", task_adapter="task", max_samples=3
    )
    path = save(tmp_path / "out", config, state_dict, provenance)
    loaded, files = load_provenance(path)
    assert loaded == dataclasses.replace(provenance, seconds={})
    assert loaded.config["weighting"] == "fisher"
    assert loaded.base_model["name"] == str(builders.llama_directory())
    assert loaded.task_adapter == "task"
    assert {name: entry["samples"] for name, entry in loaded.data.items()} == {"forget": 3, "retain": 3}
    assert len(loaded.forget_adapter["sha256"]) == 64
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json"}
    assert {"torch", "transformers", "peft", "bitsandbytes", "peft_perta"} <= set(loaded.versions)
    for layer in loaded.layers:
        assert 0 <= layer.energy_kept <= 1
        for distribution in layer.weights.values():
            assert 0 < distribution.mean < 1
            assert sum(distribution.histogram) > 0
    card = (path / "README.md").read_text()
    assert "The base still knows" in card
    assert "base_model:" not in card, "a path is no hub name"


def test_the_quantisation_is_in_the_provenance():
    provenance = builders.negate(builders.adapted_nf4_llama())[2]
    assert provenance.base_model["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert {layer.kind for layer in provenance.layers} == {"linear4bit"}


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', None])
def test_damaged_provenance_is_refused(damage, tmp_path):
    if damage is not None:
        (tmp_path / "perta_provenance.json").write_text(damage)
    with pytest.raises(AdapterError, match="damaged" if damage else "holds no perta_provenance.json"):
        load_provenance(tmp_path)


def test_an_adapter_for_absent_layers_is_refused_and_leaves_no_trace():
    config, state_dict, _ = builders.negate(builders.adapted_llama())
    config.target_modules = ["c_attn"]
    model = builders.adapted_llama()
    with laws.untouched(model), pytest.raises(AdapterError, match=r"does not fit this model: .*c_attn"):
        add_adapter(model, config, state_dict, "perta_unlearn")


def test_saving_and_loading_twice_is_the_same_adapter(tmp_path):
    result = builders.negate(builders.adapted_llama())
    path = save(tmp_path / "out", *result)
    loaded = PeftModel.from_pretrained(builders.llama(), path)
    for name, layer in oracles.adapted_layers(loaded, "default").items():
        key = f"base_model.model.{name}.lora_A.weight"
        assert torch.equal(layer.lora_A["default"].weight, result[1][key])


def test_an_emitted_adapter_is_read_back_from_its_directory(tmp_path):
    emitted = builders.negate(builders.adapted_llama())
    loaded = load_emitted(emitted.save(tmp_path / "out"))
    assert loaded.lora_config.to_dict() == emitted.lora_config.to_dict()
    assert loaded.state_dict.keys() == emitted.state_dict.keys()
    assert all(torch.equal(loaded.state_dict[key], value) for key, value in emitted.state_dict.items())
    assert loaded.provenance == dataclasses.replace(emitted.provenance, seconds={})
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"out has no adapter_model\.safetensors"):
        load_emitted(tmp_path / "out")


@pytest.mark.parametrize("factor", [2.5, 0.0, -1.0])
def test_a_scaled_adapter_is_the_edit_at_a_multiple_of_its_strength(factor):
    emitted = builders.negate(builders.adapted_llama(), strength=0.5)
    _, state_dict, provenance = emitted
    _, scaled, scaled_provenance = emitted.scaled(factor)
    once, scaled_deltas = laws.deltas_of(state_dict), laws.deltas_of(scaled)
    for name, delta in once.items():
        assert delta.any()
        laws.close(scaled_deltas[name], factor * delta, 1e-6, name)
    assert scaled_provenance.config["strength"] == 0.5 * factor
    for layer in scaled_provenance.layers:
        assert layer.edit_norm == pytest.approx(float(scaled_deltas[layer.name].norm()), rel=1e-5)
    assert provenance.config["strength"] == 0.5, "the original provenance is unchanged"


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_factor_that_is_not_finite_is_refused(factor):
    emitted = builders.negate(builders.adapted_llama())
    with pytest.raises(NumericalError, match=r"is not finite in the adapter's dtype"):
        emitted.scaled(factor)


@pytest.mark.parametrize("model", [builders.adapted_llama, builders.adapted_nf4_llama], ids=["float", "nf4"])
@pytest.mark.parametrize("step", ["peft.PeftModel.add_adapter", "peft_perta.adapters.build.give_memory",
                                  "peft_perta.adapters.build.set_peft_model_state_dict"])  # fmt: skip
def test_an_adapter_that_is_added_in_part_goes_again(model, step, monkeypatch):
    model = model()
    config, state_dict, _ = builders.negate(model, weighting="uniform")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, interrupted)
    with laws.untouched(model), pytest.raises(KeyboardInterrupt):
        add_adapter(model, config, state_dict, "perta_unlearn")
