"""The attacker in training: it relearns as the relearning attack does, and the forget gradient is taken with it on."""

import functools

import builders
import laws
import pytest
import torch
from peft import LoraConfig
from test_unlearning_trainer import (
    FORGET,
    RETAIN,
    TOKENIZER,
    WITH_PROMPTS,
    Gradients,
    Stop,
    StopAt,
    close,
    run,
    stacked,
    trained,
    trainer_of,
)
from transformers import TrainerCallback

from peft_perta import AdapterError, ConfigError
from peft_perta.data import load_samples, padded
from peft_perta.evaluation import AttackSettings, Subject
from peft_perta.evaluation.attacks.relearning import RANK, Lesson, fresh_adapter, relearn
from peft_perta.model import sample_losses
from peft_perta.training import UnlearningSettings
from peft_perta.training._relearner import LEARNING_RATE, RELEARNER_NAME

ASCENT = functools.partial(UnlearningSettings, "gradient-ascent", combiner="sum")


class Attacker(TrainerCallback):
    """A copy of the attacker's factors at each step, and its losses."""

    def __init__(self):
        self.factors, self.losses = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        relearner = self.trainer._relearner
        self.factors.append([factor.detach().clone() for factor in relearner._factors] if relearner._optimizer else [])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "relearner_loss" in logs:
            self.losses.append(logs["relearner_loss"])


def attacked(directory, callbacks=(), forget=FORGET, **options):
    """A run with an attacker. Returns the model, the gradients, and the attacker."""
    model, seen, attacker = stacked(), Gradients(), Attacker()
    trainer = trainer_of(model, directory, forget, callbacks=[seen, attacker, *callbacks], **options)
    attacker.trainer = trainer
    trainer.train()
    return model, seen.steps, attacker


def test_an_attacker_of_one_step_is_none(tmp_path):
    """It begins with B = 0 at every step."""
    plain, seen = stacked(), Gradients()
    trainer_of(plain, tmp_path, settings=UnlearningSettings(), callbacks=[seen], max_steps=3).train()
    model, steps, _ = attacked(tmp_path, settings=UnlearningSettings(relearning_steps=1), max_steps=3)
    for found, expected in zip(steps, seen.steps, strict=True):
        close(found, expected, 1e-12)
    close(trained(model), trained(plain), 1e-12)


def test_it_relearns_as_the_attack_does(tmp_path):
    """Against an adapter that does not move, its losses are those of the relearning attack after as many steps."""
    model, _, attacker = attacked(
        tmp_path, settings=UnlearningSettings(relearning_steps=3), max_steps=4, learning_rate=0.0
    )
    settings = AttackSettings(relearning_steps=(1, 2), learning_rate=LEARNING_RATE, seed=42)
    subject = Subject(model, TOKENIZER, ["task", "forget"], show_progress_bar=False)
    found = relearn(fresh_adapter, Lesson(FORGET, FORGET, "these rows"), settings, subject, "oracle")
    losses = [measured.numbers["loss"] for measured in found.values()]
    assert attacker.losses == pytest.approx([*losses, losses[0]], abs=1e-9)
    assert losses[2] < losses[1] < losses[0]


def test_the_forget_gradient_is_of_the_model_with_the_attacker_on(tmp_path):
    """Against PEFT's own third adapter, with the attacker's factors."""
    _, steps, attacker = attacked(tmp_path, settings=ASCENT(relearning_steps=4), max_steps=1 + 1, learning_rate=0.0)
    factors = attacker.factors[1]
    oracle = stacked()
    parameters = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    gradients = {}
    for rows, sign, is_attacked in ((RETAIN, 1, False), (FORGET, -1, True)):
        if is_attacked:
            config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            oracle.add_adapter("attacker", config)
            adapted = [module for module in oracle.modules() if "attacker" in getattr(module, "lora_A", {})]
            for module, A, B in zip(adapted, factors[::2], factors[1::2], strict=True):
                module.lora_A["attacker"].weight.data = A.clone()
                module.lora_B["attacker"].weight.data = B.clone()
                module.set_adapter(["task", "forget", "attacker"])
        for parameter in parameters.values():
            parameter.requires_grad_()
        samples = load_samples(rows, TOKENIZER)
        total = sign * sum(sample_losses(oracle, padded([sample], [0])).sum() for sample in samples) / len(samples)
        of_set = torch.autograd.grad(total, list(parameters.values()))
        for name, gradient in zip(parameters, of_set, strict=True):
            gradients[name] = gradients.get(name, 0.0) + gradient
    clipped = {name: steps[1][name] for name in gradients}
    scale = min(1.0, 1.0 / (sum(float(g.square().sum()) for g in gradients.values()) ** 0.5 + 1e-6))
    close(clipped, {name: scale * gradient for name, gradient in gradients.items()}, 1e-8)
    assert any(not torch.allclose(steps[0][name], steps[1][name], atol=1e-6) for name in gradients)


def test_accumulated_micro_batches_are_one_big_batch(tmp_path):
    results = []
    for size in (4, 1):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        model, _, attacker = attacked(
            tmp_path, forget=WITH_PROMPTS, settings=UnlearningSettings(relearning_steps=2), max_steps=3, **arguments
        )
        results.append((trained(model), attacker.losses))
    close(results[0][0], results[1][0], 1e-8)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant, tmp_path):
    results = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model, _, _ = attacked(tmp_path, settings=UnlearningSettings(relearning_steps=3), max_steps=3, **options)
        results.append(trained(model))
    close(*results, 1e-9)


@pytest.mark.parametrize("base", [builders.saved_llama, builders.adapted_nf4_llama], ids=["float", "nf4"])
def test_a_run_that_is_cut_within_an_attack_resumes_bit_for_bit(base, tmp_path):
    def options(directory):
        return {
            "lora_config": builders.lora_config(), "checkpoint_dir": tmp_path / directory, "save_strategy": "steps",
            "save_steps": 1, "per_device_train_batch_size": 2, "settings": UnlearningSettings(relearning_steps=3),
        }  # fmt: skip

    model = base()
    with laws.untouched(model):
        expected = run(model, **options("whole"))
        with pytest.raises(Stop):
            run(model, callbacks=[StopAt(5)], **options("cut"))
        resumed = run(model, **options("cut"))
    assert all(torch.equal(resumed.state_dict[name], value) for name, value in expected.state_dict.items())
    without = run(model, **{**options("without"), "settings": UnlearningSettings()})
    assert any(not torch.equal(without.state_dict[name], value) for name, value in expected.state_dict.items())


def test_a_checkpoint_without_the_attacker_is_refused(tmp_path):
    settings = UnlearningSettings(relearning_steps=3)
    attacked(tmp_path, settings=settings, max_steps=2, save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-1" / RELEARNER_NAME).unlink()
    with pytest.raises(AdapterError, match=r"holds no relearner\.pt of adapter 'forget'"):
        trainer_of(stacked(), tmp_path, settings=settings, max_steps=2).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_a_number_of_steps_that_cannot_be_meant(steps):
    with pytest.raises(ConfigError, match="relearning_steps: expected an integer from 1"):
        UnlearningSettings(relearning_steps=steps)
