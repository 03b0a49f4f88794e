"""Attacks: every model is attacked alike, numbers equal those of a slow oracle, and models are left as they were."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import builders
import laws
import oracles
import pytest
import tables
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peft_perta
from peft_perta import AdapterError, ConfigError, DataError, NumericalError, UnsupportedLayerError
from peft_perta.data import encode_prompt, encode_row, load_samples
from peft_perta.evaluation import (
    ATTACKS,
    AttackResult,
    AttackSettings,
    Subject,
    Victims,
    evaluate_split,
    format_attacks,
    generate,
    losses_of,
    run_attacks,
)
from peft_perta.evaluation.attacks.projections import projections
from peft_perta.evaluation.attacks.relearning import RANK, SCALING
from peft_perta.evaluation.attacks.requantization import ROUNDINGS, rounded
from peft_perta.evaluation.attacks.sampling import expected_best
from peft_perta.evaluation.metrics.rouge import rouge_l_recall
from peft_perta.model import LAYER_KINDS, attach_adapters, load_base, preserved

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
ROWS = [
    {"question": "Who wrote Hatter?", "answer": "Basil Q. Khan", "paraphrased_question": "Hatter is by whom?"},
    {"question": "Where was Lu Ba born?", "answer": "Lu Ba: Kuwait, in 1956."},
    {"question": "His father?", "answer": "A baker.", "paraphrased_question": "And what did his father do?"},
    {"prompt": "The prize is ", "completion": "the Noor"},
]
QUICK = AttackSettings(
    relearning_steps=(1, 2),
    relearning_rows=(1, 4),
    learning_rate=1e-2,
    prefix_shares=(0.5,),
    samples=2,
    generated=2,
    max_new_tokens=3,
)
CPU = {"device_map": {"": "cpu"}, "dtype": torch.float32}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def subject(model, adapters, batch_size=2, tokens=None):
    return Subject(model, tokens or builders.tokenizer(), adapters, batch_size, show_progress_bar=False)


def victims(model, rows=ROWS):
    """Unlearned: 'task' and 'forget'; full: 'task'; retain-only: 'forget'."""
    return Victims(subject(model, ["task", "forget"]), subject(model, ["task"]), subject(model, ["forget"]), list(rows))


def only(model, adapters, rows=ROWS, **how):
    return Victims(subject(model, adapters, **how), None, None, list(rows))


def by_setting(results):
    return {result.setting: result for result in results}


def unlearned(results):
    return {result.setting: result.unlearned for result in results}


class Stop(Exception):
    """Raised by a hook in the forward."""


# The same for all


@pytest.mark.parametrize("attack", ATTACKS)
def test_equal_models_have_equal_numbers_and_others_have_others(attack):
    model = builders.adapted_llama()
    whole, task = subject(model, ["task", "forget"]), subject(model, ["task"])
    results = run_attacks(Victims(whole, task, whole, ROWS), [attack], QUICK)
    assert {result.attack for result in results} == {attack}
    assert [result.setting for result in results] == tables.ATTACKS[attack]
    assert len(by_setting(results)) == len(results)
    for result in results:
        assert set(result.full) == set(result.unlearned) == set(result.retain_only)
        if (attack, result.setting) != ("switched-off", "off"):
            assert result.unlearned == result.retain_only
        if "loss" in result.unlearned:
            assert result.full["loss"] != result.retain_only["loss"]
            assert 0 < result.unlearned["probability"] < 1
        if "rouge_l_recall" in result.unlearned:
            assert 0 <= result.unlearned["rouge_l_recall"] <= 1


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack not in ("switched-off", "depth")])
def test_without_the_others_the_unlearned_model_is_attacked_alone(attack):
    model = builders.adapted_llama()
    found = run_attacks(only(model, ["task", "forget"]), [attack], QUICK)
    assert all(result.full is None and result.retain_only is None for result in found)
    assert unlearned(found) == unlearned(run_attacks(victims(model), [attack], QUICK))


def test_attacks_follow_one_another_and_stand_in_one_table():
    model = builders.adapted_llama()
    results = run_attacks(victims(model), ["switched-off", "sampling"], QUICK)
    assert [result.attack for result in results] == ["switched-off"] * 2 + ["sampling"] * 3
    assert json.loads(json.dumps([result.to_dict() for result in results]))[0]["attack"] == "switched-off"
    whole = run_attacks(Victims(*(subject(model, ["task"][:n]) for n in (1, 0, 1)), ROWS), settings=QUICK)
    assert {result.attack for result in whole} == set(ATTACKS)


def test_the_table_has_a_line_a_measure():
    results = [
        AttackResult("a", "hard", {"loss": 1.25, "probability": 0.5}, {"loss": 0.1, "probability": 0.875}, None),
        AttackResult("a", "harder", {"rouge_l_recall": 0.5}, None, {"rouge_l_recall": 1 / 3}),
    ]
    assert [line.split() for line in format_attacks(results).splitlines()] == [
        ["attack", "setting", "measure", "unlearned", "retain-only", "full"],
        ["a", "hard", "loss", "1.250", "-", "0.100"],
        ["probability", "0.500", "-", "0.875"],
        ["harder", "rouge_l_recall", "0.500", "0.333", "-"],
    ]
    assert len({len(line) for line in format_attacks(results).splitlines()}) == 1


@pytest.mark.parametrize("attack", ["relearning", "requantization"])
def test_adapters_that_transformers_attached_are_attacked_too(attack):
    model = builders.llama()
    for name, config in (("forget", builders.lora_config()), ("task", builders.lora_config(r=8, lora_alpha=8))):
        model.add_adapter(config, name)
        builders.fill(model, name)
    expected = unlearned(run_attacks(only(builders.adapted_llama(), ["task", "forget"]), [attack], QUICK))
    with laws.untouched(model):
        found = unlearned(run_attacks(only(model, ["task", "forget"]), [attack], QUICK))
    for setting, numbers in expected.items():
        assert found[setting] == pytest.approx(numbers, rel=1e-6)


def test_a_limit_on_rows_takes_them_at_even_distances():
    model = builders.adapted_llama()
    few = run_attacks(victims(model), ["switched-off"], replace(QUICK, rows=2))
    assert few == run_attacks(victims(model, [ROWS[0], ROWS[-1]]), ["switched-off"], QUICK)
    assert few != run_attacks(victims(model), ["switched-off"], QUICK)


# The models go back as they came


def awkward(model):
    model.train()
    model.set_adapter("task")
    for index, parameter in enumerate(model.parameters()):
        if parameter.is_floating_point():
            parameter.requires_grad_(index % 3 == 0)
    model.register_forward_hook(lambda module, args, output: None)
    torch.rand(3)
    return model


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", sorted(set(tables.LAYERS) - {"experts"}))
def test_the_model_goes_back_as_it_came(attack, kind):
    model = awkward(tables.LAYERS[kind]())
    with laws.untouched(model):
        run_attacks(victims(model, ROWS[:3]), [attack], replace(QUICK, relearning_rows=(2,), generated=1))


@pytest.mark.parametrize("attack", ["relearning", "requantization"])
@pytest.mark.parametrize("kind", ["linear", "linear4bit"])
@pytest.mark.parametrize("calls", [1, 4, 7])
def test_the_model_goes_back_after_an_exception(attack, kind, calls):
    model = awkward(tables.LAYERS[kind]())
    left = [calls]

    def fail_later(module, args):
        left[0] -= 1
        if not left[0]:
            raise Stop("on purpose")

    model.get_base_model().model.layers[1].register_forward_pre_hook(fail_later)
    with laws.untouched(model), pytest.raises(Stop, match="on purpose"):
        run_attacks(victims(model), [attack], QUICK)


def test_a_forward_that_was_replaced_before_is_put_back():
    """As accelerate replaces it."""
    model = builders.adapted_llama()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    calls, forward = [], layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    before = vars(layer)["forward"]
    run_attacks(only(model, ["task"]), ["requantization"], QUICK)
    assert vars(layer)["forward"] is before
    assert calls


# Relearning


def split_by(count, rows=ROWS, seed=0):
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[rows[i] for i in sorted(part)] for part in (drawn[:count], drawn[count:])]


def oracle_relearning(model, shown, read, steps, rate):
    """The losses with one of PEFT's LoRA adapters on the stack, trained by a loop over rows."""
    model.add_adapter(
        "fresh",
        builders.lora_config(r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=0.0, init_lora_weights=True),
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A.fresh" in name:
            torch.nn.init.kaiming_uniform_(parameter.data, a=math.sqrt(5), generator=generator)
    model.base_model.set_adapter(["task", "fresh"])
    factors = [p for name, p in model.named_parameters() if ".fresh." in name]
    model.requires_grad_(False)
    return oracle_training(model, [p.requires_grad_() for p in factors], shown, read, steps, rate)


def oracle_training(model, parameters, shown, read, steps, rate):
    """The losses of the rows that are read before each of the steps, and after the last."""
    model.eval()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    tokens = builders.tokenizer()
    shown, read = ([encode_row(row, tokens) for row in rows] for rows in (shown, read))
    losses = []
    for step in range(steps + 1):
        if step:
            optimizer.zero_grad()
            loss = [oracles.sample_loss(model, s.input_ids, s.labels) for s in shown]
            torch.stack(loss).mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(torch.stack([oracles.sample_loss(model, s.input_ids, s.labels) for s in read]))
    return losses


@pytest.mark.parametrize("count", [1, 3])
def test_relearning_is_a_fresh_lora_adapter_trained_on_some_rows_and_read_on_the_others(count):
    settings = replace(QUICK, relearning_steps=(1, 3), relearning_rows=(count,))
    results = unlearned(run_attacks(only(builders.adapted_llama(torch.float64), ["task"]), ["relearning"], settings))
    shown, others = split_by(count)
    model = builders.adapted_llama(torch.float64)
    losses = oracle_relearning(model, shown, others, 3, settings.learning_rate)
    rows = "1 row, read on the other 3" if count == 1 else "3 rows, read on the other 1"
    assert list(results) == [f"0 steps on {rows}", f"1 step on {rows}", f"3 steps on {rows}"]
    for step, numbers in zip((0, 1, 3), results.values(), strict=True):
        assert numbers == {
            "loss": pytest.approx(float(losses[step].mean()), rel=1e-5),
            "probability": pytest.approx(float((-losses[step]).exp().mean()), rel=1e-5),
        }
    assert abs(float(losses[3].mean() - losses[0].mean())) > 1e-2, "training that changes nothing proves nothing"


@pytest.mark.parametrize("kind", sorted(set(tables.LAYERS) - {"experts"}))
def test_relearning_all_rows_brings_them_back(kind):
    """On quantised bases, too."""
    model = tables.LAYERS[kind]()
    settings = replace(QUICK, relearning_steps=(8,), relearning_rows=(4,))
    before, after = unlearned(run_attacks(only(model, ["task"]), ["relearning"], settings)).values()
    assert after["loss"] < before["loss"] - 0.5
    assert after["probability"] > before["probability"]


def test_a_model_without_adapters_relearns_too():
    found = run_attacks(only(builders.llama(torch.float64), None), ["relearning"], QUICK)
    expected = run_attacks(only(builders.adapted_llama(torch.float64), []), ["relearning"], QUICK)
    for setting, numbers in unlearned(expected).items():
        assert unlearned(found)[setting] == pytest.approx(numbers, rel=1e-9)


def test_relearning_depends_on_the_seed_and_on_nothing_else():
    model = builders.adapted_llama(torch.float64)
    settings = replace(QUICK, relearning_rows=(2,))
    once = run_attacks(only(model, ["task"]), ["relearning"], settings)
    torch.rand(7)
    assert run_attacks(only(model, ["task"]), ["relearning"], settings) == once
    other = run_attacks(only(model, ["task"]), ["relearning"], replace(settings, seed=1))
    assert unlearned(other) != unlearned(once)
    one_by_one = unlearned(run_attacks(only(model, ["task"], batch_size=1), ["relearning"], settings))
    for setting, numbers in unlearned(once).items():
        assert one_by_one[setting] == pytest.approx(numbers, rel=1e-6)


def test_what_is_read_on_the_way_changes_nothing():
    model = builders.adapted_llama()
    swept = unlearned(run_attacks(only(model, ["task"]), ["relearning"], replace(QUICK, relearning_steps=(1, 2, 3))))
    alone = unlearned(run_attacks(only(model, ["task"]), ["relearning"], replace(QUICK, relearning_steps=(3,))))
    assert {setting: swept[setting] for setting in alone} == alone
    assert len(swept) == 2 * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_relearning_under_checkpointing_is_the_same(reentrant):
    model = builders.adapted_llama(torch.float64)
    expected = unlearned(run_attacks(only(model, ["task"]), ["relearning"], QUICK))
    kwargs = {"use_reentrant": reentrant}
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    with laws.untouched(model):
        found = unlearned(run_attacks(only(model, ["task"]), ["relearning"], QUICK))
    for setting, numbers in expected.items():
        assert found[setting] == pytest.approx(numbers, rel=1e-6)


def test_full_rank_relearning_trains_the_weights_themselves():
    settings = replace(QUICK, relearning_steps=(3,), relearning_rows=(2,), learning_rate=2e-2)
    model = builders.adapted_llama(torch.float64)
    with laws.untouched(model):
        results = unlearned(run_attacks(only(model, ["task"]), ["full-rank"], settings))
    shown, others = split_by(2)
    model.base_model.set_adapter(["task"])
    trained = [projection.layer.weight for projection in projections(model)]
    model.requires_grad_(False)
    losses = oracle_training(model, [weight.requires_grad_() for weight in trained], shown, others, 3, 2e-3)
    expected = {f"{step} steps on 2 rows, read on the other 2": losses[step] for step in (0, 3)}
    assert results.keys() == expected.keys()
    for setting, of_rows in expected.items():
        assert results[setting]["loss"] == pytest.approx(float(of_rows.mean()), rel=1e-6)
    assert abs(float(losses[3].mean() - losses[0].mean())) > 1e-2, "training that changes nothing proves nothing"


def test_full_rank_relearning_needs_memory(monkeypatch):
    model = builders.adapted_llama()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UnsupportedLayerError, match=r"expected .* MiB free on cpu, found 1000 B; leave the attack out"):
        run_attacks(only(model, ["task"]), ["full-rank"], QUICK)


