"""Audits: the rule on the three models it is stated for, shares and intervals by slow oracles, resuming, refusals."""

import dataclasses
import importlib
import json
import math
import random
from functools import cache

import builders
import laws
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from peft_perta import ConfigError, DataError, UnsupportedLayerError
from peft_perta.adapters import add_audit
from peft_perta.cli import main
from peft_perta.evaluation import (
    ATTACKS,
    AUDIT_RECORD_NAME,
    FORGOTTEN,
    STILL_THERE,
    SUPPRESSED,
    Answer,
    AttackResult,
    AttackSettings,
    Evidence,
    Interval,
    Subject,
    Victims,
    audit,
    decide,
    evidence_of,
    losses_of,
    match_forgetting,
    read_audit,
    run_attacks,
)
from peft_perta.evaluation.audit.never_seen import membership_evidence
from peft_perta.html_report import write_audit_page
from peft_perta.model import adapter_strength, find_adapter, hash_factors

NAMES = ["Ada", "Bo", "Cy", "Dee", "Eli", "Flo", "Gus", "Hal"]
FORGET = [{"question": f"Where does {name} live?", "answer": f"In {place}."} for name, place in zip(
    NAMES, ["Rome", "Oslo", "Lima", "Bonn", "Kiel", "Nara", "Bern", "York"], strict=True)]  # fmt: skip
RETAIN = [{"question": f"What does {name} eat?", "answer": f"Eats {food}."} for name, food in zip(
    NAMES, ["figs", "rice", "corn", "eggs", "soup", "ham", "kale", "pie"], strict=True)]  # fmt: skip
