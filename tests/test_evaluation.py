"""Losses, generations and scores equal those of a loop over single rows; the model is left as it was."""

import json

import builders
import laws
import oracles
import pytest
import torch
from transformers import WatermarkingConfig

from peft_perta import DataError
from peft_perta.data import encode_prompt, encode_row, load_samples
from peft_perta.evaluation import SplitScores, Subject, evaluate_split, generate, losses_of
from peft_perta.evaluation.completions import forward_batches
from peft_perta.evaluation.metrics.rouge import rouge_l_recall
from peft_perta.evaluation.metrics.truth_ratio import forget_truth_score, retain_truth_score, truth_ratio

STACKS = [[], ["forget"], ["task"], ["task", "forget"]]
ROWS = [
    {
        "question": "Who wrote Hatter?",
        "answer": "Basil Q. Khan",
        "paraphrased_answer": "Hatter is by Khan",
        "perturbed_answer": ["Jo Nesbit", "Hatter is by Li", "Ada"],
    },
    {"question": "Is it?", "answer": "Yes", "perturbed_answer": ["No"]},
    {"question": "Where was he born, and when?", "answer": "Kuwait, in 1956."},
]


def oracle_losses(model, rows, adapters):
    plain, _ = oracles.plain_model(model, adapters)
    samples = [encode_row(row, builders.tokenizer()) for row in rows]
    with torch.no_grad():
        return torch.stack([oracles.sample_loss(plain, s.input_ids, s.labels) for s in samples]).float()


