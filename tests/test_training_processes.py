"""Everything that a training step may do, in two real processes: each case is a function that both of them run."""

from __future__ import annotations

from pathlib import Path

from pipecompile.runtime import connect
from tests.runtime.processes import run
from tests.test_masters import ranks_resume_masters, replicas_resume_masters, replicas_train_masters
from tests.test_scaling import ranks_scale_alike
from tests.test_sparse import ranks_sum_sparse_gradients
from tests.test_step_options import (
    assert_uneven_is_exact,
    ranks_give_outputs,
    ranks_recompute_and_tell,
    ranks_sum_a_tied_master,
    ranks_train_masters,
    replicas_take_small_batches,
)
from tests.test_training import tokens
from tests.test_training_loops import ranks_leave_none


def ranks_take_uneven_batches() -> None:
    assert_uneven_is_exact(tokens, schedule="interleaved-1f1b", ranks=2)


CASES = (
    ranks_recompute_and_tell,
    ranks_train_masters,
    ranks_sum_a_tied_master,
    ranks_take_uneven_batches,
    ranks_scale_alike,
    ranks_leave_none,
    ranks_sum_sparse_gradients,
    ranks_give_outputs,
    replicas_train_masters,
    replicas_take_small_batches,
)


def every_case(rank: int, folder: str) -> list[str]:
    connect(timeout_s=60)
    ranks_resume_masters(f"{folder}/ranks")
    replicas_resume_masters(f"{folder}/replicas")
    passed = []
    for case in CASES:
        case()
        passed.append(case.__name__)
    return passed


def test_every_case_in_two_processes(tmp_path: Path) -> None:
    names = [case.__name__ for case in CASES]
    assert run(every_case, 2, str(tmp_path), timeout_s=200) == [names] * 2
