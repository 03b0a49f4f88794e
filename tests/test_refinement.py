"""Refinement is exact: A C_f (C_f + lambda C_r + d)^-1 in every layer, on any adapter, by the moments of the inputs."""

import json

import builders
import laws
import pytest
import torch
from test_input_directions import token_moments

from peft_perta import (
    AdapterError,
    ConfigError,
    DataError,
    NumericalError,
    RefinementSettings,
    UnsupportedLayerError,
    attach_adapters,
    load_provenance,
    refine_adapter,
)
from peft_perta.adapters import model_card, servable_rank
from peft_perta.cli import main
from peft_perta.model import resolve_targets


def refined(model, name="forget", **more):
    settings = {key: more.pop(key) for key in ("retain_weight", "damping", "batch_size", "max_memory") if key in more}
    more = {"tokenizer": builders.tokenizer(), "show_progress_bar": False, **more}
    rows = more.pop("forget", builders.forget_rows()), more.pop("retain", builders.retain_rows())
    return refine_adapter(model, name, *rows, RefinementSettings(**settings), **more)


def adapter_deltas(model, name="forget"):
    return {t.name: t.scaling * t.B.double() @ t.A.double() for t in resolve_targets(model, name)}


def of_layer(deltas, name):
    return next(delta.double() for key, delta in deltas.items() if name in key)


@pytest.mark.parametrize(("retain_weight", "damping"), [(1.0, 0.01), (4.0, 0.1)])
def test_it_follows_the_formula(retain_weight, damping):
    model = builders.adapted_llama()
    with laws.untouched(model):
        lora_config, state_dict, provenance = refined(model, retain_weight=retain_weight, damping=damping)
    moments = [token_moments(model, rows) for rows in (builders.forget_rows(), builders.retain_rows())]
    before, after = adapter_deltas(model), laws.deltas_of(state_dict)
    for name, delta in before.items():
        C_f, C_r = (x[name][0].double().T @ x[name][0].double() / len(x[name][0]) for x in moments)
        S = C_f + retain_weight * C_r
        M = C_f @ torch.linalg.inv(S + damping * S.diagonal().mean() * torch.eye(len(S)))
        expected = delta @ M
        assert float((of_layer(after, name) - expected).norm()) <= 2e-4 * float(expected.norm())
        shares = provenance.left_on_inputs[name]
        for set_name, C in (("forget", C_f), ("retain", C_r)):
            assert shares[set_name] == pytest.approx(
                float(((expected @ C) * expected).sum() / ((delta @ C) * delta).sum()), rel=1e-3
            )
    assert lora_config.r == lora_config.lora_alpha == servable_rank(model.peft_config["forget"].r)


def test_plain_negation_refined_is_perta_at_power_0():
    """Where every weight of A and B is 1/2, the edit is half of plain negation along the input directions."""
    model = builders.adapted_llama()
    halves = laws.deltas_of(builders.negate(model, power=0.0, input_directions=True)[1])
    whole = laws.deltas_of(refined(model)[1])
    for key, delta in halves.items():
        torch.testing.assert_close(-2 * delta, whole[key], rtol=1e-4, atol=1e-6)


def test_the_task_adapter_is_on_while_inputs_are_read():
    model = builders.adapted_llama()
    off, on = (refined(model, task_adapter=task) for task in (None, "task"))
    assert on.provenance.task_adapter == "task"
    assert not all(torch.equal(a, b) for a, b in zip(off.state_dict.values(), on.state_dict.values(), strict=True))


def test_more_retain_weight_leaves_less_on_both_sets():
    model = builders.adapted_llama()
    left = [refined(model, retain_weight=weight).provenance for weight in (0.1, 1.0, 10.0)]
    for name in ("forget", "retain"):
        values = [provenance.left(name) for provenance in left]
        assert values == sorted(values, reverse=True)
    assert all(p.left("retain") < p.left("forget") for p in left)


def test_the_batch_size_changes_rounding_alone():
    model = builders.adapted_llama()
    one, five = (refined(model, batch_size=size).state_dict for size in (1, 5))
    for key, factor in one.items():
        torch.testing.assert_close(factor, five[key], rtol=1e-3, atol=1e-5)


