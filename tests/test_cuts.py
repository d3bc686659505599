"""Minimum cuts between stages: closed, minimal, and the same from both flow algorithms."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipecompile.passes.partitioners import cuts
from pipecompile.passes.partitioners.cuts import Network, balanced_cut, cut_network
from pipecompile.passes.partitioners.problem import Problem


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, tuple[int, ...]]:
    """A random problem of four stages, and a stage map in which every node could be in stage 1 or 2 if it is there."""
    count = draw(st.integers(4, 9))
    stage = tuple(sorted(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))))
    pairs = itertools.combinations(range(count), 2)
    edges = tuple(pair for pair in pairs if draw(st.integers(0, 2)) == 0)
    sizes = st.integers(1, 20)
    tensors = [(u, tuple({v for a, v in edges if a == u}), draw(sizes)) for u in {u for u, _ in edges}]
    tensors += [(v, tuple({u for u, b in edges if b == v}), draw(sizes)) for v in {v for _, v in edges}]
    problem = Problem(
        stages=4,
        load=tuple(draw(st.lists(st.integers(1, 5).map(float), min_size=count, max_size=count))),
        edges=edges,
        tensors=tuple(tensors),
        weights=(),
        saved=(0,) * count,
        speeds=(1.0,) * 4,
        links=tuple(draw(st.lists(st.sampled_from((1.0, 2.0)), min_size=3, max_size=3))),
    )
    return problem, stage


def divisions(problem: Problem, stage: tuple[int, ...]) -> dict[frozenset[int], float]:
    """The traffic of every way to divide the nodes of stages 1 and 2 among them, by what is in stage 1."""
    free = [v for v, s in enumerate(stage) if s in (1, 2)]
    found = {}
    for choice in itertools.product((1, 2), repeat=len(free)):
        divided = list(stage)
        for v, s in zip(free, choice):
            divided[v] = s
        if all(divided[u] <= divided[v] for u, v in problem.edges):
            found[frozenset(v for v, s in zip(free, choice) if s == 1)] = problem.traffic(divided)
    return found


@pytest.mark.parametrize("small", [0, 1000])
@settings(max_examples=150, deadline=None)
@given(case=problems())
def test_minimum(small: int, case: tuple[Problem, tuple[int, ...]]):
    """With networkx and with scipy: no division of two stages costs less than the minimum cut between them."""
    problem, stage = case
    network = Network(cut_network(problem, stage, 1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "SMALL", small)
        smallest, largest = network.cut(set(), set())
    known = divisions(problem, stage)
    assert smallest <= largest
    assert known[frozenset(smallest)] == pytest.approx(min(known.values()))
    assert known[frozenset(largest)] == pytest.approx(min(known.values()))


@settings(max_examples=150, deadline=None)
@given(case=problems(), seed=st.integers(0, 3))
def test_balanced(case: tuple[Problem, tuple[int, ...]], seed: int):
    """A balanced cut is closed and inside its window; nodes that are fixed to a side stay there."""
    problem, stage = case
    free = [v for v, s in enumerate(stage) if s in (1, 2)]
    total = sum(problem.load[v] for v in free)
    low, high = total / 3, total * 2 / 3
    found = balanced_cut(Network(cut_network(problem, stage, 1, 2)), problem.load, low, high, random.Random(seed))
    if found is not None:
        assert frozenset(found) in divisions(problem, stage)
        assert low <= sum(problem.load[v] for v in found) <= high
    if len(free) > 1:
        inside, outside = {free[0]}, {free[-1]}
        network = Network(cut_network(problem, stage, 1, 2, inside, outside))
        assert network.members == free[1:-1]
        smallest, _ = network.cut(set(), set())
        known = {one: cost for one, cost in divisions(problem, stage).items() if inside <= one and not outside & one}
        assert known[frozenset(smallest | inside)] == pytest.approx(min(known.values()))


def test_cut_is_paid_once():
    """One tensor with two readers is cheaper to cut than two tensors of half its size and a bit."""
    problem = Problem(
        stages=2,
        load=(1.0,) * 4,
        edges=((0, 1), (0, 2), (1, 3), (2, 3)),
        tensors=((0, (1, 2), 10), (1, (3,), 6), (2, (3,), 6)),
        weights=(),
        saved=(0,) * 4,
        speeds=(1.0, 1.0),
        links=(1.0,),
    )
    network = Network(cut_network(problem, (0, 0, 0, 1), 0, 1, {0}, {3}))
    assert network.cut(set(), set()) == (set(), set())
    dearer = replace(problem, tensors=((0, (1, 2), 13), (1, (3,), 6), (2, (3,), 6)))
    network = Network(cut_network(dearer, (0, 0, 0, 1), 0, 1, {0}, {3}))
    assert network.cut(set(), set()) == ({1, 2}, {1, 2})
