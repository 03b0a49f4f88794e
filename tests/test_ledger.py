"""The ledger: requests come, are taken back and become one adapter; history and disk are checked; nothing is lost."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import builders
import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_kill_points import killed_at

from peft_perta import AdapterError, ConfigError, DataError, Goal, OutputError, attach_adapters, load_base
from peft_perta.adapters import (
    LEDGER_NAME,
    add_request,
    check_ledger,
    list_requests,
    open_adapters,
    open_rows,
    read_ledger,
    rebuild_adapter,
    record_audit,
    record_rebuilt,
    withdraw_request,
)
from peft_perta.adapters.ledger.book import extended, replayed
from peft_perta.adapters.ledger.entries import Added, Rebuilt, Withdrawn, chained, read_entries
from peft_perta.cli import main
from peft_perta.data import load_samples
from peft_perta.evaluation import FORGOTTEN
from peft_perta.model import CONFIG_NAME, WEIGHTS_NAME, hash_factors

BASE = str(builders.llama_directory())
DAY = "2026-11-27"
ROWS = {"first": builders.forget_rows()[:3], "second": builders.forget_rows()[3:]}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A task adapter, an adapter for each of two requests below ``adapters``, and rows."""
    place = tmp_path_factory.mktemp("ledger")
    model = builders.trained(builders.adapted_saved_llama(), "task", builders.forget_rows() + builders.retain_rows())
    model.save_pretrained(place, selected_adapters=["task"])
    for name, rows in ROWS.items():
        builders.trained(model, "forget", rows)
        builders.negate(model, forget=rows, weighting="uniform").save(place / "adapters" / name)
    for name, rows in {**ROWS, "retain": builders.retain_rows()}.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