def test_the_same_inputs_give_the_same_bits():
    one, two = (refined(builders.adapted_llama()).state_dict for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("build", [builders.adapted_nf4_llama, builders.adapted_int8_llama, builders.adapted_gpt2])
def test_it_runs_on_every_kind_of_base(build):
    model = build()
    with laws.untouched(model):
        emitted = refined(model)
    assert 0 < emitted.provenance.left("retain") < emitted.provenance.left("forget") < 1
    emitted.add_to(model, "refined")
    assert len(resolve_targets(model, "refined")) == len(resolve_targets(model, "forget"))


def test_experts_are_left_as_they_are():
    model = builders.with_adapters(
        builders.mixtral(),
        builders.lora_config(["q_proj"], target_parameters=builders.EXPERT_PARAMETERS, lora_dropout=0.0),
    )
    emitted = refined(model)
    emitted.add_to(model, "refined")
    before, after = adapter_deltas(model), adapter_deltas(model, "refined")
    experts = [name for name in before if "[" in name]
    assert sorted(emitted.provenance.unchanged) == sorted(name for name in experts if before[name].any())
    for name in experts:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-7)
    assert "expert weights" in model_card(emitted.provenance)


def test_an_adapter_of_experts_alone_is_refused():
    model = builders.adapted_mixtral()
    with pytest.raises(UnsupportedLayerError, match="expert parameters alone, whose inputs are unknown"):
        refined(model)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"retain_weight": 0}, ConfigError, "retain_weight: expected a number > 0, found 0"),
        ({"damping": float("nan")}, ConfigError, "damping: expected a number > 0, found nan"),
        ({"batch_size": 0}, ConfigError, "batch_size: expected an int > 0, found 0"),
        ({"name": "none"}, AdapterError, "none"),
        ({"task_adapter": "forget"}, AdapterError, "are both 'forget'; expected two names"),
        ({"retain": []}, DataError, "the retain set"),
        ({"retain": builders.forget_rows()}, DataError, "expected two sets without a common row"),
    ],
)
def test_bad_input_is_refused_and_the_model_stays(more, error, message):
    model = builders.adapted_llama()
    with laws.untouched(model), pytest.raises(error, match=message):
        refined(model, **more)


def test_an_adapter_that_is_not_finite_is_refused():
    model = builders.adapted_llama()
    target = resolve_targets(model, "forget")[0]
    with torch.no_grad():
        target.adapted.lora_B["forget"].weight[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="holds NaN or infinite values"):
        refined(model)


def test_the_command_writes_it(tmp_path, monkeypatch, capsys):
    """And its adapter loads, is verified and shown as any other."""
    monkeypatch.chdir(tmp_path)
    model = builders.adapted_saved_llama()
    for name in ("forget", "task"):
        model.save_pretrained(str(tmp_path), selected_adapters=[name])
    for name, kept in (("forget", builders.forget_rows()), ("retain", builders.retain_rows())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    base = str(builders.llama_directory())
    common = ["--model", base, "--task-adapter", "task"]
    rows = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    assert main(["refine", *common, "--adapter", "forget", *rows, "--retain-weight", "2", "--output", "out"]) == 0
    printed = capsys.readouterr().out
    assert "refined along the input directions of" in printed
    assert f"Next: peft-perta verify out --base {base}" in printed
    provenance = load_provenance("out")[0]
    assert provenance.settings["retain_weight"] == 2.0
    assert main(["verify", "out", "--base", base]) == 0
    assert main(["inspect", "out"]) == 0
    again = attach_adapters(builders.saved_llama(), {"task": "task", "forget": "forget"})
    expected = refined(again, retain_weight=2.0, task_adapter="task", forget="forget.jsonl", retain="retain.jsonl")
    loaded = attach_adapters(builders.saved_llama(), {"refined": "out"})
    for name, delta in adapter_deltas(loaded, "refined").items():
        torch.testing.assert_close(delta, of_layer(laws.deltas_of(expected.state_dict), name), rtol=1e-5, atol=1e-8)
