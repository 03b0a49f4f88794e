"""What verify says of each runtime follows from the checks that the runtime asks for, and from nothing else."""

import importlib.metadata
import json

import builders
import pytest
from test_export import export, place  # noqa: F401 - a fixture

from peft_perta import save_perta_adapter
from peft_perta.adapters import RUNTIMES, format_runtimes, judge_runtimes, verify_adapter
from peft_perta.adapters._server_rules import CONFIG_RULES, TENSOR_RULES
from peft_perta.adapters.verify import Check
from peft_perta.cli import main

OF_PEFT = ["PEFT", "transformers", "vLLM", "SGLang", "LoRAX", "TGI"]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """A negative adapter, and the checks of it on its base."""
    directory = tmp_path_factory.mktemp("emitted") / "unlearn"
    save_perta_adapter(directory, *builders.negate(builders.adapted_saved_llama(), weighting="uniform"))
    return directory, verify_adapter(directory, str(builders.llama_directory()))


def verdicts(directory, checks):
    return {verdict.runtime.name: (verdict.verdict, verdict.why) for verdict in judge_runtimes(directory, checks)}


def test_an_emitted_adapter_passes_where_peft_files_are_read_and_elsewhere_names_its_export(emitted):
    found = verdicts(*emitted)
    assert list(found) == [runtime.name for runtime in RUNTIMES]
    assert [name for name, (verdict, _) in found.items() if verdict == "pass"] == OF_PEFT
    for runtime in RUNTIMES:
        if runtime.exports:
            verdict, why = found[runtime.name]
            assert (verdict, why.endswith(f"peft-perta export --to {runtime.exports[0]}")) == ("not supported", True)


def test_every_check_that_a_runtime_asks_for_exists(emitted):
    known = {check.name for check in emitted[1]} | {name for name, _ in (*CONFIG_RULES, *TENSOR_RULES)}
    for runtime in RUNTIMES:
        assert set(runtime.rules) - {"mlx-lm: tensors"} <= known, runtime.name


def test_without_the_base_what_needs_it_is_not_checked(emitted):
    found = verdicts(emitted[0], verify_adapter(emitted[0]))
    assert {name: found[name][0] for name in OF_PEFT} == {
        "PEFT": "not checked", "transformers": "not checked", "vLLM": "pass", "SGLang": "pass",
        "LoRAX": "not checked", "TGI": "not checked",
    }  # fmt: skip
    assert found["TGI"][1] == "needs --base, for 'TGI: every layer of each projection'"


FAILS = {
    "all: finite": OF_PEFT,
    "vLLM: rank": ["vLLM"],
    "llama.cpp, TGI: no patterns": ["SGLang", "LoRAX", "TGI"],
    "llama.cpp, TGI: lora_alpha == r": ["TGI"],
    "TGI: every layer of each projection": ["LoRAX", "TGI"],
    "PEFT: loads in a fresh process": ["PEFT", "transformers"],
    "the base's tokenizer": [],  # whether it is the right base is not a matter of the runtime
    "provenance": [],
}


@pytest.mark.parametrize(("name", "hit"), FAILS.items())
def test_a_failed_check_speaks_against_those_who_ask_for_it_alone(name, hit, emitted):
    checks = [Check(check.name, check.passed and check.name != name, check.found) for check in emitted[1]]
    found = verdicts(emitted[0], checks)
    assert {of: why for of, (verdict, why) in found.items() if verdict != "pass" and of in OF_PEFT} == dict.fromkeys(
        hit, f"fails {name!r}"
    )


def test_packed_experts_are_not_supported_where_that_is_known_and_else_not_checked(emitted):
    checks = [check for check in emitted[1] if not check.name.startswith(("vLLM", "TGI", "llama.cpp"))]
    found = verdicts(emitted[0], [*checks, Check("vLLM, llama.cpp, TGI: experts", None, "packed")])
    assert {name: found[name][0] for name in OF_PEFT} == {
        "PEFT": "pass", "transformers": "pass", "vLLM": "not supported", "SGLang": "not checked",
        "LoRAX": "not checked", "TGI": "not supported",
    }  # fmt: skip


@pytest.mark.parametrize("to", ["gguf", "ollama", "peft"])  # those that take the GGUF base
def test_an_export_passes_in_its_runtime(to, place):  # noqa: F811
    base = str(place / "tiny.gguf")
    export(place, to)
    found = verdicts(place / "out", verify_adapter(place / "out", base))
    own = [runtime.name for runtime in RUNTIMES if to in runtime.exports] or OF_PEFT
    assert [name for name, (verdict, _) in found.items() if verdict == "pass"] == own, found
    if to == "gguf":
        without = verdicts(place / "out", verify_adapter(place / "out"))
        assert without["llama.cpp"] == ("not checked", 'needs --base, for "names and shapes as the base\'s"')
        assert without["vLLM"] == ("not supported", "reads PEFT's files; peft-perta export --to peft")


def test_each_line_names_a_version_and_how_it_is_known(emitted, capsys):
    lines = format_runtimes(judge_runtimes(*emitted)).splitlines()[1:]
    assert len(lines) == len(RUNTIMES)
    assert f"({importlib.metadata.version('peft')}, installed here)" in lines[0]
    assert all(runtime.known in line for runtime, line in zip(RUNTIMES, lines, strict=True))
    (tgi,) = [line for line in lines if "TGI" in line]
    assert tgi.endswith("in maintenance")
    assert main(["verify", str(emitted[0])]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-len(RUNTIMES) :]
        == format_runtimes(judge_runtimes(emitted[0], verify_adapter(emitted[0]))).splitlines()[1:]
    )


def test_a_damaged_export_record_is_of_no_runtime(place):  # noqa: F811
    export(place, "gguf")
    (place / "out" / "perta_export.json").write_text(json.dumps([]))
    found = verdicts(place / "out", verify_adapter(place / "out"))
    assert {verdict for verdict, _ in found.values()} == {"not supported"}
