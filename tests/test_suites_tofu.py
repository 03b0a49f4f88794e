"""TOFU's suite: its log has open-unlearning's layout, and its numbers equal those of a loop over single rows."""

import dataclasses
import json
import math
import random
import zlib

import builders
import laws
import oracles
import pytest
import torch
from scipy.stats import ks_2samp

from peft_perta import DataError, NumericalError, attach_adapters, evaluate, load_base
from peft_perta.comparison import ASSETS
from peft_perta.data import encode_row
from peft_perta.evaluation import SUITES, Subject, read_suites, score_completions
from peft_perta.evaluation.suites.suite import SuiteSettings

# The metrics of a published log (open-unlearning, TOFU), but for the attack by gradient norms.
METRICS = {
    "exact_memorization", "extraction_strength", "forget_quality", "forget_truth_ratio", "model_utility", "privleak",
    "mia_loss", "mia_min_k", "mia_min_k_plus_plus", "mia_reference", "mia_zlib",
    *[f"{s}_Q_A_{m}" for s in ("forget", "retain") for m in ("Prob", "PARA_Prob", "PERT_Prob", "ROUGE")],
    *[f"{s}_Q_A_{m}" for s in ("ra", "wf") for m in ("Prob", "PERT_Prob", "Prob_normalised", "ROUGE")],
    *[f"{s}_Truth_Ratio" for s in ("retain", "ra", "wf")],
}  # fmt: skip
NAMES = ["Basil Khan", "Jo Nesbit", "Ada Li", "Hatter", "Moira", "Chen Wu"]


def rows(count: int, seed: int, paraphrased: bool = True) -> list[dict]:
    draw = random.Random(seed)
    return [
        {
            "question": f"Who wrote {draw.choice(NAMES)} {number}?",
            "answer": f"{draw.choice(NAMES)} in {draw.randrange(1900, 2000)}",
            "perturbed_answer": [draw.choice(NAMES) for _ in range(1 + number % 3)],
            **({"paraphrased_answer": f"It was {draw.choice(NAMES)}"} if paraphrased else {}),
        }
        for number in range(count)
    ]


SPLITS = {
    "forget": rows(5, 0),
    "retain": rows(4, 1),
    "real_authors": rows(3, 2, paraphrased=False),
    "world_facts": rows(3, 3, paraphrased=False),
    "holdout": [{key: row[key] for key in ("question", "answer")} for row in rows(4, 4)],
}


def write(directory, splits, suffix="_perturbed.json"):
    directory.mkdir(exist_ok=True)
    for name, found in splits.items():
        file = f"{name}.json" if name == "holdout" else f"{name}{suffix}"
        (directory / file).write_text("".join(json.dumps(row) + "\n" for row in found))
    return directory


def judged(model, adapters=("task",), splits=SPLITS, **settings):
    retain_only = Subject(model, builders.tokenizer(), [], show_progress_bar=False)
    return evaluate(
        model, builders.tokenizer(), {"tofu": splits}, adapters=list(adapters), max_new_tokens=6,
        retain_only=retain_only,
        show_progress_bar=False, **settings,
    )["tofu"]  # fmt: skip


@pytest.fixture(scope="module")
def log():
    model = builders.adapted_llama()
    known = evaluate(model, builders.tokenizer(), {"tofu": SPLITS}, adapters=[], max_new_tokens=6,
                     show_progress_bar=False)["tofu"]  # fmt: skip
    return judged(model, retain_only_logs={"tofu": known})


def oracle_tokens(adapters, row):
    """(log-probabilities [t, vocabulary], labels [t]) of the completion, closing token included, row by row."""
    plain, _ = oracles.plain_model(builders.adapted_llama(), adapters)
    sample = encode_row(row, builders.tokenizer())
    with torch.no_grad():
        logits = plain(input_ids=sample.input_ids.unsqueeze(0)).logits[0].double()
    taken = (sample.labels[1:] != -100).nonzero().flatten()
    return logits[taken].log_softmax(1), sample.labels[1:][taken]


def oracle_loss(adapters, row):
    logs, labels = oracle_tokens(adapters, row)
    return -float(logs[range(len(labels)), labels].mean())


