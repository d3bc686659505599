"""Shapes, instructions, timetables, programs, forecasts, and what the runtime must know of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipecompile.errors import ProgramError, ScheduleError
from pipecompile.ir.graph import Spec

PROGRAM_VERSION = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """How many stages, ranks and microbatches, and the rank of each stage (``placement``, a loop unless given)."""

    stages: int
    ranks: int
    microbatches: int
    placement: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for what in ("stages", "ranks", "microbatches"):
            if getattr(self, what) < 1:
                raise ScheduleError(f"{what} is {getattr(self, what)}, expected at least 1")
        if self.stages % self.ranks:
            near = max(1, (2 * self.stages + self.ranks) // (2 * self.ranks)) * self.ranks
            raise ScheduleError(
                f"{self.stages} stages do not divide over {self.ranks} ranks; "
                f"use a multiple of {self.ranks}, for example --stages {near}"
            )
        if not self.placement:
            object.__setattr__(self, "placement", tuple(s % self.ranks for s in range(self.stages)))
        if len(self.placement) != self.stages or set(self.placement) != set(range(self.ranks)):
            raise ScheduleError(f"placement {self.placement} does not give {self.stages} stages to {self.ranks} ranks")

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
    gradients up to ``microbatch``, on the stage's own parameters or on the shared ones in ``values``; ``version`` is the
    one that it makes, or that a computation reads (-1: there is but one).
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
            raise ProgramError(f"unknown op {self.op!r}; expected one of {', '.join(OPS)}")

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
    def from_json(whole: Mapping[str, Any]) -> Program:
        """Read what ``to_json`` gives; ProgramError names what is malformed."""
        if whole.get("version") != PROGRAM_VERSION:
            raise ProgramError(f"program version {whole.get('version')!r}, expected {PROGRAM_VERSION}; compile again")
        try:
            shape = Shape(whole["stages"], whole["ranks"], whole["microbatches"], tuple(whole["placement"]))
            rows = tuple(
                tuple(
                    Instruction(
                        op=one["op"],
                        stage=one["stage"],
                        microbatch=one.get("microbatch", -1),
                        peer=one.get("peer", -1),
                        values=tuple(one.get("values", ())),
                        peers=tuple(one.get("peers", ())),
                        version=one.get("version", -1),
                    )
                    for one in row
                )
                for row in whole["programs"]
            )
            return Program(whole["schedule"], shape, rows)
        except (KeyError, TypeError) as error:
            raise ProgramError(f"the program is malformed at {error}; compile again") from error


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
