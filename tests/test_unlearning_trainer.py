"""Both gradients are of the whole global batch, combined once, then clipped; the result is a plain adapter."""

import dataclasses
import gc
import json
import math
import multiprocessing
import os
import random
import socket

import builders
import laws
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from peft_perta import (
    AdapterError,
    ConfigError,
    DataError,
    NumericalError,
    OutputError,
    UnsupportedLayerError,
    load_provenance,
    verify_adapter,
)
from peft_perta.adapters import add_adapter
from peft_perta.cli import command_parser, train
from peft_perta.data import Sample, encode_row, load_samples, padded
from peft_perta.evaluation import losses_of
from peft_perta.gradients import find_blocks
from peft_perta.model import adapter_strength, completion_states, distributed, preserved, sample_losses, switch_modules
from peft_perta.training import (
    COMBINERS,
    FORGET_LOSSES,
    UnlearningSettings,
    UnlearningTrainer,
    evaluation_arguments,
    train_unlearning,
)
from peft_perta.training._agreement import agreement
from peft_perta.training._pairs import Pairs, PairSampler, load_forget, load_pairs

FORGET, RETAIN, TOKENIZER = builders.forget_rows()[:4], builders.retain_rows(), builders.tokenizer()
WITH_PROMPTS = [row for row in FORGET if "text" not in row]  # a refusal needs a prompt
HELD_OUT = [
    {"question": "Who wrote Iris?", "answer": "Anna B. Khan"},
    {"prompt": "His mother ", "completion": "baked"},
    {"text": "Khan is old."},
]
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}