@pytest.fixture
def place(intact, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    monkeypatch.chdir(shutil.copytree(intact, tmp_path / "place"))
    return Path.cwd()


def add(name, **more):
    given = {"adapter": f"adapters/{name}", "forget": f"{name}.jsonl", "date": DAY, **more}
    return add_request("adapters", name, **given)


def withdraw(name):
    return withdraw_request("adapters", name, date=DAY)


def rebuild_of(*names, output="rebuilt", directory="adapters"):
    files = [part for name in names for part in ("--forget", f"{name}.jsonl")]
    goal = ["--task-adapter", "task", "--retain", "retain.jsonl", "--retain-tolerance", "0.2"]
    return ["ledger", "rebuild", directory, "--model", BASE, *files, *goal, "--output", output]


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def faults(**options):
    return [f"{check.name}: {check.found}" for check in check_ledger("adapters", **options) if check.failed]


# The law


@pytest.mark.parametrize(("taken", "left"), [("first", "second"), ("second", "first")])
def test_two_requests_of_which_one_is_taken_back_end_in_the_bytes_of_the_other_alone(taken, left, place):
    shutil.copytree("adapters", "alone")
    add_request("alone", left, adapter=f"alone/{left}", forget=ROWS[left])
    assert main(rebuild_of(left, directory="alone", output="out/alone")) == 0
    add("first")
    add("second")
    withdraw(taken)
    assert main(rebuild_of(left, output="out/both")) == 0
    assert contents("out/both") == contents("out/alone")


def test_of_one_request_it_is_what_calibrate_makes_of_its_adapter(place):
    add("first")
    assert main(rebuild_of("first")) == 0
    options = rebuild_of("first", output="calibrated")[3:]
    assert main(["calibrate", "--adapter", "adapters/first", *options]) == 0
    rebuilt, calibrated = (load_file(f"{name}/{WEIGHTS_NAME}") for name in ("rebuilt", "calibrated"))
    assert rebuilt.keys() == calibrated.keys()
    for key, of_one in deltas(calibrated).items():
        assert torch.allclose(deltas(rebuilt)[key], of_one, rtol=1e-6, atol=1e-9), key
    strengths = [json.loads(Path(f"{name}/perta_provenance.json").read_text()) for name in ("rebuilt", "calibrated")]
    assert strengths[0]["fused"]["calibration"] == strengths[1]["calibration"]


def deltas(tensors):
    return {
        key: tensors[key.replace("lora_A", "lora_B")] @ tensors[key] for key in tensors if key.endswith("lora_A.weight")
    }


def test_of_two_it_is_the_exact_sum_at_one_strength_and_the_model_is_as_it_was(place):
    add("first")
    add("second")
    adapters = open_adapters("adapters")
    base, tokenizer = load_base(BASE, dtype=torch.float32)
    model = attach_adapters(base, {"task": "task", **adapters})
    samples = [load_samples(rows, tokenizer) for rows in (open_rows("adapters", ["second.jsonl", "first.jsonl"]),
                                                          "retain.jsonl")]  # fmt: skip
    with laws.untouched(model):
        emitted = rebuild_adapter(model, "adapters", Goal(retain_tolerance=0.2), *samples, ["task"])
    parts = [deltas(load_file(path / WEIGHTS_NAME)) for path in adapters.values()]
    strength = emitted.provenance.calibration.strength
    assert strength > 0
    for key, delta in deltas(emitted.state_dict).items():
        assert torch.allclose(delta, strength * sum(part[key] for part in parts), rtol=1e-5, atol=1e-7), key
    assert [(part["name"], part["strength"]) for part in emitted.provenance.parts] == [
        ("first", strength), ("second", strength)]  # fmt: skip
    assert emitted.provenance.calibration.reached


def test_another_base_is_refused(place):
    add("first")
    base = load_base(BASE, dtype=torch.float32)[0]
    builders.flip_a_bit(base.model.embed_tokens.weight)
    base.model.embed_tokens.weight.data[0] += 1
    model = attach_adapters(base, open_adapters("adapters"))
    with pytest.raises(AdapterError, match="the model has other weights than the base"):
        rebuild_adapter(model, "adapters", Goal(retain_tolerance=0.2), [], [])


# Entries


def test_the_same_again_is_entered_once_and_writes_the_same_bytes(place):
    add("first")
    written = Path("adapters", LEDGER_NAME).read_bytes()
    add("first", date="2030-01-01")
    assert Path("adapters", LEDGER_NAME).read_bytes() == written
    withdraw("first")
    withdraw("first")
    assert [entry.action for entry in read_ledger("adapters").entries] == ["add", "withdraw"]
    add("first")
    (request,) = list_requests("adapters")
    assert request.withdrawn is None
    Path("adapters", LEDGER_NAME).unlink()
    add("first")
    assert Path("adapters", LEDGER_NAME).read_bytes() == written


def test_the_ledger_holds_no_row_and_names_adapters_by_where_they_lie_in_it(place):
    add("first")
    text = Path("adapters", LEDGER_NAME).read_text()
    assert not [value for row in ROWS["first"] for value in row.values() if value in text]
    assert str(place) not in text
    assert read_ledger("adapters").entries[0].adapter["path"] == "first"


def test_rows_are_told_by_what_they_say_and_not_by_how_they_are_written(place):
    add("first")
    rows = [dict(reversed(row.items())) for row in reversed(ROWS["first"])]
    Path("again.jsonl").write_text("\n\n".join(json.dumps(row, indent=None, separators=(",", ":")) for row in rows))
    assert open_rows("adapters", ["again.jsonl"]) == ROWS["first"]


def write_audit(factors, **changes):
    Path("audit.json").write_text(
        json.dumps({"verdict": FORGOTTEN, "because": f"{FORGOTTEN}: so it is", "yardstick": "retain-only", "rows": 40,
                    "adapters": {"task": 0.5, "x": 1}, "factors": ["0" * 64, factors], **changes})
    )  # fmt: skip
    return "audit.json"


def test_a_verdict_stands_beside_the_adapter_that_it_is_on(place, capsys):
    add("first")
    add("second")
    audit = audit_of("first")
    record_audit("adapters", audit, date=DAY)
    record_audit("adapters", audit, date="2026-11-28")  # the same again
    write_audit(hash_factors(place / "adapters" / "first"), rows=41)
    record_audit("adapters", audit, date="2026-12-01")
    request, other = list_requests("adapters")
    assert not other.audits
    assert [(entry.date, entry.audit["rows"]) for entry in request.audits] == [(DAY, 40), ("2026-12-01", 41)]
    assert main(["ledger", "list", "adapters"]) == 0
    assert f"2026-12-01  {FORGOTTEN}: so it is, on 41 rows" in capsys.readouterr().out


def test_the_adapter_of_all_stands_in_the_ledger_with_its_verdict(place, capsys):
    add("first")
    add("second")
    assert main([*rebuild_of("first", "second", output="adapters/all"), "--date", DAY]) == 0
    file, entered = Path("adapters", LEDGER_NAME), 3
    written = file.read_bytes()
    assert main([*rebuild_of("first", "second", output="adapters/all"), "--date", "2030-01-01"]) == 0
    assert file.read_bytes() == written
    assert faults() == []
    record_audit("adapters", audit_of("all"), date=DAY)
    ledger = read_ledger("adapters")
    assert len(ledger.entries) == entered + 1
    assert ledger.served.rebuilt.adapter["path"] == "all"
    assert [entry.audit["rows"] for entry in ledger.served.audits] == [40]
    assert not ledger.served.stale
    capsys.readouterr()
    withdraw("first")
    assert main(["ledger", "list", "adapters"]) == 0
    assert f"{DAY}  stale, requests came or were taken back since: all (" in capsys.readouterr().out
    assert faults() == [
        "the adapter of all: requests came or were taken back since adapters/all was made; rebuild it, or serve none"
    ]
    assert main([*rebuild_of("second", output="adapters/all"), "--date", DAY]) == 0
    assert faults() == []
    change_factors("all")
    assert faults() == ["the adapter of all: adapters/all holds other factors than those that were entered"]


def test_an_adapter_of_all_that_lies_elsewhere_is_not_entered(place, capsys):
    add("first")
    assert main(rebuild_of("first")) == 0
    assert "It does not lie below adapters, so the ledger does not hold it" in capsys.readouterr().out
    assert read_ledger("adapters").served is None


def test_a_request_that_comes_while_all_are_rebuilt_is_not_passed_over(place):
    seen = add("first").last
    add("second")
    with pytest.raises(AdapterError, match="requests came to adapters or were taken back while adapters/first was"):
        record_rebuilt("adapters", "adapters/first", seen=seen)


actions = st.lists(st.tuples(st.sampled_from(["add", "withdraw", "rebuild"]), st.sampled_from("abc")), max_size=12)


@given(actions)
def test_requests_are_what_the_history_leaves(history):
    """Against a dictionary, and through JSON."""
    entries, model = [], {}
    adapter = {"path": "x", "factors_sha256": "0" * 64, "config_sha256": "0" * 64,
               "base": {"name": None, "weights_sha256": None, "embeddings_sha256": None, "files": None}}  # fmt: skip
    stale = None
    for action, name in history:
        if action == "rebuild":
            entry = chained(Rebuilt(date=DAY, adapter=adapter), entries)
            if not any(model.values()):
                with pytest.raises(ValueError, match="no request is open"):
                    replayed(Path(), [*entries, entry])
                continue
            entries.append(entry)
            stale = False
            continue
        allowed = not model.get(name, False) if action == "add" else model.get(name, False)
        entry = Added(request=name, date=DAY, adapter=adapter, forget=["0" * 64])
        entry = chained(entry if action == "add" else Withdrawn(request=name, date=DAY), entries)
        if not allowed:
            with pytest.raises(ValueError, match=r"is open|is not open"):
                replayed(Path(), [*entries, entry])
            continue
        entries.append(entry)
        if action == "add":
            model.pop(name, None)
        model[name] = action == "add"
        stale = None if stale is None else True
    values = {"format": 1, "entries": json.loads(json.dumps([dataclasses.asdict(entry) for entry in entries]))}
    ledger = replayed(Path(), read_entries(values))
    assert {name: request.withdrawn is None for name, request in ledger.requests.items()} == model
    assert [request.name for request in ledger.open] == [name for name, is_open in model.items() if is_open]
    assert (ledger.served.stale if ledger.served else None) == stale


# Refusals

REFUSED = {
    "no rows": (lambda: add("first", forget=[]), DataError, "expected at least one row, found none"),
    "a row twice": (lambda: add("first", forget=ROWS["first"][:1] * 2), DataError, "row 2 is row 1 again"),
    "a row of no kind": (lambda: add("first", forget=[{"a": 1}]), DataError, "the forget rows, row 1: expected"),
    "no date": (lambda: add("first", date="today"), ConfigError, "expected a day as YYYY-MM-DD, found 'today'"),
    "two lines": (lambda: add("first\n", adapter="adapters/first", forget=ROWS["first"]), ConfigError, "another name"),
    "elsewhere": (lambda: add("first", adapter="task"), AdapterError, "does not lie below adapters"),
    "an adapter twice": (
        lambda: [add("first"), shutil.copytree("adapters/first", "adapters/copy"), add("copy", forget=ROWS["second"])],
        AdapterError, "copy holds the factors of the open request 'first'",
    ),
    "a row of another": (
        lambda: [add("first"), add("second", forget=ROWS["second"] + ROWS["first"][:1])],
        DataError, "row 3 of the request 'second' is in the open request 'first' too",
    ),
    "open with other rows": (
        lambda: [add("first"), add("first", forget=ROWS["second"])], AdapterError, "'first' is open with another",
    ),
    "another base": (
        lambda: [add("first"), of_another_base("second"), add("second")], AdapterError, "whose weights differ",
    ),
    "no ledger": (lambda: withdraw("first"), AdapterError, "found none; begin one with `peft-perta ledger add`"),
    "unknown": (lambda: [add("first"), withdraw("second")], AdapterError, "expected one of 'first'"),
    "an audit of nothing": (
        lambda: [add("first"), withdraw("first"), record_audit("adapters", audit_of("first"))],
        DataError, "neither an open request's nor the one that was rebuilt last",
    ),
    "an audit of another": (
        lambda: [add("first"), record_audit("adapters", audit_of("second"))],
        DataError, "neither an open request's nor the one that was rebuilt last",
    ),
    "an audit at another strength": (
        lambda: [add("first"), record_audit("adapters", write_audit("0" * 64, adapters={"task": 1, "x": 0.5}))],
        DataError, "is of the adapter at 0.5 times its strength",
    ),
    "no audit": (
        lambda: [add("first"), record_audit("adapters", "first.jsonl")], DataError, "no result of an au",
    ),
    "nothing open": (
        lambda: [add("first"), withdraw("first"), open_adapters("adapters")], AdapterError, "nothing to rebuild",
    ),
    "a changed adapter": (
        lambda: [add("first"), change_factors("first"), open_adapters("adapters")], AdapterError, "other factors than",
    ),
    "a row too few": (
        lambda: [add("first"), add("second"), open_rows("adapters", ["first.jsonl"])],
        DataError, "2 of the 2 rows of the request 'second' are in no file",
    ),
    "a row of nobody": (
        lambda: [add("first"), open_rows("adapters", ["first.jsonl", "retain.jsonl"])],
        DataError, "retain.jsonl, row 1 is of no request",
    ),
    "a row that was withdrawn": (
        lambda: [add("first"), add("second"), withdraw("second"), open_rows("adapters", ["second.jsonl"])],
        DataError, "is of the request 'second', which was withdrawn",
    ),
}  # fmt: skip


def of_another_base(name):
    file = Path("adapters", name, "perta_provenance.json")
    record = json.loads(file.read_text())
    record["base_model"] |= {"weights_sha256": "0" * 64}
    file.write_text(json.dumps(record))


def audit_of(name):
    return write_audit(hash_factors(Path("adapters", name)))


def change_factors(name):
    file = Path("adapters", name, WEIGHTS_NAME)
    tensors = load_file(file)
    builders.flip_a_bit(tensors[min(tensors)])
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, place):
    attempt, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        attempt()
    if Path("adapters", LEDGER_NAME).exists():  # of what came before
        assert len(read_ledger("adapters").entries) <= 3


