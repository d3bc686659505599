"""Random cost graphs for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from pipecompile.ir import CostGraph, CostNode, CostTensor, Parameter


@st.composite
def graphs(draw: st.DrawFn, most: int = 10) -> CostGraph:
    """Random acyclic graphs with shared parameters and gradients that go back."""
    count = draw(st.integers(2, most))
    pairs = [(u, v) for u in range(count) for v in range(u + 1, count)]
    edges = tuple(pair for pair in pairs if draw(st.integers(0, 3)) == 0)
    weights = [Parameter(f"w{k}", draw(st.integers(0, 9)), draw(st.booleans())) for k in range(3)]
    nodes = tuple(
        CostNode(
            f"n{k}",
            draw(st.integers(0, 9)),
            draw(st.integers(0, 9)),
            tuple(w for w in weights if draw(st.integers(0, 3)) == 0),
            draw(st.integers(0, 5)),
        )
        for k in range(count)
    )
    tensors = []
    for u in range(count):
        readers = tuple(v for a, v in edges if a == u)
        if readers:
            tensors.append(CostTensor(f"t{u}", u, readers, draw(st.integers(0, 20)), draw(st.integers(0, 5))))
        writers = tuple(a for a, v in edges if v == u)
        if writers and draw(st.booleans()):
            tensors.append(CostTensor(f"g{u}", u, writers, draw(st.integers(0, 20)), 0, "B"))
        if draw(st.integers(0, 7)) == 0:  # a gradient between nodes that no edge orders
            tensors.append(CostTensor(f"x{u}", u, (draw(st.integers(0, count - 1)),), 6, 0, "B"))
    return CostGraph("random", nodes, edges, tuple(tensors))
