"""Every reader against 2,000 damaged files (``make fuzz`` reads many more)."""

import pytest
from fuzz import KINDS, findings

INPUTS = 2000 // len(KINDS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_accepted_or_refused_by_an_error_of_ours(kind):
    found = [finding for finding in findings(kind, range(INPUTS)) if finding]
    assert not found, "\n".join(map(str, found))