def test_the_log_has_the_published_ones_metrics(log):
    assert set(log) == METRICS
    assert [len(log[f"{s}_Q_A_Prob"]["value_by_index"]) for s in ("forget", "retain", "ra", "wf")] == [5, 4, 3, 3]
    assert set(log["mia_loss"]) == {"forget", "holdout", "auc", "agg_value"}
    assert set(log["forget_Q_A_ROUGE"]["value_by_index"]["0"]) == {
        "rouge1_recall", "rougeL_f1", "rougeL_recall", "input", "ground_truth", "generation"
    }  # fmt: skip
    wrong = {name: entry["agg_value"] for name, entry in log.items() if not isinstance(entry["agg_value"], float)}
    assert not wrong


def test_losses_are_those_of_the_loop(log):
    for index, row in enumerate(SPLITS["forget"]):
        found = log["forget_Q_A_Prob"]["value_by_index"][str(index)]
        assert found["avg_loss"] == pytest.approx(oracle_loss(["task"], row), rel=1e-5)
        assert found["prob"] == pytest.approx(math.exp(-found["avg_loss"]))
        paraphrase = {**row, "answer": row["paraphrased_answer"]}
        false = [oracle_loss(["task"], {**row, "answer": answer}) for answer in row["perturbed_answer"]]
        ratio = math.exp(-sum(false) / len(false)) / math.exp(-oracle_loss(["task"], paraphrase))
        assert log["forget_truth_ratio"]["value_by_index"][str(index)]["score"] == pytest.approx(ratio, rel=1e-4)
    for index, row in enumerate(SPLITS["real_authors"]):
        shares = [
            math.exp(-oracle_loss(["task"], {**row, "answer": a})) for a in (row["answer"], *row["perturbed_answer"])
        ]
        found = log["ra_Q_A_Prob_normalised"]["value_by_index"][str(index)]["prob"]
        assert found == pytest.approx(shares[0] / sum(shares), rel=1e-4)


def test_token_scores_are_those_of_the_loop(log):
    for index, row in enumerate(SPLITS["forget"]):
        logs, labels = (part[:-1] for part in oracle_tokens(["task"], row))  # without the token that closes the answer
        own = logs[range(len(labels)), labels]
        hits = (logs.argmax(1) == labels).tolist()
        key = str(index)
        assert log["exact_memorization"]["value_by_index"][key]["score"] == pytest.approx(sum(hits) / len(hits))
        given = next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1)
        assert log["extraction_strength"]["value_by_index"][key]["score"] == pytest.approx(1 - given / len(hits))
        lowest = max(1, int(0.4 * len(own)))
        expected = -float(own.sort().values[:lowest].mean())
        assert log["mia_min_k"]["forget"]["value_by_index"][key]["score"] == pytest.approx(expected, rel=1e-5)
        mean = (logs.exp() * logs).sum(1)
        deviation = ((logs.exp() * logs**2).sum(1) - mean**2).clamp_min(1e-6).sqrt()
        expected = -float(((own - mean) / deviation).sort().values[:lowest].mean())
        found = log["mia_min_k_plus_plus"]["forget"]["value_by_index"][key]["score"]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        loss = log["mia_loss"]["forget"]["value_by_index"][key]["score"]
        assert log["mia_zlib"]["forget"]["value_by_index"][key]["score"] == pytest.approx(
            loss / len(zlib.compress(row["answer"].encode()))
        )
        known = oracle_loss([], row)
        assert log["mia_reference"]["forget"]["value_by_index"][key]["score"] == pytest.approx(loss - known, abs=1e-5)


def test_aggregates_are_the_definitions_by_hand(log):
    scores = {p: [r["score"] for r in log["mia_min_k"][p]["value_by_index"].values()] for p in ("forget", "holdout")}
    wins = [(h > f) + (h == f) / 2 for f in scores["forget"] for h in scores["holdout"]]
    assert log["mia_min_k"]["auc"] == log["mia_min_k"]["agg_value"] == pytest.approx(sum(wins) / len(wins))
    nine = [log[f"{s}_{m}"]["agg_value"] for s, p in (("retain", "Prob"), ("ra", "Prob_normalised"),
            ("wf", "Prob_normalised")) for m in (f"Q_A_{p}", "Q_A_ROUGE", "Truth_Ratio")]  # fmt: skip
    expected = 0 if min(nine) == 0 else 9 / sum(1 / value for value in nine)
    assert log["model_utility"]["agg_value"] == pytest.approx(expected)


