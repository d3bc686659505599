"""What each process of ``test_processes`` does: one training step of several pipelines, its results in a file.

torchrun --nproc-per-node 2 -m tests.ranks FOLDER COSTS gpt2:1f1b:2 t5:interleaved-1f1b:4 …
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import pipecompile
from pipecompile.runtime import connect
from tests.models import MODELS

MICROBATCHES = 4


def run(folder: Path, costs: str, name: str, schedule: str, stages: int) -> None:
    model, batch, loss = MODELS[name]()
    pipe = pipecompile.compile(
        model,
        batch,
        stages=stages,
        ranks=dist.get_world_size(),
        microbatches=MICROBATCHES,
        schedule=schedule,
        loss=loss,
        costs=costs,
        check=False,
        progress=False,
    )
    found = {"loss": pipe.step(batch)}
    found |= {fqn: p.grad for fqn, p in model.named_parameters() if p.grad is not None}
    save_file(found, folder / f"{name}:{schedule}:{stages}:{pipe.rank}.safetensors")
    held = {fqn for s in pipe.stages for fqn in (*pipe.plan.holds[s], *pipe.plan.stages[s].shared)}
    strangers = set(found) - held - {"loss"}
    assert not strangers, f"rank {pipe.rank} has gradients of parameters of other ranks: {sorted(strangers)}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    connect()
    for case in sys.argv[3:]:
        name, schedule, stages = case.split(":")
        run(Path(sys.argv[1]), sys.argv[2], name, schedule, int(stages))
    dist.destroy_process_group()