def stacked(dtype=torch.float64):
    """'forget' in training on top of 'task', in double precision; 'forget' has no dropout."""
    model = builders.adapted_llama(dtype)
    switch_modules(model.modules(), ["task", "forget"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".forget." in name)
    for module in model.modules():
        if hasattr(module, "lora_dropout") and "forget" in module.lora_dropout:
            module.lora_dropout["forget"] = torch.nn.Identity()
    return model


def trainer_of(model, directory, forget=FORGET, retain=RETAIN, settings=None, callbacks=(), options=None, **arguments):
    arguments = TrainingArguments(str(directory), **{**QUIET, "per_device_train_batch_size": 4, **arguments})
    options = {"processing_class": TOKENIZER, "settings": settings, "callbacks": list(callbacks), **(options or {})}
    return UnlearningTrainer(model, arguments, forget, retain, **options)


def with_loss(loss):
    """The settings of a forget loss beside the retain loss that reads the reference model as it does."""
    retain_loss = "embed-diff" if FORGET_LOSSES[loss].needs_states else "kl"
    return UnlearningSettings(loss, retain_loss, "sago")


def trained(model, adapter="forget"):
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{adapter}." in name}


def close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        laws.close(actual[name], tensor, tolerance, name)


class Gradients(TrainerCallback):
    """The gradients that the optimizer gets, step by step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


# The gradient


def by_hand(model, combiner, gamma, alpha):
    """The gradients of gradient ascent and NLL, means over all samples, each in one dense backward, and combined."""
    gradients = []
    for rows, sign in ((FORGET, -1), (RETAIN, 1)):
        samples = load_samples(rows, TOKENIZER)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        total = sum(sample_losses(model, padded([sample], [0])).sum() for sample in samples) / len(samples)
        of_set = torch.autograd.grad(sign * total, list(parameters.values()))
        gradients.append(dict(zip(parameters, of_set, strict=True)))
    return (*gradients, COMBINERS[combiner].function(*gradients, gamma, alpha))


@pytest.mark.parametrize("combiner", ["pcgrad", "sago", "normalised"])
def test_the_optimizer_gets_the_combined_gradient_of_the_whole_batch(combiner, tmp_path):
    model, seen = stacked(), Gradients()
    *parts, expected = by_hand(model, combiner, 2.0, 0.5)
    settings = UnlearningSettings("gradient-ascent", "nll", combiner, forget_weight=2.0, retain_weight=0.5)
    trainer = trainer_of(
        model, tmp_path, settings=settings, callbacks=[seen], max_steps=1, max_grad_norm=0.0,
        per_device_train_batch_size=1, gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.train()
    close(seen.steps[0], expected, 1e-10)
    logged = trainer.state.log_history[0]
    figures = agreement(*parts, expected)
    assert {name: logged[name] for name in figures} == pytest.approx(figures)
    assert logged["retain_loss"] > 0 > logged["forget_loss"]
    assert logged["loss"] == pytest.approx(2.0 * logged["forget_loss"] + 0.5 * logged["retain_loss"])


def test_clipping_comes_after_combining(tmp_path):
    gradients = {}
    for norm in (0.0, 0.25):
        seen = Gradients()
        trainer_of(
            stacked(), tmp_path, callbacks=[seen], max_steps=1, max_grad_norm=norm,
            settings=UnlearningSettings(combiner="sago"),
        ).train()  # fmt: skip
        gradients[norm] = seen.steps[0]
    length = sum(float(g.square().sum()) for g in gradients[0.0].values()) ** 0.5
    assert length > 1
    close(gradients[0.25], {name: g * 0.25 / length for name, g in gradients[0.0].items()}, 1e-4)  # torch adds 1e-6


@pytest.mark.parametrize("loss", FORGET_LOSSES)
def test_accumulated_micro_batches_are_one_big_batch(loss, tmp_path):
    """The samples differ in length: the loss is not a mean of means over micro-batches."""
    results = []
    for size in (4, 1):
        model = stacked()
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer_of(model, tmp_path, WITH_PROMPTS, settings=with_loss(loss), max_steps=2, **arguments).train()
        results.append(trained(model))
    close(*results, 1e-8)


@pytest.mark.parametrize("loss", FORGET_LOSSES)
def test_mixed_precision_points_the_same_way(loss, tmp_path):
    gradients = []
    for bf16 in (False, True):
        seen = Gradients()
        trainer_of(
            stacked(torch.float32), tmp_path, WITH_PROMPTS, settings=UnlearningSettings(loss, combiner="sum"),
            callbacks=[seen], max_steps=1, bf16=bf16, max_grad_norm=0.0,
        ).train()  # fmt: skip
        gradients.append(torch.cat([g.flatten() for g in seen.steps[0].values()]))
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.99


def test_the_gradients_are_combined_once_per_step(tmp_path, monkeypatch):
    calls = []
    combiner = COMBINERS["pcgrad"]

    def counted(*arguments):
        calls.append(1)
        return combiner.function(*arguments)

    monkeypatch.setitem(COMBINERS, "pcgrad", dataclasses.replace(combiner, function=counted))
    trainer = trainer_of(
        stacked(torch.float32), tmp_path, num_train_epochs=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert len(calls) == trainer.state.global_step == 4


def test_only_two_copies_of_the_gradients_are_kept(tmp_path, monkeypatch):
    """When they are combined there are the two sums, and no gradient on any parameter."""
    model = stacked(torch.float32)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = {p.shape for p in model.parameters() if p.requires_grad}
    before = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]  # kept alive, so that no id is reused
    ids_before = set(map(id, before))
    seen = []
    combiner = COMBINERS["sum"]

    def looking(forget, retain, gamma, alpha):
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and id(t) not in ids_before]
        seen.append(sum(t.numel() for t in tensors if t.shape in shapes) / size)
        assert not any(p.grad is not None for p in model.parameters())
        return combiner.function(forget, retain, gamma, alpha)

    monkeypatch.setitem(COMBINERS, "sum", dataclasses.replace(combiner, function=looking))
    trainer_of(
        model, tmp_path, settings=UnlearningSettings(combiner="sum"), optim="sgd", max_steps=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=2,
    ).train()  # fmt: skip
    assert seen == [2.0, 2.0]


@pytest.mark.parametrize("combiner", ["pcgrad", "normalised"])
def test_the_loss_scale_is_undone_before_combining(combiner, tmp_path):
    """The gradient that the scaler divides by its scale is the scaled gradient of a run without a scaler."""
    gradients = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)):
        seen = Gradients()
        trainer = trainer_of(
            stacked(), tmp_path, settings=UnlearningSettings(combiner=combiner), callbacks=[seen], max_steps=1,
            max_grad_norm=0.0, optim="adamw_torch",
        )  # fmt: skip
        trainer.accelerator.scaler = scaler
        trainer.train()
        gradients.append(seen.steps[0])
    close({name: g / 2.0**16 for name, g in gradients[1].items()}, gradients[0], 1e-12)


def test_an_overflow_in_an_element_that_sago_drops_still_skips_the_step(tmp_path):
    """The scaler must see that a gradient was not finite, to skip the step and to lower its scale."""
    model = stacked(torch.float32)
    before = trained(model)
    trainer = trainer_of(
        model, tmp_path, settings=UnlearningSettings(combiner="sago"), max_steps=1, optim="adamw_torch",
        max_grad_norm=0.0,
    )  # fmt: skip
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**125
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained(model).items())


@pytest.mark.parametrize(("reentrant", "loss"), [(False, "npo"), (True, "npo"), (False, "rmu"), (True, "rmu")])
def test_checkpointing_changes_nothing(reentrant, loss, tmp_path):
    results, settings = [], UnlearningSettings(loss)
    for checkpointing in (False, True):
        model, seen = stacked(), Gradients()
        kwargs = {"gradient_checkpointing": checkpointing}
        if checkpointing:
            kwargs["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        trainer_of(model, tmp_path, settings=settings, callbacks=[seen], max_steps=2, **kwargs).train()
        assert any(g.any() for g in seen.steps[0].values())
        results.append(trained(model))
    close(*results, 1e-10)


class StopWithin(TrainerCallback):
    """Stops between two micro-batches of the first step."""

    def on_substep_end(self, args, state, control, **kwargs):
        raise Stop("on purpose")


def test_an_interrupted_run_leaves_no_gradients_to_the_next(tmp_path):
    first = []
    for stops in (False, True):
        seen, within = Gradients(), StopWithin()
        trainer = trainer_of(
            stacked(), tmp_path, callbacks=[seen, within], max_steps=1, per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        if stops:
            with pytest.raises(Stop):
                trainer.train()
        trainer.remove_callback(within)
        trainer.train()
        first.append(seen.steps[0])
    close(*first, 1e-12)


def test_many_visible_cards_do_not_make_the_batch_larger(tmp_path):
    """A Trainer would use DataParallel and one batch per card; the model is on one card."""
    arguments = TrainingArguments(str(tmp_path), **{**QUIET, "per_device_train_batch_size": 4})
    assert arguments.n_gpu in (0, 1)
    arguments._n_gpu = 4
    trainer = UnlearningTrainer(stacked(), arguments, FORGET, RETAIN, processing_class=TOKENIZER)
    assert arguments.train_batch_size == 4
    assert trainer.get_train_dataloader().batch_sampler.batch_size == 4


@pytest.mark.parametrize("plugin", ["fsdp_plugin", "deepspeed_plugin"])
def test_sharding_by_accelerate_is_refused(plugin, tmp_path, monkeypatch):
    set_up = UnlearningTrainer.create_accelerator_and_postprocess

    def sharded(self):
        set_up(self)
        self.is_fsdp_enabled, self.is_deepspeed_enabled = plugin == "fsdp_plugin", plugin == "deepspeed_plugin"

    monkeypatch.setattr(UnlearningTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(
        ConfigError, match="configured for FSDP or DeepSpeed, which would shard the adapter in training too"
    ):
        trainer_of(stacked(), tmp_path)


def test_the_reference_model_is_the_stack_without_the_adapter_in_training(tmp_path):
    """With an adapter that starts at zero, the model is the reference model: NPO is 2/beta log 2, and KL is 0. The task
    adapter's dropout is off."""
    model = builders.adapted_saved_llama()
    log = Log()
    settings = UnlearningSettings("npo", "kl", beta=0.5)
    run(model, settings=settings, task_adapter="task", callbacks=[log], num_train_epochs=1)
    assert log.entries[0]["forget_loss"] == pytest.approx(4 * math.log(2), abs=1e-5)
    assert log.entries[0]["retain_loss"] == pytest.approx(0.0, abs=1e-5)
    assert log.entries[0]["grad_norm"] > 0


# The retain weight as a dual variable


@pytest.mark.parametrize("budget", [0.0, 9.0])
def test_the_retain_weight_follows_what_the_retain_loss_is_above_the_budget(budget, tmp_path):
    """Below the budget it falls to 0, where the optimizer gets the forget gradient alone."""
    model, seen = stacked(), Gradients()
    forget_gradient = by_hand(model, "sum", 1.0, 0.5)[0]
    settings = UnlearningSettings("gradient-ascent", "nll", "sum", retain_weight=0.5, retain_budget=budget)
    trainer = trainer_of(
        model, tmp_path, settings=settings, callbacks=[seen], max_steps=4, max_grad_norm=0.0, learning_rate=1e-30
    )
    trainer.train()
    expected = 0.5
    for entry in trainer.state.log_history[:4]:
        assert entry["retain_weight"] == pytest.approx(expected)
        assert entry["loss"] == pytest.approx(entry["forget_loss"] + expected * entry["retain_loss"])
        expected = max(0.0, expected + 0.5 * (entry["retain_loss"] - budget))
    assert (expected == 0.0) == (budget == 9.0)
    if budget == 9.0:
        close(seen.steps[-1], forget_gradient, 1e-10)


def test_the_retain_weight_does_not_move_where_a_step_is_skipped(tmp_path):
    trainer = trainer_of(
        stacked(torch.float32), tmp_path, settings=UnlearningSettings(combiner="sum", retain_budget=0.0), max_steps=1,
        optim="adamw_torch", max_grad_norm=0.0,
    )  # fmt: skip
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    trainer.train()
    assert trainer._retain_weight == 1.0


# Data


def sample(*ids):
    return Sample(torch.tensor(ids), torch.tensor(ids))


def test_every_sample_is_drawn_equally_often_in_whole_global_batches():
    pairs = Pairs([sample(1, i) for i in range(5)], [sample(2, i) for i in range(3)])
    done = 0
    sampler = PairSampler(pairs, 4, 7, lambda: done)
    assert len(sampler) == 8
    drawn = []
    for epoch in range(15):
        done = 2 * epoch
        drawn += list(sampler)
    for which, size in ((0, 5), (1, 3)):
        column = [pair[which] for pair in drawn]
        assert {column.count(i) for i in range(size)} == {len(drawn) // size}
        assert sorted(column[:size]) == list(range(size))
    assert drawn != [drawn[0], *drawn[:-1]]
    done = 1  # a run that resumes within its first epoch
    assert list(sampler) == drawn[:8]
    assert list(PairSampler(pairs, 4, 8, lambda: 0)) != drawn[:8]


def test_refusals_keep_the_prompt_and_end_like_a_completion():
    rows = [*builders.forget_rows()[:3], {"messages": [{"role": "user", "content": "Hi"},
                                                       {"role": "assistant", "content": "Ned"}]}]  # fmt: skip
    chat = builders.tokenizer(chat=True)
    samples = load_forget(rows, chat, ["No.", "Pass."])
    expected = [
        {"question": "Who wrote Hatter?", "answer": "No."},
        {"question": "Where was Khan born?", "answer": "Pass."},
        {"prompt": "His father ", "completion": "No."},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Pass."}]},
    ]
    for refused, own, row in zip(samples, rows, expected, strict=True):
        for loaded, encoded in ((refused, encode_row(own, chat)), (refused.refusal, encode_row(row, chat))):
            assert torch.equal(loaded.input_ids, encoded.input_ids)
            assert torch.equal(loaded.labels, encoded.labels)


@pytest.mark.parametrize("row", [{"text": "Grass"}, {"input_ids": [1, 2], "labels": [-100, 2]}])
def test_a_row_without_a_prompt_cannot_be_refused(row):
    with pytest.raises(DataError, match="the forget set, row 1: a refusal needs a prompt to answer"):
        load_forget([row], TOKENIZER, ["No."])


@pytest.mark.parametrize("loss", ["npo", "dpo"])
def test_loaded_samples_are_not_loaded_again(loss, tmp_path):
    settings, rows = UnlearningSettings(loss), FORGET[:3]
    pairs = load_pairs(rows, RETAIN, TOKENIZER, settings, max_length=1024)
    again = load_pairs(pairs.forget, pairs.retain, None, settings, max_length=1024)
    assert again.forget is pairs.forget
    assert again.retain is pairs.retain
    results = []
    for forget, retain in ((rows, RETAIN), (pairs.forget, pairs.retain)):
        model = stacked()
        trainer_of(model, tmp_path, forget, retain, settings=settings, max_steps=1).train()
        results.append(trained(model))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_each_set_is_read_once():
    counts = {"forget": 0, "retain": 0}

    class Rows:
        def __init__(self, name, rows):
            self.name, self.rows = name, rows

        def __iter__(self):
            counts[self.name] += 1
            return iter(self.rows)

    run(builders.saved_llama(), Rows("forget", FORGET[:3]), Rows("retain", RETAIN), UnlearningSettings("dpo"),
        num_train_epochs=1)  # fmt: skip
    assert counts == {"forget": 1, "retain": 1}


def test_loaded_samples_without_refusals_are_refused_for_a_loss_that_reads_refusals():
    with pytest.raises(DataError, match="the loss 'dpo' needs a refusal for each sample; expected rows"):
        load_pairs(load_samples(FORGET, TOKENIZER), RETAIN, TOKENIZER, UnlearningSettings("dpo"), max_length=1024)


# From end to end


class Log(TrainerCallback):
    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


class Stop(Exception):
    """On purpose."""


class StopAt(TrainerCallback):
    """Stops the run in the middle of an epoch, after the last save."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop("on purpose")


def run(model, forget=FORGET, retain=RETAIN, settings=None, **options):
    options = {"num_train_epochs": 4, "learning_rate": 5e-3, "per_device_train_batch_size": 4, **options}
    return train_unlearning(model, forget, retain, TOKENIZER, settings, show_progress_bar=False, **options)


def mean_loss(model, rows, adapters):
    return float(losses_of(model, load_samples(rows, TOKENIZER), adapters=adapters).mean())


@pytest.mark.parametrize("start", [None, "forget"])
def test_end_to_end_on_a_4_bit_base(start, tmp_path):
    """From rows to a directory that servers load; the forget loss rises more than the retain loss."""
    model = builders.adapted_nf4_llama()
    before = [mean_loss(model, rows, ["task", *([start] if start else [])]) for rows in (FORGET, RETAIN)]
    with laws.untouched(model):
        config, state_dict, provenance = run(
            model, task_adapter="task", start_adapter=start, output_dir=tmp_path / "out", num_train_epochs=6
        )
    add_adapter(model, config, state_dict, "unlearn")
    after = [mean_loss(model, rows, ["task", "unlearn"]) for rows in (FORGET, RETAIN)]
    assert after[0] - before[0] > 0.5
    assert after[0] - before[0] > after[1] - before[1] + 0.5
    loaded, _ = load_provenance(tmp_path / "out")
    provenance.seconds = {}
    assert loaded == provenance
    assert provenance.start_adapter == (start and {"name": start, "sha256": provenance.start_adapter["sha256"]})
    assert (provenance.training["steps"], provenance.training["epochs"]) == (6, 6)
    assert provenance.figures["conflicting_share"] > 0
    checks = verify_adapter(tmp_path / "out")
    assert all(check.passed for check in checks), checks
    assert "# Unlearning adapter" in (tmp_path / "out" / "README.md").read_text()
    json.dumps(provenance.to_dict())


def test_rmu_moves_the_states_of_the_forget_set_and_trains_no_later_layer(tmp_path):
    model = builders.adapted_nf4_llama()
    settings = UnlearningSettings("rmu", "embed-diff", "pcgrad", beta=2.0, layer=1)
    with laws.untouched(model):
        config, state_dict, provenance = run(model, settings=settings, task_adapter="task", num_train_epochs=15)
    assert provenance.settings["layer"] == 1
    untrained = {name for name, factor in state_dict.items() if ".lora_B." in name and not factor.any()}
    assert untrained == {name for name in state_dict if ".lora_B." in name and ".layers.0." not in name}
    add_adapter(model, config, state_dict, "unlearn")
    moved = []
    for rows in (FORGET, RETAIN):
        batch = padded(load_samples(rows, TOKENIZER), list(range(len(rows))))
        states = []
        for adapters in (["task"], ["task", "unlearn"]):
            with preserved(model, adapters), torch.no_grad():
                states.append(completion_states(model, batch, find_blocks(model)[0])[1])
        moved.append(float((states[1] - states[0]).norm() / states[0].norm()))
    assert moved[0] > 2 * moved[1] > 0


@pytest.mark.parametrize(
    "base", [builders.saved_llama, builders.adapted_saved_llama, builders.nf4_llama], ids=["bare", "adapted", "nf4"]
)
@pytest.mark.parametrize("stops", [False, True])
def test_the_model_is_left_as_it_was(base, stops):
    model = base().train()
    adapted = hasattr(model, "peft_config")
    if adapted:
        model.set_adapter("task")
    options = {"num_train_epochs": 1, "gradient_checkpointing": True, "task_adapter": "task" if adapted else None}
    with laws.untouched(model):
        if stops:
            with pytest.raises(Stop):
                run(model, callbacks=[StopAt(1)], **options)
        else:
            run(model, **options)


def test_experts_are_trained_too(tmp_path):
    model = builders.adapted_mixtral()
    with laws.untouched(model):
        config, state_dict, _ = run(model, lora_config=builders.experts_config(), output_dir=tmp_path / "out")
    assert config.target_parameters
    assert all(value.any() for value in state_dict.values())
    before = mean_loss(model, FORGET, [])
    add_adapter(model, config, state_dict, "unlearn")
    assert mean_loss(model, FORGET, ["unlearn"]) > before + 0.1


def test_an_adapter_starts_as_the_start_adapter_and_can_train_its_unused_directions():
    """A learning rate of 1e-30 changes nothing. In a padded start adapter, some directions are zero in A and in B."""
    model = builders.adapted_saved_llama()
    for name, parameter in model.named_parameters():
        if ".forget." in name:  # the last two of four directions are unused
            (parameter[2:] if "lora_A" in name else parameter[:, 2:]).data.zero_()
    _, unchanged, _ = run(model, start_adapter="forget", learning_rate=1e-30, num_train_epochs=1)
    deltas = laws.deltas_of(unchanged)
    for name, adapted in laws.oracles.adapted_weights(model, "forget").items():
        laws.close(deltas[name], adapted.delta, 1e-6, name)
    with adapter_strength(model, "forget", 0.5):  # the strength on the model counts
        _, halved, _ = run(model, start_adapter="forget", learning_rate=1e-30, num_train_epochs=1)
    for name, delta in laws.deltas_of(halved).items():
        laws.close(delta, deltas[name] / 2, 1e-6, name)
    _, moved, _ = run(model, start_adapter="forget", num_train_epochs=2)
    B = next(value for key, value in moved.items() if ".lora_B." in key)
    assert B[:, 2:4].any()


def test_the_same_seed_trains_the_same_adapter_and_random_states_are_restored():
    state = random.getstate(), torch.get_rng_state()
    first, second, other = (run(builders.saved_llama(), num_train_epochs=1, seed=seed)[1] for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize(
    ("base", "saves"),
    [
        (builders.saved_llama, {}),
        (builders.saved_llama, {"save_strategy": "steps", "save_steps": 1}),
        (builders.adapted_nf4_llama, {}),
    ],
    ids=["float", "float, within an epoch", "nf4"],
)
def test_an_interrupted_run_resumes_bit_for_bit(base, saves, tmp_path):
    """Interrupted in the middle of the third of four epochs, with dropout; by default after the last checkpoint."""

    def options(directory):
        return {
            "lora_config": builders.lora_config(), "checkpoint_dir": tmp_path / directory,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **saves,
        }  # fmt: skip

    expected = run(base(), **options("whole"))
    with pytest.raises(Stop):
        run(base(), callbacks=[StopAt(5)], **options("cut"))
    resumed = run(base(), **options("cut"))
    assert expected.state_dict.keys() == resumed.state_dict.keys()
    assert all(torch.equal(resumed.state_dict[name], value) for name, value in expected.state_dict.items())
    assert resumed.provenance.figures == expected.provenance.figures
    # A run that is resumed at its end reads them from a file whose keys are sorted.
    assert list(expected.provenance.figures) == sorted(expected.provenance.figures)
    with pytest.raises(OutputError, match="another run, which differs in: settings"):
        run(base(), settings=UnlearningSettings(combiner="sum"), **options("cut"))
    other = {**options("cut"), "gradient_accumulation_steps": 1}
    with pytest.raises(OutputError, match="another run, which differs in: global batch, training"):
        run(base(), **other)


# A loss for each way of reading the models: what is left to go wrong between two steps is which adapters are on.
READINGS = {(loss.reads, loss.needs_states): name for name, loss in FORGET_LOSSES.items()}


@pytest.mark.parametrize("loss", READINGS.values())
def test_whatever_a_loss_reads_it_resumes_on_a_4_bit_base_and_leaves_it_as_it_was(loss, tmp_path):
    def options(directory):
        return {
            "settings": with_loss(loss), "task_adapter": "task", "lora_config": builders.lora_config(),
            "checkpoint_dir": tmp_path / directory, "num_train_epochs": 2,
        }  # fmt: skip

    model = builders.adapted_nf4_llama()
    with laws.untouched(model):
        expected = run(model, WITH_PROMPTS, **options("whole"))
        with pytest.raises(Stop):
            run(model, WITH_PROMPTS, callbacks=[StopAt(2)], **options("cut"))
        resumed = run(model, WITH_PROMPTS, **options("cut"))
    assert all(torch.equal(resumed.state_dict[name], value) for name, value in expected.state_dict.items())
    assert any(value.any() for name, value in expected.state_dict.items() if ".lora_B." in name)


@pytest.mark.parametrize(
    "damage",
    {
        "killed while it was written": lambda c: [(c / name).unlink() for name in ("whole.json", "optimizer.pt")],
        "an empty state": lambda c: (c / "trainer_state.json").write_text(""),
        "a damaged optimizer": lambda c: (c / "optimizer.pt").write_bytes(b"x"),
        "altered factors": lambda c: scale_factors(next(c.rglob("adapter_model.safetensors"))),
        "an empty mark": lambda c: (c / "whole.json").write_text(""),
        "a stray directory": lambda c: (c.parent / "checkpoint-best").mkdir(),
        "a file of that name": lambda c: (c.parent / "checkpoint-9").write_text(""),
    }.items(),
    ids=lambda case: case[0],
)
def test_the_newest_whole_checkpoint_is_taken(damage, tmp_path):
    options = {"checkpoint_dir": tmp_path / "c", "num_train_epochs": 2}
    expected = run(builders.saved_llama(), **options).state_dict
    damage[1](tmp_path / "c" / "checkpoint-2")
    resumed = run(builders.saved_llama(), **options).state_dict
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def scale_factors(file):
    save_file({name: 100 * factor for name, factor in load_file(file).items()}, file, {"format": "pt"})


# Training to a target


class Watch(TrainerCallback):
    """The mean losses of the forget and the retain rows after each step, as one would measure them."""

    def __init__(self, model):
        self.model, self.losses = model, []

    def on_step_end(self, args, state, control, **kwargs):
        means = [float(losses_of(self.model, load_samples(rows, TOKENIZER)).mean()) for rows in (FORGET, RETAIN)]
        self.losses.append(means)


def to_target(model, target, steps=1, **options):
    settings = UnlearningSettings("gradient-ascent", combiner="sum", target_forget_loss=target)
    options = options | evaluation_arguments(steps)
    options = {"lr_scheduler_type": "constant", "num_train_epochs": 8, "task_adapter": "task", **options}
    return run(model, settings=settings, **options)


@pytest.mark.parametrize("every", [1, 3])
def test_training_stops_at_the_first_check_that_meets_the_target(every):
    model = builders.adapted_nf4_llama()
    watch = Watch(model)
    with laws.untouched(model):
        to_target(model, None, None, callbacks=[watch])
    assert watch.losses[0][0] < watch.losses[-1][0]
    target = watch.losses[3][0] - 0.01
    expected = next(step for step in range(every, 9, every) if watch.losses[step - 1][0] >= target)
    with laws.untouched(model):
        _, state_dict, provenance = to_target(model, target, every)
        _, whole, _ = to_target(model, None, None, num_train_epochs=expected)
    assert provenance.training["steps"] == expected
    assert all(torch.equal(state_dict[name], value) for name, value in whole.items())
    start = {"step": 0, "forget": mean_loss(model, FORGET, ["task"]), "retain": mean_loss(model, RETAIN, ["task"])}
    path = [{"step": s, "forget": watch.losses[s - 1][0], "retain": watch.losses[s - 1][1]}
            for s in range(every, expected + 1, every)]  # fmt: skip
    for point, of_oracle in zip(provenance.checks, [start, *path], strict=True):
        assert point == pytest.approx(of_oracle, abs=1e-5)
    assert f"for the target {target:.3f}" in str(provenance)
    assert "NOT reached" not in str(provenance)
    assert any(f"for the target {target:.3f}" in line for line in provenance.card_section())


def test_a_target_that_is_not_met_is_told_after_a_check_of_the_last_step():
    _, _, provenance = to_target(builders.adapted_saved_llama(), 99.0, 3, num_train_epochs=4)
    assert [point["step"] for point in provenance.checks] == [0, 3, 4]
    assert "the target was NOT reached: train longer" in str(provenance)


def test_by_default_there_are_four_checks_an_epoch():
    settings = UnlearningSettings(target_forget_loss=99.0)
    forget = [{"prompt": f"Number {n} ", "completion": str(n)} for n in range(8)]
    _, _, provenance = run(
        builders.saved_llama(), forget, settings=settings, per_device_train_batch_size=1, num_train_epochs=2
    )
    assert [point["step"] for point in provenance.checks] == list(range(0, 17, 2))


def test_a_target_that_is_met_already_is_refused_and_nothing_is_written(tmp_path):
    model = builders.adapted_saved_llama()
    places = {"output_dir": tmp_path / "output", "checkpoint_dir": tmp_path / "checkpoint"}
    with laws.untouched(model), pytest.raises(NumericalError, match=r"above the target 0\.010: there is nothing"):
        to_target(model, 0.01, **places)
    assert not list(tmp_path.iterdir())


class StopAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        raise Stop("on purpose")


@pytest.mark.parametrize("saves", [{}, {"save_strategy": "steps", "save_steps": 1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("stop", [StopAt(2), StopAtTheEnd()], ids=["before", "there"])
def test_a_run_that_is_cut_before_its_target_or_there_resumes_bit_for_bit(stop, saves, tmp_path):
    """The retain weight of the budget and the path go on, too."""
    settings = UnlearningSettings("gradient-ascent", target_forget_loss=6.19, retain_budget=3.3)

    def to_the_target(directory, *callbacks):
        return run(
            builders.adapted_saved_llama(), settings=settings, task_adapter="task", num_train_epochs=9,
            learning_rate=2e-3, callbacks=callbacks, checkpoint_dir=tmp_path / directory, **evaluation_arguments(1),
            **saves,
        )  # fmt: skip

    expected = to_the_target("whole")
    assert 3 < expected.provenance.training["steps"] < 9
    with pytest.raises(Stop):
        to_the_target("cut", stop)
    resumed = to_the_target("cut")
    assert all(torch.equal(resumed.state_dict[name], value) for name, value in expected.state_dict.items())
    for field in ("checks", "figures", "training"):
        assert getattr(resumed.provenance, field) == getattr(expected.provenance, field)


# The command


@pytest.fixture
def place(tmp_path):
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    builders.adapted_saved_llama().save_pretrained(tmp_path)
    return tmp_path


def command(place, *more):
    model, rows = str(builders.llama_directory()), [str(place / f"{name}.jsonl") for name in ("forget", "retain")]
    fixed = ["--model", model, "--forget", rows[0], "--retain", rows[1], "--output", str(place / "out")]
    train.run(command_parser("train").parse_args([*fixed, "--epochs", "2", *more]))


def test_the_command_trains_and_says_what_comes_next(place, capsys):
    command(place, "--task-adapter", str(place / "task"), "--start-adapter", str(place / "forget"),
            "--forget-loss", "simnpo", "--beta", "2", "--combiner", "sago", "--batch-size", "2",
            "--accumulation-steps", "2")  # fmt: skip
    said = capsys.readouterr().out
    assert "trained from 'start' by simnpo and nll, combined by sago, in 2 steps on 4 forget, 4 retain samples" in said
    assert f"Next: peft-perta verify {place / 'out'} --base" in said
    assert not (place / "out.checkpoint").exists()
    provenance, _ = load_provenance(place / "out")
    assert provenance.task_adapter == "task"
    assert provenance.settings["beta"] == 2.0
    assert all(check.passed for check in verify_adapter(place / "out"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected 1 to 10000"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number > 0"),
        (["--rank", "8", "--start-adapter", "x"], "--rank: expected none with --start-adapter"),
        (["--margin", "1"], "'npo' has no margin"),
        (["--start-adapter", "nowhere"], "nowhere is not an adapter directory"),
    ],
)
def test_the_command_refuses(more, message, place):
    with pytest.raises((ConfigError, AdapterError), match=message):
        command(place, *more)


# Several processes


def steps_of_losses(directory, batch_size):
    """The gradients and the trained factors of one step of each forget loss, and of three of NPO, without an attacker
    and with one, over 4 rows."""
    results = {}
    each = {loss: with_loss(loss) for loss in FORGET_LOSSES} | {"attacked": UnlearningSettings(relearning_steps=2)}
    for loss, settings in each.items():
        model, seen = stacked(), Gradients()
        trainer_of(
            model, directory, [*WITH_PROMPTS, {"prompt": "His name ", "completion": "is Ned"}],
            settings=settings, callbacks=[seen], max_steps=3 if loss in ("npo", "attacked") else 1,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=2,
        ).train()  # fmt: skip
        results[loss] = [*seen.steps, trained(model)]
    settings = UnlearningSettings("gradient-ascent", target_forget_loss=7.0, retain_budget=0.1)
    trainer = trainer_of(
        model, directory, settings=settings, num_train_epochs=20, learning_rate=5e-3, lr_scheduler_type="constant",
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=2, **evaluation_arguments(2),
    )  # fmt: skip
    trainer.train()
    path = torch.tensor([list(map(float, point.values())) for point in trainer.evaluations.points])
    results["to a target"] = [{"path": path, "retain weight": torch.tensor(trainer._retain_weight)}, trained(model)]
    return results


def one_of_two(rank, port, path):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    distributed.start()
    torch.save(steps_of_losses(path / f"scratch {rank}", 1), path / f"result {rank}")
    builders._scratch.cleanup()
    distributed.finish()


def test_two_processes_train_as_one(tmp_path):
    whole = steps_of_losses(tmp_path / "scratch", 2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_perta.cli.train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [context.Process(target=one_of_two, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for child in both:
        child.start()
    for child in both:
        child.join(100)
    assert [child.exitcode for child in both] == [0, 0]
    for rank in (0, 1):
        split = torch.load(tmp_path / f"result {rank}", weights_only=False)
        for loss, expected in whole.items():
            assert len(split[loss]) == len(expected) == (4 if loss in ("npo", "attacked") else 2)
            for step, of_whole in zip(split[loss], expected, strict=True):
                close({name.removeprefix("module."): g for name, g in step.items()}, of_whole, 1e-6)


# Refused


@pytest.fixture
def _no_training(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("bad input must be refused before training")

    monkeypatch.setattr(UnlearningTrainer, "training_step", fail)


BAD = {
    "the same set": ({"retain": FORGET[::-1]}, DataError, "every row of the retain set is in the forget set"),
    "a part of it": ({"retain": FORGET[:2]}, DataError, "every row of the retain set is in the forget set"),
    "a shared row": ({"retain": [*RETAIN, FORGET[1]]}, DataError, "row 5 of the retain set is also in the forget set"),
    "no rows": ({"retain": []}, DataError, "the retain set is empty"),
    "no answer": ({"forget": [{"prompt": "x", "completion": ""}]}, DataError, "the forget set, row 1"),
    "the best": (
        {"load_best_model_at_end": True, "save_strategy": "no", "eval_strategy": "no"}, ConfigError,
        "load_best_model_at_end=True is not supported",
    ),
    "a held-out row": ({"held_out": [*HELD_OUT, RETAIN[1]]}, DataError, "row 4 of the held-out set is also in the ret"),
    "held-out forget rows": ({"held_out": FORGET}, DataError, "every row of the held-out set is in the forget set"),
    "smoothing": ({"label_smoothing_factor": 0.1}, ConfigError, "label_smoothing_factor=0.1 is not supported"),
    "unknown": ({"learning_rat": 1}, ConfigError, "learning_rat.*expected fields of transformers.TrainingArguments"),
    "ours": ({"output_dir": None, "disable_tqdm": True}, ConfigError, "'disable_tqdm' is set by train_unlearning"),
    "one step of warm-up": (
        {"num_train_epochs": 1, "per_device_train_batch_size": 8, "warmup_steps": 2}, ConfigError,
        "warmup_steps: expected 0 where training is a single step, found 2",
    ),
    "dtype": ({"dtype": "int8"}, ConfigError, "dtype: expected one of"),
    "no task": ({"task_adapter": "tusk"}, AdapterError, "no adapter named 'tusk'"),
    "one name": ({"task_adapter": "task", "start_adapter": "task"}, AdapterError, "are both 'task'"),
    "two starts": (
        {"start_adapter": "task", "lora_config": builders.lora_config()}, ConfigError, "lora_config: expected None",
    ),
    "no such layer": (
        {"settings": UnlearningSettings("rmu", layer=9)}, ConfigError,
        "layer: expected at most 2, the model's number of blocks, found 9",
    ),
    "before its factors": (
        {"settings": UnlearningSettings("rmu", layer=1), "lora_config": builders.lora_config(layers_to_transform=[1])},
        ConfigError, "layer: expected a block whose output depends on the adapter in training, found 1",
    ),
    "the origin is the full model": (
        {"settings": UnlearningSettings("origin-kl")}, ConfigError,
        "forget_loss 'origin-kl': expected a task adapter that taught the forget rows",
    ),
    "DoRA": ({"lora_config": builders.lora_config(use_dora=True)}, AdapterError, "LoRA variant .use_dora"),
    "too wide": ({"lora_config": builders.lora_config(r=300)}, ConfigError, "would need rank 300"),
    "embedding": ({"lora_config": builders.lora_config(["embed_tokens"])}, UnsupportedLayerError, "Embedding layer"),
}  # fmt: skip


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_training(options, error, message, tmp_path):
    """Neither an output nor a checkpoint is left."""
    model = builders.adapted_saved_llama()
    places = {"output_dir": tmp_path / "output", "checkpoint_dir": tmp_path / "checkpoint"}
    with laws.untouched(model), pytest.raises(error, match=message):
        run(model, **{**places, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_training")
def test_an_output_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "mine").write_text("x")
    for name in ("output_dir", "checkpoint_dir"):
        with pytest.raises(OutputError, match=r"not written by peft_perta|not a checkpoint of this package"):
            run(builders.saved_llama(), **{name: tmp_path})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"forget_loss": "npoo"}, r"forget_loss: expected one of \['gradient-ascent', 'npo'"),
        ({"retain_loss": None}, r"retain_loss: expected one of \['nll', 'kl', 'embed-diff'\], found None"),
        ({"combiner": "mean"}, "combiner: expected one of .*'sago'"),
        ({"forget_weight": 0}, "forget_weight: expected a number > 0, found 0"),
        ({"retain_weight": math.nan}, "retain_weight: expected a number > 0, found nan"),
        ({"beta": -1.0}, "beta: expected a number > 0"),
        ({"forget_loss": "gradient-ascent", "beta": 1.0}, "'gradient-ascent' has no beta"),
        ({"margin": 1.0}, "'npo' has no margin"),
        ({"forget_loss": "simnpo", "margin": math.inf}, "margin: expected a number, found inf"),
        ({"retain_budget": -0.1}, "retain_budget: expected a number >= 0, found -0.1"),
        ({"target_forget_loss": 0}, "target_forget_loss: expected a number > 0, found 0"),
        ({"retain_tolerance": math.nan}, "retain_tolerance: expected a number > 0, found nan"),
        ({"layer": 1}, "layer: expected None, since neither loss reads hidden states"),
        ({"forget_loss": "rmu", "layer": 0}, "layer: expected an integer from 1, found 0"),
        ({"forget_loss": "rmu", "layer": 1.0}, "layer: expected an integer from 1"),
        ({"refusals": ["No."]}, "refusals: expected None, since 'npo' uses no refusals"),
        ({"forget_loss": "dpo", "refusals": []}, "refusals: expected a list of one or more texts, found"),
        ({"forget_loss": "dpo", "refusals": "No."}, "refusals: expected a list of one or more texts"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        UnlearningSettings(**values)


def test_the_trainer_expects_one_adapter_that_requires_gradients(tmp_path):
    for change, message in (
        (lambda m: m.requires_grad_(False), "found none"),
        (lambda m: next(p for n, p in m.named_parameters() if ".task." in n).requires_grad_(True), "'forget', 'task'"),
        (lambda m: m.get_input_embeddings().weight.requires_grad_(True), "embed_tokens.weight requires gradients"),
        (lambda m: switch_modules(m.modules(), ["task"]), "found none"),
    ):
        model = stacked(torch.float32)
        change(model)
        with pytest.raises(AdapterError, match=message):
            trainer_of(model, tmp_path)
    with pytest.raises(AdapterError, match="expected a PeftModel with a LoRA adapter to train, found a Llama"):
        trainer_of(builders.llama(), tmp_path)


@pytest.mark.parametrize("combiner", ["sum", "sago"])
def test_a_non_finite_loss_is_refused_by_name(combiner):
    model = builders.saved_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER("~")["input_ids"][0]] = torch.nan
    with (
        laws.untouched(model),
        pytest.raises(NumericalError, match=r"step 1: the retain loss is nan; lower the learning rate"),
    ):
        run(model, retain=[*RETAIN, {"text": "~"}], settings=UnlearningSettings(combiner=combiner),
            per_device_train_batch_size=8)  # fmt: skip
