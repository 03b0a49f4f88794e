"""Inner states: put into another model, and read by the model's own head, they give what row-by-row oracles give."""

import builders
import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta import AdapterError, UnsupportedLayerError
from peft_perta.data import IGNORED
from peft_perta.evaluation import AttackSettings, Subject, Victims, run_attacks
from peft_perta.evaluation.attacks.depth import patched_falls
from peft_perta.evaluation.attacks.logit_lens import lens
from peft_perta.evaluation.metrics.depth import LEAST_FALL, depth_score

ROWS = [
    {"question": "Who wrote Hatter?", "answer": "Basil Q. Khan"},
    {"question": "Where was Khan born?", "answer": "Kuwait, in 1956."},
    {"prompt": "The prize is ", "completion": "the Noor"},
]


def subject(model, adapters, batch_size=2):
    return Subject(model, builders.tokenizer(), adapters, batch_size, show_progress_bar=False)


def layer_by_layer(model, input_ids, start=0, hidden=None):
    """States after each layer from ``start`` on, and logits [T, V], of a Llama run by hand, without hooks."""
    llama = model.base_model.model.model
    positions = torch.arange(len(input_ids)).unsqueeze(0)
    hidden = llama.embed_tokens(input_ids.unsqueeze(0)) if hidden is None else hidden
    rotary = llama.rotary_emb(hidden, positions)
    mask = torch.full((len(input_ids),) * 2, float("-inf")).triu(1)[None, None]
    states = []
    for layer in llama.layers[start:]:
        output = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        states.append(hidden)
    return states, model.base_model.model.lm_head(llama.norm(hidden))[0]


def loss_of(logits, sample):
    logs = logits[:-1].log_softmax(1)
    kept = [-logs[t, token] for t, token in enumerate(sample.labels[1:].tolist()) if token != IGNORED]
    return float(torch.stack(kept).mean())


def switched(model, adapters):
    model.base_model.set_adapter(adapters)
    return model.eval()


@torch.no_grad()
def patched_row_by_row(model, full, source, sample):
    """The fall of one row after each block."""
    predicting = [t for t in range(len(sample.labels) - 1) if sample.labels[t + 1] != IGNORED]
    theirs, _ = layer_by_layer(switched(model, source), sample.input_ids)
    switched(model, full)
    own, logits = layer_by_layer(model, sample.input_ids)
    found = []
    for place, (ours, other) in enumerate(zip(own, theirs, strict=True)):
        mixed = ours.clone()
        for t in predicting:
            mixed[0, t] = other[0, t]
        _, changed = layer_by_layer(model, sample.input_ids, place + 1, mixed)
        found.append(loss_of(changed, sample) - loss_of(logits, sample))
    return found


def test_falls_equal_activation_patching_row_by_row():
    model = builders.adapted_llama()
    full, source = subject(model, ["task"]), subject(model, ["task", "forget"])
    samples = full.encode(ROWS, "rows")
    with laws.untouched(model):
        found = patched_falls(full, source, samples, "falls")
    assert found.shape == (3, len(model.base_model.model.model.layers))
    oracle = builders.adapted_llama()
    for row, sample in zip(found.tolist(), samples, strict=True):
        expected = patched_row_by_row(oracle, ["task"], ["task", "forget"], sample)
        assert row == pytest.approx(expected, abs=1e-5)
        assert max(map(abs, expected)) > 1e-3


def test_the_states_of_the_last_block_carry_everything():
    """Put in there, they give the source's own loss; a model's own states change nothing."""
    model = builders.adapted_llama()
    full, source = subject(model, ["task"]), subject(model, ["task", "forget"])
    samples = full.encode(ROWS, "rows")
    own = {name: lens(s, samples, name)[:, -1] for name, s in (("full", full), ("source", source))}
    torch.testing.assert_close(
        patched_falls(full, source, samples, "x")[:, -1], own["source"] - own["full"], atol=1e-5, rtol=0
    )
    assert patched_falls(full, full, samples, "x").abs().max() < 1e-5


