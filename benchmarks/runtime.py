"""Our runtime beside ``torch.distributed.pipelining``: ``python benchmarks/runtime.py [--json] [--only WORD] [--steps N]``.

Two real processes of one host for each, one thread a process; the same four blocks, the same split, the same schedule and
microbatches. Five steps of each in turn while the others wait, the medians of paired ratios of their medians; before they
are timed, their gradients are compared. Our messages go through shared memory, as they do between processes of one host;
``gloo_s`` are the same steps with our messages through gloo, which torch's always take. ``small`` takes about 0.15 ms for
the forward of a stage and microbatch, ``big`` 5 ms. ``ideal_s`` is the makespan of our own compute times, each the median
of what ran, if messages took no time: as long as both compute the same, no ratio can be below ideal_s / torch_s. torch's
interleaved zero bubble has two stages a rank; beside it stands our zb-h1 with the same blocks, two in a stage.
``accumulation_s``: one process with as many threads, gradient accumulation, no pipeline. The exit code is 1 if a ratio
is above its bar: 0.6 for small cases, 0.9 for big ones, and 1.2 over the ideal (1F1B, big).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining

from pipecompile.ir import Port, Shape, Spec, StageCost, StagePlan
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.runtime import RankRuntime, connect
from pipecompile.simulate import simulate

RANKS, BLOCKS = 2, 4
IN_A_ROW = 5
"""Steps of one runtime before it is the other's turn: each first one finds caches that the other has emptied."""


@dataclass(frozen=True)
class Size:
    """Rows of a microbatch, width and depth of a block."""

    rows: int
    width: int
    layers: int


BARS = {"small": 0.6, "big": 0.9}
IDEAL_BAR = 1.2
SIZES = {"small": Size(16, 128, 2), "big": Size(128, 512, 4)}
SCHEDULES = {
    # ours: torch's class, blocks in a stage of ours, of torch's
    "1f1b": (pipelining.Schedule1F1B, 2, 2),
    "gpipe": (pipelining.ScheduleGPipe, 2, 2),
    "interleaved-1f1b": (pipelining.ScheduleInterleaved1F1B, 1, 1),
    "zb-h1": (pipelining.ScheduleInterleavedZeroBubble, 2, 1),
    "zb-v": (pipelining.ScheduleZBVZeroBubble, 1, 1),
}


def block(size: Size, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(size.width, size.width), nn.ReLU()) for _ in range(size.layers)]
    return nn.Sequential(*layers)


class Part(nn.Module):
    """A stage of ours."""

    def __init__(self, blocks: list[nn.Module], first: bool, last: bool) -> None:
        super().__init__()
        self.blocks, self.first, self.last = nn.Sequential(*blocks), first, last

    def forward(self, batch: dict[str, Tensor], *received: Tensor) -> tuple[Tensor]:
        y = self.blocks(batch["x"] if self.first else received[0])
        return (F.mse_loss(y, batch["y"]) if self.last else y,)


class Ours:
    """A step of our runtime."""

    def __init__(self, rank: int, schedule: str, size: Size, microbatches: int, shared_memory: bool = True) -> None:
        self.each = each = SCHEDULES[schedule][1]
        stages = BLOCKS // each
        hidden = Spec((size.rows, size.width), "float32", True)
        loss = Spec((), "float32", True)
        plans = [
            StagePlan(
                s,
                (Port("hidden", hidden, source=s - 1),) if s else (),
                (Port("hidden", hidden, targets=(s + 1,)) if s < stages - 1 else Port("loss", loss),),
            )
            for s in range(stages)
        ]
        self.partition = chain(stages)
        self.program = communicate(make_timetable(schedule, Shape(stages, RANKS, microbatches)), self.partition)
        self.parts = {
            s: Part([block(size, s * each + i) for i in range(each)], s == 0, s == stages - 1)
            for s in self.program.shape.stages_of(rank)
        }
        self.runtime = RankRuntime(
            self.program, rank, self.parts, plans, loss="loss", timeout_s=60, shared_memory=shared_memory
        )

    def step(self, batch: dict[str, Tensor]) -> None:
        self.runtime.step(batch)

    def clear(self) -> None:
        for part in self.parts.values():
            part.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """By block and parameter."""
        return _gradients((s * self.each + i, b) for s, part in self.parts.items() for i, b in enumerate(part.blocks))

    def ideal_s(self, batch: dict[str, Tensor]) -> float:
        """The makespan of the compute times of three steps."""
        ran: list[Any] = []
        for _ in range(3):
            self.clear()
            dist.barrier()
            self.runtime.step(batch, ran)
        times: dict[tuple[str, int], list[float]] = {}
        for one, began, ended in ran:
            times.setdefault((one.op, one.stage), []).append((ended - began) * 1e3)
        mine = {key: statistics.median(values) for key, values in times.items()}
        everyone: list[Any] = [None] * RANKS
        dist.all_gather_object(everyone, mine)
        known = {key: value for some in everyone for key, value in some.items()}
        return simulate(self.program, chain(self.partition.stages, _costs(known, self.partition.stages))).step_ms / 1e3


