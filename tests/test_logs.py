"""Logs: published aggregates are recomputed, missing and malformed rows are reported, files round-trip."""

import copy
import json
import math
from pathlib import Path
from random import Random

import pytest

from peft_perta.errors import DataError, OutputError
from peft_perta.evaluation import aggregate, format_rescored, read_log, rescore, summary, write_log
from peft_perta.evaluation.logs.rescoring import check_retain_only, row_values

DATA = Path(__file__).parent / "data"  # parts of published logs; see SOURCE.md there
FULL, RETAIN, ROWS = (
    json.loads((DATA / name).read_text()) for name in ("full_forget10.json", "retain90.json", "rows_full_forget10.json")
)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def entry(values, field="score"):
    return {"value_by_index": {str(i): None if value is None else {field: value} for i, value in enumerate(values)}}


def values_of(metric, field, log=ROWS):
    return [row[field] for row in log[metric]["value_by_index"].values()]


def truth_log(paraphrased=(1.0, 2.0), perturbed=((2.0, 2.0), (1.0, 3.0)), scores=None, split="forget"):
    """A log with one split's losses; the two rows' ratios are exp(1 - 2) and exp(2 - 2)."""
    log = {
        f"{split}_Q_A_PARA_Prob": entry(list(paraphrased), "avg_loss"),
        f"{split}_Q_A_PERT_Prob": entry([list(losses) for losses in perturbed], "avg_loss"),
    }
    return log if scores is None else {**log, "forget_truth_ratio": entry(scores)}


def attack(forget, holdout):
    return {"forget": entry(forget), "holdout": entry(holdout)}


# What was published


def test_every_published_aggregate_comes_out_of_the_published_rows():
    results, left_out = rescore(FULL, RETAIN)
    assert left_out == {}
    assert set(results) == set(FULL) >= {"forget_quality", "model_utility", "privleak", "forget_truth_ratio"}
    for metric, found in results.items():
        assert found == {"agg_value": pytest.approx(FULL[metric]["agg_value"], rel=1e-9)}, metric


def test_a_retain_only_log_stands_alone():
    results, left_out = rescore(RETAIN)
    assert set(results) == {"forget_truth_ratio", "mia_min_k", "privleak"}
    for metric, found in results.items():
        assert found["agg_value"] == pytest.approx(RETAIN[metric]["agg_value"], rel=1e-9)  # privleak: against 0.5
    assert set(left_out) == {"forget_quality"}
    assert "retain-only model, whose log was not given" in left_out["forget_quality"]


def test_means_areas_and_scores_are_an_obvious_oracles():
    results, _ = rescore(ROWS)
    expected = {
        "forget_Q_A_Prob": mean(values_of("forget_Q_A_Prob", "prob")),
        "forget_Q_A_PERT_Prob": mean(mean(row) for row in values_of("forget_Q_A_PERT_Prob", "prob")),
        "wf_Q_A_ROUGE": mean(values_of("wf_Q_A_ROUGE", "rougeL_recall")),
        "extraction_strength": mean(values_of("extraction_strength", "score")),
        "exact_memorization": mean(values_of("exact_memorization", "score")),
        "forget_truth_ratio": mean(min(s, 1 / s) for s in values_of("forget_truth_ratio", "score")),
        "wf_Q_A_Prob_normalised": mean(values_of("wf_Q_A_Prob_normalised", "prob")),
    }
    for split in ("retain", "ra", "wf"):
        expected[f"{split}_Truth_Ratio"] = mean(max(0, 1 - s) for s in values_of(f"{split}_Truth_Ratio", "score"))
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradnorm"):
        parts = ROWS[f"mia_{name}"]
        forget, holdout = ([r["score"] for r in parts[p]["value_by_index"].values()] for p in ("forget", "holdout"))
        expected[f"mia_{name}"] = mean((h > f) + (h == f) / 2 for f in forget for h in holdout)
    assert {m: results[m]["agg_value"] for m in expected} == pytest.approx(expected, rel=1e-8)
    assert set(results) == set(ROWS) | {"privleak", "model_utility"}


@pytest.mark.parametrize("split", ["forget", "retain", "ra", "wf"])
def test_truth_ratios_come_from_the_losses_and_are_the_logged_ones(split):
    metric = "forget_truth_ratio" if split == "forget" else f"{split}_Truth_Ratio"
    deep = {name: ROWS[name] for name in ROWS if name.startswith(f"{split}_Q_A")}  # the ratios themselves are not there
    assert rescore(deep)[0][metric]["agg_value"] == pytest.approx(
        rescore({metric: ROWS[metric]})[0][metric]["agg_value"]
    )
    worse = copy.deepcopy(ROWS)
    for row in worse[f"{split}_Q_A_PERT_Prob"]["value_by_index"].values():
        row["avg_loss"] = [loss + 1 for loss in row["avg_loss"]]
    assert rescore(worse)[0][metric]["agg_value"] != pytest.approx(rescore(ROWS)[0][metric]["agg_value"])


