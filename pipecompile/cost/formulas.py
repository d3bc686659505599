"""What a stage costs at any size of a microbatch: the estimate's kernels, each with its FLOPs and bytes as polynomials.

Every distinct node runs on meta tensors at a few sizes. With ``batch`` to the first power and lengths to the second in all,
that determines each kernel's FLOPs and bytes, exactly in whole numbers; one more size checks them:

    sizes (2, 16) (3, 16) (2, 15) (3, 15) (2, 14) (3, 14)      flops = c0 + c1·batch + c2·sequence + … + c5·batch·sequence²
    check (4, 13)
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import sympy

from pipecompile.cost.estimate import Shapes, Work, run_node
from pipecompile.cost.interpreter import references
from pipecompile.cost.key import line, specs
from pipecompile.cost.roofline import Kernel
from pipecompile.errors import CostError
from pipecompile.ir import Graph, Node, Size, Spec, StageFormulas
from pipecompile.ir.size import BATCH, evaluate, shape_at
from pipecompile.machine import Machine

Sizes = Mapping[str, int]
Powers = tuple[int, ...]


def stage_formulas(
    graph: Graph, stage_of: Mapping[str, int], stages: int, machine: Machine
) -> tuple[StageFormulas, ...]:
    """The formulas of each stage; none if no size is open. CostError if the work is no such polynomial of the sizes."""
    if not graph.sizes:
        return ()
    fit = _Fit.of(graph.sizes)
    known = specs(graph)
    counts: list[Counter[str]] = [Counter() for _ in range(stages)]
    nodes: dict[str, Node] = {}
    for node in graph.nodes:
        if node.name in stage_of:
            signature = _signature(graph, node, known)
            nodes.setdefault(signature, node)
            counts[stage_of[node.name]][signature] += 1
    done = {signature: _polynomials(fit, graph, node, known, signature) for signature, node in nodes.items()}
    return tuple(_stage([(done[signature], n) for signature, n in count.items()], machine) for count in counts)


def _polynomials(fit: _Fit, graph: Graph, node: Node, known: Mapping[str, Spec], signature: str) -> Polynomials:
    key = (signature, tuple(fit.check.items()))
    if key not in _fitted:
        if len(_fitted) > MOST:
            _fitted.clear()
        _fitted[key] = fit.node(graph, node, known)
    return _fitted[key]


@dataclass(frozen=True, slots=True)
class Polynomials:
    """A node's work as polynomials: for each part its kernels' (flops, bytes, dtype), and the saved bytes."""

    forward: tuple[tuple[str, str, str], ...]
    backward: tuple[tuple[str, str, str], ...]
    backward_input: tuple[tuple[str, str, str], ...]
    saved_bytes: str


MOST = 1000
_fitted: dict[Any, Polynomials] = {}
"""What is known already, by the node's signature and the sizes: a model that is compiled again has the same nodes."""


@dataclass(frozen=True, slots=True)
class _Fit:
    """The sizes at which nodes run, the one that checks, and what makes coefficients of values."""

    names: tuple[str, ...]
    powers: tuple[Powers, ...]
    points: tuple[Sizes, ...]
    check: Sizes
    inverse: tuple[tuple[Fraction, ...], ...]

    @staticmethod
    def of(sizes: Sizes) -> _Fit:
        names = tuple(sizes)
        powers = tuple(
            p for p in itertools.product(*(range(2 if n == BATCH else 3) for n in names)) if _small(names, p)
        )
        points = tuple({n: _moved(n, sizes[n], k) for n, k in zip(names, p)} for p in powers)
        check = {n: _moved(n, sizes[n], 2 if n == BATCH else 3) for n in names}
        matrix = sympy.Matrix(
            [[math.prod(at[n] ** k for n, k in zip(names, p)) for p in powers] for at in points]
        ).inv()
        rows = tuple(tuple(Fraction(int(x.p), int(x.q)) for x in matrix.row(i)) for i in range(len(powers)))
        return _Fit(names, powers, points, check, rows)

    def node(self, graph: Graph, node: Node, known: Mapping[str, Spec]) -> Polynomials:
        works = [_run(graph, node, known, sizes) for sizes in self.points]
        found = Polynomials(
            self._kernels([work.forward for work in works]),
            self._kernels([work.backward for work in works]),
            self._kernels([work.backward_input for work in works]),
            self._polynomial([work.saved_bytes for work in works]),
        )
        if not self._holds(found, _run(graph, node, known, self.check)):
            raise CostError(f"the work of node {node.name!r} is no polynomial of {', '.join(self.names)}")
        return found

    def _kernels(self, runs: list[tuple[Kernel, ...]]) -> tuple[tuple[str, str, str], ...]:
        if len({tuple(kernel.dtype for kernel in run) for run in runs}) != 1:
            raise CostError("other kernels run at other sizes")
        return tuple(
            (self._polynomial([int(k.flops) for k in same]), self._polynomial([k.bytes for k in same]), same[0].dtype)
            for same in zip(*runs)
        )

    def _polynomial(self, values: Sequence[int]) -> str:
        """The polynomial's text, from its values at the points."""
        terms = []
        found = [sum(a * v for a, v in zip(row, values)) for row in self.inverse]
        below = math.lcm(*(Fraction(c).denominator for c in found))
        for coefficient, power in zip(found, self.powers):
            if coefficient:
                names = [name for name, k in zip(self.names, power) for _ in range(k)]
                terms.append("*".join([str(int(coefficient * below)), *names]))
        whole = " + ".join(terms).replace("+ -", "- ") or "0"
        return whole if below == 1 else f"({whole})//{below}"

    def _holds(self, found: Polynomials, work: Work) -> bool:
        for part in ("forward", "backward", "backward_input"):
            kernels: tuple[Kernel, ...] = getattr(work, part)
            expected = [(int(k.flops), k.bytes, k.dtype) for k in kernels]
            got = [(evaluate(f, self.check), evaluate(b, self.check), dtype) for f, b, dtype in getattr(found, part)]
            if got != expected:
                return False
        return bool(evaluate(found.saved_bytes, self.check) == work.saved_bytes)