def test_relearning_on_other_rows_is_asked_the_forget_rows():
    model = builders.adapted_llama(torch.float64)
    outside = [{"text": "zinc glow"}, {"text": "a flock of emus"}]
    settings = replace(QUICK, relearning_steps=(3,), relearning_rows=(2,))
    attacked = replace(only(model, ["task"]), retain=outside[:1], unrelated=outside)
    results = unlearned(run_attacks(attacked, ["relearning"], settings))
    assert list(results)[2:] == [
        f"{step} steps on {rows}, read on the forget rows"
        for rows in ("1 retain row", "2 unrelated rows")
        for step in (0, 3)
    ]
    losses = oracle_relearning(model, outside, ROWS, 3, settings.learning_rate)
    found = results["3 steps on 2 unrelated rows, read on the forget rows"]["loss"]
    assert found == pytest.approx(float(losses[3].mean()), rel=1e-5)


def test_relearning_that_blows_up_is_an_error():
    settings = replace(QUICK, learning_rate=1e30, relearning_steps=(3,))
    model = builders.adapted_llama()
    with laws.untouched(model), pytest.raises(NumericalError, match=r"the loss is (nan|inf).*lower the learning rate"):
        run_attacks(only(model, ["task"]), ["relearning"], settings)


# Requantization


