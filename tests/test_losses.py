"""Per-sample losses do not depend on the other samples of a batch, nor on padding or chunks."""

import math

import builders
import oracles
import pytest
import torch

from peft_perta.data import IGNORED, Batch, Sample, batches, load_samples
from peft_perta.model import completion_losses, losses, sample_losses, token_scores


@pytest.fixture(scope="module")
def samples():
    return load_samples(builders.forget_rows(), builders.tokenizer())


def by_sample(model, samples, batch_size):
    losses = torch.zeros(len(samples), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(samples, batch_size):
            losses[batch.indices] = sample_losses(model, batch).double()
    return losses


@pytest.mark.parametrize("build", [builders.llama, builders.gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_loss_is_the_loss_of_the_sample_alone(build, batch_size, samples):
    model = build()
    with torch.no_grad():
        expected = torch.stack([oracles.sample_loss(model, s.input_ids, s.labels) for s in samples]).double()
    assert len(set(expected.tolist())) == len(samples)
    torch.testing.assert_close(by_sample(model, samples, batch_size), expected, rtol=1e-5, atol=1e-5)


def test_padding_does_not_matter(samples):
    model = builders.llama()
    (batch,) = batches(samples, len(samples))
    wider = Batch(
        torch.nn.functional.pad(batch.input_ids, (0, 9), value=7),
        torch.nn.functional.pad(batch.attention_mask, (0, 9)),
        torch.nn.functional.pad(batch.labels, (0, 9), value=IGNORED),
        batch.indices,
    )
    torch.testing.assert_close(sample_losses(model, wider), sample_losses(model, batch), rtol=1e-5, atol=1e-5)


def test_equal_logits_have_the_log_of_the_vocabulary_as_loss():
    labels = torch.tensor([[IGNORED, 3, 4], [IGNORED, IGNORED, 5]])
    losses = completion_losses(torch.zeros(2, 3, 50), labels)
    torch.testing.assert_close(losses, torch.full((2,), math.log(50)))


def test_a_loss_is_a_mean_over_the_samples_own_tokens():
    """Two classes, logits (0, log 3): class 1 has probability 3/4."""
    logits = torch.tensor([0.0, math.log(3)]).expand(2, 4, 2)
    labels = torch.tensor([[IGNORED, 1, 1, 0], [0, IGNORED, IGNORED, 1]])  # the first token is never predicted
    expected = torch.tensor([(2 * math.log(4 / 3) + math.log(4)) / 3, math.log(4 / 3)])
    torch.testing.assert_close(completion_losses(logits, labels), expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_losses_are_float32_or_wider(dtype, expected):
    assert completion_losses(torch.zeros(1, 3, 4, dtype=dtype), torch.tensor([[0, 1, 2]])).dtype == expected


def test_prompts_and_padding_do_not_reach_the_gradient(samples):
    logits = torch.randn(1, 5, 8, requires_grad=True)
    completion_losses(logits, torch.tensor([[IGNORED, IGNORED, 3, 4, IGNORED]])).sum().backward()
    assert logits.grad[0].any(dim=1).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 12, 2**23])
def test_losses_in_chunks_are_torchs(dtype, chunk, monkeypatch):
    """Chunks of tokens change neither the losses nor their gradient."""
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    labels = torch.tensor([[0, 3, IGNORED, 1], [2, IGNORED, 4, 0]])
    logits = (3 * torch.randn(2, 4, 5, dtype=torch.float64)).to(dtype)
    weights = torch.tensor([0.3, -2.0], dtype=torch.float64)

    def by_library(logits):
        wide = logits[:, :-1].transpose(1, 2).to(torch.promote_types(dtype, torch.float32))
        per_token = torch.nn.functional.cross_entropy(wide, labels[:, 1:], ignore_index=IGNORED, reduction="none")
        return per_token.sum(1) / (labels[:, 1:] != IGNORED).sum(1)

    results = []
    for function in (by_library, lambda logits: completion_losses(logits, labels)):
        leaf = logits.clone().requires_grad_(True)
        values = function(leaf)
        results.append((values.detach(), *torch.autograd.grad((values * weights).sum(), leaf)))
    torch.testing.assert_close(results[1], results[0])


def test_losses_can_be_differentiated_twice(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 12)
    labels = torch.tensor([[0, 3, IGNORED, 1], [2, IGNORED, 4, 0]])
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda logits: completion_losses(logits, labels), logits)


def test_token_scores_recognise_the_models_own_choices():
    """A greedy continuation hits at every token but the one that was replaced."""
    model = builders.llama()
    ids = [5, 9, 11, 4]
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argsort(descending=True)[1 if len(ids) == 7 else 0]))
    sample = Sample(torch.tensor(ids), torch.tensor([-100] * 4 + ids[4:]))
    other = Sample(torch.tensor([7, 8, 9]), torch.tensor([-100, 8, 9]))
    batch = next(batches([other, sample], 2))
    with torch.no_grad():
        scores = dict(zip(batch.indices, token_scores(model, batch), strict=True))
        losses = dict(zip(batch.indices, sample_losses(model, batch).tolist(), strict=True))
    assert scores[1].hits.tolist() == [True, True, True, False, True, True]
    assert [len(scores[i].log_probabilities) for i in (0, 1)] == [2, 6]
    for index, score in scores.items():
        assert -float(score.log_probabilities.mean()) == pytest.approx(losses[index], rel=1e-6)
