"""What it costs to split a backward: input half plus weight half (I + W) over the whole (B).

    python benchmarks/split_backward.py [--rounds 101] [--only WORD] [--json]

Each stage takes a microbatch forward, then backward in three ways in turn: whole, in our two halves, in the two halves of
``torch.distributed.pipelining``. The clock is the thread's own, so that other processes do not count; the figures are
medians, those of the ratios medians of paired ratios. Gradients are added to what is there, as after a first microbatch,
and freed memory stays with the process for all three ways: a stage has a process of its own here, as a rank has.

The bar is 1.05 for stages of ordinary size and 1 of torch's ratio for all; stages under 2 ms, where every operation of
Python shows, have no other. The exit code is 1 if a stage misses its bar.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from pipecompile.runtime.heap import keep_freed_memory
from pipecompile.runtime.split_backward import Known, input_half, weight_half

WARM_UP = 5
BAR, SMALL = 1.05, ("linear, small", "transformer, small", "convolutions, small", "depthwise convolutions")


def linear(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)))


def residual(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def bottleneck(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4 * channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 4 * channels, 1, bias=False),
        nn.BatchNorm2d(4 * channels),
    )


def depthwise(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4 * channels, 1),
        nn.GELU(),
        nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels),
        nn.GELU(),
        nn.Conv2d(4 * channels, channels, 1),
    )


def transformer(width: int, layers: int) -> nn.Module:
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)

    return nn.Sequential(*(layer() for _ in range(layers)))


STAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, small": (lambda: linear(128, 4), (16, 128)),
    "linear, wide": (lambda: linear(512, 4), (128, 512)),
    "transformer, small": (lambda: transformer(64, 2), (2, 32, 64)),
    "transformer, wide": (lambda: transformer(256, 2), (4, 64, 256)),
    "convolutions, small": (lambda: residual(16), (2, 16, 16, 16)),
    "convolutions, wide": (lambda: residual(64), (4, 64, 28, 28)),
    "convolutions, ResNet-18": (lambda: residual(128), (4, 128, 28, 28)),
    "convolutions, ResNet-50": (lambda: bottleneck(128), (4, 512, 28, 28)),
    "depthwise convolutions": (lambda: depthwise(32), (4, 32, 14, 14)),
}

Halves = tuple[float, ...]
"""Milliseconds of each part of a backward."""


def timed(part: Callable[[], Any]) -> tuple[float, Any]:
    began = time.thread_time()
    result = part()
    return (time.thread_time() - began) * 1e3, result


def whole(stage: nn.Module, leaf: Tensor, made: Tensor, gradient: Tensor) -> Halves:
    edge = get_gradient_edge(made)
    return (timed(lambda: torch.autograd.backward([edge], [gradient]))[0],)


class Ours:
    """Our halves, with what the runtime keeps for each stage."""

    def __init__(self) -> None:
        self.known = Known()

    def __call__(self, stage: nn.Module, leaf: Tensor, made: Tensor, gradient: Tensor) -> Halves:
        edge = get_gradient_edge(made)
        inputs, (_, rest) = timed(lambda: input_half([edge], [gradient], [leaf], self.known))
        return inputs, timed(lambda: weight_half(rest))[0]


def torchs(stage: nn.Module, leaf: Tensor, made: Tensor, gradient: Tensor) -> Halves:
    inputs, (_, groups) = timed(lambda: stage_backward_input([made], [gradient], [leaf], stage.parameters()))
    return inputs, timed(lambda: stage_backward_weight(stage.parameters(), groups))[0]


def measure(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds and ratios of one stage."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    make, shape = STAGES[name]
    stage, x = make(), torch.randn(shape)
    gradient = torch.randn_like(stage(x)) * 1e-3
    ways = {"B": whole, "ours": Ours(), "torch": torchs}
    found: dict[str, list[Halves]] = {name: [] for name in ways}
    for _ in range(WARM_UP + rounds):
        for name, way in ways.items():
            leaf = x.clone().requires_grad_()
            found[name].append(way(stage, leaf, stage(leaf), gradient))
    times = {name: several[WARM_UP:] for name, several in found.items()}
    ratios = {
        name: statistics.median(sum(split) / sum(b) for split, b in zip(times[name], times["B"], strict=True))
        for name in ("ours", "torch")
    }
    return {
        "b_ms": statistics.median(b for (b,) in times["B"]),
        "i_ms": statistics.median(i for i, _ in times["ours"]),
        "w_ms": statistics.median(w for _, w in times["ours"]),
        "ratio": ratios["ours"],
        "torch_ratio": ratios["torch"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--only", default="", metavar="WORD", help="stages whose name has this")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = [name for name in STAGES if options.only in name]
    if not cases:
        parser.error(f"no stage has {options.only!r} in its name; there are {', '.join(STAGES)}")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as own:
        rows = {name: own.submit(measure, name, options.rounds).result() for name in cases}
    missed = [
        name
        for name, row in rows.items()
        if row["ratio"] > (row["torch_ratio"] if name in SMALL else min(BAR, row["torch_ratio"]))
    ]
    if options.json:
        print(json.dumps({"stages": rows, "bar": BAR, "missed": missed}))
        return int(bool(missed))
    print("stage                       B ms    I ms    W ms  (I+W)/B     bar  torch's (I+W)/B")
    for name, row in rows.items():
        bar = "torch's" if name in SMALL else f"{BAR:.2f}"
        print(
            f"{name:24}{row['b_ms']:8.3f}{row['i_ms']:8.3f}{row['w_ms']:8.3f}{row['ratio']:9.3f}{bar:>8}"
            f"{row['torch_ratio']:17.3f}"
        )
    print(f"above the bar: {', '.join(missed) or 'none'}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