def test_the_adapter_of_a_request_is_no_output(place, capsys):
    add("first")
    before = contents("adapters/first")
    assert main(rebuild_of("first", output="adapters/../adapters/first")) == 2
    assert "is the adapter of the request 'first'" in capsys.readouterr().err
    assert contents("adapters/first") == before


# Checks


def test_a_ledger_that_is_as_it_was_passes(place, capsys):
    add("first")
    seen = add("second").last
    withdraw("second")
    shutil.rmtree("adapters/second")  # a request that was taken back needs its adapter no more
    assert main(["ledger", "check", "adapters", "--seen", seen, "--forget", "first.jsonl"]) == 0
    assert "every check passed" in capsys.readouterr().out
    shutil.move("adapters", "moved")
    assert main(["ledger", "check", "moved"]) == 0


HISTORY = {
    "a date": lambda entries: entries[0].update(date="2020-01-01"),
    "a row": lambda entries: entries[0]["forget"].pop(),
    "the last entry": lambda entries: entries[-1].update(date="2020-01-01"),
    "a hash": lambda entries: entries[-1].update(sha256="0" * 64),
    "an entry left out": lambda entries: entries.pop(1),
    "the first left out": lambda entries: entries.pop(0),
    "two in another order": lambda entries: entries.insert(0, entries.pop(1)),
    "an entry twice": lambda entries: entries.append(entries[-1]),
    "a field more": lambda entries: entries[0].update(note="x"),
    "a path that leads out": lambda entries: entries[0]["adapter"].update(path="../task"),
}


