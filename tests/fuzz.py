"""Damage files at random, and read them: a reader must accept what it gets, or raise an error of ours.

Every input has a number, from which all of it is drawn. An input fails if a reader raises anything else, takes longer
than ``SECONDS``, needs more than ``MEMORY``, or prints a traceback.

    python tests/fuzz.py --minutes 60            all kinds of file
    python tests/fuzz.py --kind rows --input 17  one input again, with its traceback
"""

from __future__ import annotations

import conftest  # noqa: F401  # isort: skip - first: offline, one thread

import argparse
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import builders
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import test_gguf
import test_suites_choices
import test_suites_muse
import test_suites_rwku
import test_suites_tofu
import torch
from damage import damaged
from datasets import Dataset

from peft_perta import cli, load_base, save_perta_adapter
from peft_perta.adapters import (
    FusedProvenance,
    InfluenceProvenance,
    RefinedProvenance,
    TrainedProvenance,
    add_request,
    load_emitted,
    open_adapters,
    read_provenance,
    record_audit,
    record_rebuilt,
)
from peft_perta.adapters.model_card import model_card
from peft_perta.comparison import ComparisonSettings
from peft_perta.data import batches, load_samples, read_json
from peft_perta.errors import PerTAError
from peft_perta.evaluation import FORGOTTEN, AttackResult, Calibration, Log, aggregate, evaluate, evidence_of, read_log
from peft_perta.evaluation.attacks.attack import Answer
from peft_perta.evaluation.audit.run import AuditRecord
from peft_perta.gradients import Checkpoint
from peft_perta.html_report import ReportHeader, report_data_of_logs, write_html_report
from peft_perta.job import read_recipe, recipe_of
from peft_perta.model import hash_factors, sample_losses

SECONDS = 30
MEMORY = 4 * 2**30  # bytes that a process may allocate
OF_A_PROCESS = 200  # inputs that one process reads


class Slow(BaseException):
    """A reader took longer than ``SECONDS``."""


class Kind(NamedTuple):
    """One kind of file.

    Attributes:
        build: writes intact files into an empty directory.
        files: a pattern of those that are damaged, one at a time.
        read: reads the directory, as commands do.
    """

    build: Callable[[Path], object]
    files: str
    read: Callable[[Path], object]


class Finding(NamedTuple):
    """An input that failed."""

    kind: str
    number: int
    file: str
    fault: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.kind} {self.number} ({self.file}): {self.fault}"


refusals: list[str] = []  # what readers refused since the list was last cleared


