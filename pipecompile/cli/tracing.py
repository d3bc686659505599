"""One training step whose instructions are timed and written beside the plan, for ``pipecompile run --trace``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.errors import TraceError
from pipecompile.pipe import Pipe
from pipecompile.runtime import from_first_rank, settling
from pipecompile.simulate import Link, simulate
from pipecompile.trace import Ran, run_trace


def traced_step(pipe: Pipe, batch: Any, optimizer: torch.optim.Optimizer | None, path: str) -> Tensor:
    """A step's loss. All ranks take it at once; each counts its time from when they have met, rank 0 writes the file."""
    several = pipe.ranks * pipe.replicas > 1
    if several:
        with settling():
            dist.barrier()
    began = time.perf_counter()
    ran: list[Any] = []
    loss = pipe.step(batch, optimizer, ran)
    mine: list[list[Ran]] = [[] for _ in pipe.program.rows]
    for one, start, end in ran:
        mine[pipe.program.shape.placement[one.stage]].append((one, (start - began) * 1e3, (end - began) * 1e3))
    rows = mine
    if several:
        everyone: list[Any] = [None] * (pipe.ranks * pipe.replicas)
        with settling():
            dist.all_gather_object(everyone, mine[pipe.rank])
        rows = everyone[: pipe.ranks]

    def write() -> str:
        link = Link(pipe.plan.link[0], pipe.plan.link[1]) if pipe.plan.link else None
        planned = simulate(pipe.program, pipe.plan.partition, link, replicas=pipe.replicas)
        try:
            Path(path).write_text(json.dumps(run_trace(pipe.program, planned, rows)))
        except OSError as error:
            raise TraceError(
                f"the trace {path!r} cannot be written: {error}; name a file in a folder that is there"
            ) from error
        return ""

    from_first_rank(write)
    return loss
