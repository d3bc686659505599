"""``pipecompile schedule NAME --stages S --ranks R --microbatches M``: print a program without a model."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from pipecompile.ir import Shape
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable, schedule_names
from pipecompile.passes.verify import verify
from pipecompile.simulate import simulate
from pipecompile.timeline import coloured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the program of a schedule for a plain chain of equal stages, verified."
    parser.add_argument("name", help=f"one of {', '.join(schedule_names())}")
    parser.add_argument("--stages", type=int, required=True, help="stages of the model")
    parser.add_argument("--ranks", type=int, help="processes that hold them (default: one for each stage)")
    parser.add_argument(
        "--microbatches", type=int, default=0, help="microbatches of a step (default: twice the stages)"
    )
    parser.add_argument("--compute", action="store_true", help="only computations, no messages")
    parser.add_argument("--timeline", action="store_true", help="draw what each rank does when, one cell a time unit")
    parser.add_argument("--json", action="store_true", help="print the program as JSON, as program.json holds it")


def run(options: argparse.Namespace) -> None:
    shape = Shape(options.stages, options.ranks or options.stages, options.microbatches or 2 * options.stages)
    timetable = make_timetable(options.name, shape)
    partition = chain(shape.stages)
    program = verify(communicate(timetable, partition), partition)
    if options.timeline:
        Console().print(coloured(program.rows, program.shape, simulate(program, partition)), soft_wrap=True, end="")
    elif options.json:
        print(json.dumps(program.to_json()))
    else:
        print(timetable if options.compute else program)
