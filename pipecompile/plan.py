"""The plan: what a compiled pipeline is, for people and for the runtime, without anything of torch.

``plan.json`` in a build is ``Plan.to_json()``, which ``plan_file.py`` reads; ``str(plan)`` is what the command line prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipecompile.errors import BuildError, briefly
from pipecompile.ir import (
    Condition,
    Forecast,
    Partition,
    Program,
    Shared,
    StageCost,
    StageFormulas,
    StagePlan,
    Transfer,
    Use,
    Value,
)
from pipecompile.ir.size import with_size_texts
from pipecompile.machine import format_bytes, parse_bytes
from pipecompile.memory import ADAM, memory_over_time, peak_bytes
from pipecompile.other_sizes import (
    Sizes,
    bytes_expression,
    checked_sizes,
    costs_at,
    expression,
    holds,
    largest,
    spec_at,
    stage_at,
    transfers_at,
)
from pipecompile.simulate import Link, simulate

PLAN_VERSION = 3

Rehearse = Callable[["Plan"], tuple[tuple[Use, ...], ...]]
"""Tells what the instructions of each stage of a plan would take."""


NOT_WRITTEN = ("program", "rehearse")
"""Fields that are no part of plan.json."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled pipeline's stages, what they hold and cost, what crosses between them, and what a step will take.

    ``inputs`` are the batch's tensors at one microbatch's size. ``holds`` are the FQNs of all parameters and buffers of
    each stage; ``random`` those of the modules that draw random numbers. ``bound_ms`` and ``bound_bytes`` are proved lower bounds for the slowest stage and the bytes (0: none). ``why`` explains the
    cuts, line by line. ``link`` is the latency in ms and the bytes/ms that the forecast counts with (empty: none).
    ``reported`` are the values of a microbatch that the loss function returns besides the loss.
    ``gradient_dtype`` is that of the masters of narrow parameters; empty: there are none. ``frozen`` are the parameters
    (FQNs) that were not trained when the model was compiled.

    ``alike`` has for each stage the first that is equal to it, and ``kernels`` those with which its memory can be told at
    other sizes, which ``rehearse`` does where the stages are at hand (empty: it cannot, or need not).

    ``sizes`` are the sizes of a microbatch that a step may change, with those that were compiled; ``fixed`` the others
    with what fixes them; ``conditions`` are what other sizes must meet.
    """

    model: str
    schedule: str
    ranks: int
    microbatches: int
    placement: tuple[int, ...]
    loss: str
    weight: str
    inputs: tuple[Value, ...]
    stages: tuple[StagePlan, ...]
    costs: tuple[StageCost, ...]
    holds: tuple[tuple[str, ...], ...]
    transfers: tuple[Transfer, ...]
    forecast: Forecast
    bound_ms: float = 0.0
    bound_bytes: int = 0
    gradient_dtype: str = ""
    frozen: tuple[str, ...] = ()
    reported: tuple[Value, ...] = ()
    random: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    link: tuple[float, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    formulas: tuple[StageFormulas, ...] = ()
    shared_bytes: Mapping[str, int] = field(default_factory=dict)
    optimizer_factor: float = ADAM
    alike: tuple[int, ...] = ()
    kernels: tuple[str, ...] = ()
    program: Program | None = field(default=None, compare=False, repr=False)
    rehearse: Rehearse | None = field(default=None, compare=False, repr=False)

    def at(self, **sizes: int) -> Plan:
        """The plan at other open sizes, ``batch`` (rows of a microbatch) and ``sequence``, without capturing anew.

        Cuts and program stay; shapes, bytes, times, memory and the forecast follow. Measured times change as estimated
        ones do. Memory is that of a rehearsal at these sizes where all stages are at hand, else a sum over their parts,
        which a note says. Raises BatchError for a size that is fixed or unknown, or that does not meet the conditions.
        """
        wanted = checked_sizes(sizes, self.sizes, self.fixed, self.conditions)
        return self._resized(wanted)

    def _resized(self, sizes: Sizes) -> Plan:
        resized = replace(
            self,
            sizes=sizes,
            inputs=tuple(replace(value, spec=spec_at(value.spec, sizes)) for value in self.inputs),
            stages=tuple(stage_at(stage, sizes) for stage in self.stages),
            costs=costs_at(self.costs, self.formulas, self.sizes, sizes),
            bound_ms=0.0,
            bound_bytes=0,
        )
        resized = replace(resized, transfers=transfers_at(self.transfers, resized.stages))
        if self.kernels and dict(sizes) != dict(self.sizes):
            resized = resized._rehearsed()
        if self.program is None:
            return resized
        return replace(
            resized,
            forecast=simulate(
                self.program,
                resized.partition,
                Link(self.link[0], self.link[1]) if self.link else None,
                self.optimizer_factor,
            ),
        )

    def _rehearsed(self) -> Plan:
        """The plan with what its stages would take, or a note that this cannot be told."""
        try:
            if self.rehearse is None:
                raise LookupError("not all stages are in this process")
            uses = self.rehearse(self)
        except Exception as error:  # what needs contents or has no kernel raises errors of any kind
            note = f"peak memory at these sizes is only a sum over the parts of the stages: {briefly(error)}"
            return replace(self, notes=tuple(dict.fromkeys((*self.notes, note))))
        return replace(self, costs=tuple(replace(cost, uses=use) for cost, use in zip(self.costs, uses, strict=True)))

    def largest_microbatch(self, memory: int | str) -> int:
        """The most rows of a microbatch with which every rank stays within ``memory`` ("80GiB" or bytes) by the forecast.

        Each instruction of the program holds bytes that grow by so many with each row; that is solved for the rows.
        Raises BatchError if the model fixes the rows, MemoryLimitError if not even one fits.
        """
        checked_sizes({"batch": 1}, self.sizes, self.fixed, ())
        limit = parse_bytes(memory) if isinstance(memory, str) else memory
        assert self.program is not None, "a plan of a pipe has its program"
        program, factor = self.program, self.optimizer_factor

        def held(rows: int) -> tuple[tuple[int, ...], ...]:
            plan = self._resized({**self.sizes, "batch": rows})
            most = peak_bytes(program, plan.partition, factor)
            lines = memory_over_time(program, plan.partition, factor)
            return tuple((size, *line) for size, line in zip(most, lines))

        return largest(held, limit, lambda rows: holds({**self.sizes, "batch": rows}, self.conditions))

    @property
    def flops(self) -> tuple[Any, ...]:
        """Each stage's FLOPs for a microbatch, forward and backward, as sympy expressions in the open sizes."""
        return tuple(expression(formulas.flops, self.sizes) for formulas in self.formulas)

    def bytes_of(self, value: str) -> Any:
        """The bytes of a value that crosses, as a sympy expression in the open sizes. BuildError if none has that name."""
        specs = {port.name: port.spec for stage in self.stages for port in stage.outputs}
        if value not in specs:
            raise BuildError(f"no stage gives a value {value!r}; those that cross are {', '.join(specs)}")
        return bytes_expression(specs[value], self.sizes)

    @property
    def partition(self) -> Partition:
        """What programs are proved against: costs, transfers and shared parameters, without the nodes."""
        names = dict.fromkeys(name for stage in self.stages for name in stage.shared)
        shared = [
            Shared(name, tuple(s.index for s in self.stages if name in s.shared), self.shared_bytes.get(name, 0))
            for name in names
        ]
        return Partition(self.model, len(self.stages), (), self.costs, self.transfers, tuple(shared))

    @property
    def bytes(self) -> int:
        """Bytes that cross between stages for each microbatch, gradients included."""
        return sum(t.bytes + t.gradient_bytes for t in self.transfers)

    def to_json(self) -> dict[str, Any]:
        whole = {name: getattr(self, name) for name in self.__slots__ if name not in NOT_WRITTEN}
        whole |= {
            "version": PLAN_VERSION,
            "inputs": with_size_texts([asdict(value) for value in self.inputs]),
            "stages": with_size_texts([stage.to_json() for stage in self.stages]),
            "conditions": [asdict(condition) for condition in self.conditions],
            "reported": with_size_texts([asdict(value) for value in self.reported]),
            "formulas": [asdict(formulas) for formulas in self.formulas],
            "costs": [asdict(cost) for cost in self.costs],
            "transfers": [asdict(transfer) for transfer in self.transfers],
            "forecast": {
                "step_ms": self.forecast.step_ms,
                "busy_ms": self.forecast.busy_ms,
                "bubble": self.forecast.bubble,
                "peak_bytes": self.forecast.peak_bytes,
            },
        }
        return whole

    def _recomputed(self) -> list[str]:
        """What runs again before its backward, by mode."""
        what = {"stage": "all of", "calls": "the large module calls of"}
        rows = self.program.rows if self.program else ()
        split = any(one.op == "BACKWARD_WEIGHT" for row in rows for one in row)
        more = {"calls": ", whose weight gradients are made in the first half of the backward"} if split else {}
        modes = {mode: [str(s.index) for s in self.stages if s.recompute == mode] for mode in what}
        return [
            f"{what[mode]} stage{'s' if found[1:] else ''} {', '.join(found)}{more.get(mode, '')}"
            for mode, found in modes.items()
            if found
        ]

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.stages)} stages on {self.ranks} ranks, {self.microbatches} microbatches, {self.schedule}",
            "",
            "stage  rank  forward ms  backward ms  parameters  receives",
        ]
        for stage, cost in zip(self.stages, self.costs):
            received = ", ".join(f"{port.name} {port.spec} from {port.source}" for port in stage.inputs) or "the batch"
            lines.append(
                f"{stage.index:5}  {self.placement[stage.index]:4}  {cost.forward_ms:10.3f}  {cost.backward_ms:11.3f}  "
                f"{format_bytes(cost.parameter_bytes):>10}  {received}"
            )
        slowest = max(cost.total_ms for cost in self.costs)
        fair = sum(cost.total_ms for cost in self.costs) / len(self.costs)
        bound = f", proved bound {self.bound_ms:.3f} ms" if self.bound_ms else ""
        lines += [
            "",
            f"slowest stage {slowest:.3f} ms, {slowest / fair - 1 if fair else 0:.1%} over equal shares{bound}",
            f"{format_bytes(self.bytes)} cross between stages for each microbatch, there and back",
            f"forecast: {self.forecast.step_ms:.3f} ms a step, "
            f"idle {', '.join(f'{share:.0%}' for share in self.forecast.bubble)} of each rank's time, "
            f"peak memory {', '.join(format_bytes(size) for size in self.forecast.peak_bytes)}",
        ]
        shared = dict.fromkeys(name for stage in self.stages for name in stage.shared)
        lines += [f"shared by several stages, gradients summed: {name}" for name in shared]
        lines += [f"opened: {', '.join(self.opened)}"] if self.opened else []
        lines += [f"recomputed before the backward: {text}" for text in self._recomputed()]
        if self.sizes:
            lines += [
                f"runs with any {' and '.join(self.sizes)}, compiled for {', '.join(map(str, self.sizes.values()))}"
            ]
        lines += [f"{name} is fixed: {why}" for name, why in self.fixed.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
