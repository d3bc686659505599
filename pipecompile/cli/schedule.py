"""``pipecompile schedule NAME --stages S --ranks R --microbatches M``: print, draw, solve or convert a schedule."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from pipecompile.errors import ScheduleError
from pipecompile.ir import Partition, Program, Shape, StageCost, Timetable
from pipecompile.memory import memory_over_time, most_in_flight
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.replicas import for_replicas
from pipecompile.passes.schedules import Schedule, find_schedule, make_timetable, schedule_names
from pipecompile.passes.torch_csv import read_csv, write_csv
from pipecompile.passes.verify import verify
from pipecompile.simulate import Link, simulate
from pipecompile.timeline import coloured
from pipecompile.trace import chrome_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the verified program of a schedule for a plain chain of equal stages."
    parser.add_argument("name", nargs="?", help=f"{', '.join(schedule_names())}, or your own as my.py:function")
    parser.add_argument("--schedule", help="the same as NAME")
    parser.add_argument("--from-csv", metavar="FILE", help="read the schedule from a CSV file of torch's pipelining")
    parser.add_argument("--stages", type=int, help="stages of the model")
    parser.add_argument("--ranks", type=int, help="processes that hold them (default: as many as the schedule wants)")
    parser.add_argument("--microbatches", type=int, help="microbatches of a step (default: twice the stages)")
    parser.add_argument("--replicas", type=int, default=1, help="data parallel copies of the program (default 1)")
    parser.add_argument(
        "--costs", metavar="F,I,W", help="ms of a stage's forward, input and weight half (default 1,1,1)"
    )
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS", help="what a message takes (default 0)")
    parser.add_argument("--activations", type=int, help="room for so many activations of one stage on each rank")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--compute", action="store_true", help="print computations only, no messages")
    output.add_argument("--json", action="store_true", help="print the program as JSON, as program.json holds it")
    output.add_argument("--timeline", action="store_true", help="draw what each rank does when, one cell a time unit")
    output.add_argument("--symbolic", action="store_true", help="print the schedule's closed forms")
    output.add_argument("--solve", metavar="WISH", help="how many microbatches give, for example, 'bubble <= 0.1'")
    parser.add_argument("--trace", metavar="FILE", help="also write a trace for ui.perfetto.dev")
    parser.add_argument("--torch-csv", metavar="FILE", help="also write a CSV file that torch's pipelining runs")


def run(options: argparse.Namespace) -> None:
    if options.symbolic or options.solve:
        print(_closed_forms(_schedule(options), options))
        return
    if not 0 <= options.latency <= LONGEST_MS:
        raise ScheduleError(f"--latency {options.latency}; expected milliseconds from 0 to {LONGEST_MS:.0e}")
    timetable, partition = _timetable(options)
    program = verify(for_replicas(communicate(timetable, partition), options.replicas), partition)
    _write(options, timetable, program, partition)
    if options.timeline:
        forecast = simulate(program, partition, Link(options.latency))
        Console().print(coloured(program.rows, program.shape, forecast), soft_wrap=True, end="")
    elif options.json:
        print(json.dumps(program.to_json()))
    else:
        print(timetable if options.compute else program)


def _write(options: argparse.Namespace, timetable: Timetable, program: Program, partition: Partition) -> None:
    try:
        if options.torch_csv:
            write_csv(timetable, options.torch_csv)
        if options.trace:
            forecast = simulate(program, partition, Link(options.latency))
            trace = chrome_trace(program, forecast, memory_over_time(program, partition))
            Path(options.trace).write_text(json.dumps(trace))
    except OSError as error:
        raise ScheduleError(
            f"{str(error.filename)!r} cannot be written: {error.strerror}; give another file"
        ) from error


def _schedule(options: argparse.Namespace) -> Schedule:
    named = {name: None for name in (options.name, options.schedule, options.from_csv) if name}
    if len(named) > 1:
        raise ScheduleError(f"{' and '.join(map(repr, named))} are two schedules; name one of them")
    name = options.schedule or options.name
    if not name:
        raise ScheduleError(f"no schedule named; choose one of {', '.join(schedule_names())}, or give --from-csv")
    return find_schedule(name)


def _stages(options: argparse.Namespace) -> int:
    if options.stages is None:
        raise ScheduleError("--stages is missing; say how many stages the model has, for example --stages 4")
    return int(options.stages)


def _timetable(options: argparse.Namespace) -> tuple[Timetable, Partition]:
    """The timetable that the options ask for, and the chain that it is for."""
    if options.from_csv:
        given = [
            n for n in ("name", "schedule", "stages", "ranks", "microbatches", "activations") if getattr(options, n)
        ]
        if given:
            raise ScheduleError(
                f"--from-csv says the order, stages, ranks and microbatches itself; leave out {', '.join(given)}"
            )
        timetable = read_csv(options.from_csv)
        return timetable, chain(timetable.shape.stages, _costs(options, timetable.shape.stages))
    found, stages = _schedule(options), _stages(options)
    ranks = max(1, stages // (found.per_rank or 1)) if options.ranks is None else options.ranks
    shape = Shape(stages, ranks, 2 * stages if options.microbatches is None else options.microbatches)
    partition = chain(stages, _costs(options, stages))
    if options.activations is None:
        return make_timetable(found.name, shape, partition=partition, link=Link(options.latency)), partition
    each = stages // ranks
    if options.activations < each:
        raise ScheduleError(
            f"--activations {options.activations} leaves no room for one microbatch on a rank of {each} "
            f"stage{'s'[: each - 1]}; use --activations {each}"
        )
    limits = [options.activations * ACTIVATION + ACTIVATION // 2] * ranks
    timetable = make_timetable(found.name, shape, partition=partition, link=Link(options.latency), limits=limits)
    _check_room(timetable, options.activations)
    return timetable, partition


def _check_room(timetable: Timetable, activations: int) -> None:
    for rank, row in enumerate(timetable.rows):
        needed = most_in_flight(row)
        if needed > activations:
            raise ScheduleError(
                f"{timetable.schedule} holds {needed} activations on rank {rank}, more than --activations {activations}; "
                f"use --activations {needed}, or --schedule auto"
            )


LONGEST_MS = 1e9
"""No computation or message takes as long."""
ACTIVATION = 1_000_000
"""Bytes of an activation on this chain, large beside its messages of one byte."""


def _costs(options: argparse.Namespace, stages: int) -> list[StageCost]:
    try:
        forward, inputs, weights = map(float, (options.costs or "1,1,1").split(","))
    except ValueError as error:
        raise ScheduleError(f"costs {options.costs!r}; expected three numbers F,I,W, for example 1,1.1,0.8") from error
    if forward <= 0 or not all(0 <= cost <= LONGEST_MS for cost in (forward, inputs, weights)):
        raise ScheduleError(
            f"costs {options.costs!r} are not all positive, up to {LONGEST_MS:.0e}; give F,I,W in milliseconds, such as "
            "1,1.1,0.8"
        )
    return [StageCost(forward, inputs + weights, weights, saved_bytes=ACTIVATION)] * stages


def _closed_forms(found: Schedule, options: argparse.Namespace) -> str:
    from pipecompile.passes.symbols import describe, solve

    if options.symbolic:
        return describe(found)
    stages = _stages(options)
    each = found.per_rank or (stages // options.ranks if options.ranks else 1)
    first, last = solve(found, options.solve, max(1, stages // each), each)
    upper = "" if last is None else f" and at most {last}"
    return f"{options.solve}: at least {first}{upper} microbatches ({found.name}, {stages} stages, F = I = W)"