# By hand


def test_truth_ratios_by_hand():
    results, left_out = rescore(truth_log())
    assert results["forget_truth_ratio"]["agg_value"] == pytest.approx((math.exp(-1) + 1) / 2)
    assert "forget_quality" in left_out
    results, _ = rescore(truth_log(split="retain"))
    assert results["retain_Truth_Ratio"]["agg_value"] == pytest.approx((1 - math.exp(-1)) / 2)


def test_forget_quality_and_privleak_by_hand():
    ours = {"forget_truth_ratio": entry([0.1, 0.2]), "mia_min_k": attack([1.0, 3.0], [2.0, 4.0])}
    theirs = {"forget_truth_ratio": entry([0.3, 0.4]), "mia_min_k": attack([2.0, 4.0], [1.0, 3.0])}
    results, left_out = rescore(ours, theirs)
    assert left_out == {}
    assert results["forget_quality"]["agg_value"] == pytest.approx(1 / 3)  # see test_metrics
    assert results["mia_min_k"]["agg_value"] == pytest.approx(3 / 4)
    assert results["privleak"]["agg_value"] == pytest.approx(100 * (1 / 4 - 3 / 4) / (3 / 4))


def test_a_log_of_muse_is_read_by_f1():
    rows = {"0": {"rougeL_f1": 0.2, "rougeL_recall": 0.9}, "1": {"rougeL_f1": 0.4, "rougeL_recall": 0.9}}
    log = {f"{name}_ROUGE": {"value_by_index": rows} for name in ("forget_knowmem", "retain_knowmem", "forget_verbmem")}
    log |= {"mia_min_k": attack([1.0], [2.0]), "extraction_strength": entry([0.1, 0.3])}
    results, left_out = rescore(log)
    assert left_out == {}
    for name in ("forget_knowmem", "retain_knowmem", "forget_verbmem"):
        assert results[f"{name}_ROUGE"]["agg_value"] == pytest.approx(0.3)
    assert results["extraction_strength"]["agg_value"] == pytest.approx(0.2)
    assert results["privleak"]["agg_value"] == pytest.approx(-100)


@pytest.mark.parametrize("metric", ["choices_acc", "choices_text_acc_norm", "choices_acc_wmdp_bio", "wmdp_accuracy"])
def test_an_accuracy_is_the_share_of_right_choices(metric):
    assert rescore({metric: entry([1, 0, 1, 1])})[0][metric]["agg_value"] == 3 / 4


def test_lists_of_answers_are_averaged_within_their_row():
    log = {"forget_Q_A_PERT_ROUGE": entry([[0.0, 1.0], [1.0, 1.0, 1.0]], "rougeL_recall")}
    assert rescore(log)[0]["forget_Q_A_PERT_ROUGE"]["agg_value"] == pytest.approx(3 / 4)


def test_an_empty_generation_counts_as_0():
    rows = copy.deepcopy(ROWS["forget_Q_A_ROUGE"]["value_by_index"])
    rows["0"] = {"rouge1_recall": 0.0, "rougeL_f1": 0.0, "rougeL_recall": 0.0, "generation": "", "ground_truth": "Lima"}
    found = rescore({"forget_Q_A_ROUGE": {"value_by_index": rows}})[0]["forget_Q_A_ROUGE"]["agg_value"]
    assert found == pytest.approx(sum(row["rougeL_recall"] for row in rows.values()) / len(rows))


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_does_not_matter(seed):
    random = Random(seed)

    def shuffled(value):
        if not isinstance(value, dict):
            return value
        return {key: shuffled(value[key]) for key in random.sample(sorted(value), len(value))}

    small = {metric: ROWS[metric] for metric in ("retain_Truth_Ratio", "retain_Q_A_PERT_Prob", "retain_Q_A_PARA_Prob")}
    small |= {"mia_min_k": ROWS["mia_min_k"], "forget_truth_ratio": ROWS["forget_truth_ratio"]}
    retain_only = {metric: RETAIN[metric] for metric in ("forget_truth_ratio", "mia_min_k")}
    found, expected = rescore(shuffled(small), shuffled(retain_only))[0], rescore(small, retain_only)[0]
    assert {m: e["agg_value"] for m, e in found.items()} == pytest.approx(
        {m: e["agg_value"] for m, e in expected.items()}
    )