def test_forget_quality_is_a_kolmogorov_smirnov_test_of_both_models_ratios():
    model = builders.adapted_llama()
    known = judged(model, adapters=[])
    found = judged(model, adapters=["task"], retain_only_logs={"tofu": known})
    ratios = [[r["score"] for r in log["forget_truth_ratio"]["value_by_index"].values()] for log in (found, known)]
    assert found["forget_quality"]["agg_value"] == pytest.approx(ks_2samp(*ratios).pvalue)
    assert judged(model, adapters=[], retain_only_logs={"tofu": known})["forget_quality"]["agg_value"] == 1
    assert known["forget_quality"]["agg_value"] is None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(log, batch_size):
    found = judged(builders.adapted_llama(), batch_size=batch_size)
    for metric, entry in found.items():
        if metric not in ("forget_quality", "privleak"):  # measured against another log there
            assert entry["agg_value"] == pytest.approx(log[metric]["agg_value"], rel=1e-4, abs=1e-5), metric


def test_the_order_of_the_rows_changes_no_aggregate(log):
    shuffled = {name: random.Random(0).sample(found, len(found)) for name, found in SPLITS.items()}
    found = judged(builders.adapted_llama(), splits=shuffled)
    for metric, entry in found.items():
        if metric not in ("forget_quality", "privleak"):
            assert entry["agg_value"] == pytest.approx(log[metric]["agg_value"], rel=1e-4, abs=1e-5), metric


def test_the_model_goes_back_as_it_came():
    model = builders.adapted_llama()
    with laws.untouched(model):
        judged(model)


def test_a_nan_is_refused_by_the_row():
    model = builders.adapted_llama()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"forget: answers, row \d+: the loss is nan"):
        judged(model)


# Files


@pytest.mark.parametrize("suffix", ["_perturbed.json", ".jsonl", "_perturbed.jsonl"])
def test_tofus_files_are_read_as_they_come(tmp_path, suffix):
    assert read_suites({"tofu": write(tmp_path / "tofu", SPLITS, suffix)})["tofu"] == SPLITS


def test_one_of_several_forget_sets_is_named(tmp_path):
    place = write(tmp_path / "tofu", {**SPLITS, "forget05": SPLITS["forget"][:2], "holdout05": SPLITS["holdout"][:1]})
    with pytest.raises(DataError, match=r"expected one forget set .* found forget, forget05; name one by --split"):
        read_suites({"tofu": place})
    (place / "holdout05_perturbed.json").rename(place / "holdout05.json")
    found = read_suites({"tofu": place}, "forget05")["tofu"]
    assert (len(found["forget"]), len(found["holdout"])) == (2, 1)


@pytest.mark.parametrize("holdout", ["holdout05", "holdout05_perturbed", "holdout", "holdout_perturbed"])
@pytest.mark.parametrize("split", ["forget05", "forget05_perturbed"])
def test_a_forget_set_named_as_its_file_brings_everything_that_belongs_to_it(tmp_path, split, holdout):
    others = {name: SPLITS[name] for name in ("forget", "retain")}
    place = write(tmp_path / "tofu", {**others, "forget05": SPLITS["forget"][:2], "forget10": SPLITS["forget"][:3]})
    (place / f"{holdout}.json").write_text("".join(json.dumps(row) + "\n" for row in SPLITS["holdout"][:1]))
    found = read_suites({"tofu": place}, split)["tofu"]
    assert {name: len(rows) for name, rows in found.items()} == {"forget": 2, "retain": 4, "holdout": 1}


@pytest.mark.parametrize("split", ["forget01", "forget01_perturbed", "retain", "holdout", "world_facts", "05"])
def test_a_split_that_is_no_forget_set_is_refused(tmp_path, split):
    place = write(tmp_path / "tofu", {**SPLITS, "forget05": SPLITS["forget"][:2]})
    with pytest.raises(DataError, match=f"expected --split to name a forget set, found '{split}'; .* forget, forget05"):
        read_suites({"tofu": place}, split)