@pytest.mark.parametrize("name", HISTORY)
def test_an_edit_of_the_history_is_found(name, place, capsys):
    add("first")
    add("second")
    withdraw("first")
    file = Path("adapters", LEDGER_NAME)
    values = json.loads(file.read_text())
    HISTORY[name](values["entries"])
    file.write_text(json.dumps(values))
    assert main(["ledger", "check", "adapters"]) == 1
    assert "perta_ledger.json is damaged (" in capsys.readouterr().out
    with pytest.raises(AdapterError, match="is damaged"):
        withdraw("second")


def test_a_history_that_was_cut_or_written_anew_is_found_by_the_hash_that_was_seen(place):
    add("first")
    seen = add("second").last
    file = Path("adapters", LEDGER_NAME)
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "entries": values["entries"][:1]}))
    assert faults() == []
    assert faults(seen=seen) == ["the history seen before: is not in this ledger"]


DISK = {
    "factors": (lambda: change_factors("first"), "first holds other factors than those that were entered"),
    "config": (
        lambda: Path("adapters/first", CONFIG_NAME).write_text(
            Path("adapters/first", CONFIG_NAME).read_text().replace('"lora_alpha": 8', '"lora_alpha": 16')
        ),
        "adapter_config.json is not as it was entered",
    ),
    "gone": (lambda: shutil.rmtree("adapters/first"), "first is gone"),
    "damaged": (lambda: Path("adapters/first", WEIGHTS_NAME).write_bytes(b"x"), "is damaged"),
    "another": (
        lambda: [shutil.rmtree("adapters/first"), shutil.copytree("task", "adapters/first")],
        "holds other factors than",
    ),
}


