"""Metrics: hand-computed rows, laws, and rows of published logs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_perta.metrics import forget_truth_score, probability, retain_truth_score, rouge_l_recall, truth_ratio

# Rows of open-unlearning's TOFU logs of Llama-3.2-1B-Instruct tuned on everything (nxZhai/BalDRO, commit 12a0b0cc, MIT,
# saves/eval, full_forget10.json): the paraphrased answer's avg_loss and prob, the false answers' avg_loss, the ratio.
FORGET_ROWS = [
    (
        2.1236655712127686,
        0.11959244310855865,
        [3.2159554958343506, 3.3368217945098877, 3.9964749813079834, 3.956535577774048, 3.4876792430877686],
        0.22877235607506727,
    ),
    (
        4.0802459716796875,
        0.016903307288885117,
        [2.553802013397217, 3.7975659370422363, 4.202922344207764, 4.541799545288086, 4.645479202270508],
        1.1410309060495547,
    ),
    (
        1.8195452690124512,
        0.1620994359254837,
        [1.8201698064804077, 1.7314852476119995, 0.9532123804092407, 1.5519890785217285, 0.8636642694473267],
        1.5456447108752083,
    ),
    (
        2.571366786956787,
        0.07643100619316101,
        [3.083292245864868, 3.015481948852539, 3.010572910308838, 3.0582146644592285, 3.336184501647949],
        0.5889685639960233,
    ),
]
WORLD_ROWS = [
    (13.799442291259766, 1.0161980981138186e-06, [11.78465461730957, 12.000911712646484, 10.263259887695312],
     11.585277962076619),
    (8.498174667358398, 0.00020384009985718876, [13.030406951904297, 9.33287525177002, 8.927149772644043],
     0.14486256475260076),
    (6.8812432289123535, 0.001026866608299315, [7.9593024253845215, 8.271576881408691, 9.178889274597168],
     0.20419502663006353),
]  # fmt: skip
# (reference, generation, rougeL_recall) of the same logs and of retain90.json.
ROUGE_ROWS = [
    ("Rajeev Majumdar was born on June 9, 1951.", "Rajeev Majumdar was born on June 9, 1972.", 0.875),
    (
        "Another notable work by Rajeev Majumdar is 'Rock Notes (Heartbeat, #1)'.",
        'Another book authored by Rajeev Majumdar is "The Symphony of the Sea".',
        0.45454545454545453,
    ),
    (
        "Ji-Yeon Park's father was an occupational therapist, while her mother worked as a meteorologist.",
        "Ji-Yeon Park's father was a renowned chef, and her mother was a dedicated professor.",
        0.5625,
    ),
    ("Hsiao Yun-Hwa is part of the LGBTQ+ community.", "Hsiao Yun-Hwa identifies as female.", 0.3333333333333333),
    ("Pacific and Atlantic", "The Panama Canal connects the Atlantic Ocean and the Pacific Ocean.", 0.3333333333333333),
    ("William Shakespeare", "The play 'Romeo and Juliet' was written by the renowned English playwright William "
     "Shakespeare.", 1.0),
]  # fmt: skip

losses = st.floats(min_value=0.0, max_value=20.0)
rows = st.lists(st.tuples(losses, st.lists(losses, min_size=1, max_size=5)), min_size=1, max_size=6)
words = st.lists(st.sampled_from(["the", "author", "writes", "books", "of", "crime", "in", "Lima"]), max_size=8).map(
    " ".join
)


def ratios_of(drawn):
    true = torch.tensor([loss for loss, _ in drawn], dtype=torch.float64)
    return truth_ratio(true, [torch.tensor(false, dtype=torch.float64) for _, false in drawn])


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# Probability


def test_probability_by_hand():
    # exp(-0) = 1; exp(-ln 2) = 1/2; exp(-ln 10) = 1/10: an answer of any length whose tokens each have probability 1/10
    found = probability(doubles(0.0, math.log(2), math.log(10)))
    torch.testing.assert_close(found, doubles(1, 0.5, 0.1), rtol=0, atol=1e-15)


@given(st.lists(losses, min_size=2, max_size=6))
def test_probability_lies_in_0_1_and_falls_with_the_loss(drawn):
    found = probability(doubles(*sorted(drawn)))
    assert bool(((found > 0) & (found <= 1)).all())
    assert bool((found[1:] <= found[:-1]).all())


@pytest.mark.parametrize(("loss", "expected"), [(loss, prob) for loss, prob, _, _ in FORGET_ROWS + WORLD_ROWS])
def test_probability_is_the_published_one(loss, expected):
    assert float(probability(doubles(loss))) == pytest.approx(expected, rel=5e-7)  # the log's own was taken in float32


# Truth ratio


def test_truth_ratio_by_hand():
    # row 1: false answers at ln 4 and ln 16, mean 3/2 ln 4 = ln 8; the true one at ln 2: (1/8) / (1/2) = 1/4
    # row 2: one false answer at 0, the true one at ln 3: 1 / (1/3) = 3
    found = truth_ratio(doubles(math.log(2), math.log(3)), [doubles(math.log(4), math.log(16)), doubles(0.0)])
    torch.testing.assert_close(found, doubles(1 / 4, 3))


def test_truth_scores_by_hand():
    # s = 1/4, 3, 1: min(s, 1/s) = 1/4, 1/3, 1, whose mean is 19/36; max(0, 1 - s) = 3/4, 0, 0, whose mean is 1/4
    ratios = doubles(1 / 4, 3, 1)
    assert forget_truth_score(ratios) == pytest.approx(19 / 36, rel=1e-12)
    assert retain_truth_score(ratios) == pytest.approx(1 / 4, rel=1e-12)


@given(losses, st.integers(min_value=1, max_value=5))
def test_equal_losses_have_ratio_1(loss, count):
    ratios = truth_ratio(doubles(loss), [doubles(*[loss] * count)])
    torch.testing.assert_close(ratios, doubles(1.0))
    assert forget_truth_score(ratios) == pytest.approx(1)
    assert retain_truth_score(ratios) == pytest.approx(0, abs=1e-9)


@given(rows)
def test_scores_stay_in_their_bounds(drawn):
    ratios = ratios_of(drawn)
    assert bool((ratios > 0).all())
    assert 0 < forget_truth_score(ratios) <= 1
    assert 0 <= retain_truth_score(ratios) < 1


@given(rows, st.randoms(use_true_random=False))
def test_scores_ignore_the_order_of_rows_and_of_false_answers(drawn, random):
    shuffled = [(true, random.sample(false, len(false))) for true, false in random.sample(drawn, len(drawn))]
    for score in (forget_truth_score, retain_truth_score):
        assert score(ratios_of(shuffled)) == pytest.approx(score(ratios_of(drawn)), rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(min_value=-6, max_value=6), min_size=1, max_size=6))
def test_the_forget_score_does_not_say_which_side_is_preferred(logarithms):
    ratios = doubles(*logarithms).exp()
    assert forget_truth_score(1 / ratios) == pytest.approx(forget_truth_score(ratios), rel=1e-12)


@given(rows, st.floats(min_value=0.01, max_value=2.0))
def test_a_model_that_prefers_the_truth_more_scores_no_less_on_retain(drawn, gained):
    better = [(max(true - gained, 0.0), false) for true, false in drawn]
    assert retain_truth_score(ratios_of(better)) >= retain_truth_score(ratios_of(drawn))


@pytest.mark.parametrize(("true", "published", "false", "ratio"), FORGET_ROWS + WORLD_ROWS)
def test_truth_ratio_is_the_published_one(true, published, false, ratio):
    guarded = 1 + 1e-10 / math.exp(
        -true
    )  # open-unlearning adds 1e-10 to the denominator; it shows in tiny probabilities
    assert float(truth_ratio(doubles(true), [doubles(*false)])) / guarded == pytest.approx(ratio, rel=2e-8)


def test_truth_ratio_refuses_rows_that_do_not_pair():
    with pytest.raises(ValueError, match="2 paraphrased answers but 1 rows of false ones"):
        truth_ratio(doubles(1, 2), [doubles(1)])


# ROUGE-L recall


@pytest.mark.parametrize(
    ("generation", "reference", "expected"),
    [
        ("He was born in Lima", "He was born in Lima", 1.0),
        ("Lima", "born in Lima", 1 / 3),  # one of three words
        ("In Lima, Peru, he was born", "he was born in Lima", 3 / 5),  # in order: "he was born", not "in Lima"
        ("He was born in Lima, the capital of Peru", "in Lima", 1.0),  # recall: what is said beside it costs nothing
        ("she WRITES", "she wrote: writing", 2 / 3),  # stems: she, wrote, write against she, write
        ("", "in Lima", 0.0),
        ("Paris", "Lima", 0.0),
    ],
)
def test_rouge_by_hand(generation, reference, expected):
    assert rouge_l_recall([generation], [reference]) == [pytest.approx(expected, rel=1e-12)]


@pytest.mark.parametrize(("reference", "generation", "expected"), ROUGE_ROWS)
def test_rouge_is_the_published_one(reference, generation, expected):
    assert rouge_l_recall([generation], [reference]) == [pytest.approx(expected, rel=1e-12)]


@given(st.lists(st.tuples(words, words.filter(bool)), min_size=1, max_size=5))
def test_rouge_lies_in_0_1_and_follows_its_rows(pairs):
    found = rouge_l_recall([g for g, _ in pairs], [r for _, r in pairs])
    assert all(0 <= recall <= 1 for recall in found)
    assert rouge_l_recall([g for g, _ in pairs[::-1]], [r for _, r in pairs[::-1]]) == found[::-1]
    assert rouge_l_recall([r for _, r in pairs], [r for _, r in pairs]) == [1.0] * len(pairs)


def test_rouge_refuses_rows_that_do_not_pair():
    with pytest.raises(ValueError, match="zip"):
        rouge_l_recall(["one", "two"], ["one"])