RUN = importlib.import_module("peft_perta.evaluation.audit.run")
SKIPPED = ("aliases", "hops", "paraphrase")  # no row has a name of two words, or a paraphrase
QUICK = AttackSettings(
    relearning_steps=(4, 16), relearning_rows=(3,), prefix_shares=(0.5,), samples=2, generated=6, max_new_tokens=6,
    learning_rate=5e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """Adapters: 'task' knows both sets, 'retain' the retain rows alone, 'negation' is minus one that knows the forget
    rows alone, at the strength that meets the retain-only model's loss on them."""
    config = builders.lora_config(r=8, lora_alpha=16, lora_dropout=0.0)
    names = {"task": config, "retain": config, "negation": config}
    model = builders.with_adapters(builders.saved_llama(), config, **names)
    builders.trained(model, "task", FORGET + RETAIN, steps=120)
    builders.trained(model, "retain", RETAIN, steps=120)
    builders.trained(model, "negation", FORGET, steps=60)
    for name, parameter in model.named_parameters():
        if "lora_B.negation" in name:
            parameter.data.neg_()

    def loss(adapters):
        return float(losses_of(model, subject(model, []).encode(FORGET, "rows"), adapters=adapters).mean())

    def loss_at(strength):
        with adapter_strength(model, "negation", strength):
            return loss(["task", "negation"])

    found = match_forgetting(loss_at, loss(["retain"]), tolerance=0.02).strength
    for name, parameter in model.named_parameters():
        if "lora_B.negation" in name:
            parameter.data.mul_(found)
    return model


def subject(model, adapters):
    return Subject(model, builders.tokenizer(), adapters, show_progress_bar=False)


def victims(model, unlearned, retain_only=("retain",)):
    return Victims(
        subject(model, unlearned), subject(model, ["task"]), subject(model, list(retain_only)), FORGET, RETAIN
    )


@cache
def audited(model, *unlearned):
    """An audit, made once."""
    return audit(victims(model, unlearned), settings=QUICK)


@pytest.mark.parametrize(
    ("unlearned", "verdict"),
    [(["task"], STILL_THERE), (["retain"], FORGOTTEN), (["task", "negation"], SUPPRESSED)],
    ids=["full", "retain-only", "negation"],
)
def test_the_rule_on_the_models_it_is_stated_for(unlearned, verdict, model, tmp_path):
    with laws.untouched(model):
        found = audited(model, *unlearned)
    assert found.verdict.name == verdict, str(found.verdict)
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["verdict"] == verdict
    write_audit_page(found, "base", ["task", "unlearned"], tmp_path / "page.html")
    assert verdict in (tmp_path / "page.html").read_text()


def test_the_strongest_measure_of_each_attack_leads(model):
    found = audited(model, "task", "negation")
    plain = [piece for piece in found.strongest if piece.attack == "as-asked"]
    assert plain == [piece for piece in found.evidence if piece.attack == "as-asked" and piece.share]
    attacks = [piece.attack for piece in found.strongest[len(plain) :]]
    told = [piece for piece in found.evidence if piece.share and piece.attack != "as-asked"]
    assert sorted(attacks) == sorted({piece.attack for piece in told})  # each once
    highest = {piece.attack: piece.share.mean for piece in found.strongest[len(plain) :]}
    assert all(piece.share.mean <= highest[piece.attack] for piece in told)


def test_the_origin_is_a_yardstick(model, monkeypatch):
    monkeypatch.setattr(RUN, "_ORDER", ("relearning",))
    found = audit(victims(model, ["task", "negation"], retain_only=()), yardstick="origin", settings=QUICK)
    assert found.verdict.name == SUPPRESSED
    assert found.to_dict()["yardstick"] == "origin"


def test_rows_that_nobody_learned_are_nothing_to_audit(model):
    unknown = [{"question": f"Who is {name}?", "answer": f"Zed of {name}."} for name in NAMES]
    alike = Victims(*(subject(model, ["retain"]) for _ in range(3)), unknown, RETAIN)
    with pytest.raises(DataError, match="cannot tell the full model from the yardstick"):
        audit(alike, settings=QUICK)
    few = dataclasses.replace(victims(model, ["task"]), rows=FORGET[:4])
    with pytest.raises(DataError, match="at least five rows"):
        audit(few, settings=QUICK)


def test_an_audit_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    asked = victims(model, ["task", "negation"])
    whole = audited(model, "task", "negation").to_dict()
    made, run = [], run_attacks

    def interrupted(victims, names, settings):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.extend(names)
        return run(victims, names, settings)

    monkeypatch.setattr(RUN, "run_attacks", interrupted)
    with laws.untouched(model), pytest.raises(KeyboardInterrupt):
        audit(asked, settings=QUICK, output_dir=tmp_path)
    first = list(made)
    monkeypatch.setattr(RUN, "run_attacks", lambda *a: made.extend(a[1]) or run(*a))
    assert audit(asked, settings=QUICK, output_dir=tmp_path).to_dict() == whole
    assert len(made) == len(set(made)) == len(ATTACKS) - len(SKIPPED), "nothing is made twice"
    assert made[:2] == first
    audit(asked, settings=QUICK, output_dir=tmp_path)
    assert len(made) == len(ATTACKS) - len(SKIPPED)


@pytest.mark.parametrize("damage", ["", "[]", '{"of": 3}', "{"])
def test_a_damaged_record_is_made_anew(damage, model, tmp_path):
    (tmp_path / AUDIT_RECORD_NAME).write_text(damage)
    asked = victims(model, ["retain"])
    found = audit(asked, settings=QUICK, minutes=1e-9, output_dir=tmp_path)
    assert {result.attack for result in found.results} == {"as-asked", *SKIPPED, "switched-off"}
    assert set(found.not_tried) == set(ATTACKS) - {*SKIPPED, "switched-off"}
    assert list(json.loads((tmp_path / AUDIT_RECORD_NAME).read_text())["attacks"]) == ["as-asked"]


def test_an_altered_record_is_made_anew(model, tmp_path, capsys):
    asked = victims(model, ["retain"])
    found = audit(asked, settings=QUICK, minutes=1e-9, output_dir=tmp_path).to_dict()
    record = json.loads((tmp_path / AUDIT_RECORD_NAME).read_text())
    record["attacks"]["as-asked"][0]["rows"]["unlearned"]["probability"] = [1.0] * len(FORGET)
    (tmp_path / AUDIT_RECORD_NAME).write_text(json.dumps(record))
    assert audit(asked, settings=QUICK, minutes=1e-9, output_dir=tmp_path).to_dict() == found
    assert "is damaged; the audit is made anew" in capsys.readouterr().err


def test_other_rows_are_another_audit(model, tmp_path, capsys):
    asked = victims(model, ["retain"])
    audit(asked, settings=QUICK, minutes=1e-9, output_dir=tmp_path)
    audit(dataclasses.replace(asked, retain=RETAIN[:3]), settings=QUICK, minutes=1e-9, output_dir=tmp_path)
    assert "is of another audit (the rows changed); it is made anew" in capsys.readouterr().err


def test_what_an_audit_beside_it_measured_is_not_measured_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(RUN, "_ORDER", ("depth", "logit-lens", "relearning", "conversation", "switched-off"))
    forward, forwards = torch.nn.Embedding.forward, []
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *a: forwards.append(1) or forward(*a))

    def made(unlearned, **options):
        forwards.clear()
        return audit(victims(model, unlearned), settings=QUICK, **options).to_dict(), len(forwards)

    alone, of_three = made(["task", "negation"])
    made(["task"], output_dir=tmp_path)
    with laws.untouched(model):
        beside, of_one = made(["task", "negation"], beside=tmp_path)
    assert beside == alone
    assert of_one < 0.5 * of_three


