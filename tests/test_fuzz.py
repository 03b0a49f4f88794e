"""Every reader against 1,000 damaged files (``make fuzz`` reads many more)."""

import fuzz
import pytest
from fuzz import KINDS, Kind, findings

from peft_perta import DataError

INPUTS = 1000 // len(KINDS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_accepted_or_refused_by_an_error_of_ours(kind):
    found = [finding for finding in findings(kind, range(INPUTS)) if finding]
    assert not found, "\n".join(map(str, found))


def forever(_):
    while True:
        pass


def fails(_):
    raise KeyError("b")


@pytest.mark.parametrize(("read", "fault"), [(fails, "KeyError: 'b'"), (forever, "Slow")])
def test_a_reader_with_a_fault_is_found(read, fault, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    calls = []
    once = Kind(KINDS["settings"].build, "*.json", lambda place: read(place) if calls else calls.append(place))
    monkeypatch.setitem(KINDS, "faulty", once)  # the first call reads the intact files
    (found,) = findings("faulty", [0])
    assert found.fault.startswith(fault)


def test_a_reader_that_refuses_intact_files_is_found(monkeypatch):
    def refuses(_):
        with fuzz._ours():
            raise DataError("no")

    monkeypatch.setitem(KINDS, "strict", Kind(KINDS["settings"].build, "*.json", refuses))
    with pytest.raises(AssertionError, match="intact files are refused: no"):
        next(findings("strict", [0]))
