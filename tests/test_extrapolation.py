"""Extrapolation (UIPE) is exact: theta_start + (1 + alpha) (theta_end - theta_start), for any start."""

import json

import builders
import laws
import pytest
import torch
from peft.tuners.lora import LoraLayer

from peft_perta import (
    AdapterError,
    ConfigError,
    Goal,
    NumericalError,
    attach_adapters,
    extrapolate_adapter,
    load_base,
    load_provenance,
)
from peft_perta.adapters import add_adapter, servable_rank
from peft_perta.cli import main
from peft_perta.data import load_samples
from peft_perta.evaluation import losses_of


def deltas(model, config, state_dict) -> dict[str, torch.Tensor]:
    add_adapter(model, config, state_dict, "emitted")
    emitted_deltas = adapter_deltas(model, "emitted")
    model.delete_adapter("emitted")
    return emitted_deltas


def adapter_deltas(model, name: str) -> dict[str, torch.Tensor]:
    return {
        key: module.get_delta_weight(name)
        for key, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.scaling
    }


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("start", [None, "task"])
def test_it_follows_the_formula(alpha, start):
    model = builders.adapted_llama()
    config, state_dict, provenance = extrapolate_adapter(model, "forget", alpha, start_adapter=start)
    extrapolated = deltas(model, config, state_dict)
    end = adapter_deltas(model, "forget")
    start_deltas = (
        adapter_deltas(model, start) if start else {key: torch.zeros_like(delta) for key, delta in end.items()}
    )
    for key, delta in end.items():
        expected = start_deltas[key] + (1 + alpha) * (delta - start_deltas[key])
        torch.testing.assert_close(extrapolated[key], expected, rtol=1e-5, atol=1e-6)
    assert provenance.energy_kept == 1.0
    parts = ("forget", start) if start and alpha else ("forget",)
    assert config.r == servable_rank(sum(model.peft_config[name].r for name in parts))


@pytest.mark.parametrize("start", [None, "task"])
def test_auto_meets_the_goal_along_the_line(start):
    model = builders.adapted_llama()
    for module in model.modules():
        if isinstance(module, LoraLayer) and "forget" in module.scaling:
            module.scaling["forget"] *= 8  # large enough to raise the loss of any rows
    sets = builders.forget_rows(), builders.retain_rows()
    forget, retain = (load_samples(rows, builders.tokenizer()) for rows in sets)
    config, state_dict, _ = extrapolate_adapter(model, "forget", 0.7, start_adapter=start)
    add_adapter(model, config, state_dict, "target")
    target = float(losses_of(model, forget, adapters=["target"]).mean())
    model.delete_adapter("target")
    with laws.untouched(model):
        config, state_dict, provenance = extrapolate_adapter(
            model, "forget", "auto", start_adapter=start, goal=Goal(target_forget_loss=target), forget=forget,
            retain=retain, show_progress_bar=False,
        )  # fmt: skip
    add_adapter(model, config, state_dict, "emitted")
    assert float(losses_of(model, forget, adapters=["emitted"]).mean()) == pytest.approx(target, rel=0.02)
    assert provenance.calibration.strength == pytest.approx(provenance.parts[0]["strength"])


def test_auto_leaves_layers_without_adapters_alone():
    config = builders.lora_config(["k_proj"], layers_to_transform=[1])
    model = builders.with_adapters(builders.llama(), config, task=config)
    sets = builders.forget_rows(), builders.retain_rows()
    forget, retain = (load_samples(rows, builders.tokenizer()) for rows in sets)
    before = [name for name, _ in model.named_modules()]
    with laws.untouched(model), pytest.raises(NumericalError, match="no strength up to 256 brings the forget loss to"):
        extrapolate_adapter(
            model, "forget", "auto", start_adapter="task", goal=Goal(target_forget_loss=1e6), forget=forget,
            retain=retain, show_progress_bar=False,
        )  # fmt: skip
    assert [name for name, _ in model.named_modules()] == before


def test_auto_refuses_settings_that_it_cannot_honour():
    model = builders.adapted_llama()
    samples = load_samples(builders.forget_rows(), builders.tokenizer())
    retain = load_samples(builders.retain_rows(), builders.tokenizer())
    searched = {"goal": Goal(target_forget_loss=3.0), "forget": samples, "retain": retain, "show_progress_bar": False}
    with pytest.raises(ConfigError, match="rank: expected none with alpha='auto'"):
        extrapolate_adapter(model, "forget", "auto", rank=4, **searched)
    with pytest.raises(ConfigError, match=r"expected distinct adapters.*\['task', 'task', 'forget'\]"):
        extrapolate_adapter(model, "forget", "auto", start_adapter="task", with_adapters=["task"], **searched)
    wide = builders.lora_config(["q_proj"], r=160)
    with pytest.raises(ConfigError, match="ranks add up to 320, expected at most 256"):
        extrapolate_adapter(
            builders.with_adapters(builders.llama(), wide, task=wide),
            "forget",
            "auto",
            start_adapter="task",
            **searched,
        )


@pytest.mark.parametrize(
    ("alpha", "more", "error", "message"),
    [
        (float("nan"), {}, ConfigError, "finite number above -1, found nan"),
        (float("inf"), {}, ConfigError, "finite number above -1, found inf"),
        (-1.0, {}, ConfigError, "above -1, found -1"),
        ("much", {}, ConfigError, "found 'much'"),
        ("auto", {}, ConfigError, "needs a goal"),
        (1.0, {"start_adapter": "forget"}, AdapterError, "its own start"),
        (1.0, {"start_adapter": "gone"}, AdapterError, "no adapter named 'gone'"),
    ],
)
def test_bad_input_is_refused(alpha, more, error, message):
    with pytest.raises(error, match=message):
        extrapolate_adapter(builders.adapted_llama(), "forget", alpha, **more)


@pytest.fixture
def place(tmp_path, monkeypatch):
    builders.adapted_saved_llama().save_pretrained(tmp_path)
    for name, rows in (("forget", builders.forget_rows()), ("retain", builders.retain_rows())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_on_the_command_line_by_a_number_and_by_a_goal(place, capsys):
    config = place / "forget" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "lora_alpha": 8 * values["lora_alpha"]}))  # large enough to raise the loss
    model = ["extrapolate", "--model", str(builders.llama_directory()), "--adapter", "forget"]
    assert main([*model, "--alpha", "0.5", "--output", "further"]) == 0
    assert load_provenance("further")[0].parts[0]["strength"] == 1.5
    rows = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--four-bit"]
    base, tokens = load_base(str(builders.llama_directory()), four_bit=True)
    samples = load_samples(builders.forget_rows(), tokens)
    target = float(losses_of(attach_adapters(base, {"further": "further"}), samples, adapters=["further"]).mean())
    assert main([*model, *rows, "--target-forget-loss", str(target), "--output", "searched"]) == 0
    assert (place / "searched" / "strength.png").is_file()
    assert f"for a forget loss of {target:.3f}" in capsys.readouterr().out
    assert main([*model, "--alpha", "0.5", "--retain-tolerance", "0.2", "--output", "nothing"]) == 2
    assert "--retain-tolerance: expected none with --alpha 0.5" in capsys.readouterr().err
    assert main([*model, "--alpha", "0.5", "--start-adapter", "./forget", "--output", "nothing"]) == 2
    assert "is given twice, expected each adapter once" in capsys.readouterr().err
    assert main([*model, "--output", "nothing"]) == 2
    assert "--forget: expected a file of rows to judge by" in capsys.readouterr().err
    assert main(["verify", "further", "--base", str(builders.llama_directory())]) == 0
