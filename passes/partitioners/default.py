"""What the compiler uses unless told otherwise."""

from __future__ import annotations

from pipecompile.passes.partitioners import partitioner
from pipecompile.passes.partitioners.contiguous import contiguous
from pipecompile.passes.partitioners.problem import Answer, Problem


@partitioner("default")
def default(problem: Problem) -> Answer | None:
    """The best contiguous split."""
    return contiguous(problem)