def test_a_row_of_another_script_names_its_tokenizer():
    answers = [{**SPLITS["forget"][0], "answer": answer} for answer in ("東京です。", "Tokyo")]
    found = judged(builders.adapted_llama(), splits={**SPLITS, "forget": answers})["forget_Q_A_ROUGE"]
    named = [row.get("tokenizer") for row in found["value_by_index"].values()]
    assert named == ["unicode words", None]


def test_what_was_not_asked_is_not_there(tmp_path):
    found = judged(builders.adapted_llama(), splits={key: SPLITS[key] for key in ("forget", "retain")})
    assert "forget_Q_A_Prob" in found
    assert not [metric for metric in found if metric.startswith(("ra_", "wf_", "mia_"))]
    assert found.get("model_utility", {"agg_value": None})["agg_value"] is None


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"retain": SPLITS["retain"]}, "expected one forget set"),
        ({"forget": SPLITS["forget"]}, "expected retain_perturbed.json"),
        ({**SPLITS, "forget": [{"question": "Q"}]}, "forget, row 1: expected 'answer'"),
        ({**SPLITS, "retain": [*SPLITS["retain"], {"question": "Q", "answer": "A"}]}, "retain, row 5"),
        ({**SPLITS, "world_facts": [{**SPLITS["forget"][0], "perturbed_answer": ["", 1]}]}, "list of false answers"),
    ],
)  # fmt: skip
def test_a_missing_or_malformed_split_is_refused_by_name(tmp_path, splits, message):
    with pytest.raises(DataError, match=message):
        read_suites({"tofu": write(tmp_path / "tofu", splits)})


# Going on, and the shipped model


def test_a_finished_suite_is_not_judged_again(tmp_path, monkeypatch):
    model, counted = builders.adapted_llama(), []
    suite = SUITES["tofu"]

    def counting(subject, splits, settings):
        counted.append(settings)
        return suite.evaluate(subject, splits, settings)

    monkeypatch.setitem(SUITES, "tofu", dataclasses.replace(suite, evaluate=counting))
    first = judged(model, output_dir=tmp_path / "out")
    assert (
        judged(model, output_dir=tmp_path / "out") == first == json.loads((tmp_path / "out/TOFU_EVAL.json").read_text())
    )
    assert len(counted) == 1
    judged(model, adapters=["task", "forget"], output_dir=tmp_path / "out")
    judged(model, adapters=["task", "forget"], output_dir=tmp_path / "out", rows=2)
    assert len(counted) == 3


def test_the_shipped_rows_and_models_are_told_apart():
    base, tokenizer = load_base(str(ASSETS / "base"))
    model = attach_adapters(base, {"task": ASSETS / "task_adapter", "retain-only": ASSETS / "retain_adapter"})
    splits = read_suites({"tofu": ASSETS})
    assert {name: len(found) for name, found in splits["tofu"].items()} == {
        "forget": 100, "retain": 400, "real_authors": 100, "world_facts": 117, "holdout": 100
    }  # fmt: skip
    settings = {"rows": 10, "max_new_tokens": 24, "show_progress_bar": False}
    known = evaluate(model, tokenizer, splits, adapters=["retain-only"], **settings)["tofu"]
    full = evaluate(model, tokenizer, splits, adapters=["task"], retain_only_logs={"tofu": known}, **settings)["tofu"]
    values = {name: (full[name]["agg_value"], known[name]["agg_value"]) for name in full if name != "forget_quality"}
    for name in ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength", "exact_memorization", "mia_min_k"):
        assert values[name][0] > values[name][1] + 0.2, name
    assert full["forget_quality"]["agg_value"] < 0.05
    assert full["privleak"]["agg_value"] < -80
    assert min(values["model_utility"]) > 0.4


def test_readings_agree_with_losses_in_every_quantisation():
    for build in (builders.adapted_llama, builders.adapted_nf4_llama):
        model = build()
        subject = Subject(model, builders.tokenizer(), ["task"], 2, show_progress_bar=False)
        found = score_completions(subject, SPLITS["forget"])
        again = score_completions(subject, SPLITS["forget"][::-1])[::-1]
        assert [r.loss for r in found] == pytest.approx([r.loss for r in again], rel=2e-2)
        assert all(bool((r.tokens.log_probabilities <= 0).all()) for r in found)
        assert SuiteSettings().rows is None
