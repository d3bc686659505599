"""Everything that a training step may do, in two real processes at once: each function runs on both ranks."""

from __future__ import annotations

import torch

from tests.test_scaling import ranks_scale_alike
from tests.test_step_options import (
    assert_uneven_is_exact,
    ranks_recompute_and_tell,
    ranks_sum_a_tied_master,
    ranks_train_masters,
)
from tests.test_training import tokens
from tests.torchrun import torchrun


def ranks_take_uneven_batches() -> None:
    assert_uneven_is_exact(tokens, schedule="interleaved-1f1b", ranks=2)


CASES = (
    ranks_recompute_and_tell,
    ranks_train_masters,
    ranks_sum_a_tied_master,
    ranks_take_uneven_batches,
    ranks_scale_alike,
)


def test_every_case_in_two_processes() -> None:
    printed = torchrun(2, "tests.test_training_processes", timeout_s=200)
    for case in CASES:
        assert printed.count(f"{case.__name__} passed") == 2


if __name__ == "__main__":
    from pipecompile.runtime import connect

    torch.set_num_threads(1)
    connect(timeout_s=60)
    for case in CASES:
        case()
        print(f"{case.__name__} passed", flush=True)
    torch.distributed.destroy_process_group()