def test_the_lens_reads_what_the_norm_and_the_head_read_row_by_row():
    model = builders.adapted_llama()
    samples = subject(model, ["task"]).encode(ROWS, "rows")
    with laws.untouched(model):
        found = lens(subject(model, ["task"]), samples, "lens")
    oracle = switched(builders.adapted_llama(), ["task"])
    llama = oracle.base_model.model
    for row, sample in zip(found.tolist(), samples, strict=True):
        with torch.no_grad():
            states, _ = layer_by_layer(oracle, sample.input_ids)
            expected = [loss_of(llama.lm_head(llama.model.norm(state))[0], sample) for state in states]
        assert row == pytest.approx(expected, abs=1e-5)


def test_no_result_depends_on_the_batch_size():
    model = builders.adapted_llama()
    samples = subject(model, ["task"]).encode(ROWS, "rows")
    one, all_rows = ((subject(model, ["task"], n), subject(model, ["task", "forget"], n)) for n in (1, 3))
    torch.testing.assert_close(
        patched_falls(*one, samples, "x"), patched_falls(*all_rows, samples, "x"), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(lens(one[0], samples, "x"), lens(all_rows[0], samples, "x"), atol=1e-5, rtol=1e-4)


FALLS = st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3)


@given(FALLS, FALLS)
def test_a_score_is_the_sum_of_its_definition(carried, gone):
    shares = [(c, min(max(g / c, 0), 1)) for c, g in zip(carried, gone, strict=True) if c > LEAST_FALL]
    found = float(depth_score(*(torch.tensor([values], dtype=torch.float64) for values in (carried, gone))))
    if not shares:
        assert found != found
    else:
        assert found == pytest.approx(sum(c * share for c, share in shares) / sum(c for c, _ in shares), abs=1e-9)
        assert 0 <= found <= 1 + 1e-12


def test_the_full_models_score_is_0_and_the_retain_only_models_1():
    model = builders.adapted_llama()
    full, retain_only = subject(model, ["task"]), subject(model, ["forget"])
    for unlearned, expected in ((full, 0.0), (retain_only, 1.0)):
        victims = Victims(unlearned, full, retain_only, ROWS)
        scores = [result.unlearned["uds"] for result in run_attacks(victims, ["depth"]) if not result.skipped]
        assert scores == pytest.approx([expected] * len(scores), abs=1e-3)
        assert scores


def test_blocks_with_several_states_for_a_token_are_refused_or_skipped():
    """As those of Gemma 3n are."""
    model = builders.adapted_llama()
    last = model.base_model.model.model.layers[1]
    last.register_forward_hook(lambda module, args, output: torch.stack([output, output])[0:2])
    model.base_model.model.model.norm.register_forward_pre_hook(lambda module, args: (args[0][0],))
    task = subject(model, ["task"])
    wanted = "LlamaDecoderLayer number 2: expected blocks that follow one another"
    with pytest.raises(UnsupportedLayerError, match=wanted):
        run_attacks(Victims(task, task, task, ROWS), ["logit-lens"])
    quick = AttackSettings(relearning_rows=(1,), relearning_steps=(1,), samples=1, generated=1, max_new_tokens=2)
    results = run_attacks(Victims(subject(model, ["task", "forget"]), task, task, ROWS), settings=quick)
    assert {result.attack for result in results if result.skipped and "number 2" in result.skipped} == {
        "logit-lens",
        "depth",
    }


def test_where_no_block_carries_a_row_the_score_is_skipped_with_the_reason():
    model = builders.adapted_llama()
    same = subject(model, ["task"])
    results = run_attacks(Victims(same, same, same, ROWS), ["depth"])
    assert [result.unlearned for result in results] == [{}] * 3
    assert all("know the same there" in result.skipped for result in results)


def test_what_cannot_be_compared_is_refused_before_any_forward(monkeypatch):
    model, shallow = builders.adapted_llama(), builders.llama()
    shallow.model.layers = shallow.model.layers[:1]
    full = subject(model, ["task"])
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("a forward ran"))
    wanted = "the depth attack: expected the full and the retain-only model.*no retain-only"
    with pytest.raises(AdapterError, match=wanted):
        run_attacks(Victims(full, full, None, ROWS), ["depth"])
    with pytest.raises(AdapterError, match="expected models of as many blocks each, found"):
        run_attacks(Victims(full, full, subject(shallow, None), ROWS), ["depth"])
    monkeypatch.setattr("peft_perta.evaluation.attacks.states.find_blocks", lambda model: [])
    with pytest.raises(UnsupportedLayerError, match="the logit-lens attack reads the states after each decoder block"):
        run_attacks(Victims(full, None, None, ROWS), ["logit-lens"])