def _costs(known: dict[tuple[str, int], float], stages: int) -> list[StageCost]:
    def of(op: str, stage: int) -> float:
        return known.get((op, stage), 0.0)

    return [
        StageCost(
            of("FORWARD", s),
            of("BACKWARD", s) + of("BACKWARD_INPUT", s) + of("BACKWARD_WEIGHT", s),
            of("BACKWARD_WEIGHT", s),
            saved_bytes=1,
        )
        for s in range(stages)
    ]


class Torchs:
    """A step of torch's."""

    def __init__(self, rank: int, schedule: str, size: Size, microbatches: int) -> None:
        make, _, self.each = SCHEDULES[schedule]
        each = self.each
        stages = BLOCKS // each
        placement = [s % RANKS for s in range(stages)] if schedule != "zb-v" else [0, 1, 1, 0]
        self.mine = [s for s in range(stages) if placement[s] == rank]
        self.modules = [nn.Sequential(*(block(size, s * each + i) for i in range(each))) for s in self.mine]
        parts = [
            pipelining.PipelineStage(module, s, stages, torch.device("cpu"))
            for s, module in zip(self.mine, self.modules)
        ]
        several = issubclass(make, pipelining.schedules.PipelineScheduleMulti)
        self.schedule = make(parts if several else parts[0], microbatches, loss_fn=F.mse_loss)
        self.first, self.last = 0 in self.mine, stages - 1 in self.mine

    def step(self, batch: dict[str, Tensor]) -> None:
        given = (batch["x"],) if self.first else ()
        if self.last:
            self.schedule.step(*given, target=batch["y"], losses=[])
        else:
            self.schedule.step(*given)

    def clear(self) -> None:
        for module in self.modules:
            module.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """By block and parameter."""
        return _gradients((s * self.each + i, b) for s, m in zip(self.mine, self.modules) for i, b in enumerate(m))


def _gradients(blocks: Iterable[tuple[int, nn.Module]]) -> dict[str, Tensor]:
    return {f"{i} {name}": p.grad for i, b in blocks for name, p in b.named_parameters() if p.grad is not None}


