"""``pipecompile run build``: start the ranks and train. ``torchrun … -m pipecompile run build`` is the same."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from pipecompile.cli.output import standard_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train with a build: one process for each rank, started by torchrun, or all ranks in this one."
    parser.add_argument("build", help="a build directory")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default 100)")
    parser.add_argument("--local", action="store_true", help="run all ranks in this process")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that any wait may take (default 300)")
    parser.add_argument("--trust", action="store_true", help="accept a build whose files were changed")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(options: argparse.Namespace) -> int:
    if options.local or "RANK" in os.environ:
        with standard_output(options.json) as out:
            return _train(options, out)
    return _start_ranks(options)


def _start_ranks(options: argparse.Namespace) -> int:
    """Start torchrun with one process for each rank of the build, and end with its exit code."""
    from pipecompile.pipe import read_files
    from pipecompile.plan import Plan

    plan = Plan.from_json(json.loads(read_files(options.build, options.trust)["plan.json"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.ranks)]
    command += ["-m", "pipecompile", "run", str(Path(options.build)), "--steps", str(options.steps)]
    command += ["--timeout", str(options.timeout)]
    command += [flag for flag in ("--trust", "--json") if getattr(options, flag[2:])]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    return subprocess.run(command, env=environment, check=False).returncode


def _train(options: argparse.Namespace, out: TextIO) -> int:
    import torch
    import torch.distributed as dist

    from pipecompile.pipe import open_build
    from pipecompile.runtime import connect

    if not options.local:
        connect(timeout_s=options.timeout)
    pipe, model, file = open_build(options.build, options.trust, local=options.local, timeout_s=options.timeout)
    del model
    optimizer = file.optimizer(pipe.parameters())
    losses, begin = [], time.perf_counter()
    for index in range(options.steps):
        torch.manual_seed(index)
        loss = pipe.step(file.batch())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        if pipe.rank == 0 and not options.json and _is_told(index, options.steps):
            print(f"step {index:4}  loss {losses[-1]:.6f}", flush=True)
    seconds = time.perf_counter() - begin
    if pipe.rank == 0 and options.json:
        print(json.dumps({"losses": losses, "seconds": seconds, "ranks": pipe.ranks}), file=out)
    elif pipe.rank == 0:
        where = f"on {pipe.ranks} ranks" if not options.local else "in one process"
        print(f"{options.steps} steps {where} in {seconds:.1f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    if not options.local:
        dist.destroy_process_group()
    return 0


def _is_told(index: int, steps: int) -> bool:
    """Whether a step's loss is printed: about twenty lines, the first and the last among them."""
    return index % max(1, steps // 20) == 0 or index == steps - 1