def _small(names: tuple[str, ...], powers: Powers) -> bool:
    return sum(k for name, k in zip(names, powers) if name != BATCH) <= 2


def _moved(name: str, size: int, by: int) -> int:
    """More rows (from two on: torch treats one by itself), and shorter lengths, which no limit forbids."""
    return max(size, 2) + by if name == BATCH else size - by if size > 4 else size + by


def _signature(graph: Graph, node: Node, known: Mapping[str, Spec]) -> str:
    """Equal for nodes that do the same work at every size."""
    parts = node.inside or (node,)
    shapes = [str([_texts(known[name].shape) for name in part.reads]) for part in parts]
    return "\n".join(
        [line(node, graph, known, ""), *(line(part, graph, known, part.target) for part in parts), *shapes]
    )


def _texts(shape: tuple[int, ...]) -> list[str]:
    return [size.text if isinstance(size, Size) else str(size) for size in shape]


def _run(graph: Graph, node: Node, known: Mapping[str, Spec], sizes: Sizes) -> Work:
    """The node's work at other sizes."""
    moved = _resized(node, sizes)
    parts = moved.inside or (moved,)
    names = {name for part in (node, *node.inside) for name in part.reads} | set(_named(parts))
    at = {name: replace(known[name], shape=shape_at(known[name].shape, sizes)) for name in names if name in known}
    return run_node(Shapes(graph, at), moved, parts)


def _named(parts: Sequence[Node]) -> Iterator[str]:
    for part in parts:
        yield from references(part)


def _resized(node: Node, sizes: Sizes) -> Node:
    def moved(whole: Any) -> Any:
        if isinstance(whole, Size):
            return whole.at(sizes)
        if isinstance(whole, tuple | list):
            return type(whole)(map(moved, whole))
        if isinstance(whole, dict):
            return {key: moved(part) for key, part in whole.items()}
        return slice(*map(moved, (whole.start, whole.stop, whole.step))) if isinstance(whole, slice) else whole

    outputs = tuple(replace(v, spec=replace(v.spec, shape=shape_at(v.spec.shape, sizes))) for v in node.outputs)
    inside = tuple(_resized(part, sizes) for part in node.inside)
    return replace(node, args=moved(node.args), kwargs=moved(dict(node.kwargs)), outputs=outputs, inside=inside)


def _stage(works: list[tuple[Polynomials, int]], machine: Machine) -> StageFormulas:
    """The sums over a stage's nodes; ``works`` are theirs with how often each is there."""

    def ms(part: str) -> str:
        kernels: Counter[tuple[str, str, str]] = Counter()
        for work, count in works:
            for kernel in getattr(work, part):
                kernels[kernel] += count
        terms = [_kernel_text(machine, *kernel, count) for kernel, count in kernels.items()]
        return " + ".join(terms) or "0"

    saved = " + ".join(f"{count}*({work.saved_bytes})" for work, count in works) or "0"
    flops = [f"{n}*({flops})" for work, n in works for flops, _, _ in (*work.forward, *work.backward) if flops != "0"]
    return StageFormulas(ms("forward"), ms("backward"), ms("backward_input"), _sum(saved), _sum(" + ".join(flops)))


def _sum(text: str) -> str:
    """A sum of polynomials multiplied out, as text; as it is if it has divisions."""
    if "//" in text or not text:
        return text or "0"
    names = sorted(set(re.findall(r"[a-z]\w*", text)))
    symbols = {name: sympy.Symbol(name, integer=True) for name in names}
    whole = sympy.sympify(evaluate(text, symbols))
    if not names:
        return str(whole)
    terms = sympy.Poly(whole, *symbols.values()).terms()
    parts = ["*".join([str(c), *(n for n, k in zip(names, powers) for _ in range(k))]) for powers, c in terms]
    return " + ".join(parts).replace("+ -", "- ")


def _kernel_text(machine: Machine, flops: str, size: str, dtype: str, count: int) -> str:
    each = machine.compute_ms(1.0, dtype), machine.move_ms(1.0), machine.launch_us / 1e3
    moved = f"{each[1]!r}*({size})"
    work = moved if flops == "0" else f"max({each[0]!r}*({flops}), {moved})"
    return f"{count}*({work} + {each[2]!r})"
