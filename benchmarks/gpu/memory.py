"""Forecast against measured peak memory of each rank: ``python -m benchmarks.gpu.memory [--device cpu]``.

GPT-2 and Llama under four schedules. One device takes the part of each of four ranks in turn: it holds that rank's stages
only and runs that rank's row with the channels that it would have over NCCL, whose groups bring zeros and carry nothing.
What is measured is the allocator's peak over a second training step and AdamW's step after it (on the CPU, what tensors
hold); the forecast must be 1.0 to 1.1 times that. What the allocator has reserved is printed beside it: that is what it
got from the device, fragments included, and no forecast of tensors covers it.
"""

from __future__ import annotations

import gc
import sys
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed import HashStore

import pipecompile
from benchmarks.gpu.setting import MODELS, Batch, Result, arguments, checked, make, tell
from pipecompile.cost.meter import TensorMeter, meter_of
from pipecompile.runtime import channels, split
from pipecompile.runtime.channels import Meeting
from pipecompile.runtime.ends import Ends
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.messages import by_index
from pipecompile.runtime.replicas import World
from pipecompile.runtime.stream_channels import StreamChannels
from pipecompile.runtime.wiring import wire

RANKS, MICROBATCHES = 4, 8
LOWEST, HIGHEST = 1.0, 1.1
LAYERS = 16
"""Four a rank, or two a stage where a rank has two."""
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved-1f1b": 2, "zb-h1": 1}
"""Stages of each rank."""


class Nowhere:
    """A group, and a piece of its work: what is received is zeros."""

    def send(self, tensors: list[Tensor], end: int, tag: int) -> Nowhere:
        return self

    def recv(self, tensors: list[Tensor], end: int, tag: int) -> Nowhere:
        tensors[0].zero_()
        return self

    def wait(self, timeout: Any = None) -> None:
        pass


def run(
    device: str,
    schedules: tuple[str, ...] = tuple(SCHEDULES),
    models: tuple[str, ...] = tuple(MODELS),
    layers: int = LAYERS,
) -> Result:
    """One row for each model, schedule and rank; bytes."""
    rows = [row for name in models for schedule in schedules for row in measure(name, schedule, device, layers)]
    return {"rows": rows, "ok": all(LOWEST <= row["ratio"] <= HIGHEST for row in rows)}


def measure(name: str, schedule: str, device: str, layers: int) -> list[Result]:
    each = SCHEDULES[schedule]
    model, batch = make(name, device, MICROBATCHES, layers)
    pipe = pipecompile.compile(
        model,
        batch,
        stages=RANKS * each,
        ranks=RANKS,
        microbatches=MICROBATCHES,
        schedule=schedule,
        check=False,
        progress=False,
    )
    rows = []
    for rank in range(RANKS):
        measured, reserved = peak(pipe, model, rank, batch, device)
        forecast = pipe.forecast.peak_bytes[rank]
        row = {"model": name, "schedule": schedule, "rank": rank, "forecast": forecast, "measured": measured}
        rows.append(row | {"reserved": reserved, "ratio": forecast / measured})
    return rows


def peak(pipe: pipecompile.Pipe, model: nn.Module, rank: int, batch: Batch, device: str) -> tuple[int, int]:
    """The most bytes that the rank's tensors hold, and those reserved for them."""
    model.to("cpu")
    program, plans = pipe.program, by_index(pipe.plan.stages, pipe.program)
    stages = {s: pipe.stage(s).to(device) for s in program.shape.stages_of(rank)}
    mail = channels_of(pipe, rank, device)
    row = wire(program, rank, stages, plans, pipe.plan.loss, pipe.plan.weight)
    executor = Executor(row, mail, {"REDUCE_GRAD": lambda op: None}, 1, True)
    optimizer = torch.optim.AdamW({id(p): p for s in stages.values() for p in s.parameters()}.values(), lr=1e-3)
    meter = meter_of(torch.device(device))
    if isinstance(meter, TensorMeter):
        for stage in stages.values():
            meter.add((*stage.parameters(), *stage.buffers()))
        meter.add(batch.values())
    for _ in range(3):
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        with meter:
            meter.begin()
            step(executor, mail, batch)
            optimizer.step()
            optimizer.zero_grad()
    return meter.peak, torch.cuda.max_memory_reserved() if device == "cuda" else 0


def step(executor: Executor, mail: StreamChannels, batch: Batch) -> None:
    executor.begin(split(batch, MICROBATCHES))
    mail.begin()
    for one in executor.steps:
        one.handler(one.operand)
    mail.end()
    executor.end()


def channels_of(pipe: pipecompile.Pipe, rank: int, device: str) -> StreamChannels:
    """The rank's channels, without the other ranks."""
    store = HashStore()
    for other in range(RANKS):
        store.set(f"alone/host/{other}", "")
    meeting = Meeting(store, "alone", timedelta(seconds=60), World(rank, RANKS, 1), share=False)
    place = torch.device(device)
    with patch.object(channels.dist, "new_group", lambda *args, **options: Nowhere()):
        plans = by_index(pipe.plan.stages, pipe.program)
        return StreamChannels(pipe.program, rank, plans, place, meeting, (), Ends("stream", place))


def main() -> int:
    options = checked(arguments(__doc__.splitlines()[0]))
    return tell(run(options.device), options)


if __name__ == "__main__":
    sys.exit(main())
