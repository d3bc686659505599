"""``pipecompile model.py --stages 8``: compile a model file and print the plan."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pipecompile.cli.output import standard_output
from pipecompile.garbage import seldom_searched

if TYPE_CHECKING:
    from pipecompile.plan import Plan

DEFAULT_MICROBATCHES_PER_RANK = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compile the model of a Python file into a pipeline-parallel training program."
    parser.add_argument("model", help="a Python file with model() and batch(), optionally loss() and optimizer()")
    parser.add_argument("--stages", type=int, required=True, help="how many stages to cut the model into")
    parser.add_argument("--microbatches", type=int, help="how many parts a batch is split into (default: the most of "
                        "2 for each rank that divide the batch)")  # fmt: skip
    parser.add_argument("--schedule", default="1f1b", help="compute order (default 1f1b); a wrong name lists all")
    parser.add_argument("--ranks", type=int, help="how many processes (default: one for each stage)")
    parser.add_argument("--costs", default="measure", help="measure (default), estimate, or a cost file")
    parser.add_argument("--machine", help="named machine or JSON file, for estimates and the forecast")
    parser.add_argument("--memory", help="each rank's limit, for example 80GiB")
    parser.add_argument("--opaque", action="append", default=[], metavar="PATTERN", help="modules never cut, by FQN")
    parser.add_argument("--recompute", default="none", metavar="MODE", help="run again before the backward instead of "
                        "keeping: none (default), calls, stage, or by stage: 0=stage,1=calls")  # fmt: skip
    parser.add_argument("--gradient-dtype", choices=["float32"], help="sum gradients of bfloat16 and float16 parameters "
                        "in it, and train masters")  # fmt: skip
    parser.add_argument("--out", default="build", help="build directory (default: build)")
    parser.add_argument("--explain", action="store_true", help="say why the cuts are where they are")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with the unsplit model")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(options: argparse.Namespace) -> int:
    with standard_output(options.json) as out:
        return _run(options, out)


def _run(options: argparse.Namespace, out: TextIO) -> int:
    with seldom_searched():
        import torch

        from pipecompile.api import compile
        from pipecompile.model_file import read_model_file

        file = read_model_file(options.model)
        model, batch = file.model(), file.batch()
    pipe = compile(
        model,
        batch,
        stages=options.stages,
        microbatches=_microbatches(options, batch),
        schedule=options.schedule,
        loss=file.loss,
        ranks=options.ranks,
        costs=options.costs,
        machine=options.machine,
        memory=options.memory,
        opaque=tuple(options.opaque),
        recompute=recompute_modes(options.recompute),
        gradient_dtype=torch.float32 if options.gradient_dtype else None,
        check=not options.no_check,
        progress=not options.json,
        source={"file": os.path.relpath(file.path, Path(options.out).resolve()), "sha256": file.sha256},
    )
    pipe.save(options.out)
    if options.json:
        print(json.dumps({"build": str(options.out), "plan": pipe.plan.to_json()}), file=out)
    else:
        print(pipe.plan)
        if options.memory and "batch" in pipe.plan.sizes:
            print(_largest(pipe.plan, options.memory))
        if options.explain:
            print("", *pipe.plan.why, sep="\n")
        print(f"\nwritten to {options.out}: pipecompile verify {options.out}, pipecompile run {options.out}")
    return 0


def recompute_modes(text: str) -> str | dict[int, str]:
    """``stage`` as it is, ``0=stage,1=calls`` by stage."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    return {int(stage) if stage.strip().isdecimal() else -1: mode for stage, _, mode in pairs}


def _largest(plan: Plan, memory: str) -> str:
    """The largest microbatch that fits, as a line of the plan."""
    from pipecompile.errors import PipecompileError

    try:
        return f"largest microbatch within {memory}: {plan.largest_microbatch(memory)} rows"
    except PipecompileError as error:
        return f"largest microbatch within {memory}: {error}"


def _microbatches(options: argparse.Namespace, batch: object) -> int:
    if options.microbatches is not None:
        return int(options.microbatches)
    return default_microbatches(batch, max(1, options.stages if options.ranks is None else options.ranks))


def default_microbatches(batch: object, ranks: int) -> int:
    """The largest number up to twice the ranks that divides the batch's dimension 0."""
    from pipecompile.capture.structure import tensors

    sizes = [tensor.shape[0] for _, tensor in tensors(batch) if tensor.ndim]
    most = DEFAULT_MICROBATCHES_PER_RANK * ranks
    return next(m for m in range(most, 0, -1) if all(size % m == 0 for size in sizes))