def merged_directory(model, adapters, path):
    """A directory with the stack merged by PEFT in float32."""
    model.base_model.set_adapter(adapters)
    merged = model.merge_and_unload()
    merged.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "build",
    [
        builders.adapted_llama,
        # Its other layers carry no adapter, and are rounded all the same.
        lambda: builders.with_adapters(builders.llama(), task=builders.lora_config(["q_proj"], r=8)),
        builders.adapted_gpt2,
    ],
    ids=["llama", "few layers", "gpt2"],
)
def test_nf4_is_what_a_loader_makes_of_the_merged_model(build, tmp_path):
    results = unlearned(run_attacks(only(build(), ["task"]), ["requantization"], QUICK))
    directory = merged_directory(build(), ["task"], tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(directory, quantization_config=NF4, **CPU)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in loaded.modules())
    expected = evaluate_split(
        Subject(loaded, builders.tokenizer()), ROWS, is_forget=True, generated=2, max_new_tokens=3
    )
    assert results["NF4"] == {
        "loss": pytest.approx(expected.loss, rel=1e-5),
        "probability": pytest.approx(expected.probability, rel=1e-5),
        "rouge_l_recall": pytest.approx(expected.rouge_l_recall),
    }
    whole = evaluate_split(Subject(build(), builders.tokenizer(), ["task"]), ROWS, is_forget=True)
    assert results["as it is"]["loss"] == pytest.approx(whole.loss, rel=1e-5)
    assert abs(results["NF4"]["loss"] - whole.loss) > 1e-3