@pytest.mark.parametrize("name", DISK)
def test_a_change_on_the_disk_is_found(name, place):
    add("first")
    assert faults() == []
    change, message = DISK[name]
    change()
    (fault,) = faults()
    assert fault.startswith("request first: ")
    assert message in fault


def test_rows_and_the_base_are_checked(place, tmp_path):
    add("first")
    assert faults(forget=["first.jsonl"]) == []
    assert faults(forget=["second.jsonl"]) == [
        "the rows: second.jsonl, row 1 is of no request; give the rows of the open requests alone"
    ]
    other = shutil.copytree(BASE, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    assert faults(base=str(other)) == [f"the base: {str(other)!r} has other weights"]
    (unknown,) = [check for check in check_ledger("adapters", base="none/such") if check.name == "the base"]
    assert unknown.passed is None


# Two writers, and kills


def in_a_child(action):
    """The exit status of a forked process: 0 if the action ended, 2 if it was refused, 3 for anything else."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            action()
            status = 0
        except OutputError:
            status = 2
        finally:
            os._exit(status)
    return child


def test_one_process_writes_at_a_time(place):
    add("first")
    begun, end = os.pipe(), os.pipe()

    def hold():
        with extended(Path("adapters"), begins=False):
            os.write(begun[1], b"x")
            os.read(end[0], 1)

    holder = in_a_child(hold)
    os.read(begun[0], 1)
    with pytest.raises(OutputError, match=f"in use by process {holder}, which writes to it"):
        add("second")
    assert check_ledger("adapters")[0].passed  # whoever reads is not kept out
    os.write(end[1], b"x")
    assert os.waitpid(holder, 0)[1] == 0
    assert add("second").open[1].name == "second"


def test_writers_at_once_lose_no_entry(place):
    add("first")
    children = [in_a_child(lambda: [withdraw("first"), add("first")]) for _ in range(8)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(statuses) <= {0, 2}
    ledger = read_ledger("adapters")  # each entry follows the one before it
    assert len(ledger.entries) >= 1 + 2 * (0 in statuses)


STEPS = [
    (["add", "adapters", "first", "--adapter", "adapters/first", "--forget", "first.jsonl"], 1),
    (["add", "adapters", "second", "--adapter", "adapters/second", "--forget", "second.jsonl"], 2),
    (["audit", "adapters", "audit.json"], 3),
    (["withdraw", "adapters", "first"], 4),
    (["add", "adapters", "first", "--adapter", "adapters/first", "--forget", "first.jsonl"], 5),
]  # fmt: skip


def killed_on_the_way(place, moments):
    """Take the steps, and kill each at the moments that are given before it ends; the number of kills."""
    audit_of("second")
    kills, before = 0, []
    for arguments, count in STEPS:
        command = ["ledger", *arguments, "--date", DAY]
        for moment in moments(arguments):
            if not killed_at(moment, place, command):
                break
            kills += 1
            entries = read_ledger("adapters").entries if Path("adapters", LEDGER_NAME).exists() else []
            assert entries[: len(before)] == before, "an entry was lost"
            assert len(entries) in (len(before), count), "a step was taken in part"
        assert not killed_at(None, place, command)
        before = read_ledger("adapters").entries
        assert len(before) == count
        assert not list(place.rglob("*.partial")), "what was half-written is gone"
    assert [request.name for request in read_ledger("adapters").open] == ["second", "first"]
    return kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_each_change_of_a_file_and_run_again(place):
    main(["ledger", "list", "adapters"])  # imports are made here, not in each child
    assert killed_on_the_way(place, lambda _: range(1, 100)) > 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_kills_lose_nothing(intact, tmp_path, monkeypatch):
    """Of every action, ``rebuild`` too; at moments drawn at random, several times before the action ends."""
    draw, kills, run = random.Random(0), 0, 0
    main(["ledger", "list", "nowhere"])
    while kills < 200:
        run += 1
        place = shutil.copytree(intact, tmp_path / f"place-{run}")
        monkeypatch.chdir(place)
        kills += killed_on_the_way(place, lambda _: [draw.randint(1, 4) for _ in range(8)])
        if run == 1:
            history = Path("adapters", LEDGER_NAME).read_bytes()
            for moment in draw.sample(range(1, 13), 5):
                kills += killed_at(moment, place, rebuild_of("first", "second"))
                assert Path("adapters", LEDGER_NAME).read_bytes() == history
            assert not killed_at(None, place, rebuild_of("first", "second"))
            whole = contents("rebuilt")
            assert not killed_at(None, place, rebuild_of("first", "second"))
            assert contents("rebuilt") == whole
        assert faults(forget=["first.jsonl", "second.jsonl"]) == []
