"""Whatever happens to a process at whichever instruction, all processes end with one message that names it.

``make faults`` does the same at 20 random instructions for each way to fail.
"""

from __future__ import annotations

import pytest

from tests.runtime.faults import Case, outcome, wrong


@pytest.mark.parametrize(
    "case",
    [
        Case("raise", "interleaved-1f1b", 2, process=1, position=9),
        Case("kill", "zb-h2", 4, process=2, position=12, shared_memory=False),
        Case("kill", "interleaved-1f1b", 2, process=0, position=5, agent=False),
        Case("stop", "1f1b", 4, process=3, position=4),
    ],
    ids=str,
)
def test_the_first_cause_is_named(case: Case) -> None:
    answers, seconds = outcome(case)
    assert not wrong(case, answers, seconds)
