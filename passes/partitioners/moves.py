"""Local search: move single nodes between stages, uphill too, and keep the best partition on the way.

C. Fiduccia, R. Mattheyses, "A linear-time heuristic for improving network partitions" (1982), for acyclic partitions
as in J. Herrmann et al., "Multilevel algorithms for acyclic partitioning of directed acyclic graphs" (2019): a node may
go to any stage between its latest predecessor and its earliest successor.

A pass moves each node at most once, best gain first, and then returns to the best state seen; passes repeat while they
help. O(S · degree · log n) a move.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from pipecompile.passes.partitioners.orders import neighbours
from pipecompile.passes.partitioners.problem import ROUNDING, Problem

POWER = 24


class Moves:
    """A stage map with the counts that make the gain of a move cheap."""

    def __init__(self, problem: Problem, stage: Sequence[int]) -> None:
        self.problem = problem
        self.stage = list(stage)
        self.after, self.before = neighbours(problem)
        self.made: list[list[int]] = [[] for _ in problem.load]
        self.read: list[list[int]] = [[] for _ in problem.load]
        self.needs: list[list[int]] = [[] for _ in problem.load]
        for t, (source, targets, _) in enumerate(problem.tensors):
            self.made[source].append(t)
            for v in targets:
                self.read[v].append(t)
        span = range(problem.stages)
        self.cost = [[problem.link(one, other) for other in span] for one in span]
        self.readers = [[0] * problem.stages for _ in problem.tensors]
        self.users = [[0] * problem.stages for _ in problem.weights]
        self.load = [0.0] * problem.stages
        self.size = [0] * problem.stages
        for t, (_, targets, _) in enumerate(problem.tensors):
            for v in targets:
                self.readers[t][stage[v]] += 1
        if problem.limits:
            for w, (_, nodes) in enumerate(problem.weights):
                for v in nodes:
                    self.needs[v].append(w)
                    self.users[w][stage[v]] += 1
        self.held = problem.held(stage)
        self.mean = sum(problem.load) / sum(problem.speeds) or 1.0
        for v, s in enumerate(stage):
            self.load[s] += problem.load[v]
            self.size[s] += 1

    def window(self, v: int) -> tuple[int, int]:
        """The stages that a node may be in while its neighbours stay."""
        low = max((self.stage[u] for u in self.before[v]), default=0)
        high = min((self.stage[u] for u in self.after[v]), default=self.problem.stages - 1)
        return low, high

    def gain(self, v: int, to: int) -> float:
        """Traffic saved by moving a node."""
        at, stage, cost, tensors = self.stage[v], self.stage, self.cost, self.problem.tensors
        saved = 0.0
        for t in self.read[v]:
            home, count = stage[tensors[t][0]], self.readers[t]
            if count[at] == 1:
                saved += tensors[t][2] * cost[home][at]
            if count[to] == 0:
                saved -= tensors[t][2] * cost[home][to]
        for t in self.made[v]:
            for other, readers in enumerate(self.readers[t]):
                if readers:
                    saved += tensors[t][2] * (cost[at][other] - cost[to][other])
        return saved

    def extra(self, v: int, to: int) -> list[tuple[int, int]]:
        """Change of memory of each rank that a move changes."""
        limits = self.problem.limits
        assert limits is not None
        at = self.stage[v]
        less = self.problem.saved[v] * limits.in_flight[at]
        more = self.problem.saved[v] * limits.in_flight[to]
        for w in self.needs[v]:
            less += self.problem.weights[w][0] * (self.users[w][at] == 1)
            more += self.problem.weights[w][0] * (self.users[w][to] == 0)
        return [(limits.rank[at], -less), (limits.rank[to], more)]

    def allowed(self, v: int, to: int, cap: float) -> bool:
        """Whether a move keeps the time of the target ≤ cap, its own stage filled, and the memory in its limits."""
        problem = self.problem
        if self.size[self.stage[v]] == 1:
            return False
        if self.load[to] + problem.load[v] > cap * problem.speeds[to] * (1 + ROUNDING):
            return False
        if problem.limits is None:
            return True
        (one, less), (other, more) = self.extra(v, to)
        if one == other:
            return self.held[one] + less + more <= max(problem.limits.memory[one], self.held[one])
        return self.held[other] + more <= max(problem.limits.memory[other], self.held[other])

    def move(self, v: int, to: int) -> None:
        """Move a node."""
        if self.problem.limits:
            for rank, change in self.extra(v, to):
                self.held[rank] += change
            for w in self.needs[v]:
                self.users[w][self.stage[v]] -= 1
                self.users[w][to] += 1
        at = self.stage[v]
        for t in self.read[v]:
            self.readers[t][at] -= 1
            self.readers[t][to] += 1
        self.load[at] -= self.problem.load[v]
        self.load[to] += self.problem.load[v]
        self.size[at] -= 1
        self.size[to] += 1
        self.stage[v] = to

    def relief(self, v: int, to: int) -> float:
        """How much more even a move makes the stages' times: the fall of Σ (time / mean time) ** POWER."""
        problem, at = self.problem, self.stage[v]
        before = after = 0.0
        for s, change in ((at, -problem.load[v]), (to, problem.load[v])):
            unit = problem.speeds[s] * self.mean
            before += (self.load[s] / unit) ** POWER
            after += (max(self.load[s] + change, 0.0) / unit) ** POWER
        return before - after

    def best(self, v: int, cap: float) -> tuple[float, int]:
        """The best move of a node: (gain, stage), stage -1 if it has none."""
        worth = self.gain if cap < float("inf") else self.relief
        low, high = self.window(v)
        found, where = -float("inf"), -1
        for to in range(low, high + 1):
            if to != self.stage[v] and self.allowed(v, to, cap):
                gain = worth(v, to)
                if gain > found:
                    found, where = gain, to
        return found, where

    def around(self, v: int) -> set[int]:
        """The nodes whose gain or window a move of ``v`` changes."""
        near = {*self.after[v], *self.before[v]}
        for t in self.read[v]:
            source, targets, _ = self.problem.tensors[t]
            near.add(source)
            near.update(targets if len(targets) < 16 else ())
        return near