# What is missing


@pytest.mark.parametrize("name", ["forget_truth_ratio", "forget_Truth_Ratio"])
@pytest.mark.parametrize("field", ["score", "truth_ratio"])
@pytest.mark.parametrize("lost", ["forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob"])
def test_where_losses_are_missing_the_logged_ratios_are_taken(name, field, lost):
    log = {**truth_log(), name: entry([0.5, 4.0], field)}
    del log[lost]
    results, _ = rescore(log, {"forget_truth_ratio": entry([0.6, 5.0])})
    assert results[name]["agg_value"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert results["forget_quality"]["agg_value"] == pytest.approx(1)
    assert [metric for metric in results if metric.lower() == "forget_truth_ratio"] == [name]


def test_an_aggregate_without_rows_is_not_passed_off_as_recomputed():
    log = copy.deepcopy(FULL)
    del log["wf_Q_A_ROUGE"]["value_by_index"]
    results, left_out = rescore(log, RETAIN)
    assert set(left_out) == {"wf_Q_A_ROUGE", "model_utility"}
    assert not set(left_out) & set(results)
    assert "wf_Q_A_ROUGE has no rows" in left_out["wf_Q_A_ROUGE"]
    assert "wf_Q_A_ROUGE has no rows" in left_out["model_utility"]


def test_a_missing_split_is_told():
    log = {metric: found for metric, found in FULL.items() if not metric.startswith("ra_")}
    results, left_out = rescore(log, RETAIN)
    assert set(left_out) == {"model_utility"}
    assert "ra_Q_A_ROUGE is missing" in left_out["model_utility"]
    assert {"forget_quality", "privleak", "wf_Truth_Ratio"} <= set(results)


def test_null_rows_are_left_out_of_both_sides():
    log = truth_log(paraphrased=(1.0, None, 5.0), perturbed=((2.0,), (9.0,), (3.0,)))
    log["forget_Q_A_PERT_Prob"]["value_by_index"]["2"] = None
    assert rescore(log)[0]["forget_truth_ratio"]["agg_value"] == pytest.approx(math.exp(-1))
    scores = {"exact_memorization": {"value_by_index": {"0": {"score": 0.5}, "1": {"score": None}, "2": None}}}
    assert rescore(scores)[0]["exact_memorization"]["agg_value"] == 0.5


@pytest.mark.parametrize(
    ("entry_of_metric", "reason"),
    [
        (None, "missing"),
        ({}, "no rows"),
        ({"agg_value": 0.5}, "no rows"),
        ({"agg_value": 0.5, "value_by_index": None}, "no rows"),
        ({"value_by_index": {}}, "no rows"),
        ({"value_by_index": {"0": None}}, "no rows"),
        ({"value_by_index": {"0": {"score": None}}}, "null"),
        ({"value_by_index": {"0": {"other": 1.0}}}, "no rows with 'score'"),
    ],
)
def test_a_metric_without_usable_rows_is_left_out_with_the_reason(entry_of_metric, reason):
    log = {"exact_memorization": entry_of_metric, "extraction_strength": entry([0.5])}
    results, left_out = rescore(log)
    assert results == {"extraction_strength": {"agg_value": 0.5}}
    assert reason in left_out["exact_memorization"]


def test_metrics_that_we_do_not_know_are_left_out_and_harm_nothing():
    log = {"extraction_strength": entry([0.5]), "run_seconds": 12.5, "perplexity": {"value_by_index": [math.nan]}}
    results, left_out = rescore(log)
    assert set(results) == {"extraction_strength"}
    assert set(left_out) == {"run_seconds", "perplexity"}
    assert "unknown metric: there is no rule" in left_out["perplexity"]


def test_a_retain_only_model_without_what_is_compared_is_told_not_replaced():
    ours = {"forget_truth_ratio": entry([0.1]), "mia_min_k": attack([1.0], [2.0])}
    results, left_out = rescore(ours, {"mia_min_k": {"agg_value": 0.4}}, retain_only_where="R.json")
    assert set(results) == {"forget_truth_ratio", "mia_min_k"}  # no privleak against 0.5 in silence
    assert left_out["privleak"].startswith("in R.json mia_min_k.forget is missing")
    assert left_out["forget_quality"].startswith("in R.json forget_Q_A_PARA_Prob is missing")


@pytest.mark.parametrize("log", [{}, {"model_utility": {"agg_value": 0.6}}, {"my_metric": entry([1.0])}])
def test_a_log_of_nothing_is_refused(log):
    with pytest.raises(DataError, match=r"L\.json: expected rows .* of at least one known metric, found none"):
        rescore(log, where="L.json")


# What is malformed


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"forget_Q_A_Prob": entry([0.5, math.nan], "prob")}, "forget_Q_A_Prob, row 1: expected a finite number as"),
        ({"forget_Q_A_Prob": entry([math.inf], "prob")}, "forget_Q_A_Prob, row 0: .* found inf"),
        ({"forget_Q_A_Prob": entry([10**400], "prob")}, "forget_Q_A_Prob, row 0: .* found 1000"),
        ({"forget_Q_A_Prob": entry(["0.5"], "prob")}, "forget_Q_A_Prob, row 0: .* found '0.5'"),
        ({"forget_Q_A_Prob": entry([True], "prob")}, "forget_Q_A_Prob, row 0: .* found True"),
        ({"forget_Q_A_PERT_Prob": entry([[0.5], [0.5, None]], "prob")}, "forget_Q_A_PERT_Prob, row 1: .* found None"),
        ({"forget_Q_A_PERT_Prob": {"value_by_index": {"3": {"prob": []}}}}, r"row 3: .* found \[\]"),
        ({"forget_Q_A_Prob": {"value_by_index": {"0": {"prob": 1.0}, "1": {"p": 1}}}}, r"row 1: .* found \{'p': 1\}"),
        ({"forget_Q_A_Prob": {"value_by_index": {"0": 0.5}}}, "row 0: expected an object or null, found a float"),
        ({"forget_Q_A_Prob": {"value_by_index": [0.5]}}, "expected an object, index -> row, found a list"),
        ({"forget_Q_A_Prob": 0.5}, "a summary holds no rows, give the whole log"),
        ({"mia_min_k": attack([1.0], [math.nan])}, "mia_min_k.holdout, row 0: expected a finite number as 'score'"),
        ({"mia_min_k": {"forget": [], "holdout": {}}}, "mia_min_k.forget: expected an object"),
        (truth_log(paraphrased=(1.0, math.nan)), "forget_Q_A_PARA_Prob, row 1: .* as 'avg_loss', found nan"),
        (truth_log(perturbed=((1.0, math.nan), (1.0,))), "forget_Q_A_PERT_Prob, row 0: .* as 'avg_loss', found nan"),
        (
            truth_log(paraphrased=(1.0, 2.0, 3.0)),
            "same rows in .*PARA.* and .*PERT.*, found 1 in only one of them, such as row 2",
        ),
        (truth_log(paraphrased=(-1e4, 1.0), perturbed=((-1e4,), (1.0,))), "forget_truth_ratio is nan"),
    ],
)  # fmt: skip
def test_a_malformed_log_is_refused_by_metric_and_row(log, message):
    with pytest.raises(DataError, match=f"L.json: .*{message}"):
        rescore(log, where="L.json")