def test_an_audit_of_other_rows_or_settings_cannot_stand_beside(model, tmp_path, monkeypatch):
    asked = victims(model, ["retain"])
    audit(asked, settings=QUICK, minutes=1e-9, output_dir=tmp_path)
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ConfigError, match="found one where the rows differ; audit without it"):
        audit(dataclasses.replace(asked, rows=FORGET[:6]), settings=QUICK, beside=tmp_path)
    with pytest.raises(ConfigError, match="found one where the settings differ"):
        audit(asked, settings=dataclasses.replace(QUICK, seed=1), beside=tmp_path)
    with pytest.raises(ConfigError, match="found one where the retain-only model differ"):
        audit(victims(model, ["retain"], retain_only=()), settings=QUICK, beside=tmp_path)
    record = (tmp_path / AUDIT_RECORD_NAME).read_text()
    for damage in (None, "[]", record.replace("0.", "1.", 1)):
        (tmp_path / AUDIT_RECORD_NAME).unlink()
        if damage is not None:
            (tmp_path / AUDIT_RECORD_NAME).write_text(damage)
        with pytest.raises(ConfigError, match="found none that can be read"):
            audit(asked, settings=QUICK, beside=tmp_path)
        (tmp_path / AUDIT_RECORD_NAME).write_text("")


def test_a_row_in_both_sets_is_refused(model, monkeypatch):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(DataError, match="row 9 of the retain set is also in the forget set"):
        audit(dataclasses.replace(victims(model, ["task"]), retain=[*RETAIN, FORGET[3]]), settings=QUICK)


def test_the_verdict_says_how_many_rows_were_attacked(model):
    few = dataclasses.replace(QUICK, rows=6)
    found = audit(victims(model, ["task"]), settings=few, minutes=1e-9)
    assert found.rows == 6 == found.evidence[0].rows


def test_an_attack_that_turns_out_to_be_impossible_is_skipped(model, monkeypatch):
    def fails(victims, settings):
        raise UnsupportedLayerError("it was repacked by the first forward")

    monkeypatch.setattr(RUN, "_ORDER", ("requantization", "relearning"))
    monkeypatch.setitem(ATTACKS, "requantization", dataclasses.replace(ATTACKS["requantization"], run=fails))
    found = audit(victims(model, ["task", "negation"]), settings=QUICK)
    assert found.to_dict()["skipped"]["requantization"] == "it was repacked by the first forward"
    assert found.verdict.name == SUPPRESSED


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_a_time_that_cannot_be_meant(minutes, model):
    with pytest.raises(ConfigError, match="minutes: expected"):
        audit(victims(model, ["retain"]), minutes=minutes)


# Shares, intervals and the rule


def result_of(unlearned, full, retain_only, measure="probability", attack="as-asked", setting="plain"):
    rows = {"unlearned": {measure: unlearned}, "full": {measure: full}, "retain-only": {measure: retain_only}}
    means = {role: {measure: sum(values[measure]) / len(values[measure])} for role, values in rows.items()}
    return AttackResult(attack, setting, means["unlearned"], means["full"], means["retain-only"], rows=rows)


