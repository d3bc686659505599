"""Everything that a training step may do, in two real processes at once: each function runs on both ranks."""

from __future__ import annotations

from pipecompile.runtime import connect
from tests.runtime.processes import run
from tests.test_scaling import ranks_scale_alike
from tests.test_step_options import (
    assert_uneven_is_exact,
    ranks_recompute_and_tell,
    ranks_sum_a_tied_master,
    ranks_train_masters,
)
from tests.test_training import tokens


def ranks_take_uneven_batches() -> None:
    assert_uneven_is_exact(tokens, schedule="interleaved-1f1b", ranks=2)


CASES = (
    ranks_recompute_and_tell,
    ranks_train_masters,
    ranks_sum_a_tied_master,
    ranks_take_uneven_batches,
    ranks_scale_alike,
)


def every_case(rank: int) -> list[str]:
    connect(timeout_s=60)
    passed = []
    for case in CASES:
        case()
        passed.append(case.__name__)
    return passed


def test_every_case_in_two_processes() -> None:
    assert run(every_case, 2, timeout_s=200) == [[case.__name__ for case in CASES]] * 2
