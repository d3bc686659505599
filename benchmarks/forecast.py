"""Forecast against measured step time of ten plans: ``python benchmarks/forecast.py [--json] [--only WORD]``.

Two real processes, gloo, one thread each. A machine that others use changes its speed from second to second, so costs and
steps are measured in turns: both ranks at once run every kind of instruction of their own stages alone (``weigh``, with a
message handed over in memory), between two steps. The forecast simulates the program with these costs and with the time
that a message was seen to take; the error is the median of the rounds' own.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from memory import llama
from torch import nn

import pipecompile
from pipecompile.runtime import connect, split
from pipecompile.simulate import Link, simulate
from pipecompile.weighing import weigh

RANKS, ROUNDS = 2, 12
PLANS = (
    ("mlp", "gpipe", 2, 4),
    ("mlp", "1f1b", 2, 8),
    ("mlp", "interleaved-1f1b", 4, 8),
    ("mlp", "zb-h1", 2, 8),
    ("mlp", "1f1b", 2, 16),
    ("llama", "gpipe", 2, 4),
    ("llama", "1f1b", 2, 8),
    ("llama", "interleaved-1f1b", 4, 8),
    ("llama", "zb-h1", 2, 8),
    ("llama", "1f1b", 2, 16),
)
"""Model, schedule, stages, microbatches."""


def case(name: str, microbatches: int) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    if name == "llama":
        tokens = torch.randint(512, (2 * microbatches, 64))
        return llama(8), {"input_ids": tokens, "labels": tokens}, None
    layers = [layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.GELU())]
    batch = {"x": torch.randn(128 * microbatches, 512), "y": torch.randn(128 * microbatches, 512)}
    return nn.Sequential(*layers), batch, lambda model, part: nn.functional.mse_loss(model(part["x"]), part["y"])


def latency_ms(pipe: pipecompile.Pipe, batch: Any) -> float:
    """From the end of a send to the end of a receive that waited for it, the median over three steps."""
    found = []
    for _ in range(3):
        pipe.model.zero_grad()  # type: ignore[attr-defined]
        dist.barrier()
        ran: list[Any] = []
        pipe.step(batch, ran=ran)
        everyone: list[Any] = [None] * RANKS
        dist.all_gather_object(everyone, ran)  # one host, one clock
        sent = {(one.op[-1], one.stage, one.peer, one.microbatch): end for row in everyone for one, _, end in row
                if one.op.startswith("SEND")}  # fmt: skip
        for row in everyone:
            for one, begin, end in row:
                if one.op.startswith("RECV"):
                    arrived = sent[one.op[-1], one.peer, one.stage, one.microbatch]
                    found += [(end - arrived) * 1e3] if begin < arrived else []
    return statistics.median(found) if found else 0.0


def measure(name: str, schedule: str, stages: int, microbatches: int, rounds: int) -> dict[str, Any]:
    model, batch, loss = case(name, microbatches)
    pipe = pipecompile.compile(
        model,
        batch,
        stages=stages,
        ranks=RANKS,
        microbatches=microbatches,
        schedule=schedule,
        loss=loss,
        check=False,
        progress=False,
    )
    pipe.model = model  # type: ignore[attr-defined]
    plan, piece = pipe.plan, split(batch, microbatches)[0]
    sources = [pipe.source(s) for s in range(stages)]
    delay = latency_ms(pipe, batch)
    pairs = []
    for _ in range(rounds):
        before = seconds(pipe, batch)
        dist.barrier()
        found = weigh(
            model, piece, plan.partition, plan.stages, sources, plan.inputs, plan.loss, plan.weight, budget_s=0.0
        )
        everyone: list[Any] = [None] * RANKS
        dist.all_gather_object(everyone, found.costs)
        costs = tuple(everyone[plan.placement[s]][s] for s in range(stages))
        predicted = simulate(pipe.program, replace(plan.partition, costs=costs), Link(delay)).step_ms
        pairs.append((predicted, (before + seconds(pipe, batch)) / 2 * 1e3))
    return {
        "model": name,
        "schedule": schedule,
        "microbatches": microbatches,
        "predicted_ms": statistics.median(predicted for predicted, _ in pairs),
        "measured_ms": statistics.median(measured for _, measured in pairs),
        "latency_ms": delay,
        "error": statistics.median(predicted / measured for predicted, measured in pairs) - 1,
    }


def seconds(pipe: pipecompile.Pipe, batch: Any) -> float:
    """One step, until the slower rank is done."""
    pipe.model.zero_grad()  # type: ignore[attr-defined]
    dist.barrier()
    began = time.perf_counter()
    pipe.step(batch)
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def work(rank: int, port: int, chosen: list[tuple[str, str, int, int]], rounds: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    connect(timeout_s=120)
    for plan in chosen:
        found = measure(*plan, rounds)
        if rank == 0:
            results.put(found)
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--only", default="", help="plans whose 'model schedule stages microbatches' contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"costs and steps in turns (default {ROUNDS})")
    options = parser.parse_args()
    chosen = [plan for plan in PLANS if options.only in " ".join(map(str, plan))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("fork").SimpleQueue()
    llama(1)  # imports what the processes need before they are forked
    arguments = (port, chosen, options.rounds, results)
    started = mp.start_processes(work, arguments, nprocs=RANKS, join=False, start_method="fork")
    rows = []
    for _ in chosen:
        while results.empty():  # a process that fails raises here
            started.join(timeout=0.1)
        rows.append(row := results.get())
        if not options.json:
            print(
                "{model:5} {schedule:17} M={microbatches:<3} predicted {predicted_ms:8.2f} ms  measured {measured_ms:8.2f} ms"
                "  error {error:+.1%}  (a message {latency_ms:.3f} ms)".format(**row),
                flush=True,
            )
    median = statistics.median(abs(row["error"]) for row in rows)
    print(json.dumps({"plans": rows, "median_error": median}) if options.json else f"median error {median:.1%}")


if __name__ == "__main__":
    main()