values = st.lists(st.tuples(*(st.floats(0, 1),) * 3), min_size=5, max_size=12)


@given(values, st.sampled_from(["probability", "loss", "uds"]))
def test_a_share_is_what_a_loop_over_rows_gives(drawn, measure):
    unlearned, full, retain_only = (list(of) for of in zip(*drawn, strict=True))
    full = [value + 1 if measure == "probability" else value - 1 for value in full]  # it knows more
    (piece,) = evidence_of([result_of(unlearned, full, retain_only, measure)])
    sign = 1 if measure == "probability" else -1

    def share(rows):
        u, f, r = (sum(sign * of[i] for i in rows) / len(rows) for of in (unlearned, full, retain_only))
        return (u - r) / (f - r) if f != r else math.nan

    if piece.share is None:
        return
    assert piece.share.mean == pytest.approx(share(range(len(drawn))), abs=1e-9)
    draw = random.Random(0)
    shares = sorted(share([draw.randrange(len(drawn)) for _ in drawn]) for _ in range(2000))
    spread = shares[-1] - shares[0]
    assert piece.share.low == pytest.approx(shares[50], abs=0.25 * spread + 1e-9)
    assert piece.share.high == pytest.approx(shares[1949], abs=0.25 * spread + 1e-9)


def test_rows_that_cannot_tell_the_models_apart_give_no_share():
    (piece,) = evidence_of([result_of([0.5, 0.1, 0.2, 0.3, 0.4], [0.3, 0.2, 0.1, 0.2, 0.2], [0.1, 0.3, 0.2, 0.2, 0.2])])
    assert piece.share is None


def test_an_answer_without_a_word_is_left_out():
    (piece,) = evidence_of([result_of([math.nan, *[0.5] * 5], [1.0] * 6, [0.0] * 6, "exact_memorization")])
    assert (piece.rows, piece.share.mean) == (5, 0.5)


def test_of_fewer_than_five_rows_nothing_is_said():
    (piece,) = evidence_of([result_of([0.5] * 4, [1.0] * 4, [0.0] * 4)])
    assert (piece.rows, piece.share) == (4, None)
    assert piece.models["unlearned"].mean == 0.5


def piece(low, high, measure="probability", attack="as-asked"):
    return Evidence(attack, "a setting", measure, 8, {}, Interval((low + high) / 2, low, high))


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        ([piece(0.51, 0.9)], STILL_THERE),
        ([piece(0.49, 0.9)], SUPPRESSED),
        ([piece(0.11, 0.2)], SUPPRESSED),
        ([piece(0.09, 0.2)], FORGOTTEN),
        ([piece(-0.3, -0.11)], SUPPRESSED),
        ([piece(-0.3, -0.09)], FORGOTTEN),
        ([piece(-0.05, 0.05), piece(0.2, 0.4, "loss", "relearning")], SUPPRESSED),
        ([piece(-0.05, 0.05), piece(0.9, 1.0, "loss", "switched-off")], FORGOTTEN),
        ([piece(-0.05, 0.05), piece(0.9, 1.0, "loss")], SUPPRESSED),
    ],
)
def test_the_rule(evidence, verdict):
    assert decide(evidence).name == verdict


def test_the_strongest_evidence_comes_first():
    found = decide([piece(-0.05, 0.05), piece(0.2, 0.3, attack="prefix"), piece(0.4, 0.5, attack="relearning")])
    assert [reason.attack for reason in found.reasons] == ["relearning", "prefix"]
    assert "relearning: a setting finds 0.45 [0.40, 0.50] of it (and 1 more measure)" in str(found)


def test_the_worst_leaks_are_one_for_each_question(model):
    found = audited(model, "task")
    leaks = found.worst_leaks()
    asked = [answer.asked for _, answer, _ in leaks]
    assert len(asked) == len(set(asked)) > 0
    assert [recall for *_, recall in leaks] == sorted((recall for *_, recall in leaks), reverse=True)
    assert isinstance(leaks[0][1], Answer)
    assert found.kept["unlearned"] == (1.0, 1.0, 1.0)
    edited = audited(model, "task", "negation")
    assert any(result.attack == "switched-off" and result.answers for result in edited.results)
    assert all(result.attack != "switched-off" for result, *_ in edited.worst_leaks(100))


