"""``pipecompile partition graph.json --stages S``: cut any cost graph, without a model."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipecompile.errors import PartitionError
from pipecompile.ir import Partition
from pipecompile.ir.cost_file import read_cost_graph
from pipecompile.machine import format_bytes, parse_bytes
from pipecompile.passes.partitioners import evaluate_answer, pose, solve
from pipecompile.passes.partitioners.explain import explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Cut a cost graph into stages: the least time of the slowest stage, then the fewest bytes between stages."
    )
    parser.add_argument("graph", help="JSON file of nodes, edges and tensors")
    parser.add_argument("--stages", type=int, required=True, help="how many stages")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="how much more than the least time is allowed (default: 0.05)"
    )
    parser.add_argument(
        "--memory", metavar="SIZES", help="limit of each rank, such as 80GiB, or one for each: 80GiB,40GiB"
    )
    parser.add_argument(
        "--in-flight", metavar="N,…", help="microbatches whose activations each stage holds (default: 1F1B's S,…,2,1)"
    )
    parser.add_argument("--placement", metavar="RANK,…", help="the rank of each stage (default: its own)")
    parser.add_argument(
        "--state-factor", type=float, default=4.0, help="bytes held for each parameter byte (default: 4, as with Adam)"
    )
    parser.add_argument("--speeds", metavar="X,…", help="relative speed of each stage's device")
    parser.add_argument("--bandwidths", metavar="X,…", help="relative bandwidth of each link from stage s to s+1")
    parser.add_argument("--method", default="default", help="default, mincut (no solver), exact or contiguous")
    parser.add_argument(
        "--time-limit", type=float, default=12.0, metavar="SECONDS", help="for the search (default: 12)"
    )
    parser.add_argument("--explain", action="store_true", help="what crosses each cut, the next best cut, and the gaps")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    file = read_cost_graph(options.graph)
    problem = pose(
        file.graph,
        options.stages,
        tolerance=options.tolerance,
        memory=None if options.memory is None else tuple(parse_bytes(size) for size in options.memory.split(",")),
        in_flight=_numbers("--in-flight", options.in_flight, int),
        placement=_numbers("--placement", options.placement, int),
        state_factor=options.state_factor,
        speeds=_numbers("--speeds", options.speeds, float),
        bandwidths=_numbers("--bandwidths", options.bandwidths, float),
        time_limit=options.time_limit,
    )
    with native_output_on_stderr():
        answer = solve(problem, options.method)
    found = evaluate_answer(file.graph, problem, answer)
    seconds = time.perf_counter() - start
    why = explain(file.graph, problem, found) if options.explain else None
    if options.json:
        whole = _to_json(found, file.by_id(found.stage), seconds)
        if options.bandwidths:
            whole |= {"traffic": problem.traffic(found.stage), "bound_traffic": answer.bound_bytes}
        print(json.dumps(whole | ({"explain": why.to_json()} if why else {})))
    else:
        print(_text(found, file.graph.unit, seconds))
        if why:
            print(why)


@contextmanager
def native_output_on_stderr() -> Iterator[None]:
    """HiGHS, which is C++, tells of numerical trouble on stdout; that is for our result alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _numbers(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError as error:
        raise PartitionError(f"{option} is {text!r}, expected numbers with commas between, such as 2,1,1") from error


def _to_json(found: Partition, stage: list[int], seconds: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "bottleneck": found.bottleneck_ms,
        "bytes": found.bytes,
        "bound": {"bottleneck": found.bound_ms, "bytes": found.bound_bytes},
        "seconds": round(seconds, 3),
    }


def _text(found: Partition, unit: str, seconds: float) -> str:
    slowest = max(range(found.stages), key=lambda s: found.costs[s].total_ms)
    lines = [f"{found.graph}: {len(found.stage)} nodes in {found.stages} stages, {seconds:.1f} s"]
    for s, cost in enumerate(found.costs):
        sent = sum(t.bytes + t.gradient_bytes for t in found.transfers if s in (t.source, t.target))
        mark = "  slowest" if s == slowest else ""
        lines.append(
            f"stage {s}: {found.stage.count(s):5d} nodes  {cost.total_ms:10.3f} {unit}  "
            f"parameters {format_bytes(cost.parameter_bytes):>10}  sent and received {format_bytes(sent):>10}{mark}"
        )
    lines.append(f"bottleneck {found.bottleneck_ms:.3f} {unit}, at least {found.bound_ms:.3f} {unit} is needed")
    lines.append(
        f"bytes {found.bytes} ({format_bytes(found.bytes)}), at least {found.bound_bytes} within the tolerance"
    )
    return "\n".join(lines)