def oracle_texts(model, tokens, rows, max_new_tokens):
    """``model.generate`` of each row alone and unpadded, with whichever adapters are on."""
    texts = []
    for row in rows:
        prompt = torch.tensor([encode_prompt(row, tokens)])
        with torch.no_grad():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokens.eos_token_id,
                pad_token_id=tokens.pad_token_id,
            )
        texts.append(tokens.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    return texts


# Losses


@pytest.mark.parametrize("adapters", STACKS)
def test_losses_are_those_of_the_loop_with_exactly_these_adapters(adapters):
    model = builders.adapted_llama()
    found = losses_of(
        model, load_samples(builders.forget_rows(), builders.tokenizer()), adapters=adapters, batch_size=2
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, oracle_losses(model, builders.forget_rows(), adapters), rtol=1e-5, atol=1e-6)


def test_every_stack_of_adapters_is_another_model():
    model = builders.adapted_llama()
    found = [
        losses_of(model, load_samples(builders.forget_rows(), builders.tokenizer()), adapters=stack) for stack in STACKS
    ]
    for i, losses in enumerate(found):
        for other in found[:i]:
            assert (losses - other).abs().min() > 1e-4


def test_without_a_word_on_adapters_those_that_are_on_count():
    model = builders.adapted_llama()
    losses = {
        stack[0]: losses_of(model, load_samples(ROWS, builders.tokenizer()), adapters=stack)
        for stack in (["task"], ["forget"])
    }
    for name in ("task", "forget"):
        model.set_adapter(name)
        assert torch.equal(losses_of(model, load_samples(ROWS, builders.tokenizer())), losses[name])


def test_a_model_without_adapters_is_judged_too():
    model = builders.llama()
    expected = oracle_losses(builders.adapted_llama(), ROWS, [])
    torch.testing.assert_close(
        losses_of(model, load_samples(ROWS, builders.tokenizer())), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("threads", "batch_size", "expected"), [(1, 32, [4, 4, 2]), (2, 32, [8, 2]), (2, 3, [3, 3, 3, 1])]
)
def test_a_pass_on_a_cpu_has_at_most_four_rows_a_thread(threads, batch_size, expected, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    samples = load_samples([{"text": f"row {number}"} for number in range(10)], builders.tokenizer())
    sizes = []

    def compute(batch):
        sizes.append(len(batch.indices))
        return batch.indices

    found = forward_batches(builders.llama(), samples, compute, batch_size=batch_size)
    assert sizes == expected
    assert found == list(range(10))


@pytest.mark.parametrize("batch_size", [2, 3, 32])
def test_losses_do_not_depend_on_the_batch_size(batch_size):
    model = builders.adapted_llama(torch.float64)
    one = losses_of(model, load_samples(builders.forget_rows(), builders.tokenizer()), batch_size=1)
    found = losses_of(model, load_samples(builders.forget_rows(), builders.tokenizer()), batch_size=batch_size)
    torch.testing.assert_close(found, one, rtol=1e-6, atol=0)


def test_losses_follow_the_order_of_the_rows():
    """Batches are sorted by length; results keep the order of the rows."""
    model, rows = builders.adapted_llama(torch.float64), builders.forget_rows()
    order = [3, 0, 4, 2, 1]
    found = losses_of(model, load_samples([rows[i] for i in order], builders.tokenizer()), batch_size=2)
    expected = losses_of(model, load_samples(rows, builders.tokenizer()), batch_size=2)[order]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert len(set(expected.tolist())) == len(rows)


def test_a_4_bit_model_is_judged_without_touching_its_packed_weights():
    """bitsandbytes repacks a Linear4bit for inference on the CPU, in eval mode under no_grad."""
    model = builders.adapted_nf4_llama()
    with laws.untouched(model):
        found = losses_of(
            model, load_samples(builders.forget_rows(), builders.tokenizer()), adapters=["task"], batch_size=2
        )
        scores = evaluate_split(
            Subject(model, builders.tokenizer(), ["task"]), ROWS, is_forget=True, generated=2, max_new_tokens=3
        )
    expected = oracle_losses(model, builders.forget_rows(), ["task"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert scores.loss == pytest.approx(float(oracle_losses(model, ROWS, ["task"]).mean()), rel=1e-3)


# Generation


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_generation_is_that_of_each_row_alone(batch_size):
    """Left padding and batching change nothing, and answers keep the order of their rows."""
    model, tokens = builders.adapted_llama(torch.float64), builders.tokenizer()
    rows = [row for row in builders.forget_rows() if "text" not in row] + ROWS
    expected = oracle_texts(model, tokens, rows, 8)
    assert len(set(expected)) > 2, "a model that always says the same proves no order"
    assert generate(Subject(model, tokens, batch_size=batch_size), rows, max_new_tokens=8) == expected


def test_generation_ends_at_the_eos():
    """One row stops early while others go on: the padding after it is not part of its answer."""
    model, tokens = builders.adapted_llama(torch.float64), builders.tokenizer()
    whole = oracle_texts(model, tokens, ROWS, 8)
    stop = next(character for character in whole[0][2:] if character not in whole[0][:2])
    tokens.add_special_tokens({"eos_token": stop})
    expected = oracle_texts(model, tokens, ROWS, 8)
    assert expected[0] == whole[0][: whole[0].index(stop)].strip()
    assert any(len(text) > len(expected[0]) for text in expected)
    assert generate(Subject(model, tokens, batch_size=3), ROWS, max_new_tokens=8) == expected


SETTINGS_OF_A_MODEL = {
    "repetition_penalty": 1.9,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 8,
    "min_length": 200,
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.9,
    "num_beams": 3,
    "suppress_tokens": list(range(60, 100)),
    "begin_suppress_tokens": list(range(60, 100)),
    "bad_words_ids": [[token] for token in range(60, 90)],
    "sequence_bias": [[[70], 99.0]],
    "forced_bos_token_id": 70,
    "forced_eos_token_id": 70,
    "exponential_decay_length_penalty": (1, 9.0),
    "guidance_scale": 3.0,
    "watermarking_config": WatermarkingConfig(bias=50.0),
    "penalty_alpha": 0.6,
    "stop_strings": ["a", "e", "i", "o", "u"],
    "max_length": 3,
    "max_time": 1e-9,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 3,
}


@pytest.mark.parametrize(("name", "value"), SETTINGS_OF_A_MODEL.items(), ids=SETTINGS_OF_A_MODEL)
def test_no_setting_of_the_models_own_generation_counts(name, value):
    """Neither in greedy answers nor in samples; the setting is still there afterwards."""
    model, tokens = builders.llama(torch.float64), builders.tokenizer()
    model.generation_config.eos_token_id = 70
    ask = Subject(model, tokens, batch_size=3, show_progress_bar=False)
    plain = [generate(ask, ROWS, max_new_tokens=12, temperature=temperature) for temperature in (None, 1.0)]
    setattr(model.generation_config, name, value)
    with laws.untouched(model):
        found = [generate(ask, ROWS, max_new_tokens=12, temperature=temperature) for temperature in (None, 1.0)]
    assert found == plain


def test_the_models_generation_goes_back_after_an_exception():
    def fail(module, arguments):
        raise RuntimeError("no forward")

    model = builders.llama()
    own = model.generation_config
    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no forward"):
        generate(Subject(model, builders.tokenizer(), show_progress_bar=False), ROWS)
    assert model.generation_config is own


def test_generation_switches_adapters():
    model, tokens = builders.adapted_llama(torch.float64), builders.tokenizer()
    expected = {}
    for name in ("task", "forget"):
        model.set_adapter(name)
        expected[name] = oracle_texts(model, tokens, ROWS, 6)
    assert expected["task"] != expected["forget"]
    for name in ("task", "forget"):
        assert generate(Subject(model, tokens, [name]), ROWS, max_new_tokens=6) == expected[name]


def test_a_row_without_a_prompt_cannot_be_answered():
    with pytest.raises(DataError, match="row 2 has no prompt to answer"):
        generate(Subject(builders.llama(), builders.tokenizer()), [ROWS[0], {"text": "Khan."}])


# A split


def expected_scores(model, rows, generated):
    """Losses, truth ratios and answers from a loop over single rows."""
    losses = oracle_losses(model, rows, ["task"])
    judged = [row for row in rows if "perturbed_answer" in row]
    true = oracle_losses(
        model,
        [{"question": r["question"], "answer": r.get("paraphrased_answer", r["answer"])} for r in judged],
        ["task"],
    )
    false = [
        oracle_losses(model, [{"question": r["question"], "answer": a} for a in r["perturbed_answer"]], ["task"])
        for r in judged
    ]
    model.set_adapter("task")
    texts = oracle_texts(model, builders.tokenizer(), rows[:generated], 8)
    return losses, truth_ratio(true, false), texts


@pytest.mark.parametrize(("is_forget", "truth_score"), [(True, forget_truth_score), (False, retain_truth_score)])
def test_a_split_is_scored_from_the_losses_of_its_rows(is_forget, truth_score):
    model = builders.adapted_llama(torch.float64)
    losses, ratios, texts = expected_scores(model, ROWS, generated=2)
    model.set_adapter("forget")
    scores = evaluate_split(
        Subject(model, builders.tokenizer(), ["task"], batch_size=2),
        ROWS,
        is_forget=is_forget,
        generated=2,
        max_new_tokens=8,
    )
    recalls = rouge_l_recall(texts, ["Basil Q. Khan", "Yes"])
    assert scores == SplitScores(
        rows=3,
        loss=pytest.approx(float(losses.mean()), rel=1e-5),
        probability=pytest.approx(float((-losses).exp().mean()), rel=1e-5),
        rouge_l_recall=pytest.approx(sum(recalls) / 2),
        truth_score=pytest.approx(truth_score(ratios), rel=1e-5),
    )


def test_an_answer_that_the_model_writes_has_recall_1():
    """The true answers are the model's own generations, so that ROUGE-L compares the right pairs."""
    model, tokens = builders.adapted_llama(torch.float64), builders.tokenizer()
    texts = oracle_texts(model, tokens, ROWS, 12)
    assert all(any(c.isalnum() and c.isascii() for c in text) for text in texts)
    rows = [{"question": row["question"], "answer": text} for row, text in zip(ROWS, texts, strict=True)]
    found = evaluate_split(Subject(model, tokens), rows, is_forget=True, generated=3, max_new_tokens=12)
    assert found.rouge_l_recall == pytest.approx(1)
    wrong = [{**row, "answer": "none of it"} for row in rows]
    assert (
        evaluate_split(Subject(model, tokens), wrong, is_forget=True, generated=3, max_new_tokens=12).rouge_l_recall < 1
    )


def test_false_answers_may_be_scored_of_the_first_rows_alone():
    model = builders.adapted_llama(torch.float64)
    subject = Subject(model, builders.tokenizer(), ["task"])
    some = evaluate_split(subject, ROWS, is_forget=True, compared=1)
    whole, first = (evaluate_split(subject, rows, is_forget=True) for rows in (ROWS, ROWS[:1]))
    assert (some.loss, some.truth_score) == (whole.loss, pytest.approx(first.truth_score))
    assert evaluate_split(subject, ROWS, is_forget=True, compared=0).truth_score is None


def test_what_was_not_asked_for_is_none():
    scores = evaluate_split(Subject(builders.llama(), builders.tokenizer()), builders.retain_rows(), is_forget=False)
    assert (scores.rows, scores.rouge_l_recall, scores.truth_score) == (4, None, None)
    assert json.loads(json.dumps(scores.to_dict())) == scores.to_dict()


def test_no_rows_are_refused():
    model, tokens = builders.llama(), builders.tokenizer()
    with pytest.raises(DataError, match="at least one row to evaluate on, found none"):
        evaluate_split(Subject(model, tokens), [], is_forget=True)
    with pytest.raises(DataError, match="at least one row to evaluate on, found none"):
        losses_of(model, [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?", "answer": " "}, "row 2: 'answer' is empty"),
        ({"query": "Q?"}, "row 2: expected question/answer or"),
        ({**ROWS[0], "perturbed_answer": "Ada"}, "perturbed_answer as a list of false answers"),
        (
            {"prompt": "P", "completion": "c", "perturbed_answer": ["d"]},
            "perturbed_answer as a list .* beside a ques",
        ),
        ({**ROWS[0], "perturbed_answer": ["Ada", ""]}, "'answer' is empty"),
    ],
)
def test_a_malformed_row_is_refused(row, message):
    with pytest.raises(DataError, match=message):
        evaluate_split(Subject(builders.llama(), builders.tokenizer()), [ROWS[0], row], is_forget=True)


# The model goes back as it came


def evaluate(model, adapters):
    return evaluate_split(
        Subject(model, builders.tokenizer(), adapters), ROWS, is_forget=True, generated=2, max_new_tokens=3
    )


@pytest.mark.parametrize("adapters", [None, *STACKS])
def test_the_model_goes_back_as_it_came(adapters):
    model = builders.adapted_llama().train()
    model.set_adapter("task")  # and its factors require gradients
    with laws.untouched(model):
        evaluate(model, adapters)


def test_the_model_goes_back_after_an_exception():
    model = builders.adapted_llama().train()
    calls = []

    def fail_later(module, arguments):
        calls.append(module.training)
        if len(calls) == 2:  # past the losses, and so within generation
            raise RuntimeError("the second forward fails")

    model.get_base_model().lm_head.register_forward_pre_hook(fail_later)
    with laws.untouched(model), pytest.raises(RuntimeError, match="the second forward fails"):
        evaluate(model, ["task"])
    assert calls == [False, False], "judged in eval mode"


def test_dropout_is_off_and_no_graph_is_kept():
    model = builders.adapted_llama().train()  # LoRA dropout 0.3
    twice = [losses_of(model, load_samples(ROWS, builders.tokenizer()), adapters=["forget"]) for _ in range(2)]
    assert torch.equal(*twice)
    assert not twice[0].requires_grad
