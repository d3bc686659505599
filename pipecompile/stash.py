"""What a rank holds where weights are updated inside a step: older versions of them, gradients that wait.

update     + the trainable parameters, for each older version of them that a microbatch still reads
backward   + a shared parameter's gradient, for each group of microbatches more than one whose update waits for others
"""

from __future__ import annotations

from collections.abc import Iterator

from pipecompile.ir import Partition, Program
from pipecompile.ir.versions import lines


def stashed(program: Program, rank: int, partition: Partition) -> Iterator[int]:
    """Bytes of older versions of the weights, and of gradients beside the first set, on ``rank`` at each instruction."""
    shared = {one.parameter: one for one in partition.shared}
    found = lines(program.rows, rank, [(one.parameter, one.stages) for one in partition.shared])
    sizes = [
        shared[line.values[0]].bytes
        if line.values
        else partition.costs[line.stages[0]].trainable_bytes
        - sum(one.bytes for one in partition.shared if line.stages[0] in one.stages)
        for line in found
    ]
    for one in program.rows[rank]:
        if one.op == "UPDATE":
            for line in found:
                line.step(one)
        yield sum(size * (line.held - 1 + max(0, len(line.open) - 1)) for line, size in zip(found, sizes))
        if one.op != "UPDATE":
            for line in found:
                line.step(one)