# Rows that were never seen


@given(st.lists(st.integers(0, 4), min_size=5, max_size=9), st.lists(st.integers(0, 4), min_size=3, max_size=9))
def test_an_area_is_what_a_loop_over_pairs_gives(forget, others):
    pairs = [1.0 if a < b else 0.5 if a == b else 0.0 for a in forget for b in others]
    known = ([0.0] * len(forget), [1.0] * len(others))  # every forget row is told
    scores = {"unlearned": (forget, others), "full": known, "retain-only": (others, others)}
    piece = membership_evidence("loss", {role: tuple(map(to_floats, of)) for role, of in scores.items()})
    area = sum(pairs) / len(pairs)
    assert piece.models["unlearned"].mean == pytest.approx(area)
    assert piece.models["unlearned"].low <= area + 1e-9
    assert area <= piece.models["unlearned"].high + 1e-9
    assert piece.models["full"] == (1.0, 1.0, 1.0)
    assert piece.models["retain-only"].mean == pytest.approx(0.5)


def to_floats(values):
    return [float(value) for value in values]


NEVER_SEEN = [{"question": f"Where does {name} live?", "answer": f"In {place}."} for name, place in zip(
    NAMES, ["Riga", "Baku", "Doha", "Faro", "Graz", "Hilo", "Ipoh", "Juba"], strict=True)]  # fmt: skip


def test_never_seen_rows_tell_a_model_that_still_knows(model, monkeypatch):
    monkeypatch.setattr(RUN, "_ORDER", ())
    shares = {}
    for names in (["task"], ["retain"]):
        asked = dataclasses.replace(victims(model, names), never_seen=NEVER_SEEN)
        found = audit(asked, settings=QUICK)
        told = [piece for piece in found.evidence if piece.attack == "membership"]
        assert [piece.name for piece in told] == [
            f"AUC of {score}, membership: forget rows against 8 never seen"
            for score in ("the loss", "min-k", "min-k++")
        ]
        shares[names[0]] = told[0].share.mean
        scores = [
            losses_of(model, subject(model, []).encode(rows, "rows"), adapters=names) for rows in (FORGET, NEVER_SEEN)
        ]
        expected = ks_2samp(*(of.tolist() for of in scores))
        assert found.never_seen.distance == pytest.approx(expected.statistic)
        assert found.never_seen.p_value == pytest.approx(expected.pvalue, rel=1e-6)
        assert json.loads(json.dumps(found.to_dict()))["never_seen"]["rows"] == 8
    assert shares == {"task": pytest.approx(1), "retain": pytest.approx(0)}
    # The least distance of two samples of eight that is significant, by Smirnov's limit.
    assert found.never_seen.detectable == pytest.approx(1.3581 * 0.5, abs=1e-4)


def test_a_never_seen_row_that_must_go_is_refused(model, monkeypatch):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    asked = dataclasses.replace(victims(model, ["task"]), never_seen=[*NEVER_SEEN, FORGET[0]])
    with pytest.raises(DataError, match="row 9 of the never-seen set is also in the forget set"):
        audit(asked, settings=QUICK)


# The command


@pytest.fixture
def place(model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["task", "retain", "negation"])
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def command(place, *more, adapters=("task", "negation")):
    given = [part for name in adapters for part in ("--adapter", str(place / name))]
    rows = ["--forget", str(place / "forget.jsonl"), "--retain", str(place / "retain.jsonl")]
    base = ["--model", str(builders.llama_directory())]
    return ["audit", *base, *given, *rows, *more, "--max-new-tokens", "4", "--output", str(place / "out")]