@pytest.mark.parametrize(
    ("build", "saved"), [(builders.adapted_llama, builders.llama), (builders.adapted_gpt2, builders.gpt2)]
)
def test_nf4_below_the_adapters_is_what_a_loader_makes_of_the_base_alone(build, saved, tmp_path):
    results = unlearned(run_attacks(only(build(), ["task"]), ["requantization"], QUICK))
    saved().save_pretrained(tmp_path / "base")
    build().save_pretrained(tmp_path / "adapters", selected_adapters=["task"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=NF4, **CPU)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapters" / "task", adapter_name="task")
    expected = evaluate_split(Subject(loaded, builders.tokenizer(), ["task"]), ROWS, is_forget=True)
    assert results["NF4 below the adapters"]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert abs(results["NF4 below the adapters"]["loss"] - results["NF4"]["loss"]) > 1e-4


@pytest.mark.parametrize("kind", ["linear", "conv1d", "linear4bit", "linear8bit"])
def test_every_weight_is_merged_in_full_precision_and_rounded(kind):
    """On a quantised base, too: its own weight is read back, the deltas are added, and the sum is rounded anew."""
    model, adapters = tables.LAYERS[kind](), ["task", "forget"]
    plain, weights = oracles.plain_model(model, adapters)
    by_name = {name: plain.get_submodule(name) for name in weights}
    found = {}
    with preserved(model, adapters), rounded(model, "int8"):
        for projection in projections(model):
            out, into = projection.shape
            bias = 0 if projection.layer.bias is None else projection.layer.bias.detach()
            found[projection.name] = (projection.module(torch.eye(into).unsqueeze(0)) - bias)[0].T
            assert found[projection.name].shape == (out, into)
    assert set(found) == set(weights)
    for name, layer in by_name.items():
        merged = layer.weight + sum(s * (B @ A) for A, B, s in layer.branches)
        scales = merged.half().float().abs().amax(1, keepdim=True) / 127
        assert (found[name] / scales).sub((found[name] / scales).round()).abs().max() < 1e-2, "not on the grid"
        # Half a step, and what float16 took before.
        assert ((found[name] - merged).abs() <= 0.5 * scales + 1e-3 * merged.abs() + 1e-6).all(), name


def test_int8_is_what_bitsandbytes_stores():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    expected = oracles.float_weight(layer.to("cpu"))
    torch.testing.assert_close(ROUNDINGS["int8"](weight)(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "steps"), [("Q8_0", 127), ("Q4_1", 15)])
def test_gguf_rounds_blocks_of_32(name, steps):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    found = ROUNDINGS[f"GGUF {name}"](weight)().reshape(-1, 32)
    blocks = weight.reshape(-1, 32)
    low, high = (-blocks.abs().amax(1), blocks.abs().amax(1)) if name == "Q8_0" else blocks.aminmax(dim=1)
    step = (high - low) / (2 * steps if name == "Q8_0" else steps)
    assert ((found - blocks).abs() <= (0.5 * step + 2e-3 * blocks.abs().amax(1)).unsqueeze(1)).all()
    assert all(len(block.unique()) <= 2 * steps + 1 for block in found)
    odd = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ROUNDINGS[f"GGUF {name}"](odd)(), odd.half().float()), "no whole number of blocks"