class Pair:
    """Two processes with one of the runtimes, which wait without work until they are asked."""

    def __init__(self, kind: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn = mp.get_context("spawn")
        self._ends = []
        for rank in range(RANKS):
            end, other = spawn.Pipe()
            spawn.Process(target=work, args=(rank, kind, port, other), daemon=True).start()
            other.close()
            self._ends.append(end)

    def end(self) -> None:
        for end in self._ends:
            end.send(("end", ()))

    def ask(self, question: str, *arguments: Any) -> list[Any]:
        """What each rank answers."""
        for end in self._ends:
            end.send((question, arguments))
        try:
            return [end.recv() for end in self._ends]
        except EOFError as error:
            raise SystemExit(f"a process ended when it was asked to {question}; see what it printed above") from error


def work(rank: int, kind: str, port: int, end: Any) -> None:
    """A process of a pair."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    connect(timeout_s=60)
    runner: Any = None
    batch: dict[str, Tensor] = {}
    while True:
        question, arguments = end.recv()
        if question == "make":
            schedule, name, microbatches = arguments
            size = SIZES[name]
            torch.manual_seed(99)
            shape = (size.rows * microbatches, size.width)
            batch = {"x": torch.randn(shape), "y": torch.randn(shape)}
            runner = RUNNERS[kind](rank, schedule, size, microbatches)
            end.send(None)
        elif question == "step":
            end.send([seconds(runner, batch) for _ in range(IN_A_ROW)])
        elif question == "show gradients":
            end.send({name: value.numpy() for name, value in runner.gradients().items()})
        elif question == "tell the ideal":
            end.send(runner.ideal_s(batch))
        else:
            os._exit(0)


def compare(mine: list[Any], theirs: list[Any]) -> None:
    """SystemExit unless the gradients of two pairs, a dict of each rank, are the same."""
    ours, torchs = ({name: value for rank in pair for name, value in rank.items()} for pair in (mine, theirs))
    if ours.keys() != torchs.keys() or not ours:
        raise SystemExit("the two runtimes do not have the same blocks: nothing can be compared")
    for name, value in torchs.items():
        if abs(ours[name] - value).max() > 1e-5 * abs(value).max():
            raise SystemExit(f"the gradients of block {name} differ: the two do not compute the same")


def seconds(runner: Ours | Torchs, batch: dict[str, Tensor]) -> float:
    """One step, until the slower rank is done."""
    runner.clear()
    dist.barrier()
    began = time.perf_counter()
    runner.step(batch)
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def measure(pairs: dict[str, Pair], schedule: str, name: str, microbatches: int, steps: int) -> dict[str, Any]:
    for pair in pairs.values():
        pair.ask("make", schedule, name, microbatches)
        pair.ask("step")
    gradients = {kind: pair.ask("show gradients") for kind, pair in pairs.items()}
    compare(gradients["ours"], gradients["torch"])
    compare(gradients["gloo"], gradients["torch"])
    times = [{kind: statistics.median(pair.ask("step")[0]) for kind, pair in pairs.items()} for _ in range(steps)]
    return {
        "schedule": schedule,
        "size": name,
        "microbatches": microbatches,
        "ours_s": statistics.median(one["ours"] for one in times),
        "torch_s": statistics.median(one["torch"] for one in times),
        "ratio": statistics.median(one["ours"] / one["torch"] for one in times),
        "ideal_s": pairs["ours"].ask("tell the ideal")[0],
        "gloo_s": statistics.median(one["gloo"] for one in times),
        "gloo_ratio": statistics.median(one["gloo"] / one["torch"] for one in times),
    }


def accumulation_s(name: str, microbatches: int, steps: int) -> float:
    """One process, as many threads as ranks, the whole model, gradient accumulation."""
    size = SIZES[name]
    torch.set_num_threads(RANKS)
    model = nn.Sequential(*(block(size, i) for i in range(BLOCKS)))
    xs, ys = (torch.randn(microbatches, size.rows, size.width) for _ in range(2))
    took = []
    for _ in range(steps + 2):
        model.zero_grad()
        began = time.perf_counter()
        for x, y in zip(xs, ys):
            (F.mse_loss(model(x), y) / microbatches).backward()
        took.append(time.perf_counter() - began)
    return statistics.median(took[2:])


RUNNERS = {"ours": Ours, "torch": Torchs, "gloo": functools.partial(Ours, shared_memory=False)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--only", default="", help="cases whose 'schedule size microbatches' contains this")
    parser.add_argument(
        "--steps", type=int, default=40, help="turns of five steps of each small case; big ones take a quarter"
    )
    options = parser.parse_args()
    every = [(schedule, size, m) for size in SIZES for schedule in SCHEDULES for m in (8, 32)]
    chosen = [case for case in every if options.only in " ".join(map(str, case))]
    pairs = {kind: Pair(kind) for kind in RUNNERS}
    cases = []
    for one in chosen:
        case = measure(pairs, *one, options.steps if one[1] == "small" else max(options.steps // 4, 3))
        cases.append(case)
        if not options.json:
            print(
                "{schedule:>17} {size:5} M={microbatches:<3} ours {ours_s:.5f} s  torch {torch_s:.5f} s  "
                "ratio {ratio:.3f}".format(**case)
                + f"  over ideal {case['ours_s'] / case['ideal_s']:.3f}, torch's {case['torch_s'] / case['ideal_s']:.3f}  through gloo {case['gloo_s']:.5f} s, "
                f"ratio {case['gloo_ratio']:.3f}",
                flush=True,
            )
    for pair in pairs.values():
        pair.end()
    alone = [
        {"size": size, "microbatches": m, "accumulation_s": accumulation_s(size, m, 5)}
        for size, m in sorted({(size, m) for _, size, m in chosen})
    ]
    if options.json:
        print(json.dumps({"cases": cases, "one_process": alone}))
        return int(any(map(missed, cases)))
    for one in alone:
        print("one process, two threads: {size:5} M={microbatches:<3} {accumulation_s:.5f} s".format(**one), end="")
        same = [c for c in cases if (c["size"], c["microbatches"]) == (one["size"], one["microbatches"])]
        print("".join(f"  {c['schedule']} {one['accumulation_s'] / c['ours_s']:.2f} times as fast" for c in same))
    above = ["{schedule} {size} M={microbatches}".format(**case) for case in cases if missed(case)]
    print(f"above the bar: {', '.join(above) or 'none'}")
    return int(bool(above))


def missed(case: dict[str, Any]) -> bool:
    """Whether a case is above its bars."""
    over_ideal = case["ours_s"] / case["ideal_s"] if (case["schedule"], case["size"]) == ("1f1b", "big") else 0
    return case["ratio"] > BARS[case["size"]] or over_ideal > IDEAL_BAR


if __name__ == "__main__":
    sys.exit(main())