def test_a_malformed_retain_only_model_is_refused_by_its_name():
    ours = {"forget_truth_ratio": entry([0.1])}
    with pytest.raises(DataError, match=r"R\.json: forget_truth_ratio, row 0: expected a finite number"):
        rescore(ours, {"forget_truth_ratio": entry([math.nan])}, where="L.json", retain_only_where="R.json")


def test_a_negative_part_of_the_utility_is_refused():
    log = copy.deepcopy(FULL)
    log["wf_Q_A_ROUGE"]["value_by_index"] = {"0": {"rougeL_recall": -1.0}}
    with pytest.raises(DataError, match=r"model_utility: expected parts of at least 0, found -1\.0"):
        rescore(log, RETAIN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"forget_quality": ', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "expected a JSON object, .* found a list"),
        (b"null", "expected a JSON object, .* found a NoneType"),
    ],
)
def test_a_file_that_is_no_log_is_refused(content, message, tmp_path):
    (tmp_path / "L.json").write_bytes(content)
    with pytest.raises(DataError, match=f"L.json.* {message}|L.json: {message}"):
        read_log(tmp_path / "L.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected an evaluation log at .*absent\.json"):
        read_log(tmp_path / "absent.json")


# Aggregates put in


def bare(log):
    """Without its aggregates."""
    if not isinstance(log, dict):
        return log
    return {key: bare(value) for key, value in log.items() if key not in ("agg_value", "auc")}