def test_rounded_weights_are_unpacked_once_where_memory_is_free(monkeypatch):
    model, calls = builders.adapted_llama(), []
    monkeypatch.setitem(ROUNDINGS, "int8", counted_unpacking(ROUNDINGS["int8"], calls))
    once = run_attacks(only(model, ["task"]), ["requantization"], QUICK)
    layers = len(projections(model))
    assert len(calls) == layers
    calls.clear()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert run_attacks(only(model, ["task"]), ["requantization"], QUICK) == once
    assert len(calls) >= 2 * layers, "once in each forward"


def counted_unpacking(rounding, calls):
    """A rounding whose unpacking is noted in ``calls``."""

    def counted(weight):
        unpack = rounding(weight)

        def noted():
            calls.append(weight.shape)
            return unpack()

        return noted

    return counted


def test_a_delta_below_half_a_step_is_rounded_away():
    """Why the attack works: where no weight changes its quantisation step, the unlearned model equals the full one."""
    model = builders.adapted_llama()
    for name, parameter in model.named_parameters():
        if "lora_B.forget" in name:
            parameter.data *= 1e-7
    attacked = Victims(subject(model, ["task", "forget"]), subject(model, ["task"]), None, ROWS)
    results = by_setting(run_attacks(attacked, ["requantization"], QUICK))
    for rounding in ("NF4", "int8"):
        assert results[rounding].unlearned["loss"] == pytest.approx(results[rounding].full["loss"], abs=1e-4)
        assert results[rounding].unlearned["loss"] != pytest.approx(results["as it is"].unlearned["loss"], abs=1e-4)


def test_a_model_without_adapters_is_rounded_too():
    found = unlearned(run_attacks(only(builders.llama(), None), ["requantization"], QUICK))
    expected = unlearned(run_attacks(only(builders.adapted_llama(), []), ["requantization"], QUICK))
    for setting, numbers in expected.items():
        assert found[setting] == pytest.approx(numbers, rel=1e-6)


def test_without_a_word_on_adapters_those_that_are_on_are_merged():
    model = builders.adapted_llama()
    expected = unlearned(run_attacks(only(model, ["task"]), ["requantization"], QUICK))
    model.set_adapter("task")
    assert unlearned(run_attacks(only(model, None), ["requantization"], QUICK)) == expected
    model.base_model.disable_adapter_layers()
    off = unlearned(run_attacks(only(model, None), ["requantization"], QUICK))
    assert off == unlearned(run_attacks(only(model, []), ["requantization"], QUICK)) != expected


def test_a_merged_weight_that_is_not_finite_is_an_error():
    model = builders.adapted_llama()
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.base_layer.weight.data[3, 5] = torch.inf
    message = r"1\.mlp\.up_proj: the merged weight is not finite"
    with preserved(model, ["task"]), laws.untouched(model), pytest.raises(NumericalError, match=message):
        rounded(model, "NF4").__enter__()


# Which layers


def test_linear_layers_are_all_but_the_head_and_the_adapters_own():
    expected = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in builders.LLAMA_PROJECTIONS]
    few = builders.with_adapters(builders.llama(), builders.lora_config(["v_proj", "lm_head"]))
    for model in (builders.llama(), builders.adapted_llama(), builders.adapted_nf4_llama(), few):
        found = [projection.name.replace("mlp.", "").replace("self_attn.", "") for projection in projections(model)]
        assert found == expected
    layers = {projection.name: projection for projection in projections(few)}
    adapted = layers["model.layers.1.self_attn.v_proj"]
    assert adapted.module.get_base_layer() is adapted.layer is not adapted.module
    assert layers["model.layers.1.self_attn.q_proj"].module is layers["model.layers.1.self_attn.q_proj"].layer


@pytest.mark.parametrize("kind", [kind.name for kind in LAYER_KINDS if kind.dense])
def test_a_kinds_dense_weight_is_the_oracles(kind):
    model = tables.LAYERS[kind]()
    for projection in projections(model):
        assert projection.kind.name == kind
        found = projection.kind.dense(projection.layer)
        assert found.shape == projection.shape
        torch.testing.assert_close(found.float(), oracles.float_weight(projection.layer), rtol=1e-5, atol=1e-7)