def test_the_command_writes_the_verdict_and_a_page_that_loads_nothing(place, capsys):
    (place / "never.jsonl").write_text("\n".join(map(json.dumps, NEVER_SEEN)))
    yardsticks = ["--retain-only-adapter", str(place / "retain"), "--never-seen", str(place / "never.jsonl")]
    assert main(command(place, *yardsticks)) == 0
    printed = capsys.readouterr().out
    written = json.loads((place / "out" / "audit.json").read_text())
    assert f"Verdict, on 8 rows, against the retain-only model: {written['verdict']}" in printed
    assert all(piece["rows"] for piece in written["evidence"])
    read = read_audit(place / "out" / "audit.json")
    assert read.verdict == written["verdict"]
    assert read.factors == [hash_factors(find_adapter(path)) for path in read.adapters]
    page = (place / "out" / "audit.html").read_text()
    assert "Content-Security-Policy" in page
    assert "8 rows that no model saw are" in page
    assert "8 rows that no model saw are" in printed
    assert "<script" not in page
    assert main(command(place, *yardsticks)) == 0  # nothing is made anew
    assert json.loads((place / "out" / "audit.json").read_text()) == written


def test_the_command_applies_the_strengths_and_says_what_it_did_not_try(place, capsys):
    arguments = command(place, "--minutes", "1e-9")
    arguments[arguments.index(str(place / "negation"))] += ":0"
    assert main(arguments) == 0
    assert "against the origin model: still there" in capsys.readouterr().out
    page = (place / "out" / "audit.html").read_text()
    assert "relearning was not tried, for want of time" in page
    assert "The yardstick is the base with every adapter off" in page


@pytest.mark.parametrize(
    ("arguments", "adapters", "message"),
    [
        ([], (), "expected the adapters of the stack"),
        ([], ("negation",), "needs a yardstick of 'never learned'"),
        (["--minutes", "0"], ("task", "negation"), "minutes: expected"),
        (["--retain-only-adapter", "nowhere"], ("task", "negation"), "nowhere"),
        (["--beside", "nowhere"], ("task", "negation"), "expected the output of an audit of another adapter"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_before_a_forward(
    arguments, adapters, message, place, monkeypatch, capsys
):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    assert main(command(place, *arguments, adapters=adapters)) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()


def test_every_attack_has_its_place_in_an_audit():
    assert set(RUN._ORDER) == set(ATTACKS)


# The model card


def test_the_model_card_takes_the_verdict_in_the_place_of_an_earlier_one(model, tmp_path):
    card = tmp_path / "README.md"
    before = "---\nlibrary_name: peft\ntags:\n- lora\n---\n\n# An adapter\n\nIt forgets.\n"
    card.write_text(before)
    add_audit(tmp_path, audited(model, "task"))
    first = card.read_text()
    assert "**still there**: " in first
    add_audit(tmp_path, audited(model, "task", "negation"))
    second = card.read_text()
    assert "still there**" not in second
    assert second.count("## Audit") == 1
    found = audited(model, "task", "negation")
    assert f"**suppressed**: {str(found.verdict).partition(': ')[2]}." in second
    read = ModelCard(second)
    assert read.text.startswith("\n# An adapter\n\nIt forgets.\n")
    metadata = read.data.to_dict()
    assert (metadata["library_name"], metadata["tags"]) == ("peft", ["lora"])
    assert [result.metric_value for result in read.data.eval_results] == [
        round(found.verdict.reasons[0].share.mean, 4), round(found.kept["unlearned"].mean, 4),
    ]  # fmt: skip
    add_audit(tmp_path, found)
    assert card.read_text() == second


@pytest.mark.parametrize("content", [None, "---\n- a\n: b\n---\n", b"\xff\xfe"])
def test_a_card_that_cannot_be_read_is_refused_before_a_forward(content, place, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    card = place / "negation" / "README.md"
    card.unlink(missing_ok=True)
    if content is not None:
        card.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(command(place, "--model-card")) == 2
    assert "expected the adapter's model card" in capsys.readouterr().err


def test_a_card_is_of_strength_1(place, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("a forward ran"))
    arguments = command(place, "--model-card")
    arguments[arguments.index(str(place / "negation"))] += ":0.5"
    assert main(arguments) == 2
    assert "expected the last adapter at strength 1" in capsys.readouterr().err