def descend(
    problem: Problem, stage: Sequence[int], cap: float, passes: int = 8, patience: int = 200
) -> tuple[int, ...]:
    """A partition of at most the given one's traffic, by passes of single moves under the time cap."""
    state = Moves(problem, stage)
    for _ in range(passes):
        if not _improve(state, cap, patience):
            break
    return tuple(state.stage)


def even_out(problem: Problem, stage: Sequence[int], passes: int = 8, patience: int = 200) -> tuple[int, ...]:
    """A partition whose slowest stage takes no longer than the given one's, by passes of single moves."""
    best = tuple(stage)
    state = Moves(problem, stage)
    for _ in range(passes):
        improved = _improve(state, float("inf"), patience)
        if max(problem.times(state.stage)) < max(problem.times(best)):
            best = tuple(state.stage)
        if not improved:
            break
    return best


def _improve(state: Moves, cap: float, patience: int) -> bool:
    heap = []
    for v in range(state.problem.nodes):
        gain, to = state.best(v, cap)
        if to >= 0:
            heap.append((-gain, v, to))
    heapq.heapify(heap)
    locked = [False] * state.problem.nodes
    trail: list[tuple[int, int]] = []
    total, best, best_length = 0.0, 0.0, 0
    while heap and len(trail) - best_length < patience:
        worth, v, to = heapq.heappop(heap)
        if locked[v]:
            continue
        gain, now = state.best(v, cap)
        if now != to or gain < -worth:  # stale: something near it moved since
            if now >= 0:
                heapq.heappush(heap, (-gain, v, now))
            continue
        locked[v] = True
        trail.append((v, state.stage[v]))
        state.move(v, to)
        total += gain
        if total > best * (1 + ROUNDING):
            best, best_length = total, len(trail)
        for u in state.around(v):
            if not locked[u]:
                gain, where = state.best(u, cap)
                if where >= 0:
                    heapq.heappush(heap, (-gain, u, where))
    for v, home in reversed(trail[best_length:]):
        state.move(v, home)
    return best > 0