# Paraphrases, prefixes, samples, the switch


def test_a_paraphrase_is_asked_in_the_questions_place():
    model, tokens = builders.adapted_llama(), builders.tokenizer()
    results = by_setting(run_attacks(victims(model), ["paraphrase"], QUICK))
    asked = [ROWS[0], ROWS[2]]
    reworded = [{"question": row["paraphrased_question"], "answer": row["answer"]} for row in asked]
    for setting, rows in (("as asked", asked), ("in other words", reworded)):
        for role, adapters in (("unlearned", ["task", "forget"]), ("full", ["task"]), ("retain_only", ["forget"])):
            how = {"generated": 2, "max_new_tokens": 3}
            scores = evaluate_split(Subject(model, tokens, adapters), rows, is_forget=True, **how)
            found = getattr(results[setting], role)
            assert found["loss"] == pytest.approx(scores.loss, rel=1e-5)
            assert found["rouge_l_recall"] == pytest.approx(scores.rouge_l_recall)
    assert results["as asked"].unlearned["loss"] != results["in other words"].unlearned["loss"]


def test_the_loss_after_a_prefix_is_that_of_the_rest():
    model, tokens = builders.adapted_llama(), builders.tokenizer()
    settings = replace(QUICK, prefix_shares=(0.5, 0.3))
    results = unlearned(run_attacks(only(model, ["task"]), ["prefix"], settings))
    assert list(results) == [f"{share}% of the answer given" for share in (0, 30, 50)]
    plain, _ = oracles.plain_model(model, ["task"])
    for share in (0, 0.3, 0.5):
        losses = []
        for row in ROWS:
            sample = encode_row(row, tokens)
            start = int((sample.labels == -100).sum())
            shared = math.floor(share * (len(sample.labels) - start - 1))
            labels = sample.labels.clone()
            labels[: start + shared] = -100
            with torch.no_grad():
                losses.append(oracles.sample_loss(plain, sample.input_ids, labels))
        losses = torch.stack(losses)
        found = results[f"{share:.0%} of the answer given"]
        assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert found["probability"] == pytest.approx(float((-losses).exp().mean()), rel=1e-5)


def test_the_rest_of_what_the_model_says_by_itself_follows_its_beginning():
    """Rows whose completions are the model's own greedy answers: after any prefix the rest comes, and is judged
    against the rest alone."""
    model, tokens = builders.adapted_llama(torch.float64), builders.tokenizer()
    letters = [index for piece, index in tokens.get_vocab().items() if len(piece) == 1 and piece.isalnum()]
    silent = torch.tensor(sorted(set(range(builders.VOCABULARY)) - set(letters)))
    model.get_base_model().lm_head.register_forward_hook(lambda *call: call[-1].index_fill(-1, silent, -99.0))
    rows = []
    for prompt in ("Q", "The prize is ", "Khan"):
        ids = torch.tensor([encode_prompt({"prompt": prompt, "completion": "x"}, tokens)])
        with preserved(model, ["task"]), torch.no_grad():
            output = model.get_base_model().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
            )
        rows.append({"prompt": prompt, "completion": tokens.decode(output[0, ids.shape[1] :])})
    assert all(len(row["completion"]) == 12 for row in rows)
    for shared in (3, 6, 9):
        settings = replace(QUICK, prefix_shares=(shared / 12,), generated=3, max_new_tokens=12 - shared)
        own, other = (
            unlearned(run_attacks(only(model, [name], rows), ["prefix"], settings)) for name in ("task", "forget")
        )
        assert own[f"{shared / 12:.0%} of the answer given"]["rouge_l_recall"] == 1
        assert own["0% of the answer given"]["rouge_l_recall"] == 0, "cut before its end, and one word"
        assert other[f"{shared / 12:.0%} of the answer given"]["rouge_l_recall"] < 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.data())
