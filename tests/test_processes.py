"""Real processes: GPT-2, T5 and UNet2D on two and four ranks; loss, every gradient and every buffer on every rank."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.torchrun import torchrun

MODELS = ("gpt2", "t5", "unet2d")
CASES = [(2, 2, "1f1b"), (4, 4, "1f1b"), (4, 2, "interleaved-1f1b")]
BAR = 1e-6


def check(name: str, stages: int, ranks: int, schedule: str) -> dict[str, Any]:
    """This rank's largest relative errors over two steps, over all that its stages hold."""
    import pipecompile
    from pipecompile.compare import buffers, differences, gradients, worst
    from tests.models import MODELS as MAKE

    torch.manual_seed(0)
    model, batch, loss = MAKE[name]()
    unsplit = copy.deepcopy(model)
    pipe = pipecompile.compile(
        model, batch, stages=stages, ranks=ranks, microbatches=4, schedule=schedule, loss=loss, costs="estimate"
    )
    found, losses = [], []
    for _ in range(2):
        value = pipe.step(batch)
        expected = pipe.reference(unsplit, batch)
        losses.append((float(value), float(expected)))
    wanted = gradients(unsplit) | {f"buffer {key}": value for key, value in buffers(unsplit).items()}
    first = {id(tensor): key for key, tensor in reversed([*model.named_parameters(), *model.named_buffers()])}
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    mine = {first[id(tensors[key])] for stage in pipe.stages for key in pipe.plan.holds[stage]}
    got = {key: value for key, value in gradients(model).items() if key in mine}
    got |= {f"buffer {key}": value for key, value in buffers(model).items() if key in mine}
    found = list(differences(got, {key: wanted[key] for key in got}, ""))
    return {"names": sorted(got), "error": worst(found).error, "worst": worst(found).name, "losses": losses}


def main(folder: str) -> None:
    """What torchrun starts: every case for this number of ranks."""
    from pipecompile.runtime import connect

    torch.set_num_threads(1)
    connect(timeout_s=60)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {
        f"{name} {stages} {schedule}": check(name, stages, ranks, schedule)
        for stages, wanted, schedule in CASES
        if wanted == ranks
        for name in MODELS
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_equals_the_unsplit_model(ranks: int, tmp_path: Path) -> None:
    torchrun(ranks, "tests.test_processes", str(tmp_path))
    per_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    cases = [case for case in CASES if case[1] == ranks]
    assert len(per_rank[0]) == len(cases) * len(MODELS)
    for key in per_rank[0]:
        rows = [results[key] for results in per_rank]
        for rank, row in enumerate(rows):
            assert row["error"] <= BAR, f"{key}, rank {rank}: {row['worst']}"
            assert row["losses"] == rows[0]["losses"], "every rank gets the same loss"
            for value, expected in row["losses"]:
                assert value == pytest.approx(expected, rel=1e-6)
        held = [name for row in rows for name in row["names"]]
        if key.startswith("gpt2"):
            assert held.count("transformer.wte.weight") == 2, "tied: on the first rank and on the last"


if __name__ == "__main__":
    main(sys.argv[1])