def command(*arguments: object) -> None:
    """Run a command. What it does not foresee is raised; its own errors are refusals."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        raise AssertionError("the command does not know these options") from error
    if status:
        refusals.append(" ".join(map(str, arguments)))


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    """An error of ours is a refusal."""
    try:
        yield
    except PerTAError as error:
        refusals.append(str(error))


def _raised(error: Exception) -> str:
    raise error


@functools.cache
def model() -> torch.nn.Module:
    return load_base(str(builders.llama_directory()), dtype=torch.float32)[0]


def _emitted(place: Path) -> None:
    adapted = builders.adapted_saved_llama()
    adapted.save_pretrained(place, selected_adapters=["forget"])
    save_perta_adapter(place / "mine", *builders.negate(adapted, weighting="uniform"))


def _read_adapter(place: Path) -> None:
    command("verify", place / "mine")
    command("inspect", place / "mine")
    base = str(builders.llama_directory())
    command(
        "fuse", place / "mine", f"{place / 'forget'}:2", "--model", base, "--rank", "2", "--output", place / "fused"
    )
    command("merge", place / "mine", "--model", base, "--output", place / "merged")


def _read_provenance(place: Path) -> None:
    command("verify", place / "mine")
    command("inspect", place / "mine")
    with _ours():
        load_emitted(place / "mine").save(place / "again")
    with _ours():
        report = report_data_of_logs({}, ReportHeader("title", "base", [str(place / "mine")]))
        write_html_report(report, place / "page.html")


def _records(place: Path) -> None:
    """Each other kind of provenance, as its dataclass writes it."""
    base = {"name": "base", "revision": None, "quantization": None}
    adapter, data = {"name": "task", "sha256": "a" * 64}, {"samples": 4, "sha256": "b" * 64}
    sets, point = {"forget": data, "retain": data}, {"forget": 2.0, "retain": 1.0}
    goal = {"target_forget_loss": 2.0, "retain_tolerance": None}
    calibration = Calibration(goal, 2.0, 1.5, point, [{"strength": 0.0, **point}, {"strength": 1.5, **point}])
    weights = {"forget_weight": 1.0, "retain_weight": 1.0, "target_forget_loss": 2.0}
    records = (
        FusedProvenance(base, [{**adapter, "strength": 1.0}], 4, 1.0, calibration=calibration),
        TrainedProvenance(
            {"forget_loss": "npo", "retain_loss": "nll", "combiner": "sum", **weights},
            {"steps": 6, "global_batch": 2, "learning_rate": 1e-3, "seed": 0},
            base, adapter, "task", sets, {"cosine": 0.5}, 4, "float32", {"torch": "2"}, [{"step": 0, **point}],
        ),
        InfluenceProvenance(
            "erase_instances", {"curvature": "ggn", "tolerance": 1e-5}, base, adapter,
            {"training": data, "changed": data}, 0.1, 1e-6, 12, "tolerance", {"forget": [1.0, 2.0]}, {}, [adapter],
        ),
        RefinedProvenance(
            base, adapter, None, sets, {"retain_weight": 1.0, "damping": 0.01, "dtype": "float32"},
            {"model.layers.0.q_proj": {"forget": 0.9, "retain": 0.1}}, [], 4, {},
        ),
    )  # fmt: skip
    for record in records:
        (place / f"{record.KEY}.json").write_text(json.dumps(record.to_dict()), encoding="utf-8")


def _read_records(place: Path) -> None:
    for file in sorted(place.glob("*.json")):
        try:
            record = read_provenance(read_json(file))
        except ValueError as error:  # what its callers make an error of ours
            refusals.append(str(error))
        else:
            assert str(record)
            assert model_card(record)


def _rows(place: Path) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ned"}]
    conversations = [
        {"messages": turns, "tools": [{"type": "function"}], "chat_template_kwargs": {"a": 1}},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    for name, rows in (("texts", builders.forget_rows()), ("conversations", conversations)):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _read_rows(place: Path) -> None:
    for name, chat in (("texts", False), ("texts", True), ("conversations", True)):
        with _ours():
            samples = load_samples(place / f"{name}.jsonl", builders.tokenizer(chat), max_length=64)
            for batch in batches(samples, 8):
                sample_losses(model(), batch)


def _tables(place: Path) -> None:
    table = pyarrow.Table.from_pylist(builders.forget_rows())
    pyarrow.parquet.write_table(table, place / "rows.parquet")
    pyarrow.csv.write_csv(table, place / "rows.csv")
    content = (place / "rows.csv").read_bytes()
    (place / "rows.csv.gz").write_bytes(gzip.compress(content, mtime=0))
    (place / "list.json").write_text(json.dumps(builders.forget_rows()), encoding="utf-8")
    (place / "saved").mkdir()
    Dataset(table).save_to_disk(place / "saved")


def _read_tables(place: Path) -> None:
    for name in ("rows.parquet", "rows.csv", "rows.csv.gz", "list.json", "saved"):
        with _ours():
            load_samples(f"{place / name}[train[:50%]]", builders.tokenizer(), max_length=64)


def _suites(place: Path) -> None:
    test_suites_tofu.write(place / "tofu", test_suites_tofu.SPLITS)
    test_suites_muse.write(place / "muse")
    test_suites_rwku.write(place / "rwku")
    lines = [json.dumps(row) for row in test_suites_choices.ROWS]
    (place / "choices.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _read_suites(place: Path) -> None:
    for name in ("tofu", "muse", "rwku", "choices"):
        path = place / name if (place / name).is_dir() else place / f"{name}.jsonl"
        with _ours():
            evaluate(model(), builders.tokenizer(), {name: path}, rows=1, max_new_tokens=1, show_progress_bar=False)


def _logs(place: Path) -> None:
    for name in ("full", "retain_only"):
        rows = {str(i): {"prob": 0.5, "avg_loss": 0.7 + i / 10} for i in range(3)}
        spoken = {
            str(i): {"rougeL_recall": 0.5, "input": "Who?", "ground_truth": "Ned", "generation": "Bo"} for i in range(3)
        }
        ratios = {key: {"score": 0.4, "correct": {"avg_loss": 1.0}, "wrong": {"avg_loss": [2.0, 1.5]}} for key in rows}
        area = {"forget": {"agg_value": 1.0, "value_by_index": {"0": {"score": 0.1}}}, "auc": 0.4, "agg_value": 0.4}
        log = {
            "forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": rows},
            "forget_Q_A_ROUGE": {"agg_value": 0.5, "value_by_index": spoken},
            "forget_truth_ratio": {"agg_value": 0.4, "value_by_index": ratios},
            "retain_Truth_Ratio": {"agg_value": 0.4, "value_by_index": ratios},
            "mia_loss": {**area, "holdout": area["forget"]},
        }
        (place / f"{name}.json").write_text(json.dumps(log), encoding="utf-8")


def _read_logs(place: Path) -> None:
    command("rescore", place / "full.json", "--retain-only-log", place / "retain_only.json", "--output", place / "new")
    with _ours():
        logs: dict[str, dict[str, Log]] = {
            label: {"tofu": read_log(place / f"{name}.json")}
            for label, name in (("full", "full"), ("retain-only", "retain_only"))
        }
        aggregate(logs["full"]["tofu"], logs["retain-only"]["tofu"])
        write_html_report(report_data_of_logs(logs, ReportHeader("title", "base")), place / "page.html")


def _settings(place: Path) -> None:
    (place / "settings.json").write_text(json.dumps(ComparisonSettings.own().to_dict()), encoding="utf-8")


def _read_settings(place: Path) -> None:
    with _ours():
        ComparisonSettings.read(place / "settings.json")


def _recipe(place: Path) -> None:
    sections = {"train": {"learning_rate": 1e-3}, "refine": {"damping": 0.02}, "judging": {"rows": 4}}
    recipe = recipe_of({"model": "base", "forget": "f.jsonl", "retain": "r.jsonl", "method": "npo", **sections})
    (place / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    values = dataclasses.asdict(recipe)
    (place / "recipe.json").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML, damaged value by value


def _read_recipe(place: Path) -> None:
    for name in ("recipe.yaml", "recipe.json"):
        with _ours():
            recipe_of(read_recipe(place / name)).to_yaml()


OF = {"the rows": "a"}


def _audit(place: Path) -> None:
    rows = {role: {"probability": [0.5, 0.25]} for role in ("unlearned", "full", "retain-only")}
    numbers = {"probability": 0.375}
    result = AttackResult(
        "as-asked", "plain", numbers, numbers, numbers, rows=rows, answers=[Answer("Who?", "Ned", "Bo")]
    )
    AuditRecord(place, OF).add("as-asked", [result])


def _read_audit(place: Path) -> None:
    for results in AuditRecord(place, OF).found.values():
        assert evidence_of(results)


def _ledger(place: Path) -> None:
    _emitted(place)
    rows = place / "forget.jsonl"
    rows.write_text("\n".join(map(json.dumps, builders.forget_rows())), encoding="utf-8")
    result = {
        "verdict": FORGOTTEN, "because": f"{FORGOTTEN}: so it is", "yardstick": "origin", "rows": 40,
        "adapters": {"mine": 1.0}, "factors": [hash_factors(place / "mine")],
    }  # fmt: skip
    (place / "audit.json").write_text(json.dumps(result), encoding="utf-8")
    for directory, forget in (("mine", rows), ("forget", [ROW])):
        seen = add_request(place, directory, adapter=place / directory, forget=forget, date="2026-11-27").last
    record_audit(place, place / "audit.json", date="2026-11-27")
    record_rebuilt(place, place / "forget", seen=seen, date="2026-11-27")


ROW = {"question": "Who?", "answer": "Ned"}


def _read_ledger(place: Path) -> None:
    command("ledger", "list", place)
    command("ledger", "check", place)
    command("ledger", "audit", place, place / "audit.json", "--date", "2026-11-27")
    with _ours():
        open_adapters(place)
    command("ledger", "withdraw", place, "mine")


RUN = {"format": 1, "data": {"forget": "a"}, "config": {"rank": None}}


def _checkpoint(place: Path) -> None:
    checkpoint = Checkpoint(place / "checkpoint", RUN)
    checkpoint.save("sums", {("layer", "A"): torch.ones(2, 3), ("layer", "B"): torch.ones(3, 2)}, {"samples": 4})


def _read_checkpoint(place: Path) -> None:
    with _ours():
        checkpoint = Checkpoint(place / "checkpoint", RUN)
        for name in checkpoint.names():
            checkpoint.load(name)
        checkpoint.save("more", {("layer",): torch.ones(1)}, {})


def _interrupted(place: Path) -> None:
    builders.adapted_saved_llama().save_pretrained(place, selected_adapters=["forget"])
    for name, rows in (("forget", builders.forget_rows()), ("retain", builders.retain_rows())):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    save, saved = Checkpoint.save, []

    def interrupted(self: Checkpoint, name: str, *parts: object) -> None:
        save(self, name, *parts)
        saved.append(name)
        if len(saved) == 3:
            raise KeyboardInterrupt

    Checkpoint.save = interrupted
    try:
        _unlearn(place)
    finally:
        Checkpoint.save = save


def _unlearn(place: Path) -> None:
    rows = ("--forget", place / "forget.jsonl", "--retain", place / "retain.jsonl")
    base = builders.llama_directory()
    command("unlearn", "--model", base, "--forget-adapter", place / "forget", *rows, "--output", place / "out")


def _base(place: Path) -> None:
    shutil.copytree(builders.llama_directory(), place / "base")
    builders.tokenizer(chat=True).save_pretrained(place / "base")


def _read_base(place: Path) -> None:
    with _ours():
        loaded, tokenizer = load_base(str(place / "base"), dtype=torch.float32)
        samples = load_samples(builders.forget_rows(), tokenizer, max_length=64)
        for batch in batches(samples, 8):
            sample_losses(loaded, batch)


def _gguf(place: Path) -> None:
    test_gguf.write_gguf(place / "tiny.gguf", test_gguf.llama())


def _read_gguf(place: Path) -> None:
    with _ours():
        load_base(str(place / "tiny.gguf"), dtype=torch.float32)


KINDS = {
    "adapter": Kind(_emitted, "mine/adapter_*", _read_adapter),
    "provenance": Kind(_emitted, "mine/perta_provenance.json", _read_provenance),
    "records": Kind(_records, "*.json", _read_records),
    "rows": Kind(_rows, "*.jsonl", _read_rows),
    "tables": Kind(_tables, "**/*", _read_tables),
    "suites": Kind(_suites, "**/*.json*", _read_suites),
    "logs": Kind(_logs, "*.json", _read_logs),
    "audit": Kind(_audit, "*.json", _read_audit),
    "ledger": Kind(_ledger, "[ap]*.json", _read_ledger),
    "recipe": Kind(_recipe, "recipe.*", _read_recipe),
    "settings": Kind(_settings, "*.json", _read_settings),
    "checkpoint": Kind(_checkpoint, "checkpoint/*[!k]", _read_checkpoint),
    "interrupted run": Kind(_interrupted, "out.checkpoint/*[!k]", _unlearn),
    "base": Kind(_base, "base/*", _read_base),
    "gguf": Kind(_gguf, "*.gguf", _read_gguf),
}


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Within ``SECONDS``, silent, and with unforeseen errors raised."""

    def stop(*_: object) -> None:
        raise Slow(f"slower than {SECONDS} s")

    report, handler = cli._report_of, signal.signal(signal.SIGALRM, stop)
    cli._report_of = _raised
    signal.alarm(SECONDS)
    silent = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        cli._report_of = report