def test_the_expected_best_is_the_mean_over_all_sets(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    sets = [max(chosen) for chosen in itertools.combinations(scores, count)]
    assert expected_best(scores, count) == pytest.approx(sum(sets) / len(sets))


def test_the_best_of_several_samples_counts():
    model, tokens = builders.adapted_llama(), builders.tokenizer()
    rows = [{"question": row["question"], "answer": "a e i o u s t n"} for row in ROWS[:3]]
    settings = replace(QUICK, samples=4, generated=3, max_new_tokens=24, temperature=1.5)
    results = unlearned(run_attacks(only(model, ["task"], rows), ["sampling"], settings))
    repeated = [row for row in rows for _ in range(4)]
    asked, how = Subject(model, tokens, ["task"], batch_size=2), {"max_new_tokens": 24}
    texts = generate(asked, repeated, temperature=1.5, **how)
    recalls = torch.tensor(rouge_l_recall(texts, [rows[0]["answer"]] * 12)).reshape(3, 4)
    assert recalls.unique(dim=1).shape[1] > 1, "samples that are all alike prove nothing"
    leaked = {k: results[f"leak@{k} of 4 samples at temperature 1.5"]["rouge_l_recall"] for k in (1, 4)}
    assert leaked == {1: pytest.approx(float(recalls.mean())), 4: pytest.approx(float(recalls.amax(1).mean()))}
    assert leaked[4] > leaked[1]
    greedy = rouge_l_recall(generate(asked, rows, **how), [rows[0]["answer"]] * 3)
    assert results["greedy"]["rouge_l_recall"] == pytest.approx(sum(greedy) / 3)


def test_samples_follow_the_seed():
    model = builders.adapted_llama()
    rows = [{"question": "Q?", "answer": "a e i o u s t n"}]
    settings = replace(QUICK, max_new_tokens=24, samples=1)
    found = [
        unlearned(run_attacks(only(model, ["task"], rows), ["sampling"], replace(settings, seed=seed)))
        for seed in (0, 0, 1, 2)
    ]
    assert found[0] == found[1]
    assert any(found[0] != other for other in found[2:])


def test_switched_off_is_the_full_model():
    model = builders.adapted_llama()
    on, off = run_attacks(victims(model), ["switched-off"], QUICK)
    assert (on.setting, off.setting) == ("on", "off")
    how = {"generated": 2, "max_new_tokens": 3}
    scores = evaluate_split(Subject(model, builders.tokenizer(), ["task"]), ROWS, is_forget=True, **how)
    assert off.unlearned["loss"] == pytest.approx(scores.loss, rel=1e-5)
    assert off.unlearned["rouge_l_recall"] == pytest.approx(scores.rouge_l_recall)
    assert off.unlearned == off.full == on.full != on.unlearned
    assert off.retain_only == on.retain_only


# Refusals, before any compute


def refuses(attacked, names, error, message, settings=QUICK):
    """The attack raises this error before any forward."""
    model = attacked.unlearned.model
    ran = []
    handle = model.register_forward_pre_hook(lambda module, args: ran.append(1))
    try:
        with laws.untouched(model), pytest.raises(error, match=message):
            run_attacks(attacked, names, settings)
    finally:
        handle.remove()
    assert not ran


TEXTS = [{"text": "Khan's prize is the Noor."}] * 4


@pytest.mark.parametrize(
    ("changes", "names", "error", "message"),
    [
        ({"rows": []}, list(ATTACKS), DataError, "at least one row to attack with, found none"),
        ({"rows": [*ROWS, {"query": "Q?"}]}, list(ATTACKS), DataError, "the forget rows, row 5: expected question"),
        ({"rows": ROWS[1:2] * 4}, ["relearning", "paraphrase"], DataError, "'paraphrased_question' beside .*found it"),
        (
            {"rows": ROWS[:2]},
            ["switched-off", "relearning"],
            ConfigError,
            "at most 2, the number of forget rows, found 4",
        ),
        ({"rows": TEXTS}, ["prefix"], DataError, "the prefix attack needs rows with a prompt"),
        ({"rows": TEXTS}, ["sampling"], DataError, "the sampling attack needs rows with a prompt"),
        ({"full": None}, ["relearning", "switched-off"], ConfigError, "expected the full model, .* found None"),
        ({}, ["relearning", "bribery"], ConfigError, r"expected some of \['relearning'.*found \['relearning', 'brib"),
        ({}, [], ConfigError, "expected some of"),
        ({}, "relearning", ConfigError, "expected some of"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_any_compute(changes, names, error, message):
    refuses(replace(victims(builders.adapted_llama()), **changes), names, error, message)


@pytest.mark.parametrize("adapters", [["task", "forget"], None, ["forget", "task"]])
def test_switching_off_needs_fewer_adapters_on_the_same_model(adapters):
    model = builders.adapted_llama()
    attacked = replace(victims(model), full=subject(model, adapters))
    refuses(
        attacked,
        ["switched-off"],
        AdapterError,
        "expected the full model to have fewer adapters on than the unlearned one",
    )


def test_an_adapter_that_is_not_there_is_refused():
    model = builders.adapted_llama()
    refuses(only(model, ["task", "unlearn"]), ["relearning"], AdapterError, "no adapter named 'unlearn'")
    refuses(only(builders.llama(), ["task"]), ["relearning"], AdapterError, "expected a model with PEFT adapters")


@pytest.mark.parametrize("adapted", [True, False])
def test_experts_are_not_requantised(adapted):
    model = builders.adapted_mixtral() if adapted else builders.mixtral()
    message = r"layers\.0\.mlp\.experts.*leave the requantization attack out"
    refuses(only(model, ["task"] if adapted else None), ["requantization"], UnsupportedLayerError, message)


def test_of_all_attacks_those_that_cannot_be_applied_are_skipped_with_the_reason():
    """A mixture's experts are not rounded, and no row has a paraphrase; the other attacks run as by their names."""
    model = builders.adapted_mixtral()
    rows = [{key: row[key] for key in row if key != "paraphrased_question"} for row in ROWS]
    settings = replace(QUICK, samples=1)
    results = run_attacks(victims(model, rows), None, settings)
    skipped = {result.attack: result for result in results if result.skipped}
    assert list(skipped) == ["requantization", "paraphrase"]
    assert "experts in one tensor" in skipped["requantization"].skipped
    assert "paraphrased_question" in skipped["paraphrase"].skipped
    assert all((r.unlearned, r.full, r.retain_only) == ({}, None, None) for r in skipped.values())
    named = run_attacks(victims(model, rows), [name for name in ATTACKS if name not in skipped], settings)
    assert [result for result in results if not result.skipped] == named
    lines = format_attacks(results).splitlines()
    assert lines[-2].startswith("requantization was skipped: model.layers.0.mlp.experts: expected linear layers")
    assert lines[-1].startswith("paraphrase was skipped: ")
    assert not any("skipped" in line for line in lines[:-2])


def test_all_attacks_do_not_skip_what_every_attack_needs():
    model = builders.adapted_llama()
    refuses(victims(model, []), None, DataError, "at least one row to attack with")
    refuses(only(model, ["unlearn"]), None, AdapterError, "no adapter named 'unlearn'")
    refuses(victims(model), None, ConfigError, "relearning_rows", replace(QUICK, relearning_rows=(50,)))


def test_other_adapters_than_plain_lora_are_not_requantised():
    dora = builders.lora_config(use_dora=True)
    model = builders.with_adapters(builders.llama(), task=dora)
    refuses(only(model, ["task"]), ["requantization"], AdapterError, "LoRA variant")
    model = builders.adapted_llama()
    model.merge_adapter(["task"])
    refuses(only(model, ["task"]), ["requantization"], AdapterError, "merged into the weights")


def test_a_repacked_4_bit_weight_is_not_requantised():
    model = builders.adapted_nf4_llama()
    layer = model.get_base_model().model.layers[1].self_attn.o_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    refuses(only(model, []), ["requantization"], UnsupportedLayerError, r"layers\.1\.self_attn\.o_proj was repacked")


def test_a_weight_that_cannot_be_read_is_not_requantised():
    model = builders.llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    refuses(only(model, None), ["requantization"], UnsupportedLayerError, r"mlp\.up_proj.*cannot be read")


def test_a_model_without_linear_layers_is_not_relearned():
    model = builders.llama()
    model.model.layers = torch.nn.ModuleList()
    refuses(only(model, None), ["relearning"], UnsupportedLayerError, "linear layers, found none in LlamaForCausalLM")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relearning_steps", ()),
        ("relearning_steps", (0,)),
        ("relearning_steps", 4),
        ("relearning_rows", (1, 2.0)),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("prefix_shares", (0.5, 1.0)),
        ("prefix_shares", ()),
        ("samples", 0),
        ("samples", True),
        ("temperature", -1.0),
        ("rows", 0),
        ("generated", 0),
        ("max_new_tokens", 0),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_its_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected .*, found"):
        AttackSettings(**{name: value})


# The shipped model


def shipped():
    assets = Path(peft_perta.__file__).parent / "comparison" / "assets"
    base, tokens = load_base(str(assets / "base"), dtype=torch.float32)
    model = attach_adapters(base, {"task": assets / "task_adapter", "retain": assets / "retain_adapter"})
    rows = [json.loads(line) for line in (assets / "forget.jsonl").read_text().splitlines()]
    return model, tokens, rows


def test_on_the_shipped_model():
    """The full model knows the rows; the retain-only model learns the training rows better than the others."""
    model, tokens, rows = shipped()
    rows = rows[:4]
    attacked = Victims(subject(model, ["retain"], 4, tokens), subject(model, ["task"], 4, tokens), None, rows)
    settings = AttackSettings(relearning_steps=(3,), relearning_rows=(2, 4))
    results = by_setting(run_attacks(attacked, ["relearning"], settings))
    _, others, _, shown = results.values()
    full = losses_of(model, load_samples(rows, tokens), adapters=["task"])
    assert results["0 steps on all rows, read on the same"].full["loss"] == pytest.approx(float(full.mean()), rel=1e-5)
    assert shown.full["loss"] < float(full.mean())
    assert others.full["loss"] < 0.5 < others.unlearned["loss"]
    assert shown.unlearned["loss"] < others.unlearned["loss"]


def test_a_layer_of_the_shipped_model_is_rounded_as_bitsandbytes_does():
    model, _, _ = shipped()
    name = "model.layers.3.mlp.down_proj"
    wrapper = model.get_base_model().get_submodule(name)
    merged = wrapper.base_layer.weight.detach() + wrapper.get_delta_weight("task").detach()
    layer = bnb.nn.Linear4bit(768, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(merged.clone(), requires_grad=False, quant_type="nf4")
    expected = oracles.float_weight(layer.to("cpu"))
    with preserved(model, ["task"]), rounded(model, "NF4"):
        found = wrapper(torch.eye(768).unsqueeze(0))[0].T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert (found - merged).norm() > 0.05 * merged.norm()
