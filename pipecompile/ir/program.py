"""Shapes, instructions, timetables, programs, forecasts, and what the runtime must know of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipecompile.errors import ProgramError, ScheduleError
from pipecompile.ir.graph import Spec
from pipecompile.ir.json_text import Reader, shortened

PROGRAM_VERSION = 1
MOST_FORWARDS = 10_000_000
"""Stages times microbatches of the largest program that is made or read: it has one instruction and more for each."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many stages, ranks and microbatches, and the rank of each stage (``placement``, a loop unless given)."""

    stages: int
    ranks: int
    microbatches: int
    placement: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for what in ("stages", "ranks", "microbatches"):
            number = getattr(self, what)
            if type(number) is not int or number < 1:
                raise ScheduleError(f"{what} is {shortened(number)}, expected at least 1")
        if self.stages * self.microbatches > MOST_FORWARDS:
            raise ScheduleError(
                f"{shortened(self.stages)} stages times {shortened(self.microbatches)} microbatches are more than "
                f"{MOST_FORWARDS:,} forwards, the largest program that is unrolled; use fewer microbatches in a step"
            )
        if self.stages % self.ranks:
            near = max(1, (2 * self.stages + self.ranks) // (2 * self.ranks)) * self.ranks
            raise ScheduleError(
                f"{self.stages} stages do not divide over {self.ranks} ranks; "
                f"use a multiple of {self.ranks}, for example --stages {near}"
            )
        if not self.placement:
            object.__setattr__(self, "placement", tuple(s % self.ranks for s in range(self.stages)))
        whole = all(type(rank) is int for rank in self.placement)
        if not whole or len(self.placement) != self.stages or set(self.placement) != set(range(self.ranks)):
            raise ScheduleError(
                f"placement {shortened(self.placement)} does not give {self.stages} stages to {self.ranks} ranks; expected a "
                f"rank from 0 to {self.ranks - 1} for each stage, and every rank"
            )

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(s for s, r in enumerate(self.placement) if r == rank)


COMPUTE = {"FORWARD": "F", "BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
SENDS = ("SEND_F", "SEND_B")
RECEIVES = ("RECV_F", "RECV_B")
SUMS = ("REDUCE_GRAD", "REDUCE_REPLICAS")
OPS = (*COMPUTE, *SENDS, *RECEIVES, *SUMS, "UPDATE")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of a rank: ``stage`` acts on ``microbatch``; ``peer`` is the stage at the other end of a message.

    ``values`` are the tensors of a message, or the shared parameters of a REDUCE_GRAD, whose ``peers`` are the stages
    on other ranks that hold them too. REDUCE_REPLICAS sums the stage's other gradients over the replicas of the program;
    REDUCE_GRAD sums over them as well. Sums have microbatch -1. UPDATE steps the optimizer inside a step, with the
    gradients up to ``microbatch``, on the stage's own parameters or on the shared ones in ``values``, after summing them
    over the replicas; ``version`` is the one that it makes, or that a computation reads (-1: there is but one).
    """

    op: str
    stage: int
    microbatch: int = -1
    peer: int = -1
    values: tuple[str, ...] = ()
    peers: tuple[int, ...] = ()
    version: int = -1

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ProgramError(f"unknown op {shortened(self.op)}; expected one of {', '.join(OPS)}")
        numbers = (self.stage, self.microbatch, self.peer, self.version)
        if not all(type(number) is int and number >= -1 for number in numbers):
            raise ProgramError(
                f"{self.op} has stage, microbatch, peer and version {shortened(numbers)}; expected whole numbers"
            )
        if not all(type(name) is str for name in self.values) or not all(type(peer) is int for peer in self.peers):
            raise ProgramError(
                f"{self.op} has the values {shortened(self.values)} and peers {shortened(self.peers)}; expected names and "
                "stages"
            )

    def __str__(self) -> str:
        if self.op in COMPUTE:
            version = f"@{self.version}" if self.version >= 0 else ""
            return f"{self.stage}{COMPUTE[self.op]}{self.microbatch}{version}"
        if self.op in SUMS:
            return f"{self.stage}{self.op}"
        if self.op == "UPDATE":
            shared = f"({','.join(self.values)})" if self.values else ""
            return f"{self.stage}UPDATE{self.microbatch}@{self.version}{shared}"
        return f"{self.stage}{self.op}{self.microbatch}{'>' if self.op in SENDS else '<'}{self.peer}"

    def to_json(self) -> dict[str, Any]:
        whole: dict[str, Any] = {"op": self.op, "stage": self.stage}
        if self.microbatch >= 0:
            whole["microbatch"] = self.microbatch
        if self.peer >= 0:
            whole["peer"] = self.peer
        if self.values:
            whole["values"] = list(self.values)
        if self.peers:
            whole["peers"] = list(self.peers)
        if self.version >= 0:
            whole["version"] = self.version
        return whole


def _lines(rows: tuple[tuple[Instruction, ...], ...]) -> str:
    return "\n".join(" ".join(map(str, row)) for row in rows)


@dataclass(frozen=True, slots=True)
class Timetable:
    """The compute instructions (and updates) of each rank in order, without communication."""

    schedule: str
    shape: Shape
    rows: tuple[tuple[Instruction, ...], ...]

    def __str__(self) -> str:
        return _lines(self.rows)


@dataclass(frozen=True, slots=True)
class Program:
    """The instruction list of each rank, communication included. ``str`` gives one rank a line."""

    schedule: str
    shape: Shape
    rows: tuple[tuple[Instruction, ...], ...]

    def __str__(self) -> str:
        return _lines(self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": PROGRAM_VERSION,
            "schedule": self.schedule,
            "stages": self.shape.stages,
            "ranks": self.shape.ranks,
            "microbatches": self.shape.microbatches,
            "placement": list(self.shape.placement),
            "programs": [[instruction.to_json() for instruction in row] for row in self.rows],
        }

    @staticmethod
    def from_json(whole: Any) -> Program:
        """Read what ``to_json`` gives; ProgramError names the place of what is malformed."""
        read, where = Reader(ProgramError, defaults=True), "program.json"
        version = read.object(whole, where).get("version")
        if version != PROGRAM_VERSION:
            raise ProgramError(f"program version {shortened(version)}, expected {PROGRAM_VERSION}; compile again")
        found = read.fields_of(_File, whole, where, ignored=("version",))
        rows = found.pop("programs")
        try:
            placement = found["placement"] or (-1,)
            shape = Shape(found["stages"], found["ranks"], found["microbatches"], placement)
        except ScheduleError as error:
            raise ProgramError(f"{where}: {error}; compile again") from error
        return Program(
            found["schedule"],
            shape,
            tuple(
                tuple(_instruction(read, one, f"{where}: programs[{rank}][{at}]") for at, one in enumerate(row))
                for rank, row in enumerate(rows)
            ),
        )


@dataclass(frozen=True, slots=True)
class _File:
    """The keys of program.json besides its version."""

    schedule: str
    stages: int
    ranks: int
    microbatches: int
    placement: tuple[int, ...]
    programs: tuple[tuple[Any, ...], ...]


def _instruction(read: Reader, whole: Any, where: str) -> Instruction:
    found = read.fields_of(Instruction, whole, where)
    try:
        return Instruction(**found)
    except ProgramError as error:
        read.refuse(where, f"is wrong: {error}")


@dataclass(frozen=True, slots=True)
class Span:
    """When an instruction (its position in the rank's row) runs, in milliseconds from the start of the step."""

    rank: int
    position: int
    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a step will take: its time, each rank's busy time and share of idle time, and each rank's peak memory."""

    step_ms: float
    busy_ms: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    spans: tuple[Span, ...] = ()

    @property
    def bubble(self) -> tuple[float, ...]:
        """Idle share of the step for each rank, 0 to 1."""
        return tuple(1 - busy / self.step_ms if self.step_ms else 0.0 for busy in self.busy_ms)


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor at the edge of a stage: received from stage ``source``, or made here and sent to ``targets``."""

    name: str
    spec: Spec
    source: int = -1
    targets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What the runtime must know of a stage: its ports in the order of ``forward``'s arguments and results.

    ``modules``, ``parameters`` and ``buffers`` are the FQNs that the stage takes from the model (parameters and
    buffers only those that are read outside of a taken module); ``shared`` maps the canonical FQN of a parameter that
    other stages have too to the FQN that it has here. ``recompute`` says what runs again before its backward: "none",
    the "stage", or each of its "calls".
    """

    index: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    opened: tuple[str, ...] = ()
    recompute: str = "none"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