def test_aggregate_restores_the_published_log():
    log = bare(FULL)
    before = copy.deepcopy(log)
    found = aggregate(log, RETAIN)
    assert log == before
    assert list(found) == sorted(FULL)
    assert bare(found) == bare(FULL)
    for metric, published in FULL.items():
        assert found[metric]["agg_value"] == pytest.approx(published["agg_value"], rel=1e-9)
    for part in ("forget", "holdout"):  # taken in float32 there
        assert found["mia_min_k"][part]["agg_value"] == pytest.approx(FULL["mia_min_k"][part]["agg_value"], rel=1e-6)
    assert found["mia_min_k"]["auc"] == found["mia_min_k"]["agg_value"]


def test_aggregate_twice_is_aggregate_once_and_nothing_stale_stays():
    found = aggregate(FULL, RETAIN)
    assert aggregate(found, RETAIN) == found
    alone = aggregate(found)
    assert alone["forget_quality"] == {"agg_value": None}
    assert alone["privleak"]["agg_value"] == pytest.approx(-99.33, abs=0.01)  # against 0.5
    assert alone == aggregate(bare(FULL))


def test_aggregate_refuses_a_retain_only_model_that_lacks_the_rows():
    with pytest.raises(DataError, match="the retain-only log: mia_min_k is missing; privleak is measured against"):
        aggregate(FULL, {"forget_truth_ratio": RETAIN["forget_truth_ratio"]})


def test_a_retain_only_model_is_checked_before_it_is_needed():
    check_retain_only(RETAIN, ["forget_quality", "privleak"])
    check_retain_only({"mia_min_k": RETAIN["mia_min_k"]}, ["privleak"])
    with pytest.raises(
        DataError, match=r"R\.json: .*forget_truth_ratio has no rows .*; forget_quality is measured against"
    ):
        check_retain_only({"mia_min_k": RETAIN["mia_min_k"]}, ["forget_quality"], where="R.json")
    with pytest.raises(DataError, match=r"R\.json: mia_min_k.forget, row 0: expected a finite number"):
        check_retain_only({"mia_min_k": attack([math.nan], [1.0])}, ["privleak"], where="R.json")


def test_a_summary_holds_what_has_a_number():
    assert summary(RETAIN) == {
        metric: RETAIN[metric]["agg_value"] for metric in ("forget_truth_ratio", "mia_min_k", "privleak")
    }


def test_row_values_follow_the_rows():
    assert row_values(ROWS, "forget_Q_A_Prob", "avg_loss") == values_of("forget_Q_A_Prob", "avg_loss")
    means = [mean(losses) for losses in values_of("forget_Q_A_PERT_Prob", "avg_loss")]
    assert row_values(ROWS, "forget_Q_A_PERT_Prob", "avg_loss") == pytest.approx(means)
    with pytest.raises(DataError, match=r"R\.json: forget_Q_A_Prob is missing; expected an evaluation log"):
        row_values({}, "forget_Q_A_Prob", "avg_loss", where="R.json")


# There and back


def test_a_log_goes_there_and_back_bit_for_bit(tmp_path):
    write_log(FULL, tmp_path / "new" / "TOFU_EVAL.json")
    assert read_log(tmp_path / "new" / "TOFU_EVAL.json") == FULL
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["TOFU_EVAL.json"]
    reordered = dict(sorted(FULL.items(), reverse=True))
    write_log(reordered, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "TOFU_EVAL.json").read_bytes()


def test_a_log_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "L.json"
    write_log(RETAIN, path)
    with pytest.raises(DataError, match=r"L\.json holds a number that JSON cannot express"):
        write_log({"forget_quality": {"agg_value": math.nan}}, path)
    assert read_log(path) == RETAIN
    with pytest.raises(OutputError, match="could not be written"):
        write_log(RETAIN, path / "below")


def test_the_table_says_what_differs_and_what_is_left_out():
    log = {
        "extraction_strength": {**entry([0.25, 0.75]), "agg_value": 0.5},
        "exact_memorization": {**entry([0.5]), "agg_value": 0.25},
        "forget_Q_A_Prob": {**entry([0.5], "prob"), "agg_value": None},
        "my_metric": {"agg_value": 1.0},
    }
    lines = [" ".join(line.split()) for line in format_rescored(log, *rescore(log)).splitlines()]
    assert lines == [
        "metric recomputed as logged difference",
        "exact_memorization 0.5 0.25 2.5e-01",
        "extraction_strength 0.5 0.5 0",
        "forget_Q_A_Prob 0.5 - -",
        "my_metric left out: unknown metric: there is no rule to aggregate it",
    ]