def findings(kind_name: str, numbers: Sequence[int]) -> Iterator[Finding | None]:
    """For each of the numbered inputs what went wrong, or None."""
    kind = KINDS[kind_name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        intact, place = Path(scratch, "intact"), Path(scratch, "place")
        intact.mkdir()
        with _limited():
            kind.build(intact)
        shutil.copytree(intact, place)
        refusals.clear()
        with _limited():
            kind.read(place)
        assert not refusals, f"intact files are refused: {refusals[0]}"
        files = sorted(path.relative_to(intact) for path in intact.glob(kind.files) if path.is_file())
        for number in numbers:
            draw = random.Random(f"{kind_name} {number}")
            file = draw.choice(files)
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(intact, place)
            (place / file).write_bytes(damaged(file.name, (intact / file).read_bytes(), draw))
            try:
                with _limited():
                    kind.read(place)
            except (Exception, Slow) as error:
                fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                yield Finding(kind_name, number, str(file), fault, traceback.format_exc())
            else:
                yield None


def main() -> int:
    """Read inputs until the time is over; the status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--input", type=int, help="read this one, and show its traceback")
    parser.add_argument("--inputs", type=int, nargs=2, metavar=("FIRST", "LAST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.input is not None:
        found = next(findings(options.kind, [options.input]))
        print(found and found.traceback)
        return int(found is not None)
    if options.inputs:
        return _read_few(options.kind, range(*options.inputs))
    return _read_many([options.kind] if options.kind else list(KINDS), options.minutes)


def _read_few(kind: str, numbers: Sequence[int]) -> int:
    """Read inputs in this process, with limited memory, and print what failed."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    failed = 0
    for number, found in zip(numbers, findings(kind, numbers), strict=True):
        print(f"at {number}", file=sys.stderr, flush=True)
        if found:
            failed += 1
            print(found, found.traceback, sep="\n", flush=True)
    return int(failed > 0)


def _read_many(kinds: Sequence[str], minutes: float) -> int:
    """Read inputs in processes of their own, so that a crash is a finding too."""
    end, first, failed, read = time.monotonic() + 60 * minutes, 0, 0, 0
    while time.monotonic() < end:
        for kind in kinds:
            inputs = ("--kind", kind, "--inputs", str(first), str(first + OF_A_PROCESS))
            done = subprocess.run([sys.executable, __file__, *inputs], capture_output=True, text=True, check=False)
            read += OF_A_PROCESS
            print(done.stdout, end="", flush=True)
            if done.returncode not in (0, 1):
                print(f"{kind}: the process ended with {done.returncode}: {done.stderr[-2000:]}", flush=True)
            failed += done.returncode != 0
            if time.monotonic() >= end:
                break
        first += OF_A_PROCESS
        print(f"{read} inputs, {failed} processes with a finding", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
