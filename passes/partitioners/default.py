"""What the compiler uses unless told otherwise: a search with min cuts, polished and bounded by the exact solver."""

from __future__ import annotations

from pipecompile.passes.partitioners import partitioner
from pipecompile.passes.partitioners.contiguous import contiguous
from pipecompile.passes.partitioners.exact import polish
from pipecompile.passes.partitioners.problem import Answer, Problem


@partitioner("default")
def default(problem: Problem) -> Answer | None:
    """The least time, then the fewest bytes, within the problem's time limit."""
    return polish(problem, contiguous(problem))
