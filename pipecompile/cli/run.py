"""``pipecompile run build``: start the ranks and train. ``torchrun … -m pipecompile run build`` is the same."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from pipecompile.cli.output import standard_output
from pipecompile.errors import CheckpointError, PipecompileError, RuntimeFault, TraceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train with a build: one process for each rank, started by torchrun, or all ranks in this one."
    parser.add_argument("build", help="a build directory")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default 100)")
    parser.add_argument(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="start N data parallel replicas; of N batches each takes one, and a step is their mean",
    )
    parser.add_argument("--save", metavar="DIR", help="write checkpoints there, the last one after the last step")
    parser.add_argument("--save-every", type=int, default=0, metavar="N", help="also write one after every N steps")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--load", metavar="PATH", help="start from the weights of a safetensors file, index or folder")
    start.add_argument("--resume", metavar="DIR", help="go on from the newest checkpoint that --save wrote there; "
                       "--steps more are taken")  # fmt: skip
    parser.add_argument("--local", action="store_true", help="run all ranks in this process")
    parser.add_argument("--trace", metavar="FILE", help="write what was planned beside what ran in one step, for "
                        "ui.perfetto.dev")  # fmt: skip
    parser.add_argument("--trace-step", type=int, metavar="N", help="which of the steps, from 0 (default: the last)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that any wait may take (default 300)")
    parser.add_argument("--trust", action="store_true", help="accept a build whose files were changed")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(options: argparse.Namespace) -> int:
    if not options.local and "RANK" not in os.environ:
        _check(options)
        return _start(options)
    try:
        with standard_output(options.json) as out:
            return _train(options, out)
    except PipecompileError as error:
        from pipecompile.runtime import first_to_say

        if getattr(error, "__notes__", ()) or not first_to_say(str(error)):  # another rank says it
            return 1
        raise


def _check(options: argparse.Namespace) -> None:
    if options.replicas < 1 or (options.local and options.replicas > 1):
        raise RuntimeFault(
            f"--replicas {options.replicas}{' --local' * options.local} is no run; expected at least 1, each in processes "
            "of its own"
        )
    if options.steps < 1 or options.save_every < 0 or (options.save_every and not options.save):
        raise CheckpointError(
            f"--steps {options.steps} --save-every {options.save_every} is no run; expected at least 1 step, and a "
            "directory for the checkpoints with --save DIR"
        )
    if not -1 <= _traced(options) < options.steps or (options.trace_step is not None and not options.trace):
        raise TraceError(
            f"--trace-step {options.trace_step} of {options.steps} steps cannot be traced; expected --trace FILE, and a "
            f"step from 0 to {options.steps - 1}"
        )


def _start(options: argparse.Namespace) -> int:
    """Start one process for each rank of the build and replica, and end with their exit code."""
    from pipecompile.build_files import plan_and_program
    from pipecompile.cli.ranks import start_ranks
    from pipecompile.opened import read_files

    plan, _ = plan_and_program(read_files(options.build, options.trust))
    words = [str(Path(options.build)), "--steps", str(options.steps), "--timeout", str(options.timeout)]
    words += [flag for flag in ("--trust", "--json") if getattr(options, flag[2:])]
    for name in ("save", "save_every", "load", "resume", "trace"):
        if value := getattr(options, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--trace-step", str(options.trace_step)] if options.trace_step is not None else []
    return start_ranks(plan.ranks * options.replicas, words)


def _train(options: argparse.Namespace, out: TextIO) -> int:
    import torch.distributed as dist

    from pipecompile.runtime import backend_here, connect

    if not options.local:
        connect(backend_here(), options.timeout)
    _check(options)
    pipe, file, optimizer, losses = _begin(options)
    first, begin, before = pipe.steps - len(losses), time.perf_counter(), len(losses)
    with pipe.together():
        _loop(options, pipe, file, optimizer, losses)
    seconds = time.perf_counter() - begin
    if _tells(pipe) and options.json:
        found = {"losses": losses, "seconds": seconds, "ranks": pipe.ranks, "replicas": pipe.replicas}
        found |= {"first_step": first} | ({"restarted_at": first + before} if before else {})
        print(json.dumps(found), file=out)
    elif _tells(pipe):
        where = f"on {pipe.ranks} ranks" if not options.local else "in one process"
        where += f" in {pipe.replicas} replicas" if pipe.replicas > 1 else ""
        where += f", the last {options.steps} of them after a restart," if before else ""
        print(f"{len(losses)} steps {where} in {seconds:.1f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    if not options.local:
        dist.destroy_process_group()
    return 0


def _begin(options: argparse.Namespace) -> tuple[Any, Any, Any, list[float]]:
    """The pipe, at the step from which it goes on, the model file, the optimizer, and the losses before a restart."""
    from pipecompile.opened import open_share
    from pipecompile.restarts import note_run, restarted
    from pipecompile.saving import check_start, load_training
    from pipecompile.weights.folder import newest

    again = restarted(options.save)
    checkpoint = again.checkpoint if again else newest(options.resume) if options.resume else None
    pipe, file = open_share(
        options.build,
        options.trust,
        local=options.local,
        timeout_s=options.timeout,
        weights=checkpoint or options.load,
    )
    optimizer = file.optimizer(pipe.master_parameters())
    if checkpoint:
        step = load_training(pipe.share(), checkpoint, optimizer)
        for _ in range(step):  # batches may come from a source that moves on with each
            _batch(pipe, file)
            pipe.steps += 1
    if again:
        options.steps -= pipe.steps - again.first
    elif options.save:
        check_start(options.save, pipe.steps)
        note_run(options.save, pipe.steps, [])
    return pipe, file, optimizer, again.losses if again else []


def _loop(options: argparse.Namespace, pipe: Any, file: Any, optimizer: Any, losses: list[float]) -> None:
    """Take the steps, add their losses to ``losses``, and save as asked."""
    from pipecompile.cli.tracing import traced_step
    from pipecompile.restarts import note_run

    traced = _traced(options)
    for taken in range(options.steps):
        batch = _batch(pipe, file, first=not taken)
        if taken == traced:
            loss = traced_step(pipe, batch, optimizer if pipe.updates else None, options.trace)
        else:
            loss = pipe.step(batch, optimizer if pipe.updates else None)
        if not pipe.updates:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
        if _tells(pipe) and not options.json and _is_told(taken, options.steps):
            print(f"step {pipe.steps - 1:4}  loss {losses[-1]:.6f}", flush=True)
        due = options.save_every and pipe.steps % options.save_every == 0
        if options.save and (due or taken == options.steps - 1):
            note_run(options.save, pipe.steps - len(losses), losses)
            pipe.save_checkpoint(options.save, optimizer)


def _traced(options: argparse.Namespace) -> int:
    """The step that is traced, -1 if none is."""
    if not options.trace:
        return -1
    return options.steps - 1 if options.trace_step is None else int(options.trace_step)


def _batch(pipe: Any, file: Any, first: bool = False) -> Any:
    """The next batch for this replica: of a step's batches, one for each, that with its number.

    BatchError if the ``first`` ones of a run are not the same in every process.
    """
    from pipecompile.same_batch import check_same

    found = [file.batch(pipe.steps * pipe.replicas + index) for index in range(pipe.replicas)]
    if first:
        check_same(found)
    return found[pipe.replica]


def _tells(pipe: Any) -> bool:
    """Whether this process prints for all."""
    return bool(pipe.rank == pipe.replica == 0)


def _is_told(index: int, steps: int) -> bool:
    """Whether a step's loss is printed: about twenty lines, the first and the last among them."""
    return index % max(1, steps // 20) == 0 or index == steps - 1
